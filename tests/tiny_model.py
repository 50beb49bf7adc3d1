"""Tiny random checkpoints in the Hugging Face layout, and what transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_sdpo.rollout import cpu_platform

EOS_ID = 1
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def write_tiny_checkpoint(
    path: Path,
    seed: int,
    family: str = "llama",
    vocab_size: int = 104,
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 24,
    intermediate_size: int = 176,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float32,
    std: float = 0.15,
    expert_size: int = 40,
) -> Path:
    """A checkpoint directory (config.json, model.safetensors, tokenizer files) whose weights follow from ``seed``.

    ``family`` is ``"llama"``, ``"qwen3"`` or ``"qwen3_moe"`` (8 experts of ``expert_size`` units, 3 a token). ``std``
    is large enough for distributions that are far from uniform. Token 0 pads, token ``EOS_ID`` ends a turn. Returns
    ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "qwen3_moe":
        config |= {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": expert_size}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if len(shape) == 1 else std * noise).to(dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(path, vocab_size)
    return path


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, middle, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    experts = [f"mlp.experts.{n}" for n in range(config.get("num_experts", 0))]
    if experts:
        middle = config["moe_intermediate_size"]
        layer["mlp.gate"] = (len(experts), hidden)
    for mlp in experts or ["mlp"]:
        layer |= {f"{mlp}.gate_proj": (middle, hidden), f"{mlp}.up_proj": (middle, hidden)}
        layer[f"{mlp}.down_proj"] = (hidden, middle)
    if config["model_type"] != "llama":
        layer |= {"self_attn.q_norm": (config["head_dim"],), "self_attn.k_norm": (config["head_dim"],)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    words = ["<pad>", "<end>", "<unk>"] + [f"w{i}" for i in range(3, vocab_size)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": words[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in range(3)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<end>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


BYTE_TEMPLATE = """{%- for message in messages %}<|start|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor %}<|start|>assistant
{% if not enable_thinking %}<think></think>
{% endif %}"""


def write_byte_checkpoint(path: Path, seed: int, **sizes: Any) -> Path:
    """A tiny checkpoint that reads and writes any text: a token a byte, with a chat template that may think."""
    write_tiny_checkpoint(path, seed, vocab_size=259, **sizes)
    specials = ["<|pad|>", "<|end|>", "<|start|>"]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    alphabet = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # bytes that byte-level tokenizers leave as they are
    others = [byte for byte in range(256) if byte not in alphabet]
    letters = [chr(byte) for byte in alphabet] + [chr(256 + place) for place in range(len(others))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **added} for id, token in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {t: id for id, t in enumerate([*specials, *letters])}, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(BYTE_TEMPLATE)
    return path


def reference_log_probs(path: Path, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """transformers' log-probabilities of ``ids[1:]``, each given the ids before it: fp32, ``[len(ids) - 1]``."""
    log_probs_TV = reference_distributions(path, ids[:-1], temperature)
    return log_probs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def reference_distributions(path: Path, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """transformers' log-probabilities of whatever may follow each of ``ids``: fp32, ``[T, V]``."""
    cpu_platform.provide_torchvision_operators()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0].float()
    return torch.log_softmax(logits_TV / temperature, dim=-1)
