"""What the site and the job say: the environment variables of slurm/site.env and slurm/job.sh, read strictly."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sdpo.config import ConfigError

PREFIX = "SDPO_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Each is the environment variable ``SDPO_`` and its name in capitals."""

    gpus_per_node: int = 0
    """0: nodes without GPUs."""
    ranks_per_node: int = 0
    """Trainer ranks of a node without GPUs; 0: all on one node."""
    fabric: str = ""
    """Interface whose address the other nodes use; empty: the address that the node's own name has."""
    nvidia_smi: str = "nvidia-smi"
    infiniband: str = "/sys/class/infiniband"
    """Where the kernel shows the adapters."""
    start_timeout_s: float = 300.0
    """How long nodes may need to show themselves."""
    node_timeout_s: float = 60.0
    """A node that has shown no life for so long is lost."""
    retries: int = 3
    """How many attempts in a row may end without a new checkpoint before the job is not started again."""
    measure: bool = True
    """Measure all-reduces before the roles start."""
    min_node_gb_s: float = 0.0
    """Least bus bandwidth of an all-reduce inside a node, 10^9 bytes a second; 0 measures only."""
    min_network_gb_s: float = 0.0
    """The same between two nodes."""
    min_sm_clock_mhz: int = 0
    """Least maximum clock that a GPU must allow: a lower one was capped by somebody."""
    dry_run: bool = False
    """Say what would be started where, and end."""


@dataclass(frozen=True, slots=True)
class Job:
    """This job, and this node's place in it."""

    run_dir: Path
    attempt: str
    """Example: ``attempt-002``"""
    node: str
    groups: tuple[tuple[str, ...], ...]
    """Names of the nodes, in order; two groups (trainers, engines) in a heterogeneous job, else one."""
    is_restart: bool
    """Slurm, or the job itself, has put it back into the queue."""

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node for group in self.groups for node in group)

    @property
    def is_first(self) -> bool:
        return self.node == self.nodes[0]


def read_site(environment: Mapping[str, str] = os.environ) -> Site:
    """ConfigError for a value of another kind; variables that are not set, or empty, take the default."""
    given: dict[str, Any] = {}
    for field in fields(Site):
        name = PREFIX + field.name.upper()
        text = environment.get(name, "")
        if text:
            given[field.name] = _value(name, text, type(field.default))
    return Site(**given)


def read_job(environment: Mapping[str, str] = os.environ) -> Job:
    """ConfigError where slurm/job.sh has not set what it sets."""
    needed = ("SDPO_RUN_DIR", "SDPO_ATTEMPT", "SDPO_NODES", "SLURMD_NODENAME")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not set; start this by slurm/job.sh inside a batch job")
    run_dir, attempt, nodes, own = (environment[name] for name in needed)
    groups = tuple(tuple(group.split(",")) for group in nodes.split())
    job = Job(Path(run_dir), attempt, own, groups, environment.get("SLURM_RESTART_COUNT", "0") != "0")
    if own not in job.nodes:
        raise ConfigError(f"node {own} is not among SDPO_NODES {nodes}")
    return job


def _value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("0", "1"):
            raise ConfigError(f"{name} is {text!r}; set it to 0 or 1")
        return text == "1"
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; set it to a number") from None
    if kind in (int, float) and not value >= 0:
        raise ConfigError(f"{name} is {text}; set it to 0 or more")
    return value
