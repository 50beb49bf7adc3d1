"""Worker of test_stragglers.py: phases in which one rank burns more CPU before all meet. Argument: run directory."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sdpo.config import LayoutConfig, RanksConfig, apply_overrides
from megatron_sdpo.launch.stragglers import OwnWork, StragglerLog
from megatron_sdpo.mcore.groups import initialize, shutdown
from megatron_sdpo.phases import Phases
from megatron_sdpo.tracking import Tracker
from recipes.minipipe import minipipe

STEPS, RANKS = 7, 2
USUAL_S, SLOW_S = 0.1, 0.4
"""CPU seconds of a phase, and of the slow rank in training from the second step on."""


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def main() -> None:
    groups = initialize(LayoutConfig(world_size=RANKS), seed=0, timeout_s=60)
    work = OwnWork()
    tracker = Tracker(apply_overrides(minipipe(), [f"steps={STEPS}"]), Path(sys.argv[1]), groups.rank == 0)
    rows = StragglerLog(RanksConfig(slow_share=0.5, slow_steps=3), groups, work, tracker)
    phases = Phases([work])
    rows.log(0, {"eval/accuracy": 0.5})  # before any step
    for step in range(STEPS):
        for name in ("wait", "score_student", "train"):
            with phases(name):
                slow = name == "train" and groups.rank == 1 and step > 0
                burn((SLOW_S if slow else USUAL_S) if name != "wait" else 0.3 * (groups.rank == 0))
                dist.all_reduce(torch.zeros(1), group=groups.world)  # leaves when the slow rank does
        rows.log(step + 1, phases.taken())
    tracker.close()
    shutdown()


if __name__ == "__main__":
    main()
