"""What the config.json of published checkpoints says, and how many parameters each model is known to have."""

import json
from pathlib import Path
from typing import Any

import megatron_sdpo

_FOLDER = Path(megatron_sdpo.__file__ or "").parent / "data" / "architectures"
_DENSE = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.3-70B": 70_553_706_496,
}
_EXPERTS = {"Qwen3-30B-A3B": 30_532_122_624}


def _published(parameters: dict[str, int]) -> dict[str, tuple[dict[str, Any], int]]:
    return {
        name: (json.loads((_FOLDER / name / "config.json").read_text()), count) for name, count in parameters.items()
    }


DENSE = _published(_DENSE)
"""Name -> (config.json, parameters, a tied embedding counted once)."""
EXPERTS = _published(_EXPERTS)
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
