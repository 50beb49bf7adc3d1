"""One step of an experiment, where its job runs: after those that it needs, and with its end left in a file.

``python -m megatron_sdpo.launch.nemo_step --record R/nemo/train.json --after R/nemo/convert.json -- train minipipe``

Schedulers disagree on what happens to a step whose predecessor failed (NeMo-Run's local executor starts it), and exit
codes get lost on the way (srun gives the largest of all tasks); a file in the run directory does neither.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import msgspec

from megatron_sdpo.rollout import lifeline

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Record(msgspec.Struct, frozen=True):
    """How a step ended. Example: ``Record(["train", "minipipe"], 0, 412.7)``. While it runs, exit_code is None."""

    command: list[str]
    exit_code: int | None = None
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode(self))
        temporary.replace(path)


def read_record(path: Path) -> Record | None:
    """None when the step has not begun."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="where the end is written")
    parser.add_argument("--after", type=Path, action="append", default=[], help="records that must say success")
    parser.add_argument("--once", action="store_true", help="do nothing when the record says that it is done")
    parser.add_argument("--output", type=Path, help="also keep standard output here")
    parser.add_argument("--module", default="megatron_sdpo.cli", help="what takes the command")
    parser.add_argument("--ended", type=int, metavar="CODE", help="record that the command ended so, and run nothing")
    parser.add_argument("--check", action="store_true", help="record that the command begins, and run nothing")
    parser.add_argument("command", nargs="+")
    parsed = parser.parse_args(arguments)
    if parsed.ended is not None:
        return _record(parsed.record, Record(parsed.command, parsed.ended))
    for path in parsed.after:
        before = read_record(path)
        if before is None or before.exit_code != 0:
            how = "has not finished" if before is None or before.exit_code is None else f"failed ({before.exit_code})"
            print(f"error: {path.stem} {how}, so {parsed.record.stem} is not run; see {path}", file=sys.stderr)
            return _record(parsed.record, Record(parsed.command, 2))
    done = read_record(parsed.record)
    if parsed.once and done is not None and done.exit_code == 0 and done.command == parsed.command:
        print(f"{parsed.record.stem} is done already")
        return 0
    began = time.perf_counter()
    _record(parsed.record, Record(parsed.command))
    if parsed.check:
        return 0
    code = _run([sys.executable, "-m", parsed.module, *parsed.command], parsed.output)
    return _record(parsed.record, Record(parsed.command, code, time.perf_counter() - began))


def _record(path: Path, record: Record) -> int:
    """One node of a job of several writes, the first: its roles are told when those of another fail."""
    if os.environ.get("SLURM_PROCID", "0") == "0":
        record.save(path)
    return record.exit_code or 0


def _run(command: Sequence[str], output: Path | None) -> int:
    """The exit code, 128 + n for signal n as shells have it; signals to this process go on to the command."""
    own = os.getpid()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE if output else None,
        start_new_session=True,  # a signal to this process's group would come twice
        preexec_fn=lambda: lifeline.end_with(own),
    ) as process:
        with _passed_on(process):
            if output is not None and process.stdout is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                temporary = output.with_name(f".{output.name}.{os.getpid()}")
                with temporary.open("wb") as file:
                    for line in process.stdout:
                        file.write(line)
                        sys.stdout.buffer.write(line)
                        sys.stdout.flush()
            code = process.wait()
    if output is not None:
        if code == 0:
            temporary.replace(output)
        else:
            temporary.unlink()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
