"""``megatron-sdpo doctor``: is this machine ready, and if not, what is to be done?

Each check (doctor_software.py, doctor_machine.py) looks at one thing and returns a ``Finding``; whatever may be slow or
harmful to import is looked at in a process of its own, with a time limit. A recipe says what is needed: without one,
what is merely absent is no fault.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sdpo.config import Config
from megatron_sdpo.sandbox.lending import ExecutesPrograms
from megatron_sdpo.tasks import task_class

State = Literal["ok", "warn", "fail", "absent"]
PROBE_S = 120.0
"""Time limit of a probe: a first import from a shared file system is slow."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Example: ``Finding("apex", "absent", "not installed", "only fused gradient accumulation needs it")``"""

    name: str
    state: State
    seen: str
    todo: str = ""
    """Empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What is asked of this machine."""

    config: Config | None
    """Of the recipe; None judges the machine alone."""
    run_dir: Path

    @property
    def gpus(self) -> int:
        """How many of this machine, one node of a job; 0 where a CPU will do: in fp32, at the size of a test."""
        if self.config is None or self.config.model.dtype == "float32":
            return 0
        engines = self.config.engine.count * self.config.engine.tensor_parallel
        return min(8, self.config.layout.world_size + engines)

    @property
    def fp8(self) -> tuple[str, ...]:
        """Kinds that Transformer Engine must do: blockwise, tensorwise."""
        kinds = self.config.fp8.kinds if self.config is not None else ()
        return tuple(kind for kind in kinds if kind != "emulated")

    @property
    def executes_programs(self) -> bool:
        return self.config is not None and issubclass(task_class(self.config.task.name), ExecutesPrograms)


Check = Callable[[Needs], Finding]


def examine(needs: Needs, checks: Sequence[Check]) -> list[Finding]:
    """In the order of the checks, which run two at a time. A check that breaks is a finding too."""

    def look(check: Check) -> Finding:
        try:
            return check(needs)
        except Exception as error:
            return Finding(check.__name__, "fail", f"the check itself failed: {error!r}", "report this as a defect")

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(look, checks))


def probe(program: str, timeout_s: float = PROBE_S) -> dict[str, Any]:
    """What a Python program prints last, as a JSON object; ``{"error": its last words}`` when it does not get there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = [line for line in done.stderr.splitlines() if line.strip()]
    how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {"error": words[-1].strip() if words else how}


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


def print_table(findings: Sequence[Finding]) -> None:
    """For people; colours only on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("", "what", "seen", "what to do"):
        table.add_column(name, overflow="fold", no_wrap=name in ("", "what"))
    for finding in findings:
        words = (finding.name, finding.seen, finding.todo)
        table.add_row(Text(finding.state, colours[finding.state]), *map(Text, words))
    Console().print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in colours}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))


def fails(findings: Sequence[Finding]) -> bool:
    return any(finding.state == "fail" for finding in findings)
