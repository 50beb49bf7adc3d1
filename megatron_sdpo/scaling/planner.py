"""A run on given nodes: does it fit, how long is a step, what to change, and which layouts would be better."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sdpo.config import Config, ConfigError, LayoutConfig, check
from megatron_sdpo.fp8_format import check_engines
from megatron_sdpo.hf_config import check_model
from megatron_sdpo.scaling.assumed import Lengths, Reach
from megatron_sdpo.scaling.engines import RESIDUE, EngineMemory, Sharing, engine_bytes, engine_memory
from megatron_sdpo.scaling.hardware import Gpu
from megatron_sdpo.scaling.memory import RankMemory, multiplies_fp8, rank_memory
from megatron_sdpo.scaling.timing import GPUS_PER_NODE, StepFlops, StepTime, step_flops, step_time

USABLE = 0.9
"""Of a GPU's memory: the rest is the driver's, the communicators' and what an allocator cannot hand out."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is predicted of a run. ``rank`` is the fullest trainer rank's memory, of pipeline rank ``stage``."""

    config: Config
    gpu: Gpu
    lengths: Lengths
    stage: int
    rank: RankMemory
    engine: EngineMemory
    flops: StepFlops
    sync_bytes: int
    """Of the weights that go to every engine after a step."""
    time: StepTime
    gpus: int
    sharing: Sharing

    @property
    def room(self) -> float:
        """Bytes of a GPU that a trainer rank may use."""
        return self.gpu.memory_gb * 1e9 * USABLE - (RESIDUE if self.sharing is Sharing.COLOCATED else 0)

    @property
    def fits(self) -> bool:
        """Trainer ranks and engines both; an engine that cannot hold one sequence of model.max_length would stop."""
        return self.rank.total <= self.room and self.engine.tokens >= self.config.model.max_length


def plan(
    config: Config,
    hf_config: Mapping[str, Any],
    nodes: int,
    gpu: Gpu,
    lengths: Lengths,
    reach: Reach,
    sharing: Sharing = Sharing.SEPARATE,
) -> Plan:
    """ConfigError for a layout that cannot work on these nodes, whatever the memory."""
    check(config)
    check_model(config, dict(hf_config))
    check_engines(config, hf_config)
    gpus = gpus_of(config, nodes, sharing)
    _check_gpu(config, gpu)
    ranks = [rank_memory(config, hf_config, stage) for stage in range(config.layout.pipeline_parallel)]
    stage = max(range(len(ranks)), key=lambda s: ranks[s].total)
    beside = max(rank.standing for rank in ranks) if sharing is Sharing.COLOCATED else 0
    engine = engine_memory(config, hf_config, gpu, lengths, beside)
    return Plan(
        config=config,
        gpu=gpu,
        lengths=lengths,
        stage=stage,
        rank=ranks[stage],
        engine=engine,
        flops=step_flops(config, hf_config, lengths),
        sync_bytes=engine_bytes(config, hf_config),
        time=step_time(config, hf_config, gpu, lengths, reach, engine.sequences, sharing),
        gpus=gpus,
        sharing=sharing,
    )


def gpus_of(config: Config, nodes: int, sharing: Sharing = Sharing.SEPARATE) -> int:
    """How many a run takes, whatever its layout; ConfigError where so many are not there."""
    ranks, engines = config.layout.world_size, config.engine.count * config.engine.tensor_parallel
    gpus = max(ranks, engines) if sharing is Sharing.COLOCATED else ranks + engines
    there = nodes * GPUS_PER_NODE
    if gpus > there:
        raise ConfigError(
            f"{ranks} trainer ranks and {config.engine.count} engines of {config.engine.tensor_parallel} GPUs need"
            f" {gpus} GPUs, but {nodes} node(s) have {there}; set layout.world_size or engine.count lower, or --nodes"
            " higher"
        )
    return gpus


def nodes_of(config: Config, sharing: Sharing = Sharing.SEPARATE) -> int:
    """How many a run takes: one if all fit there, else ranks and engines share none. No engine crosses nodes."""
    ranks, count, tensor = config.layout.world_size, config.engine.count, config.engine.tensor_parallel
    if sharing is Sharing.COLOCATED:
        return -(-max(ranks, count * tensor) // GPUS_PER_NODE)
    if ranks + count * tensor <= GPUS_PER_NODE:
        return 1
    engines = max(1, GPUS_PER_NODE // tensor)
    return -(-ranks // GPUS_PER_NODE) - (-count // engines)


def _check_gpu(config: Config, gpu: Gpu) -> None:
    """Refuse what these nodes cannot do, or only so slowly that nobody wants it."""
    for key, tensor in {
        "layout.tensor_parallel": config.layout.tensor_parallel,
        "engine.tensor_parallel": config.engine.tensor_parallel,
    }.items():
        if tensor > GPUS_PER_NODE:
            raise ConfigError(
                f"{key} {tensor} crosses nodes of {GPUS_PER_NODE} GPUs, where its exchanges in every layer would take"
                f" most of the time; set {GPUS_PER_NODE} or less"
            )
    if gpu.fp8_tflops is None and any(map(multiplies_fp8, config.fp8.kinds)):
        raise ConfigError(
            f"fp8 {config.fp8.kinds[0]} needs a GPU with FP8 matrix products, which {gpu.name} has not; set"
            " fp8.student=off and fp8.teacher=off, or another --gpu"
        )
    if gpu.fp8_tflops is None and config.engine.fp8 != "off":
        raise ConfigError(
            f"engine.fp8={config.engine.fp8} needs a GPU with FP8 matrix products, which {gpu.name} has not; set"
            " engine.fp8=off, or another --gpu"
        )


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
    if config.objective.has_teacher and config.teacher.kind != "live" and config.teacher.placement != "offloaded":
        tried["teacher.placement=offloaded"] = dataclasses.replace(
            config, teacher=dataclasses.replace(config.teacher, placement="offloaded")
        )
    count, tensor = config.engine.count, config.engine.tensor_parallel
    if count > 1:
        larger = dataclasses.replace(config.engine, count=count // 2, tensor_parallel=2 * tensor)
        words = f"engine.tensor_parallel={2 * tensor} engine.count={count // 2}"
        tried[words] = dataclasses.replace(config, engine=larger)
    for key in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        more = 2 * getattr(layout, key)
        with_layout(f"layout.{key}={more}", **{key: more})
    lines = []
    for words, changed in tried.items():
        try:
            other = plan(changed, hf_config, nodes, found.gpu, found.lengths, reach, found.sharing)
        except ConfigError:
            continue
        if other.fits:
            lines.append(f"{words}: {other.rank.total / 1e9:.1f} GB, {other.time.total:.0f} s a step")
    return lines


def suggest(
    config: Config,
    hf_config: Mapping[str, Any],
    nodes: int,
    gpu: Gpu,
    lengths: Lengths,
    reach: Reach,
    sharing: Sharing = Sharing.SEPARATE,
) -> list[Plan]:
    """Layouts of as many trainer ranks: those that fit, the shortest step first, then the smallest others."""
    gpus_of(config, nodes, sharing)  # no layout would help
    found = []
    for layout in _layouts(config.layout, hf_config):
        try:
            other = plan(dataclasses.replace(config, layout=layout), hf_config, nodes, gpu, lengths, reach, sharing)
        except ConfigError:
            continue
        found.append(other)

    def order(p: Plan) -> tuple[bool, float, float, int]:
        # Where generation takes longer than the trainer, the trainer's own time tells layouts apart.
        return (not p.fits, *((p.time.total, p.time.trainer) if p.fits else (0.0, 0.0)), p.rank.total)

    return sorted(found, key=order)


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
