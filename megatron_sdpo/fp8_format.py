"""Block FP8 in a Hugging Face checkpoint, as DeepSeek's and Qwen's have it: which tensors, and what config.json says.

``X.weight`` holds E4M3 codes, ``X.weight_scale_inv`` beside it a scale fp32 for each 128 x 128 of them, by which codes
are multiplied. The linears of the layers are so; embedding, norms, biases, router and head are not. No torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sdpo.config import Config, ConfigError

BLOCK = 128
KEY = "quantization_config"
"""Of config.json."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEAR = re.compile(
    rf"model\.layers\.(\d+)\.(?:self_attn\.(?:{'|'.join(_ATTENTION)})|mlp\.(?:experts\.\d+\.)?(?:{'|'.join(_MLP)}))"
    r"\.weight"
)
_WRITTEN = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def is_quantized(name: str, n_layers: int, kept: int) -> bool:
    """Whether a tensor of an unquantised checkpoint becomes codes; ``kept`` layers at each end do not.

    Example: with 4 layers of which 1 is kept, ``model.layers.1.self_attn.q_proj.weight`` does.
    """
    match = _LINEAR.fullmatch(name)
    return match is not None and kept <= int(match[1]) < n_layers - kept


def scale_name(name: str) -> str:
    """``X.weight`` -> ``X.weight_scale_inv``."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the scales of a weight ``[N, K]``: one for each block, the last ones smaller."""
    n, k = shape
    return -(-n // BLOCK), -(-k // BLOCK)


def quantization_config(hf_config: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """What the config.json of such a checkpoint has under ``KEY``.

    The linears that are not quantised are named in full, each part of what an engine fuses: an engine decides by whole
    module names, and refuses a fused linear of which one part is named and another is not.
    """
    n_layers, has_experts = hf_config["num_hidden_layers"], "num_experts" in hf_config
    plain = ["lm_head"]
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        if has_experts:
            plain.append(f"{prefix}.mlp.gate")
        if not kept <= layer < n_layers - kept:
            plain += [f"{prefix}.self_attn.{name}" for name in _ATTENTION]
            plain += [f"{prefix}.mlp.experts"] if has_experts else [f"{prefix}.mlp.{name}" for name in _MLP]
    return {**_WRITTEN, "modules_to_not_convert": plain}


def is_fp8(hf_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this configuration (``hf_config.read_hf_config``) is in block FP8."""
    return hf_config.get(KEY) is not None


def check_readable(said: Any, file: Path, fp8: bool) -> None:
    """Refuse what ``file`` says under ``KEY`` unless it is block FP8 and may be that (``fp8``)."""
    if not isinstance(said, dict) or any(said.get(key, value) != value for key, value in _WRITTEN.items()):
        raise ConfigError(
            f"{file} has {KEY}={said!r}, which is not supported; use the checkpoint in full precision, or one in FP8"
            f" with weight_block_size [{BLOCK}, {BLOCK}] and activation_scheme dynamic"
        )
    missing = [key for key in ("quant_method", "activation_scheme", "weight_block_size") if key not in said]
    if missing:
        raise ConfigError(f"{file} does not say {missing[0]} in its {KEY}; use a complete Hugging Face configuration")
    if not fp8:
        raise ConfigError(
            f"{file} is of a checkpoint in FP8, which engines alone can use (evaluate, serve); set model.path to the"
            " model in full precision, which is quantised when it is published (engine.fp8)"
        )


def why_not_served(hf_config: Mapping[str, Any]) -> str | None:
    """What is wrong with engines of this model in block FP8, whatever its sizes."""
    if hf_config["model_type"] != "llama":  # 0.5.15 and 0.5.21 look for its scales under another name, and only warn
        return None
    return "SGLang leaves out the scales of LlamaForCausalLM in block FP8, and would serve other numbers"


def check_engines_alone(config: Config, hf_config: Mapping[str, Any]) -> None:
    """Refuse engines in FP8 that would wait for weights which no trainer sends, and those of no use with them."""
    check_engines(config, hf_config)
    if config.engine.fp8 != "off" and not is_fp8(hf_config):
        path = config.model.path
        raise ConfigError(
            f"engine.fp8={config.engine.fp8} without a trainer needs a model in FP8, and model.path {path} is in full"
            f" precision; write one with megatron-sdpo convert --fp8 {path} OUT and set model.path (--model) to OUT,"
            " or set engine.fp8=off"
        )


def check_engines(config: Config, hf_config: Mapping[str, Any]) -> None:
    """Refuse FP8 engines of a model whose scales SGLang does not load, or of whose blocks a rank would hold parts."""
    if config.engine.fp8 == "off" and not is_fp8(hf_config):
        return
    if (why := why_not_served(hf_config)) is not None:
        raise ConfigError(f"{why}; set engine.fp8=off and model.path to a model in full precision")
    heads, tp = hf_config["num_attention_heads"], config.engine.tensor_parallel
    groups = hf_config.get("num_key_value_heads") or heads
    d = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    inner = hf_config.get("moe_intermediate_size", hf_config["intermediate_size"])
    held = {
        "hidden units": (hf_config["hidden_size"], hf_config["hidden_size"]),
        "rows of queries": (heads * d / tp, heads * d),
        "rows of keys": (max(1, groups / tp) * d, groups * d),  # ranks beyond the heads hold copies of them
        "MLP units": (inner / tp, inner),
    }
    for what, (on_rank, whole) in held.items():
        if on_rank % BLOCK:
            smaller = "a smaller engine.tensor_parallel or " if whole % BLOCK == 0 and tp > 1 else ""
            raise ConfigError(
                f"an engine in FP8 works on blocks of {BLOCK}, but a rank of it would hold {on_rank:g} {what}; set"
                f" {smaller}engine.fp8=off"
            )


def check_device(config: Config, hf_config: Mapping[str, Any], has_gpu: bool) -> None:
    """Refuse a dtype in which SGLang's FP8 kernels give nothing."""
    if (config.engine.fp8 != "off" or is_fp8(hf_config)) and has_gpu and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"engines in FP8 compute beside bfloat16 on a GPU, but model.dtype is {config.model.dtype}; set"
            " model.dtype=bfloat16 or engine.fp8=off"
        )
