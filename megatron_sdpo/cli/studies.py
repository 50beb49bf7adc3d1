"""``study``: a scaling study's runs, and what they say."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sdpo.cli.configuring import RAW, Commands
from megatron_sdpo.config import ConfigError
from recipes import studies
from recipes import study as study_of

if TYPE_CHECKING:
    from megatron_sdpo.scaling.runs import Manifest


def add_study(commands: Commands) -> None:
    command = commands.add_parser(
        "study",
        formatter_class=RAW,
        help="a scaling study: sizes x algorithms x seeds, run or listed, and the laws that their scores follow",
        description="Run a study's cells that are not finished, then write study.html, study.png and findings.json.\n"
        "The same command continues. With --list or --slurm nothing is started; with --report nothing is run.",
    )
    command.add_argument("study", help=f"one of: {', '.join(sorted(studies()))}; or module:NAME")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for every cell, e.g. steps=100")
    for name, what in (("arms", "algorithms"), ("sizes", "sizes"), ("seeds", "seeds")):
        command.add_argument(f"--{name}", default="", metavar="A,B", help=f"only these {what}")
    command.add_argument("--out", type=Path, help="the study's folder (default: runs/STUDY)")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="each cell, how far it got, and its command")
    instead.add_argument("--slurm", action="store_true", help="an sbatch command for each cell that is not finished")
    instead.add_argument("--report", action="store_true", help="only read what is there")
    command.set_defaults(run=study)


def study(arguments: argparse.Namespace) -> None:
    """List, queue or run; then report."""
    from megatron_sdpo.scaling.runs import FILE, read_manifest, steps_done  # loads numpy

    chosen = study_of(arguments.study)
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs is {arguments.jobs}; it must be at least 1")
    folder = arguments.out or Path("runs") / chosen.name
    if arguments.report and (folder / FILE).exists():
        _report(folder, read_manifest(folder))
        return
    from megatron_sdpo.launch import studies as launching  # loads torch

    arms, sizes = (_words(text) for text in (arguments.arms, arguments.sizes))
    cells = chosen.cells(str(folder), arms, sizes, _seeds(arguments.seeds), arguments.overrides)
    manifest = launching.manifest_of(chosen, cells, folder)
    if arguments.report:  # of runs that were started one by one
        _report(folder, manifest)
        return
    if arguments.list:
        for cell in cells:
            state = f"{steps_done(folder, cell)}/{manifest.steps[cell.name]} steps"
            print(f"{state:14} {cell.name:24} {launching.local_line(cell)}")
        return
    manifest.save(folder)
    if arguments.slurm:
        waiting = [cell for cell in cells if not launching.is_finished(folder, manifest, cell)]
        print("\n".join(map(launching.slurm_line, waiting)))
        return
    try:
        failed = launching.run_here(manifest, cells, folder, arguments.jobs)
    except launching.StudyStopped as stopped:
        print(str(stopped), file=sys.stderr)
        sys.exit(128 + stopped.number)
    _report(folder, manifest)
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
        sys.exit(1)


def _report(folder: Path, manifest: "Manifest") -> None:
    from megatron_sdpo.scaling.study_page import findings_lines, write_study  # loads matplotlib

    page, findings = write_study(folder, manifest)
    print("\n".join(findings_lines(findings)))
    print(page)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; give whole numbers with commas between, as 0,1,2") from None
