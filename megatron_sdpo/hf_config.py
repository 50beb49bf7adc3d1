"""A Hugging Face ``config.json``, read strictly: what it says is built, or it is refused by name. No torch."""

from pathlib import Path
from typing import Any

from megatron_sdpo import fp8_format
from megatron_sdpo.config import Config, ConfigError, read_json

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_MISSING = {  # what megatron-core's layer lacks for architectures that one may well ask for
    "Olmo3ForCausalLM": "norms on the outputs of attention and MLP instead of their inputs, nor norms of queries and"
    " keys over all heads together",
}
_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings", "hidden_act"),
)
_NEEDED_OF_FAMILY: dict[str, tuple[str, ...]] = {  # whose default is not what another family's would be
    "qwen3": ("head_dim",),
    "qwen3_moe": ("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
}
_READ = {
    *(*_NEEDED, "architectures", "model_type", "head_dim", "num_key_value_heads", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"),
    fp8_format.KEY,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,  # Qwen2's bias of queries, keys and values goes without saying
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "decoder_sparse_step": 1,  # every layer has experts
}
_NEUTRAL = {  # keys that do not change what the model computes
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "dtype", "torch_dtype", "initializer_range"),
    *("transformers_version", "use_cache", "max_window_layers", "is_llama_config", "transformers.js_config"),
    *("return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    "router_aux_loss_coef",  # of a loss that is not added here
}


def read_hf_config(path: str | Path, fp8: bool = False) -> dict[str, Any]:
    """A checkpoint's config.json with its defaults filled in (``head_dim``, ``num_key_value_heads``,
    ``tie_word_embeddings``) and its rotary embedding under ``rope_theta`` and ``rope_scaling`` (None, or all numbers of
    Llama 3), however it was spelled; ConfigError names an architecture, key or value that is not supported here.
    A checkpoint in block FP8 is refused too, but where ``fp8`` says that engines alone read it.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model.path {path} has no config.json; set model.path to a Hugging Face checkpoint directory"
        )
    hf = read_json(file, "the model's configuration")
    if not isinstance(hf, dict):
        raise ConfigError(f"{file} does not hold a JSON object; set model.path to a Hugging Face checkpoint directory")
    if hf.get("model_type") == "qwen3_moe" and "num_local_experts" in hf:  # transformers 5 writes it so
        hf = {"num_experts": hf["num_local_experts"], **hf}
        if hf["num_experts"] != hf.pop("num_local_experts"):
            raise ConfigError(f"{file} says num_experts and num_local_experts, which differ; remove one of them")
    _check_family(hf, file)
    _check_values(hf, file)
    if hf.get(fp8_format.KEY) is not None:
        fp8_format.check_readable(hf[fp8_format.KEY], file, fp8)
    heads = hf["num_attention_heads"]
    defaults = {
        "head_dim": hf["hidden_size"] // heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
    }
    return {**hf, **{key: value for key, value in defaults.items() if hf.get(key) is None}, **_rotary(hf, file)}


def _check_family(hf: dict[str, Any], file: Path) -> None:
    architectures = hf.get("architectures") or ["None"]
    family = _FAMILIES.get(architectures[0])
    if missing := _MISSING.get(architectures[0]):
        raise ConfigError(f"{file} has the architecture {architectures[0]!r}, for which megatron-core has no {missing}")
    if len(architectures) != 1 or family is None:
        raise ConfigError(
            f"{file} has the architecture {architectures[0]!r}; supported are {', '.join(map(str, _FAMILIES))}"
        )
    if hf.get("model_type") != family:
        raise ConfigError(f"{file} has model_type {hf.get('model_type')!r}; {architectures[0]} must have {family!r}")
    for key in (*_NEEDED, *_NEEDED_OF_FAMILY.get(family, ())):
        if hf.get(key) is None:
            raise ConfigError(f"{file} does not say {key}; use a complete Hugging Face configuration")
    if family == "qwen3_moe":
        _check_experts(hf, file)


def _check_experts(hf: dict[str, Any], file: Path) -> None:
    chosen, least = hf["num_experts_per_tok"], 2 if hf["norm_topk_prob"] else 1  # one normalised weight is always 1
    if not least <= chosen <= hf["num_experts"]:
        raise ConfigError(
            f"{file} has num_experts_per_tok={chosen}; it must lie between {least} and num_experts={hf['num_experts']}"
        )


def _check_values(hf: dict[str, Any], file: Path) -> None:
    """A key that changes the model must have the value that is built here; a key nobody here knows must be off."""
    windowed = hf.get("sliding_window") is not None and hf.get("use_sliding_window") is not False
    if windowed or set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"{file} asks for sliding-window attention, which is not supported; only full attention is")
    for key, value in hf.items():
        if key in _ONLY and value not in (_ONLY[key], None):
            raise ConfigError(f"{file} has {key}={value!r}, which is not supported; only {key}={_ONLY[key]!r} is")
        known = (
            key in _READ
            or key in _NEEDED_OF_FAMILY.get(hf["model_type"], ())
            or key in _ONLY
            or key in _NEUTRAL
            or key.startswith("_")
        )
        if not known and value not in (None, False, [], {}):
            raise ConfigError(
                f"{file} has {key}={value!r}, which this package does not know; remove the key if the model is the same"
                " without it"
            )


def _rotary(hf: dict[str, Any], file: Path) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` from ``rope_parameters`` (transformers 5) or the older two keys."""
    older, newer = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if older and newer and older != newer:
        raise ConfigError(f"{file} has rope_scaling and rope_parameters, which differ; remove one of them")
    said = {"type": "default", **older, **newer}
    bases = {base for base in (hf.get("rope_theta"), said.pop("rope_theta", None)) if base is not None}
    if len(bases) > 1:
        raise ConfigError(f"{file} says rope_theta twice, {' and '.join(map(str, bases))}; remove one of them")
    older_kind = said.pop("type")
    kind = said.pop("rope_type", older_kind)
    said = {key: value for key, value in said.items() if value is not None}
    if kind not in ("default", "llama3"):
        raise ConfigError(
            f"{file} has rotary scaling rope_type={kind!r}; supported are plain rotary embedding and 'llama3'"
        )
    if said.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{file} rotates a part of each head (partial_rotary_factor), which is not supported")
    wanted = _LLAMA3 if kind == "llama3" else ()
    if set(said) != set(wanted):
        raise ConfigError(
            f"{file} has rotary scaling {kind!r} with the keys {sorted(said)}; it needs {sorted(wanted) or 'none'}"
        )
    if kind == "llama3" and not 0 < said["low_freq_factor"] < said["high_freq_factor"]:
        raise ConfigError(f"{file} has a low_freq_factor that is not below its high_freq_factor; check rope_scaling")
    scaling = {"rope_type": kind, **said} if kind == "llama3" else None
    return {"rope_theta": bases.pop() if bases else 10000.0, "rope_scaling": scaling}


def read_model_config(config: Config, fp8: bool = False) -> dict[str, Any]:
    """``read_hf_config`` of a run's model; a missing model or tokenizer is refused."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ConfigError(f"model.path {folder} is not a directory; set it to a Hugging Face checkpoint directory")
    for name, what in {"config.json": "model configuration", "tokenizer.json": "tokenizer"}.items():
        if not (folder / name).is_file():
            raise ConfigError(f"model.path {folder} has no {name} ({what}); set model.path to a complete checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path {folder} has no *.safetensors file; set model.path to a complete checkpoint")
    return read_hf_config(folder, fp8)


def check_model(config: Config, model: dict[str, Any]) -> None:
    """Refuse a layout that does not divide the model's heads, MLP or layers, and sizes beyond the model's."""
    tp = config.layout.tensor_parallel
    sizes = {
        "attention heads": model["num_attention_heads"],
        "key-value heads": model.get("num_key_value_heads", model["num_attention_heads"]),
    }
    if config.layout.expert_tensor == tp:  # else tensor ranks hold whole experts
        sizes["MLP units"] = model.get("moe_intermediate_size", model["intermediate_size"])
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
    _check_experts_layout(config, model)
    _check_recompute(config, model)
    _check_fp8(config, model)
    fp8_format.check_engines(config, model)
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


def _check_experts_layout(config: Config, model: dict[str, Any]) -> None:
    """Refuse to divide experts that a model has not, or not evenly."""
    layout, experts = config.layout, model.get("num_experts")
    if experts is None and layout.expert_parallel > 1:
        raise ConfigError(
            f"layout.expert_parallel {layout.expert_parallel} divides the experts of a layer, but the model is dense;"
            " set layout.expert_parallel=1"
        )
    if experts is None and layout.expert_tensor != layout.tensor_parallel:
        raise ConfigError(
            f"layout.expert_tensor_parallel {layout.expert_tensor} is about experts, but the model is dense; set"
            " layout.expert_tensor_parallel=none"
        )
    if experts is not None and experts % layout.expert_parallel:
        raise ConfigError(
            f"layout.expert_parallel {layout.expert_parallel} does not divide the model's {experts} experts; set a"
            f" divisor of {experts}"
        )


def _check_recompute(config: Config, model: dict[str, Any]) -> None:
    """Refuse to compute again what the model has not, and layers that a stage has not."""
    layout = config.layout
    absent = ("mlp",) if "num_experts" in model else ("moe", "moe_act")
    asked = [name for name in layout.recompute_modules if name in absent]
    if layout.recompute == "selective" and asked:
        what = "has experts in every layer, no plain MLP" if "num_experts" in model else "has no experts"
        raise ConfigError(f"layout.recompute_modules names {' and '.join(asked)}, but the model {what}; leave it out")
    if layout.recompute != "full":
        return
    layers = model["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    count = layout.recompute_num_layers
    if count > layers or (layout.recompute_method == "uniform" and layers % count):
        wanted = f"a divisor of {layers}" if layout.recompute_method == "uniform" else f"{layers} or fewer"
        raise ConfigError(
            f"layout.recompute_num_layers {count} does not fit the {layers} layers of a pipeline stage"
            f" (layout.recompute_method={layout.recompute_method}); set {wanted}"
        )
    if layout.distribute_saved_activations and model["hidden_size"] % layout.tensor_parallel:
        raise ConfigError(
            f"layout.distribute_saved_activations cuts tokens of {model['hidden_size']} numbers into"
            f" {layout.tensor_parallel} equal parts, which is impossible; set it to false"
        )


def _check_fp8(config: Config, model: dict[str, Any]) -> None:
    """Refuse weights whose shards the blocks do not divide: scales would then be of other blocks than an engine's."""
    fp8, layout = config.fp8, config.layout
    layers = model["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    beyond_stage = bool(fp8.kinds) and fp8.high_precision_layers > layers
    if 2 * fp8.high_precision_layers >= model["num_hidden_layers"] or beyond_stage:
        raise ConfigError(
            f"fp8.high_precision_layers {fp8.high_precision_layers} at each end leave none of the model's"
            f" {model['num_hidden_layers']} layers for FP8, or are more than a stage's {layers}; lower it"
        )
    unit = {"blockwise": fp8_format.BLOCK, "tensorwise": 16}.get(fp8.kinds[0]) if fp8.kinds else None
    if unit is None:  # an emulated block may be smaller
        return
    heads, tp = model["num_attention_heads"], layout.tensor_parallel
    groups, d = model.get("num_key_value_heads") or heads, model.get("head_dim") or model["hidden_size"] // heads
    inner = model.get("moe_intermediate_size", model["intermediate_size"])
    expert_ranks = layout.expert_tensor if "num_experts" in model else tp
    sizes = {  # whole, and how many ranks divide it
        "hidden units": (model["hidden_size"], 1),
        "rows of queries": (heads * d, tp),
        "rows of keys": (groups * d, tp),
        "MLP units": (inner, expert_ranks),
    }
    for what, (size, ranks) in sizes.items():
        if size // ranks % unit:
            smaller = "a smaller layout.tensor_parallel, " if size % unit == 0 else ""
            raise ConfigError(
                f"fp8 {fp8.kinds[0]} works on blocks of {unit}, but a rank holds {size // ranks} {what}; set {smaller}"
                "fp8.student=off and fp8.teacher=off, or, for tests, emulated"
            )
