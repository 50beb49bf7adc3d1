"""All-reduces in every node and between neighbours: ``torchrun ... -m megatron_sdpo.launch.cluster.bandwidth ATTEMPT``.

gloo between CPUs, NCCL between GPUs (not yet run on a GPU). Each node's first rank writes what it measured.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sdpo.launch.cluster.attempt import Attempt
from megatron_sdpo.rollout import lifeline

CPU_BYTES, GPU_BYTES = 16 * 2**20, 512 * 2**20
ROUNDS = 5
TIMEOUT_S = 120.0


def main(attempt: Attempt) -> None:
    """Every rank of every node, in step."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    own, held = dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    node, nodes = own // held, dist.get_world_size() // held
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, os.environ["SLURMD_NODENAME"])
    device = "cuda" if gpu else "cpu"
    inside = None
    if held > 1:
        for i in range(nodes):  # all ranks make all groups
            group = dist.new_group(list(range(i * held, (i + 1) * held)))
            if i == node:
                inside = _gb_s(group, held, device)
    pairs: dict[str, float] = {}
    for first in (0, 1):  # disjoint pairs at a time
        for i in range(first, nodes - 1, 2):
            group = dist.new_group(list(range(i * held, (i + 2) * held)))
            if node in (i, i + 1):
                other = i + 1 if node == i else i
                pairs[names[other * held]] = _gb_s(group, 2 * held, device)
    if own % held == 0:
        attempt.write(f"measured/{names[own]}.json", {"inside": inside, "pairs": pairs})
    dist.barrier()
    dist.destroy_process_group()


def _gb_s(group: Any, ranks: int, device: str) -> float:
    """Bus bandwidth, the best of some rounds."""
    size = GPU_BYTES if device == "cuda" else CPU_BYTES
    numbers_N = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(ROUNDS):
        dist.barrier(group=group)
        began = time.perf_counter()
        dist.all_reduce(numbers_N, group=group)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * (ranks - 1) / ranks * size / (time.perf_counter() - began) / 1e9)
    return best


if __name__ == "__main__":
    lifeline.tie_to_parent()
    main(Attempt(Path(sys.argv[1])))
