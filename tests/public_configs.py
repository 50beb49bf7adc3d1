"""What the config.json of published checkpoints says, and how many parameters each model is known to have."""

from typing import Any


def _qwen(family: str, **changes: Any) -> dict[str, Any]:
    """What all Qwen checkpoints agree on."""
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    common = {
        "architectures": [architecture[family]],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": family,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    return common | changes


def _qwen3(width: int, ffn: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return _qwen(
        "qwen3",
        attention_bias=False,
        head_dim=128,
        hidden_size=width,
        intermediate_size=ffn,
        max_position_embeddings=40960,
        max_window_layers=layers,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=8,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=tied,
        transformers_version="4.51.0",
        vocab_size=151936,
    )


def _qwen25(width: int, ffn: int, layers: int, heads: int, kv_heads: int, eps: float) -> dict[str, Any]:
    return _qwen(
        "qwen2",
        eos_token_id=151643,
        hidden_size=width,
        intermediate_size=ffn,
        max_position_embeddings=131072,
        max_window_layers=layers,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        rms_norm_eps=eps,
        sliding_window=131072,
        tie_word_embeddings=False,
        transformers_version="4.40.1",
        use_mrope=False,
        vocab_size=152064,
    )


def _llama3(width: int, ffn: int, layers: int, heads: int, factor: float = 8.0, **changes: Any) -> dict[str, Any]:
    common = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    return common | changes


DENSE: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-0.6B": (_qwen3(1024, 3072, 28, 16, tied=True), 596_049_920),
    "Qwen3-1.7B": (_qwen3(2048, 6144, 28, 16, tied=True), 1_720_574_976),
    "Qwen3-4B": (_qwen3(2560, 9728, 36, 32, tied=True), 4_022_468_096),
    "Qwen3-8B": (_qwen3(4096, 12288, 36, 32, tied=False), 8_190_735_360),
    "Qwen3-14B": (_qwen3(5120, 17408, 40, 40, tied=False), 14_768_307_200),
    "Qwen3-32B": (_qwen3(5120, 25600, 64, 64, tied=False), 32_762_123_264),
    "Qwen2.5-7B": (_qwen25(3584, 18944, 28, 28, 4, 1e-6), 7_615_616_512),
    "Qwen2.5-72B": (_qwen25(8192, 29568, 80, 64, 8, 1e-5), 72_706_203_648),
    "Llama-3.1-8B": (_llama3(4096, 14336, 32, 32), 8_030_261_248),
    "Llama-3.2-1B": (_llama3(2048, 8192, 16, 32, head_dim=64, factor=32.0, tie_word_embeddings=True), 1_235_814_400),
    "Llama-3.3-70B": (_llama3(8192, 28672, 80, 64, head_dim=128, eos_token_id=[128001, 128008]), 70_553_706_496),
}
"""Name -> (config.json, parameters, a tied embedding counted once)."""

EXPERTS: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-30B-A3B": (
        _qwen3(2048, 6144, 48, 32, tied=False)
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        30_532_122_624,
    ),
}
"""The same of mixtures of experts."""

OLMO3: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": 100278,
}
"""Olmo-3-7B, which is not built."""
