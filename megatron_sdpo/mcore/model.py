"""A Hugging Face config becomes one pipeline stage of a Megatron model that ends in hidden states."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sdpo.config import ConfigError, Fp8Config, LayoutConfig
from megatron_sdpo.mcore import platform
from megatron_sdpo.mcore.experts import with_experts
from megatron_sdpo.mcore.fp8 import (
    EmulatedColumnLinear,
    EmulatedRowLinear,
    check_backend,
    megatron_settings,
    uses_transformer_engine,
)
from megatron_sdpo.mcore.fp8_codes import write_codes_when_asked
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.modules import PackedRows, cpu_block_spec
from megatron_sdpo.mcore.names import padded_vocabulary
from megatron_sdpo.mcore.rotary import inverse_frequencies
from megatron_sdpo.mcore.te_attention import with_continuations

NO_FP8 = Fp8Config()


class HiddenStatesModel(GPTModel):
    """GPTModel whose last stage returns the states after the final norm, ``[T, 1, H]``; see ``head``.

    Log-probabilities are needed at response positions only, and their logits a chunk at a time, so the head is applied
    elsewhere (``megatron_sdpo.fused``).
    """

    def __init__(self, *args: Any, rotary_in_attention: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_in_attention = rotary_in_attention

    def head(self) -> Tensor:
        """The vocabulary-parallel head, ``[V, H]`` local: the output layer's weight, or the tied embedding.

        Last stage only. Rows beyond the vocabulary (``names.padded_vocabulary``) are zero, and their logits are not to
        be used: ``fused.Head`` takes the size of the vocabulary.
        """
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return cast(Tensor, self.output_layer.weight)

    def _preprocess(self, *args: Any, packed_seq_params: PackedRows | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """As the base class; for packed rows on CPU the rotary tables go to the attention instead of the layers.

        So do they, in fp32, where pieces of a row continue others: Megatron's rotation lets every piece begin at 0.
        """
        out: Any = super()._preprocess(*args, packed_seq_params=cast(Any, packed_seq_params), **kwargs)
        if packed_seq_params is None or not (self.rotary_in_attention or packed_seq_params.starts):
            return out
        decoder_input, angles_S11D, *rest = out
        angles_SD = angles_S11D[:, 0, 0]
        dtype = self.config.params_dtype if self.rotary_in_attention else torch.float32
        packed_seq_params.set_rotary(angles_SD.cos().to(dtype), angles_SD.sin().to(dtype))
        return decoder_input, None, *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[T, 1, H]``, whole on every tensor rank, before the last stage as the next one wants it."""
        if not (self.post_process and self.config.sequence_parallel):
            return hidden_states
        # Whatever is computed of them sums its gradient over the tensor ranks itself, so each takes its part of that.
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )


class Chunks(torch.nn.ModuleList):
    """The stages of one rank of an interleaved pipeline, first to last; elsewhere a rank has one model."""

    @property
    def config(self) -> TransformerConfig:
        return chunks_of(self)[0].config

    def head(self) -> Tensor:
        return chunks_of(self)[-1].head()

    def sharded_state_dict(self, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Of all stages, under the names of ``state_dict``; in a checkpoint layers have the numbers of the model."""
        return {
            f"{prefix}{i}.{name.removeprefix(prefix)}": shard
            for i, chunk in enumerate(chunks_of(self))
            for name, shard in chunk.sharded_state_dict(prefix=prefix, **kwargs).items()
        }


Model = HiddenStatesModel | Chunks


def chunks_of(model: Model) -> list[HiddenStatesModel]:
    """The stages that a rank holds."""
    return [cast(HiddenStatesModel, chunk) for chunk in model] if isinstance(model, Chunks) else [model]


def transformer_config(
    hf: dict[str, Any], layout: LayoutConfig, dtype: torch.dtype, fp8: Fp8Config = NO_FP8
) -> TransformerConfig:
    """Megatron's configuration of a model (``hf`` of read_hf_config) under ``layout``, parameters in ``dtype``."""
    fused = uses_transformer_engine(dtype, fp8)
    return TransformerConfig(
        transformer_impl="transformer_engine" if fused else "local",
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
        qk_layernorm=hf["model_type"] in ("qwen3", "qwen3_moe"),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        overlap_p2p_comm=layout.virtual_pipeline
        > 1,  # the interleaved schedule deadlocks where sends wait for receives
        batch_p2p_comm=layout.virtual_pipeline == 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # each micro-batch packs another number of tokens
        moe_token_dispatcher_type="alltoall",  # variable lengths want it, of a dense model too
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights always come from a checkpoint; load_hf leaves none out
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # the module of the layer's spec: ours
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=_fuses_gradients(layout),
        **megatron_settings(fp8),
        **_experts(hf, grouped=fused),
        **_recompute(hf, layout, fused),
    )


def _experts(hf: dict[str, Any], grouped: bool) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts; ``grouped``: one kernel for all experts of a rank."""
    if "num_experts" not in hf:
        return {}
    return {
        "num_moe_experts": hf["num_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        # The softmax of the chosen logits is the normalised softmax of all of them.
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
        # transformers has the softmax alone in fp32; the product before it costs nothing, and is rounded less.
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # no auxiliary loss
        "moe_grouped_gemm": grouped,
    }


def _fuses_gradients(layout: LayoutConfig) -> bool:
    """Whether to use apex's kernel (not yet run on a GPU); ConfigError where it is asked for and not there.

    Transformer Engine has one of its own, but the head is Megatron's linear in any case, which refuses to be built
    without apex's.
    """
    exists = torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if layout.gradient_accumulation_fusion == "on" and not exists:
        raise ConfigError(
            "layout.gradient_accumulation_fusion=on needs a GPU and apex's module fused_weight_gradient_mlp_cuda;"
            " install the extra apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or set"
            " layout.gradient_accumulation_fusion=off"
        )
    return exists and layout.gradient_accumulation_fusion != "off"


def _recompute(hf: dict[str, Any], layout: LayoutConfig, transformer_engine: bool) -> dict[str, Any]:
    """Megatron's settings of what the backward pass computes again; ConfigError for parts that the modules have not."""
    if layout.recompute == "none":
        return {}
    if layout.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": layout.recompute_method,
            "recompute_num_layers": layout.recompute_num_layers,
            "distribute_saved_activations": layout.distribute_saved_activations,
        }
    if "moe_act" in layout.recompute_modules and not transformer_engine:
        raise ConfigError(
            "layout.recompute_modules names moe_act, which only Transformer Engine's grouped experts can compute again;"
            " install transformer-engine on a machine with a GPU, or name moe"
        )
    if "layernorm" in layout.recompute_modules and transformer_engine and "num_experts" not in hf:
        raise ConfigError(  # Megatron would compute nothing again, and not say so
            "layout.recompute_modules names layernorm, but Transformer Engine's layers hold their norms inside;"
            " leave it out"
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(layout.recompute_modules)}


def build_model(
    hf: dict[str, Any], layout: LayoutConfig, groups: ParallelGroups, dtype: torch.dtype, fp8: Fp8Config = NO_FP8
) -> Model:
    """This rank's stages, weights not yet loaded (their memory is not even set: call ``hf.load_hf``).

    Their passes run in ``dtype`` until ``fp8.Precision`` says otherwise, which takes ``fp8`` too.
    """
    check_backend(fp8)
    config = transformer_config(hf, layout, dtype, fp8)
    spec = _block_spec(config, hf["num_hidden_layers"] // groups.stages, "emulated" in fp8.kinds)
    chunks = [_build_stage(hf, config, groups, spec, stage) for stage in groups.own_stages]
    for chunk in chunks:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(hf)
        _mark_shards(chunk)
        _keep_norms_when_scoring(chunk)
        if config.transformer_impl == "transformer_engine" and "blockwise" in fp8.kinds:
            write_codes_when_asked(chunk.decoder.layers)
        chunk.to(platform.device())
    return chunks[0] if len(chunks) == 1 else Chunks(chunks)


def build_unallocated(hf: dict[str, Any], groups: ParallelGroups, dtype: torch.dtype) -> HiddenStatesModel:
    """The whole model without memory for its weights: what it is made of, and under which names it is saved."""
    config = transformer_config(hf, LayoutConfig(), dtype)
    config.use_cpu_initialization = True  # else Megatron asks for a GPU's memory by name
    with torch.device("meta"):
        return _build_stage(hf, config, groups, cpu_block_spec(config, hf["num_hidden_layers"]), stage=0)


def _build_stage(
    hf: dict[str, Any], config: TransformerConfig, groups: ParallelGroups, spec: Any, stage: int
) -> HiddenStatesModel:
    return HiddenStatesModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocabulary(hf, config.tensor_model_parallel_size),
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=stage == 0,
        post_process=stage == groups.stages - 1,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=hf["rope_theta"],
        rotary_in_attention=config.transformer_impl == "local",
        vp_stage=stage // groups.pipeline_size if groups.virtual_size > 1 else None,
    )


def _mark_shards(model: torch.nn.Module) -> None:
    """Say which weights are cut over the tensor group. Megatron says so only while it initialises weights.

    A weight without the mark passes for a copy of tensor rank 0's, so the gradient norm would leave the other ranks'
    shards out. Transformer Engine's modules mark their own.
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def _keep_norms_when_scoring(model: HiddenStatesModel) -> None:
    """Recompute norms for a backward pass only: without one Megatron would keep what enters them for long."""
    layer: Any
    for layer in model.decoder.layers:
        recomputed = [
            name for name in ("recompute_input_layernorm", "recompute_pre_mlp_layernorm") if getattr(layer, name)
        ]
        if recomputed:
            layer.register_forward_pre_hook(partial(_as_gradients_are_wanted, recomputed))


def _as_gradients_are_wanted(switches: Sequence[str], layer: torch.nn.Module, _: Any) -> None:
    for name in switches:
        setattr(layer, name, torch.is_grad_enabled())


def _block_spec(config: TransformerConfig, n_layers: int, emulated: bool) -> Any:
    if config.transformer_impl == "local":
        return cpu_block_spec(config, n_layers, (EmulatedColumnLinear, EmulatedRowLinear) if emulated else None)
    # The same model from Transformer Engine's modules, fused norms, attention, rotary, experts.
    spec = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    with_continuations(spec.submodules)
    if config.num_moe_experts:
        with_experts(spec.submodules)
    return spec
