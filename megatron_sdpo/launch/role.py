"""How the process of a coordinator or a trainer rank begins and ends, whatever it does in between."""

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout import lifeline


def play(role: str, run: Callable[[RunDir], None]) -> None:
    """``run`` in the run directory that the command line names; its failure is left there for whoever started us."""
    lifeline.tie_to_parent()
    run_dir = RunDir(Path(sys.argv[1]))
    try:
        run(run_dir)
    except Exception as failure:
        run_dir.report_failure(role, failure)
        raise
