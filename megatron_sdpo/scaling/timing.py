"""Seconds of a step, by phase, from what the passes compute and move and what a GPU can do.

Every number here is a prediction from stated speeds and the shares of them in ``Reach``, none is a measurement: not yet
compared with a run on GPUs. What it is good for is to rank layouts and to see which phase a step is made of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sdpo.config import Config, Fp8Kind
from megatron_sdpo.flops import Tokens, forward_flops, layer_parameters
from megatron_sdpo.scaling.assumed import Lengths, Reach
from megatron_sdpo.scaling.engines import Sharing, engine_bytes, generation_seconds, kv_bytes
from megatron_sdpo.scaling.hardware import Gpu
from megatron_sdpo.scaling.memory import BYTES, fp8_layers, held, multiplies_fp8

GPUS_PER_NODE = 8


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


def step_time(
    config: Config,
    hf_config: Mapping[str, Any],
    gpu: Gpu,
    lengths: Lengths,
    reach: Reach,
    sequences: int,
    sharing: Sharing = Sharing.SEPARATE,
) -> StepTime:
    """Of one generation batch; ``sequences``: at once in an engine, at most."""
    flops = step_flops(config, hf_config, lengths)
    student, teacher = lengths.prompt + lengths.response, lengths.teacher_prompt + lengths.response
    samples = config.rollout.prompts_per_step * config.rollout.attempts_per_prompt
    mini = config.optim.mini_batches
    token = _token_exchange(config, hf_config, gpu, reach)
    experts = "num_experts" in hf_config
    scorings, passes = _scorings(config), _passes(config)

    def seconds(work: Work, kind: Fp8Kind, share: float, tokens: int, exchanges: int, mini_batches: int = 1) -> float:
        fp8_share = reach.fp8 if multiplies_fp8(kind) and not experts else None
        computing = work.seconds(gpu, config.layout.world_size, reach.experts if experts else share, fp8_share)
        return (computing + exchanges * tokens * token) / _filled(config, tokens / mini_batches)

    fp8 = config.fp8
    return StepTime(
        generate=generation_seconds(config, hf_config, gpu, lengths, reach, sequences),
        score_student=seconds(flops.score_student, fp8.student, reach.scoring, samples * student, scorings),
        score_teacher=seconds(flops.score_teacher, fp8.teacher, reach.scoring, samples * teacher, 1)
        if flops.score_teacher.total
        else 0.0,
        train=seconds(flops.train, fp8.student, reach.training, samples * student, passes - 1, mini),
        exchange=mini * _exchange(config, hf_config, gpu, reach),
        sync=_sync(config, hf_config, gpu, reach, sharing),
        staleness=0 if sharing is Sharing.COLOCATED else config.rollout.max_staleness,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of a phase on all ranks together, with what is computed again."""

    linear: float
    """Products with the layers' weights that are FP8 where the pass is."""
    rest: float

    @property
    def total(self) -> float:
        return self.linear + self.rest

    def seconds(self, gpu: Gpu, ranks: int, share: float, fp8_share: float | None) -> float:
        """At a share of the bf16 peak, and what is linear at one of the FP8 peak, if any."""
        plain = gpu.bf16_tflops * share
        quantised = plain if fp8_share is None else (gpu.fp8_tflops or gpu.bf16_tflops) * fp8_share
        return (self.linear / quantised + self.rest / plain) / (ranks * 1e12)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of a generation batch, by phase of the trainer."""

    score_student: Work
    score_teacher: Work
    train: Work

    @property
    def total(self) -> float:
        return self.score_student.total + self.score_teacher.total + self.train.total


def step_flops(config: Config, hf_config: Mapping[str, Any], lengths: Lengths) -> StepFlops:
    """What the trainer computes for one generation batch."""
    layers = hf_config["num_hidden_layers"]
    fp8_share = fp8_layers(config, hf_config, range(layers)) / layers
    samples = config.rollout.prompts_per_step * config.rollout.attempts_per_prompt

    def work(prompt: int, passes: int) -> Work:
        length = prompt + lengths.response
        tokens = Tokens(samples * length, samples * length * (length + 1) // 2, samples * lengths.response)
        linear = fp8_share * 2 * tokens.tokens * layers * layer_parameters(hf_config)
        return Work(passes * linear, passes * (forward_flops(hf_config, tokens) - linear))

    return StepFlops(
        score_student=work(lengths.prompt, _scorings(config)),
        score_teacher=work(lengths.teacher_prompt, 1 if config.objective.has_teacher else 0),
        train=work(lengths.prompt, _passes(config)),
    )


def _scorings(config: Config) -> int:
    """Forward passes over the student's view before training."""
    return 0 if config.objective.kind == "next_token" else 2 if config.objective.kl_coefficient else 1


def _passes(config: Config) -> int:
    """Forward passes that training is as long as."""
    return 4 if config.layout.recompute == "full" else 3


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


def _sync(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, reach: Reach, sharing: Sharing) -> float:
    """Every pipeline rank's first tensor rank broadcasts its layers to all engines."""
    bytes_ = engine_bytes(config, hf_config)
    gpus = config.layout.world_size + config.engine.count * config.engine.tensor_parallel
    within = sharing is Sharing.COLOCATED or gpus <= GPUS_PER_NODE
    speed = gpu.link_gb_s if within else gpu.network_gb_s
    return bytes_ / config.layout.pipeline_parallel / (speed * 1e9 * reach.links)
