"""Ranks that disagree refuse to start: one configuration, one copy of the code, one set of versions.

On many nodes each rank reads the run directory, this package and its libraries from wherever its node has them. A rank
with another learning rate or another loss would train without any error, into nonsense. So before the model is built
every rank tells the others what it has: at first only a digest of it, and all of it when the digests differ.
"""

import dataclasses
import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_sdpo
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.launch.run_dir import leaves
from megatron_sdpo.mcore.checkpoint import versions

NAMED = 8
"""At most so many ranks, and so many differences of a rank, are named one by one."""

Facts = dict[str, str]
"""What one rank has: ``{"optim.lr": "1e-05", "loop.py": "3f2a…", "torch": "2.13.0"}``"""


def check_agreement(config: Config) -> None:
    """Raise the same ConfigError on every rank when one of them has something else than most.

    All ranks call this, once torch.distributed has started and before anything depends on the configuration.
    """
    mine = facts(config, Path(megatron_sdpo.__file__ or "").parent)
    digests = _everywhere(_digest(mine))
    if len(set(digests)) > 1:
        raise ConfigError(disagreement(_everywhere((socket.gethostname(), mine))))


def facts(config: Config, package: Path) -> Facts:
    """Every configuration key, every .py file below ``package`` and every version, under names that differ."""
    keys = {key: json.dumps(value) for key, value in leaves(dataclasses.asdict(config)).items()}
    code = {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }
    return keys | code | versions()


def disagreement(held: Sequence[tuple[str, Facts]]) -> str:
    """One sentence about the ranks that have something else than most; ``held`` are (host, facts) in order of rank.

    Where two sets are held by as many ranks, the one that the lowest rank holds counts as what most have.
    """
    digests = [_digest(facts) for _, facts in held]
    usual, _ = max(Counter(digests).items(), key=lambda item: (item[1], -digests.index(item[0])))
    _, most = held[digests.index(usual)]
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    told = "; ".join(f"rank {rank} on {held[rank][0]} has {_differences(held[rank][1], most)}" for rank in odd[:NAMED])
    more = f"; {len(odd) - NAMED} more ranks differ too" if len(odd) > NAMED else ""
    return (
        f"{len(odd)} of {len(held)} trainer ranks do not have what the others have: {told}{more}; give all ranks"
        " one configuration, one copy of the code and the same versions"
    )


def _differences(own: Mapping[str, str], others: Mapping[str, str]) -> str:
    names = [name for name in sorted(own.keys() | others.keys()) if own.get(name) != others.get(name)]
    told = ", ".join(_difference(name, own.get(name), others.get(name)) for name in names[:NAMED])
    return told + (f" and {len(names) - NAMED} more differences" if len(names) > NAMED else "")


def _difference(name: str, own: str | None, others: str | None) -> str:
    if not name.endswith(".py"):
        return f"{name} {own or 'not at all'} where others have {others or 'none'}"
    if own is None:
        return f"no file {name}"
    return f"an unknown file {name}" if others is None else f"another content of the file {name}"


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _everywhere(value: Any) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
