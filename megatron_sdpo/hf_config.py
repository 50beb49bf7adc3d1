"""A Hugging Face ``config.json``, read strictly: what it says is built, or it is refused by name. No torch."""

from pathlib import Path
from typing import Any

from megatron_sdpo.config import Config, ConfigError, read_json

_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings", "hidden_act"),
)
_READ = {
    *(*_NEEDED, "architectures", "model_type", "head_dim", "num_key_value_heads", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"),
}
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,  # Qwen2's bias of queries, keys and values goes without saying
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
_NEUTRAL = {  # keys that do not change what the model computes
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "dtype", "torch_dtype", "initializer_range"),
    *("transformers_version", "use_cache", "max_window_layers", "is_llama_config", "transformers.js_config"),
    *("return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
}


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json with its defaults filled in (``head_dim``, ``num_key_value_heads``, ``rope_theta``,
    ``tie_word_embeddings``); ConfigError names an architecture, key or value that is not supported here.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model.path {path} has no config.json; set model.path to a Hugging Face checkpoint directory"
        )
    hf = read_json(file, "the model's configuration")
    if not isinstance(hf, dict):
        raise ConfigError(f"{file} does not hold a JSON object; set model.path to a Hugging Face checkpoint directory")
    _check_family(hf, file)
    _check_values(hf, file)
    older, rope = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    for key, value in (*older.items(), *rope.items()):
        if key != "rope_theta" and value not in ("default", None):
            raise ConfigError(f"{file} has rotary scaling {key}={value!r}; only plain rotary embedding is supported")
    heads = hf["num_attention_heads"]
    defaults = {
        "head_dim": hf["hidden_size"] // heads,
        "num_key_value_heads": heads,
        "rope_theta": rope.get("rope_theta", older.get("rope_theta", 10000.0)),
        "tie_word_embeddings": False,
    }
    return {**hf, **{key: value for key, value in defaults.items() if hf.get(key) is None}}


def _check_family(hf: dict[str, Any], file: Path) -> None:
    architectures = hf.get("architectures") or ["None"]
    family = _FAMILIES.get(architectures[0])
    if len(architectures) != 1 or family is None:
        raise ConfigError(
            f"{file} has the architecture {architectures[0]!r}; supported are {', '.join(map(str, _FAMILIES))}"
        )
    if hf.get("model_type") != family:
        raise ConfigError(f"{file} has model_type {hf.get('model_type')!r}; {architectures[0]} must have {family!r}")
    needed = _NEEDED if family != "qwen3" else (*_NEEDED, "head_dim")  # whose default is not hidden_size / heads
    for key in needed:
        if hf.get(key) is None:
            raise ConfigError(f"{file} does not say {key}; use a complete Hugging Face configuration")


def _check_values(hf: dict[str, Any], file: Path) -> None:
    """A key that changes the model must have the value that is built here; a key nobody here knows must be off."""
    windowed = hf.get("sliding_window") is not None and hf.get("use_sliding_window") is not False
    if windowed or set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"{file} asks for sliding-window attention, which is not supported; only full attention is")
    for key, value in hf.items():
        if key in _ONLY and value not in (_ONLY[key], None):
            raise ConfigError(f"{file} has {key}={value!r}, which is not supported; only {key}={_ONLY[key]!r} is")
        known = key in _READ or key in _ONLY or key in _NEUTRAL or key.startswith("_")
        if not known and value not in (None, False, [], {}):
            raise ConfigError(
                f"{file} has {key}={value!r}, which this package does not know; remove the key if the model is the same"
                " without it"
            )


def read_model_config(config: Config) -> dict[str, Any]:
    """``read_hf_config`` of a run's model; a missing model or tokenizer is refused."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(f"model.path {folder} is not a directory; set it to a Hugging Face checkpoint directory")
    for name, what in {"config.json": "model configuration", "tokenizer.json": "tokenizer"}.items():
        if not (folder / name).is_file():
            raise ConfigError(f"model.path {folder} has no {name} ({what}); set model.path to a complete checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path {folder} has no *.safetensors file; set model.path to a complete checkpoint")
    return read_hf_config(folder)


def check_model(config: Config, model: dict[str, Any]) -> None:
    """Refuse a layout that does not divide the model's heads, layers or vocabulary, and sizes beyond the model's."""
    tp = config.layout.tensor_parallel
    sizes = {
        "attention heads": model["num_attention_heads"],
        "key-value heads": model.get("num_key_value_heads", model["num_attention_heads"]),
        "vocabulary entries": model["vocab_size"],
        "MLP units": model["intermediate_size"],
    }
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(
                f"layout.tensor_parallel {tp} does not divide the model's {size} {what}; set a divisor of {size}"
            )
    pp, vp = config.layout.pipeline_parallel, config.layout.virtual_pipeline
    if model["num_hidden_layers"] % (pp * vp):
        pieces = f"layout.pipeline_parallel {pp}" + (f" times layout.virtual_pipeline {vp}" if vp > 1 else "")
        raise ConfigError(
            f"{pieces} does not divide the model's {model['num_hidden_layers']} layers;"
            f" set a divisor of {model['num_hidden_layers']}"
        )
    objective = config.objective
    keeps_tokens = objective.has_teacher and objective.support == "top_k"
    if keeps_tokens and objective.kept_tokens >= model["vocab_size"]:
        raise ConfigError(
            f"objective.top_k {objective.top_k} must be smaller than the vocabulary of {model['vocab_size']}"
        )
    if config.model.max_length > model["max_position_embeddings"]:
        raise ConfigError(
            f"model.max_length {config.model.max_length} is beyond the model's {model['max_position_embeddings']}"
            " positions; lower it"
        )
