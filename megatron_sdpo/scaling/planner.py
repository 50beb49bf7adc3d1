"""A run on given nodes: does it fit, how long is a step, what to change, and which layouts would be better."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sdpo.config import Config, ConfigError, LayoutConfig, check
from megatron_sdpo.hf_config import check_model
from megatron_sdpo.scaling.hardware import Gpu
from megatron_sdpo.scaling.memory import BYTES, RankMemory, rank_memory
from megatron_sdpo.scaling.timing import GPUS_PER_NODE, Lengths, Reach, StepTime, kv_bytes, model_bytes, step_time

USABLE = 0.9
"""Of a GPU's memory: the rest is the driver's, the communicators' and what an allocator cannot hand out."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of one GPU of an engine, and how many average sequences have room in an engine at once."""

    weights: int
    cache: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is predicted of a run. ``rank`` is the fullest trainer rank's memory, of pipeline rank ``stage``."""

    config: Config
    gpu: Gpu
    lengths: Lengths
    stage: int
    rank: RankMemory
    engine: EngineMemory
    time: StepTime
    gpus: int

    @property
    def room(self) -> float:
        """Bytes of a GPU that may be used."""
        return self.gpu.memory_gb * 1e9 * USABLE

    @property
    def fits(self) -> bool:
        """Trainer ranks and engines both."""
        return self.rank.total <= self.room and self.engine.sequences >= 1


def plan(
    config: Config,
    hf_config: Mapping[str, Any],
    nodes: int,
    gpu: Gpu,
    lengths: Lengths,
    reach: Reach,
) -> Plan:
    """ConfigError for a layout that cannot work on these nodes, whatever the memory."""
    check(config)
    check_model(config, dict(hf_config))
    gpus = gpus_of(config, nodes)
    if config.layout.tensor_parallel > GPUS_PER_NODE:
        raise ConfigError(
            f"layout.tensor_parallel {config.layout.tensor_parallel} crosses nodes of {GPUS_PER_NODE} GPUs, where its"
            f" exchanges in every layer would take most of the time; set {GPUS_PER_NODE} or less"
        )
    ranks = [rank_memory(config, hf_config, stage) for stage in range(config.layout.pipeline_parallel)]
    stage = max(range(len(ranks)), key=lambda s: ranks[s].total)
    return Plan(
        config=config,
        gpu=gpu,
        lengths=lengths,
        stage=stage,
        rank=ranks[stage],
        engine=_engine(config, hf_config, gpu, lengths),
        time=step_time(config, hf_config, gpu, lengths, reach),
        gpus=gpus,
    )


def gpus_of(config: Config, nodes: int) -> int:
    """How many a run takes, whatever its layout; ConfigError where so many are not there."""
    gpus = config.layout.world_size + config.engine.count * config.engine.tensor_parallel
    there = nodes * GPUS_PER_NODE
    if gpus > there:
        raise ConfigError(
            f"{config.layout.world_size} trainer ranks and {config.engine.count} engines of"
            f" {config.engine.tensor_parallel} GPUs need {gpus} GPUs, but {nodes} nodes have {there}; set"
            " layout.world_size or engine.count lower, or --nodes higher"
        )
    return gpus


def _engine(config: Config, hf_config: Mapping[str, Any], gpu: Gpu, lengths: Lengths) -> EngineMemory:
    tensor, width = config.engine.tensor_parallel, BYTES[config.model.dtype]
    weights = model_bytes(hf_config, width) // tensor
    cache = max(0, int(gpu.memory_gb * 1e9 * USABLE) - weights)
    each = kv_bytes(hf_config, width) * (lengths.prompt + lengths.response) // tensor
    return EngineMemory(weights, cache, cache // max(1, each))


def changes(found: Plan, hf_config: Mapping[str, Any], nodes: int, reach: Reach) -> list[str]:
    """Single changes with which a run that does not fit would, or else what else to ask for; a line each."""
    config, layout = found.config, found.config.layout
    tried: dict[str, Config] = {}

    def with_layout(words: str, **values: Any) -> None:
        tried[words] = dataclasses.replace(config, layout=dataclasses.replace(layout, **values))

    if not layout.distributed_optimizer:
        with_layout("layout.distributed_optimizer=true", distributed_optimizer=True)
    if layout.tensor_parallel > 1 and not layout.sequence_parallel:
        with_layout("layout.sequence_parallel=true", sequence_parallel=True)
    if layout.recompute != "full":
        with_layout("layout.recompute=full", recompute="full", recompute_modules=LayoutConfig().recompute_modules)
    if config.objective.has_teacher and config.teacher.kind != "live":
        tried["teacher.placement=offloaded"] = dataclasses.replace(
            config, teacher=dataclasses.replace(config.teacher, placement="offloaded")
        )
    for key in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        more = 2 * getattr(layout, key)
        with_layout(f"layout.{key}={more}", **{key: more})
    lines = []
    for words, changed in tried.items():
        try:
            other = plan(changed, hf_config, nodes, found.gpu, found.lengths, reach)
        except ConfigError:
            continue
        if other.fits:
            lines.append(f"{words}: {other.rank.total / 1e9:.1f} GB, {other.time.total:.0f} s a step")
    return lines


def suggest(
    config: Config, hf_config: Mapping[str, Any], nodes: int, gpu: Gpu, lengths: Lengths, reach: Reach
) -> list[Plan]:
    """Layouts of as many trainer ranks: those that fit, the shortest step first, then the smallest others."""
    gpus_of(config, nodes)  # no layout would help
    found = []
    for layout in _layouts(config.layout, hf_config):
        try:
            other = plan(dataclasses.replace(config, layout=layout), hf_config, nodes, gpu, lengths, reach)
        except ConfigError:
            continue
        found.append(other)
    return sorted(found, key=lambda p: (not p.fits, p.time.total if p.fits else 0.0, p.rank.total))


def _layouts(layout: LayoutConfig, hf_config: Mapping[str, Any]) -> Iterator[LayoutConfig]:
    ranks = layout.world_size
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    experts = [n for n in divisors if hf_config.get("num_experts", 1) % n == 0]
    for tensor in (n for n in divisors if n <= GPUS_PER_NODE):
        for pipeline in (n for n in divisors if hf_config["num_hidden_layers"] % n == 0):
            for context in (n for n in divisors if n <= 8):
                if ranks % (tensor * pipeline * context):
                    continue
                for expert in experts:
                    for recompute in ("none", "full"):
                        yield dataclasses.replace(
                            layout,
                            tensor_parallel=tensor,
                            sequence_parallel=tensor > 1,
                            pipeline_parallel=pipeline,
                            virtual_pipeline=1,
                            context_parallel=context,
                            expert_parallel=expert,
                            expert_tensor_parallel=1 if tensor > 1 and expert > 1 else None,
                            distributed_optimizer=ranks > tensor * pipeline,
                            overlap_grad_reduce=layout.overlap_grad_reduce and ranks > tensor * pipeline,
                            overlap_param_gather=False,
                            recompute=recompute,
                            recompute_modules=LayoutConfig().recompute_modules,
                            distribute_saved_activations=False,
                        )
