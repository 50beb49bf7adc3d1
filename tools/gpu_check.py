"""Bring-up on one GPU: is what was written for it right there? A section a process, a table, and JSON.

    python tools/gpu_check.py [SECTION ...] [--json FILE] [--limit SECONDS] [--jobs 4]

Without names all sections run, ``--jobs`` at a time, each in a process of its own that is ended after ``--limit``
seconds, so that one that crashes or hangs leaves the others alone. Exit code 0 when every bound holds. Nothing is
downloaded; ``engines`` says so where no SGLang is installed. It wants a Hopper GPU, torch with CUDA, megatron-core and
Transformer Engine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECTIONS = {  # long ones first, so that none is left to run alone
    "environment": "gpu_sections.numerics:environment",
    "engines": "gpu_sections.engines:engines",
    "layouts": "gpu_sections.layouts:layouts",
    "minipipe": "gpu_sections.training:minipipe_plain",
    "minipipe-fp8": "gpu_sections.training:minipipe_fp8",
    "memory": "gpu_sections.training:memory",
    "linears": "gpu_sections.numerics:linears",
    "codes": "gpu_sections.numerics:codes",
    "learners": "gpu_sections.numerics:learners",
    "packed": "gpu_sections.numerics:packed",
    "teacher": "gpu_sections.numerics:teacher",
    "divergences": "gpu_sections.numerics:divergences",
    "checkpoints": "gpu_sections.training:checkpoints",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--within", metavar="SECTION", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        within(SECTIONS[arguments.within], arguments.json)
    else:
        sys.exit(check(arguments.sections or list(SECTIONS), SECTIONS, arguments, __file__))


def check(names: list[str], sections: dict[str, str], arguments: argparse.Namespace, program: str) -> int:
    """Run, print, write; 0 when all is well."""
    with ThreadPoolExecutor(arguments.jobs) as pool, tempfile.TemporaryDirectory() as folder:
        running = {n: pool.submit(run, program, n, Path(folder) / f"{n}.json", arguments.limit) for n in names}
        results = {}
        for name, future in running.items():
            results[name] = future.result()
            print(table(name, results[name]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    bad = [name for name, result in results.items() if not well(result)]
    print(
        f"{len(results) - len(bad)} of {len(results)} sections as they should be"
        + (f"; not {', '.join(bad)}" * bool(bad))
    )
    return int(bool(bad))


def well(result: dict[str, Any]) -> bool:
    return not result["error"] and all(finding["good"] is not False for finding in result["findings"])


def run(program: str, name: str, file: Path, limit: float) -> dict[str, Any]:
    """One section in a process of its own -> its findings, or what became of it."""
    began = time.perf_counter()
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, program, "--within", name, "--json", str(file)]
    try:
        ended = subprocess.run(command, env=environment, timeout=limit, capture_output=True, text=True)
        said = f"exit code {ended.returncode}: {ended.stderr[-1500:]}" if ended.returncode else ""
    except subprocess.TimeoutExpired as late:
        said = f"not finished after {limit:g} s: {(late.stderr or b'').decode(errors='replace')[-800:]}"
    result = {"findings": [], "error": ""} | (json.loads(file.read_text()) if file.exists() else {})
    return {**result, "error": result["error"] or said, "seconds": round(time.perf_counter() - began, 1)}


def within(path: str, file: Path) -> None:
    """In the process of a section."""
    import importlib

    result: dict[str, Any] = {"findings": [], "error": ""}
    module, _, function = path.partition(":")
    try:
        section: Callable[[], Any] = getattr(importlib.import_module(module), function)
        from gpu_sections.common import rows

        result["findings"] = rows(section())
    except Exception:
        result["error"] = traceback.format_exc()[-3000:]
    file.write_text(json.dumps(result))


def table(name: str, result: dict[str, Any]) -> str:
    lines = [f"== {name} ({result['seconds']} s)"]
    for finding in result["findings"]:
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding["good"]]
        found = finding["found"]
        shown = f"{found:.4g}" if isinstance(found, float) else str(found)
        lines.append(f"{mark}{finding['what']:72} {shown} {finding['bound']}")
    if result["error"]:
        lines.append(f"ERROR {result['error']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
