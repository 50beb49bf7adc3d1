"""Which node does what: one allocation split by node into trainers and engines. A pure function."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.cluster.site import Site


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node runs. Example: ``NodePlan("n2", ranks=range(8, 16), engines=range(0), is_coordinator=False)``"""

    name: str
    ranks: range
    """Trainer ranks; empty on nodes with engines."""
    engines: range
    is_coordinator: bool
    """Has the coordinator, and the router."""

    @property
    def has_trainers(self) -> bool:
        return len(self.ranks) > 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Trainer nodes come first: rank 0 is on the first node, where the batch script runs."""

    nodes: tuple[NodePlan, ...]

    @property
    def trainers(self) -> tuple[NodePlan, ...]:
        return tuple(node for node in self.nodes if node.has_trainers)

    def of(self, name: str) -> NodePlan:
        return next(node for node in self.nodes if node.name == name)


def split(config: Config, groups: Sequence[Sequence[str]], site: Site) -> Plan:
    """The roles of every node.

    ``groups`` are the nodes' names, in one group or, in a heterogeneous job, in two: trainers' and engines'. Raises
    ConfigError, with the numbers to ask for, when the recipe does not fill exactly these nodes.
    """
    _check_whole_run(config)
    ranks, engines = _ranks_per_node(config, site), _engines_per_node(config, site)
    world, count = config.layout.world_size, config.engine.count
    trainer_nodes, engine_nodes = -(-world // ranks), -(-count // engines)
    names = [name for group in groups for name in group]
    if len(names) != trainer_nodes + engine_nodes:
        raise ConfigError(
            f"the job has {len(names)} nodes, but the recipe needs {trainer_nodes} for {world} trainer ranks and"
            f" {engine_nodes} for {count} engines; submit with --nodes={trainer_nodes + engine_nodes}, or change"
            " layout.world_size or engine.count"
        )
    if len(groups) > 1 and [len(group) for group in groups] != [trainer_nodes, engine_nodes]:
        raise ConfigError(
            f"the heterogeneous job has {' + '.join(str(len(group)) for group in groups)} nodes, but the recipe needs"
            f" {trainer_nodes} for trainers + {engine_nodes} for engines"
        )
    nodes: list[NodePlan] = []
    for i, name in enumerate(names):
        if i < trainer_nodes:
            nodes.append(NodePlan(name, range(i * ranks, min((i + 1) * ranks, world)), range(0), False))
        else:
            first = (i - trainer_nodes) * engines
            held = range(first, min(first + engines, count))
            nodes.append(NodePlan(name, range(0), held, is_coordinator=i == trainer_nodes))
    return Plan(tuple(nodes))


def _check_whole_run(config: Config) -> None:
    for key, half in (("from_journal", config.debug.from_journal), ("rollout_only", config.debug.rollout_only)):
        if half:
            raise ConfigError(f"debug.{key} runs on one machine; leave it out, or use megatron-sdpo train")
    for key, given in (
        ("engine.release_memory", config.engine.release_memory),
        ("publish.backend=ipc", config.publish.backend == "ipc"),
    ):
        if given:
            raise ConfigError(
                f"{key} is for engines on the trainer's own GPUs, but a job has nodes for each; leave it out, or use"
                " megatron-sdpo train on one node"
            )


def _ranks_per_node(config: Config, site: Site) -> int:
    world = config.layout.world_size
    held = site.gpus_per_node or site.ranks_per_node or world
    if world > held and world % held:
        raise ConfigError(
            f"layout.world_size {world} does not fill nodes of {held} trainer ranks each; set it to a multiple"
        )
    return min(held, world)


def _engines_per_node(config: Config, site: Site) -> int:
    """On nodes without GPUs all engines share one node."""
    if not site.gpus_per_node:
        return config.engine.count
    held = site.gpus_per_node // config.engine.tensor_parallel
    if held == 0:
        raise ConfigError(
            f"engine.tensor_parallel {config.engine.tensor_parallel} is more than the {site.gpus_per_node} GPUs of a"
            f" node; set it to {site.gpus_per_node} or fewer"
        )
    return held
