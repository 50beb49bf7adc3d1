"""Bytes of a trainer rank, by what holds them, from the configuration and the model's config.json.

Weights are counted exactly, tensor by tensor (mcore/names.py). Activations are the tensors that a layer keeps for its
backward pass: a token of one layer keeps, in numbers,

* ``4 H`` of the residual stream: what enters each norm and what leaves it,
* ``3 (heads + groups) D`` of attention: queries, keys and values as the product gave them, queries and keys rotated,
  the output (without flash attention there would be more),
* ``3 F`` of the MLP: gate and up, and their product; of a mixture of experts that of the chosen ones, and ``2 H`` for
  each, sent and returned.

Tensor ranks divide the last two, and with sequence parallelism the first. A pipeline's first rank keeps as many
micro-batches as there are stages. Where a linear multiplies in FP8 it keeps its input in FP8, one byte and its scale,
and of its weight two quantised copies, for the forward and for the backward product (one, if only the teacher's passes
are FP8).

``tests/test_scaling_memory.py`` compares this with what small models hold on a CPU, ``tests/test_published_figures.py``
with the formulas and figures that others have published, ``tools/gpu_check.py memory`` with what one GPU has allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_sdpo.config import Config, Fp8Kind, LayoutConfig
from megatron_sdpo.mcore import names
from megatron_sdpo.vocabulary import BLOCK, support_bytes

BYTES = {"float32": 4, "bfloat16": 2}
FP8_BYTES = 1 + 4 / 128
"""A number in FP8 and its part of an fp32 scale, of which blockwise has one for 128 numbers."""
MASTER, MOMENTS = 4, 8
"""Bytes a weight: an fp32 master weight where the model is bf16, and AdamW's two fp32 moments."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank while it trains, at the peak."""

    weights: int
    quantised: int
    """FP8 copies of the linears' weights, kept between micro-batches."""
    gradients: int
    optimizer: int
    teacher: int
    """Of the teacher, and of the model that objective.kl_coefficient compares with."""
    scores: int
    """What the scoring passes found, kept until training."""
    activations: int
    head: int
    """Logits of a chunk and the gradient of the states before it, that of the head being added where its others are;
    or, where it is more, what the backward pass of one layer holds for the moment, with what it computes again."""
    swap: int
    """A cast copy of the teacher while it scores; no activations are kept then."""
    scoring: int
    """What one layer makes for the moment of the longest row that is scored, the teacher's longer context in it; or,
    where it is more, what the head makes of a chunk."""

    @property
    def standing(self) -> int:
        """Between the passes, whatever runs."""
        return self.weights + self.quantised + self.gradients + self.optimizer + self.teacher

    @property
    def training(self) -> int:
        """Of a training pass, at its peak."""
        return self.activations + self.head

    @property
    def total(self) -> int:
        return self.standing + self.scores + max(self.training, self.swap + self.scoring)


@dataclass(frozen=True, slots=True)
class Held:
    """Weights of a rank. Experts are shared by other ranks than the rest."""

    dense: int
    experts: int

    def divided(self, layout: LayoutConfig) -> float:
        """Of the optimizer's part of them, where ranks with the same weights divide it."""
        if not layout.distributed_optimizer:
            return float(self.dense + self.experts)
        stage = layout.world_size // layout.pipeline_parallel
        return self.dense / (stage // layout.tensor_parallel) + self.experts / (
            stage // (layout.expert_parallel * layout.expert_tensor)
        )


def own_stages(layout: LayoutConfig, pipeline_rank: int) -> range:
    """Of an interleaved pipeline several."""
    stages = layout.pipeline_parallel * layout.virtual_pipeline
    return range(pipeline_rank, stages, layout.pipeline_parallel)


def held(hf_config: Mapping[str, Any], layout: LayoutConfig, pipeline_rank: int) -> Held:
    """Numbers in the parameters of a rank, padding of the vocabulary included."""
    stages = layout.pipeline_parallel * layout.virtual_pipeline
    mine, per_stage = own_stages(layout, pipeline_rank), hf_config["num_hidden_layers"] // stages
    ends = names.stage_parameters(_one_layer(hf_config), range(0), 0 in mine, stages - 1 in mine)
    layer, layers = _layer_weights(hf_config, layout), len(mine) * per_stage
    outside = sum(prod(names.local_shape(made_of, layout.tensor_parallel)) for made_of in ends.values())
    return Held(outside + layers * layer.dense, layers * layer.experts)


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    """What a rank holds of one layer; all layers are alike."""

    dense: int
    experts: int
    linear: int
    """Of both, what belongs to linears: all but norms, biases and routers."""


def _one_layer(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {**hf_config, "num_hidden_layers": 1}


def _layer_weights(hf_config: Mapping[str, Any], layout: LayoutConfig) -> _LayerWeights:
    counts, linear = {False: 0, True: 0}, {False: 0, True: 0}
    for made_of in names.stage_parameters(_one_layer(hf_config), range(1), False, False).values():
        first = made_of[0]
        of_expert = first.expert is not None
        ranks = layout.expert_tensor if of_expert else layout.tensor_parallel
        size = prod(names.local_shape(made_of, ranks))
        counts[of_expert] += size
        if len(first.shape) == 2 and "router" not in first.parameter:
            linear[of_expert] += size
    share = layout.expert_parallel
    return _LayerWeights(counts[False], counts[True] // share, linear[False] + linear[True] // share)


def multiplies_fp8(kind: Fp8Kind) -> bool:
    """The emulation keeps and costs what the model's dtype does, and more."""
    return kind in ("blockwise", "tensorwise")


def fp8_layers(config: Config, hf_config: Mapping[str, Any], layers: range) -> int:
    """How many of these layers multiply in FP8 where a pass does."""
    ends, count = config.fp8.high_precision_layers, hf_config["num_hidden_layers"]
    return len([layer for layer in layers if ends <= layer < count - ends])


def _quantised(config: Config, hf_config: Mapping[str, Any], pipeline_rank: int) -> int:
    """Bytes of the FP8 copies of a rank's linears."""
    student, teacher = multiplies_fp8(config.fp8.student), multiplies_fp8(config.fp8.teacher)
    if not (student or teacher):
        return 0
    layout = config.layout
    per_stage = hf_config["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    stages = (range(s * per_stage, (s + 1) * per_stage) for s in own_stages(layout, pipeline_rank))
    layers = sum(fp8_layers(config, hf_config, stage) for stage in stages)
    return round(layers * _layer_weights(hf_config, layout).linear * FP8_BYTES * (2 if student else 1))


def rank_memory(config: Config, hf_config: Mapping[str, Any], pipeline_rank: int, on_cpu: bool = False) -> RankMemory:
    """Of a rank of this stage. ``on_cpu``: as the CPU's attention and log-probs do it, for the comparison."""
    layout, width = config.layout, BYTES[config.model.dtype]
    mine = held(hf_config, layout, pipeline_rank)
    weights = mine.dense + mine.experts
    divided = mine.divided(layout)
    copies = (config.objective.has_teacher and config.teacher.kind != "live") + bool(config.objective.kl_coefficient)
    resident = width * weights if config.teacher.placement == "resident" and width < 4 else 0
    placement = config.teacher.placement
    on_device = placement != "offloaded"
    first, last = pipeline_rank == 0, pipeline_rank == layout.pipeline_parallel - 1
    tokens = row_tokens(config)
    kept = activations(config, hf_config, pipeline_rank, tokens, on_cpu)
    momentary = [_backward(config, hf_config, tokens, on_cpu)]
    if first:  # the embedding's gradient is the last of all, when the layers have let go of everything
        momentary.append(_entries(hf_config, layout) * hf_config["hidden_size"] * width - kept)
    if last:
        momentary.append(_head(config, hf_config, tokens, on_cpu))
    return RankMemory(
        weights=width * weights,
        quantised=_quantised(config, hf_config, pipeline_rank),
        gradients=4 * weights,
        optimizer=round(divided * (MOMENTS + (MASTER if width < 4 else 0))),
        teacher=round(copies * (4 * divided + resident)) if on_device else 0,
        scores=_scores(config) if last else 0,
        activations=kept,
        head=max(momentary),
        swap=width * weights if copies and placement == "swapped" and width < 4 else 0,
        scoring=_scoring(config, hf_config, on_cpu, last),
    )


def row_tokens(config: Config) -> int:
    """Of the longest row of a training pass that one rank holds; a sequence beyond the budget has a row of its own."""
    return -(-max(config.layout.tokens_per_micro_batch, config.model.max_length) // config.layout.context_parallel)


def _scoring(config: Config, hf_config: Mapping[str, Any], on_cpu: bool, last: bool) -> int:
    """Of the longest row: a layer's tensors, as if all were kept; on the last stage the head's, when they are gone."""
    if config.objective.kind == "next_token":
        return 0
    longest = max(config.layout.tokens_per_micro_batch, config.model.max_length)
    if config.objective.has_teacher:
        longest = max(longest, config.teacher_context.max_prompt_tokens + config.rollout.max_new_tokens)
    tokens = -(-longest // config.layout.context_parallel)
    whole, _ = _token_bytes(config, hf_config, range(hf_config["num_hidden_layers"]), on_cpu)
    return max(round(tokens * whole), _scoring_head(config, hf_config, tokens, on_cpu) if last else 0)


def _scoring_head(config: Config, hf_config: Mapping[str, Any], tokens: int, on_cpu: bool) -> int:
    """Logits of a chunk, what the support is found with, and the states before them."""
    hidden, width = hf_config["hidden_size"], BYTES[config.model.dtype]
    entries, chunk = _entries(hf_config, config.layout), min(config.layout.head_chunk_tokens, tokens)
    block, scratch = BLOCK["cpu" if on_cpu else "cuda"], 0
    if config.objective.has_teacher and config.objective.support == "top_k":
        scratch = min(chunk * support_bytes(entries, min(config.objective.kept_tokens, entries)), 20 * block)
    if on_cpu:  # where kernels do not walk
        scratch = max(scratch, 4 * min(chunk * entries, block))
    return chunk * entries * width + scratch + 3 * tokens * hidden * width


def layer_items(config: Config, hf_config: Mapping[str, Any], on_cpu: bool, fp8: bool) -> dict[str, float]:
    """Bytes that one layer keeps of a token for its backward pass, by what they are; a rank's share."""
    layout, hidden, width = config.layout, hf_config["hidden_size"], BYTES[config.model.dtype]
    heads, groups, d = hf_config["num_attention_heads"], names.key_value_heads(hf_config), names.head_dim(hf_config)
    tensor = layout.tensor_parallel
    stream = tensor if layout.sequence_parallel else 1
    entering = FP8_BYTES if fp8 else width  # what enters a linear
    again = layout.recompute_modules if layout.recompute == "selective" else ()
    items = {
        "stream": 2 * hidden * width / stream,
        "norms": 2 * hidden * entering / stream * ("layernorm" not in again),
        "products": (heads + 2 * groups) * d * width / tensor,
        "rotated": (heads + groups) * d * width / tensor,
        "attention": heads * d * (width + (FP8_BYTES if fp8 else 0)) / tensor,
    }
    if on_cpu and groups < heads:  # torch repeats keys and values for every head there
        items["repeated"] = 2 * (heads - groups) * d * width / tensor
    if "num_experts" in hf_config:
        inner = hf_config["num_experts_per_tok"] * hf_config["moe_intermediate_size"] / tensor
        whole = tensor if layout.expert_tensor == 1 else 1  # tensor ranks with whole experts divide the tokens
        items["sent"] = hf_config["num_experts_per_tok"] * hidden * (entering + width) / whole * ("moe" not in again)
    else:
        inner = hf_config["intermediate_size"] / tensor
    kept = not {"mlp", "moe"} & set(again)
    items["gates"] = 2 * inner * width * kept
    items["activated"] = inner * entering * (kept and "moe_act" not in again)
    return items


def _token_bytes(config: Config, hf_config: Mapping[str, Any], layers: range, on_cpu: bool) -> tuple[float, float]:
    """What one of these layers keeps of a token for its backward pass, on average: (all of it, what enters it)."""
    fp8 = fp8_layers(config, hf_config, layers) / len(layers) if multiplies_fp8(config.fp8.student) else 0.0
    whole = sum(
        share * sum(layer_items(config, hf_config, on_cpu, quantised).values())
        for quantised, share in ((True, fp8), (False, 1 - fp8))
        if share
    )
    layout = config.layout
    stream = layout.tensor_parallel if layout.sequence_parallel else 1
    return whole, BYTES[config.model.dtype] * hf_config["hidden_size"] / stream


def layers_alive(config: Config, hf_config: Mapping[str, Any], pipeline_rank: int) -> int:
    """Layers times micro-batches whose activations a pipeline rank keeps at the peak, with micro-batches to fill it."""
    layout = config.layout
    per_stage = hf_config["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    behind = layout.pipeline_parallel - pipeline_rank
    if layout.virtual_pipeline == 1:
        return behind * per_stage
    # Megatron's interleaved schedule: warm-up passes of the first rank, and the one under way.
    return ((layout.virtual_pipeline - 1) * layout.pipeline_parallel + 2 * (behind - 1) + 1) * per_stage


def activations(
    config: Config, hf_config: Mapping[str, Any], pipeline_rank: int, tokens: int, on_cpu: bool = False
) -> int:
    """Bytes kept for the backward passes of the micro-batches in flight, ``tokens`` in each."""
    layout = config.layout
    alive = layers_alive(config, hf_config, pipeline_rank)
    per_stage = hf_config["num_hidden_layers"] // (layout.pipeline_parallel * layout.virtual_pipeline)
    first = own_stages(layout, pipeline_rank)[0] * per_stage
    whole, entering = _token_bytes(config, hf_config, range(first, first + per_stage), on_cpu)
    if layout.recompute != "full":
        kept = alive * whole
    elif layout.recompute_method == "uniform":
        kept = alive / layout.recompute_num_layers * entering
    else:
        again = min(layout.recompute_num_layers, per_stage) / per_stage
        kept = alive * (again * entering + (1 - again) * whole)
    if layout.distribute_saved_activations:
        kept -= alive * entering * (1 - 1 / layout.tensor_parallel)
    return round(tokens * kept)


def _entries(hf_config: Mapping[str, Any], layout: LayoutConfig) -> int:
    """Of the vocabulary, a tensor rank's."""
    return names.padded_vocabulary(hf_config, layout.tensor_parallel) // layout.tensor_parallel


def _head(config: Config, hf_config: Mapping[str, Any], tokens: int, on_cpu: bool) -> int:
    """While a micro-batch's loss is found; its response tokens may be all of its tokens."""
    layout, hidden, width = config.layout, hf_config["hidden_size"], BYTES[config.model.dtype]
    entries, chunk = _entries(hf_config, layout), min(layout.head_chunk_tokens, tokens)
    whole = config.objective.has_teacher and config.objective.support == "vocabulary"
    # The teacher's logits too; of the hybrid's two sums a gradient each, and both together.
    logits = 1 + whole + 3 * (config.objective.kind == "hybrid")
    wide = min(chunk * entries, BLOCK["cpu" if on_cpu else "cuda"]) if on_cpu or whole else 0  # else kernels walk
    return logits * chunk * entries * width + 4 * wide + tokens * hidden * (4 + 3 * width)


def _backward(config: Config, hf_config: Mapping[str, Any], tokens: int, on_cpu: bool) -> int:
    """Gradients alive in the backward pass of one MLP, and the layers that are computed again for it."""
    inner = hf_config.get("moe_intermediate_size", 0) * hf_config.get("num_experts_per_tok", 0)
    inner = max(inner, 0 if inner else hf_config["intermediate_size"])
    # On a GPU the gated unit's backward pass is one kernel, before which the second product has let go of its input.
    units = (4 if on_cpu else 2) * inner / config.layout.tensor_parallel
    bytes_ = BYTES[config.model.dtype] * (hf_config["hidden_size"] + units)
    if config.layout.recompute == "full" and config.layout.recompute_method == "uniform":
        # With block the layers that are computed again come last, when the others have let go of theirs.
        whole, _ = _token_bytes(config, hf_config, range(hf_config["num_hidden_layers"]), on_cpu)
        bytes_ += config.layout.recompute_num_layers * whole
    return round(tokens * bytes_)


def _scores(config: Config) -> int:
    """Of this data rank's responses: old log-probs, kept ids (8 bytes) and the teacher's log-probs (4 bytes each)."""
    rollout, objective, layout = config.rollout, config.objective, config.layout
    copies = layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)
    tokens = rollout.prompts_per_step * rollout.attempts_per_prompt * rollout.max_new_tokens / copies
    kept = objective.kept_tokens * 8 + objective.teacher_columns * 4 if objective.has_teacher else 0
    return round(tokens * (4 + kept))
