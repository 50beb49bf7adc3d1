"""A Hugging Face config becomes one pipeline stage of a Megatron model that ends in hidden states."""

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sdpo.config import ConfigError, LayoutConfig
from megatron_sdpo.mcore import platform
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.modules import PackedRows, cpu_block_spec

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


class HiddenStatesModel(GPTModel):
    """GPTModel whose last stage returns the states after the final norm, ``[T, 1, H]``; see ``logits``.

    Log-probabilities are needed at response positions only, so the head is applied to chosen rows.
    """

    def __init__(self, *args: Any, rotary_in_attention: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_in_attention = rotary_in_attention

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Rows of hidden states -> this rank's vocabulary shard ``logits_NV``; last stage only.

        Backward sums the gradient of ``hidden_NH`` over the tensor group, so it is whole on every rank.
        """
        logits_NV, _ = self.output_layer(hidden_NH, weight=self.head())
        return logits_NV

    def head(self) -> Tensor:
        """The vocabulary-parallel head, ``[V, H]`` local: the output layer's weight, or the tied embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return cast(Tensor, self.output_layer.weight)

    def _preprocess(self, *args: Any, packed_seq_params: PackedRows | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """As the base class; for packed rows on CPU the rotary tables go to the attention instead of the layers."""
        out: Any = super()._preprocess(*args, packed_seq_params=cast(Any, packed_seq_params), **kwargs)
        if packed_seq_params is None or not self.rotary_in_attention:
            return out
        decoder_input, angles_S11D, *rest = out
        padding, dtype = packed_seq_params.padding, self.config.params_dtype
        angles_SD = angles_S11D[:, 0, 0]
        padding.cos_PD, padding.sin_PD = (f(angles_SD).to(dtype)[padding.position_P] for f in (torch.cos, torch.sin))
        return decoder_input, None, *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json with its defaults filled in (``head_dim``, ``num_key_value_heads``, ``rope_theta``,
    ``tie_word_embeddings``); ConfigError names an architecture, key or value that is not supported here.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model.path {path} has no config.json; set model.path to a Hugging Face checkpoint directory"
        )
    hf = json.loads(file.read_text())
    _check_family(hf, file)
    _check_values(hf, file)
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    for key, value in rope.items():
        if key != "rope_theta" and value not in ("default", None):
            raise ConfigError(f"{file} has rotary scaling {key}={value!r}; only plain rotary embedding is supported")
    heads = hf["num_attention_heads"]
    defaults = {
        "head_dim": hf["hidden_size"] // heads,
        "num_key_value_heads": heads,
        "rope_theta": rope.get("rope_theta", 10000.0),
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


def transformer_config(hf: dict[str, Any], layout: LayoutConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a model (``hf`` of read_hf_config) under ``layout``, parameters in ``dtype``."""
    fused = _transformer_engine()
    return TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf["model_type"] == "qwen2",
        qk_layernorm=hf["model_type"] == "qwen3",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # each micro-batch packs another number of tokens
        moe_token_dispatcher_type="alltoall",  # variable lengths want it, of a dense model too
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights always come from a checkpoint; load_hf leaves none out
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(
    hf: dict[str, Any], layout: LayoutConfig, groups: ParallelGroups, dtype: torch.dtype
) -> HiddenStatesModel:
    """This rank's stage, weights not yet loaded (their memory is not even set: call ``hf.load_hf``)."""
    config = transformer_config(hf, layout, dtype)
    n_layers = hf["num_hidden_layers"] // layout.pipeline_parallel
    model = HiddenStatesModel(
        config=config,
        transformer_layer_spec=_block_spec(config, n_layers),
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=hf["rope_theta"],
        rotary_in_attention=not _transformer_engine(),
    )
    return model.to(platform.device())


def _transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _block_spec(config: TransformerConfig, n_layers: int) -> Any:
    if not _transformer_engine():
        return cpu_block_spec(config, n_layers)
    # Not yet run on a GPU: the same model from Transformer Engine's modules, fused norms, attention and rotary.
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
