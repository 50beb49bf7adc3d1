"""The runner of tools/gpu_check.py: sections apart from each other, broken bounds told; no GPU is needed for that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parent.parent / "tools" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU: the tool itself is the check")
def test_one_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(TOOL), "divergences", "environment", "--json", str(found), "--jobs", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert "1 of 2 sections as they should be; not environment" in ended.stdout
    results = json.loads(found.read_text())
    assert "transformer_engine" in results["environment"]["error"]
    assert not results["divergences"]["error"]
    bounded = [finding for finding in results["divergences"]["findings"] if finding["good"] is not None]
    assert len(bounded) == 10 and all(finding["good"] for finding in bounded)


def test_a_broken_bound_a_crash_and_a_late_section_are_told(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys, time\n"
        "name, file = sys.argv[2], sys.argv[4]\n"
        "good = {'what': 'x', 'found': 2.0, 'bound': '<= 1', 'good': False}\n"
        "if name == 'bound': open(file, 'w').write(json.dumps({'findings': [good], 'error': ''}))\n"
        "if name == 'crash': os.abort()\n"
        "if name == 'late': time.sleep(60)\n"
    )
    from gpu_check import run, table, well

    bound, crash, late = (
        run(str(program), name, tmp_path / f"{name}.json", limit)
        for name, limit in (("bound", 60.0), ("crash", 60.0), ("late", 0.5))
    )
    assert not any(map(well, (bound, crash, late)))
    assert "BAD x" in table("bound", bound)
    assert "exit code -6" in table("crash", crash)
    assert "not finished after 0.5 s" in table("late", late)
