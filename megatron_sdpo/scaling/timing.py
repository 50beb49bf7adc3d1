"""Seconds of a step, by phase, from what the passes compute and move and what a GPU can do.

Every number here is a prediction from stated speeds and the shares of them in ``Reach``, none is a measurement: not yet
compared with a run on GPUs. What it is good for is to rank layouts and to see which phase a step is made of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_sdpo.config import Config
from megatron_sdpo.flops import Tokens, forward_flops, layer_parameters
from megatron_sdpo.mcore import names
from megatron_sdpo.scaling.hardware import Gpu
from megatron_sdpo.scaling.memory import BYTES, held

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Reach:
    """Which share of a stated speed a run reaches."""

    training: float = 0.4
    """Of the matrix products' peak, in training passes."""
    scoring: float = 0.45
    """The same in forward-only passes and prefill."""
    memory: float = 0.6
    """Of memory bandwidth, decoding and in the optimizer."""
    links: float = 0.6
    """Of links within a node and between nodes."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of an average sample."""

    prompt: int
    response: int
    teacher_prompt: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds by phase."""

    generate: float
    score_student: float
    score_teacher: float
    train: float
    exchange: float
    """Gradients and weights between data ranks, and the optimizer's own step."""
    sync: float
    staleness: int

    @property
    def trainer(self) -> float:
        """Phases in which the trainer works."""
        return self.score_student + self.score_teacher + self.train + self.exchange + self.sync

    @property
    def total(self) -> float:
        """With attempts made ahead, generation and training overlap."""
        if self.staleness:
            return max(self.generate, self.trainer)
        return self.generate + self.trainer


def usual_lengths(config: Config) -> Lengths:
    """Where nobody says: prompts of 256 tokens, responses of a quarter of the longest, a response in the context."""
    response = max(1, config.rollout.max_new_tokens // 4)
    prompt = max(1, min(256, config.model.max_length - config.rollout.max_new_tokens))
    return Lengths(prompt, response, min(prompt + response, config.teacher_context.max_prompt_tokens))


def step_time(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, lengths: Lengths, reach: Reach) -> StepTime:
    """Of one generation batch."""
    student, teacher = lengths.prompt + lengths.response, lengths.teacher_prompt + lengths.response
    samples = config.rollout.prompts_per_step * config.rollout.attempts_per_prompt
    peak = config.layout.world_size * gpu.bf16_tflops * 1e12
    forward = _forward(hf_config, samples, student, lengths.response)
    teaching = _forward(hf_config, samples, teacher, lengths.response) if config.objective.has_teacher else 0
    scorings = 0 if config.objective.kind == "next_token" else 2 if config.objective.kl_coefficient else 1
    passes = 4 if config.layout.recompute == "full" else 3
    mini = config.optim.mini_batches
    token = _token_exchange(config, hf_config, gpu, reach)

    def seconds(flops: float, share: float, tokens: int, exchanges: int, mini_batches: int = 1) -> float:
        return (flops / (peak * share) + exchanges * tokens * token) / _filled(config, tokens / mini_batches)

    return StepTime(
        generate=_generation(config, hf_config, gpu, lengths, reach),
        score_student=scorings * seconds(forward, reach.scoring, samples * student, 1),
        score_teacher=seconds(teaching, reach.scoring, samples * teacher, 1) if teaching else 0.0,
        train=seconds(passes * forward, reach.training, samples * student, passes - 1, mini),
        exchange=mini * _exchange(config, hf_config, gpu, reach),
        sync=_sync(config, hf_config, gpu, reach),
        staleness=config.rollout.max_staleness,
    )


def _forward(hf_config: Mapping[str, Any], samples: int, length: int, response: int) -> int:
    return forward_flops(hf_config, Tokens(samples * length, samples * length * (length + 1) // 2, samples * response))


def _filled(config: Config, tokens: float) -> float:
    """Share of the time that a pipeline's ranks work: with m micro-batches m / (m + (p - 1) / v)."""
    layout = config.layout
    copies = layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)
    count = max(1.0, tokens / copies / layout.tokens_per_micro_batch)
    return count / (count + (layout.pipeline_parallel - 1) / layout.virtual_pipeline)


def _token_exchange(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, reach: Reach) -> float:
    """Seconds that a pass spends, a token, on sums over tensor ranks and on keys and values of context ranks.

    Two sums a layer, each moving a token's state (t - 1) / t times twice; the backward pass makes as many.
    """
    layout, width = config.layout, BYTES[config.model.dtype]
    tensor, context = layout.tensor_parallel, layout.context_parallel
    sums = 4 * hf_config["hidden_size"] * width * (tensor - 1) / tensor
    attention = kv_bytes(hf_config, width) / hf_config["num_hidden_layers"] / tensor * (context - 1)
    within = gpu.link_gb_s if tensor * context <= GPUS_PER_NODE else gpu.network_gb_s
    links = sums / gpu.link_gb_s + attention / within
    copies = layout.world_size // (tensor * layout.pipeline_parallel)  # context ranks divide the tokens too
    return links / (1e9 * reach.links) * hf_config["num_hidden_layers"] / layout.pipeline_parallel / copies


def _exchange(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, reach: Reach) -> float:
    """Per optimizer step, on the rank with the most weights: fp32 gradients reduced, weights gathered, AdamW."""
    layout, width = config.layout, BYTES[config.model.dtype]
    seconds = 0.0
    for rank in (0, layout.pipeline_parallel - 1):
        mine = held(hf_config, layout, rank)
        weights = mine.dense + mine.experts
        replicas = layout.world_size // (layout.tensor_parallel * layout.pipeline_parallel)
        speed = gpu.network_gb_s if layout.world_size > GPUS_PER_NODE else gpu.link_gb_s
        moved = weights * (4 + (width if layout.distributed_optimizer else 4)) * (replicas - 1) / replicas
        stepped = mine.divided(layout) * 2 * (4 + 4 + 8 + width)
        hidden = 0.3 if layout.overlap_grad_reduce else 1.0  # what overlap leaves visible
        seconds = max(
            seconds,
            hidden * moved / (speed * 1e9 * reach.links) + stepped / (gpu.memory_gb_s * 1e9 * reach.memory),
        )
    return seconds


def kv_bytes(hf_config: Mapping[str, Any], width: int) -> int:
    """Of one token in all layers."""
    return 2 * hf_config["num_hidden_layers"] * names.key_value_heads(hf_config) * names.head_dim(hf_config) * width


def model_bytes(hf_config: Mapping[str, Any], width: int) -> int:
    """Of all weights, as the checkpoint has them."""
    return width * sum(prod(tensor.shape) for tensor in names.hf_layout(hf_config).values())


def _generation(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, lengths: Lengths, reach: Reach) -> float:
    """Prefill of every question once, decoding of an average response by full engines, then of the longest by few.

    A decoding step reads the weights that its tokens are multiplied by and the keys and values of all sequences, or
    computes, whichever takes longer.
    """
    engine, rollout, width = config.engine, config.rollout, BYTES[config.model.dtype]
    each = -(-rollout.prompts_per_step * rollout.attempts_per_prompt // engine.count)
    at_once = min(each, engine.max_running_requests)
    waves = -(-each // at_once)
    speed = engine.tensor_parallel * gpu.memory_gb_s * 1e9 * reach.memory
    compute = engine.tensor_parallel * gpu.bf16_tflops * 1e12 * reach.scoring

    def decoding(sequences: int, context: float) -> float:
        active = 2 * sequences * hf_config["num_hidden_layers"] * layer_parameters(hf_config)
        read = model_bytes(hf_config, width) + sequences * context * kv_bytes(hf_config, width)
        return max(read / speed, active / compute)

    prefill = _forward(hf_config, rollout.prompts_per_step, lengths.prompt, 0) / engine.count / compute
    average = waves * lengths.response * decoding(at_once, lengths.prompt + lengths.response / 2)
    longest = max(0, rollout.max_new_tokens - lengths.response) * decoding(1, lengths.prompt + rollout.max_new_tokens)
    return prefill + average + longest


def _sync(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, reach: Reach) -> float:
    """Every pipeline rank's first tensor rank broadcasts its layers to all engines."""
    bytes_ = model_bytes(hf_config, BYTES[config.model.dtype])
    gpus = config.layout.world_size + config.engine.count * config.engine.tensor_parallel
    speed = gpu.network_gb_s if gpus > GPUS_PER_NODE else gpu.link_gb_s
    return bytes_ / config.layout.pipeline_parallel / (speed * 1e9 * reach.links)
