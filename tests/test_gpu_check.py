"""The runner of tools/gpu_check.py: sections apart from each other, broken bounds told; no GPU is needed for that."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_time_of_kernels_is_put_together_by_operator_and_by_kind() -> None:
    from gpu_sections.kernels import by_kind, longest, summed

    def on_gpu(name: str, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        time_range, device = SimpleNamespace(elapsed_us=lambda: microseconds), SimpleNamespace(name="CUDA")
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=time_range)

    def operator(name: str, *kernels: tuple[str, float]) -> SimpleNamespace:
        launched = [SimpleNamespace(name=kernel, duration=microseconds) for kernel, microseconds in kernels]
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name="CPU"), kernels=launched)

    events = [
        *(on_gpu("void nvjet_tst<8>", t) for t in (60.0, 20.0)),
        on_gpu("void at::elementwise<int>", 15.0),
        on_gpu("quantize_kernel", 5.0),
        on_gpu("a range of the profiler's user", 1000.0, annotation=True),
        operator("aten::mm", ("void nvjet_tst<8>", 60.0)),
        operator("aten::copy_", ("void at::elementwise<int>", 15.0)),
    ]
    found = summed(events)
    assert [(one.operator, one.count, one.microseconds) for one in found] == [
        ("aten::mm", 1, 60.0),
        ("", 1, 20.0),
        ("aten::copy_", 1, 15.0),
        ("", 1, 5.0),
    ]
    assert by_kind(found) == {"products": 80.0, "copies": 15.0, "quantising, transposing": 5.0}
    name, shown = longest(found)[0]
    assert name == "nvjet_tst<8>" and "60.0%" in shown and "by aten::mm" in shown


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engines_are_published_to_by_every_way_of_this_machine() -> None:
    from gpu_sections.engines import engines

    found = {one.what: one for one in engines()}
    for fp8 in ("off", "blockwise"):
        for backend in ("ipc", "gloo"):
            assert found[f"{backend}, engine's fp8 {fp8}: probe gap"].good is True
    sizes = [float(str(found[f"ipc, engine's fp8 {fp8}: MB, s"].found).split(",")[0]) for fp8 in ("off", "blockwise")]
    assert 0.5 < sizes[1] / sizes[0] < 0.7  # embedding and head stay as they are


def test_the_sections_measure_what_they_say_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_sections import last_layer, publishing

    monkeypatch.setattr(last_layer, "CHUNKS", (64,))
    own, added = last_layer.memory_of(last_layer.LastLayer(256, 64, 3001, 20))[1:3]
    assert float(str(own.found).split(", ")[1]) > 0.2 and added.good is True

    weights = [(f"model.layers.{i}.mlp.up_proj.weight", torch.randn(130, 96).bfloat16()) for i in range(3)]
    found = publishing.rates({"num_hidden_layers": 3}, [lambda: weights[:2], lambda: weights[2:]])
    assert str(found[0].found) == f"{3 * 130 * 96 * 2}, 2, 3" and len(found) == 10
    assert all(float(str(one.found).split(", ")[0]) > 0 for one in found[1:])
