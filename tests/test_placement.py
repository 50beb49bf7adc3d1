"""Where the teacher's weights are changes memory, and no number; and no copy of them is ever old."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from megatron_sdpo import teacher as teacher_module
from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.teacher import TeacherWeights, on_host
from tests.dist_placement import CASES, PLACEMENTS, check_case, check_never_stale
from tests.launch import run_ranks
from tests.learner_setup import write_models
from tools.live_memory import LiveMemory, peak_bytes

Placement = Literal["swapped", "resident", "offloaded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    write_models(folder, models={"llama": 2, "qwen3_moe": 2})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_to_the_bit(folder: Path, groups: ParallelGroups, case: str) -> None:
    check_case(folder, case, groups, LayoutConfig())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_copy_is_ever_old(folder: Path, groups: ParallelGroups, placement: str, tmp_path: Path) -> None:
    check_never_stale(folder, placement, groups, LayoutConfig(), tmp_path)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(("dp2-overlap",), id="divided"),
        pytest.param(("dp2ep2-overlap",), id="experts", marks=pytest.mark.slow),
        pytest.param(("dp2-do", "tp2-sp", "pp2vp2"), id="more", marks=pytest.mark.slow),
    ],
)
def test_under_layouts(folder: Path, layouts: tuple[str, ...]) -> None:
    run_ranks("dist_placement.py", 2, [str(folder), *layouts], timeout=450)


def _model(dtype: torch.dtype, device: str = "cpu") -> tuple[list[nn.Parameter], list[Tensor], int]:
    """Parameters, their fp32 masters, and how many numbers they are."""
    generator = torch.Generator().manual_seed(1)
    masters = [torch.randn(size, generator=generator).to(device) for size in ((64, 32), (7,), (128, 64), (64,))]
    parameters = [nn.Parameter(master.to(dtype, copy=True)) for master in masters]
    return parameters, masters, sum(master.numel() for master in masters)


@pytest.mark.parametrize(
    ("placement", "dtype", "beside", "during", "on_the_host"),
    [
        ("swapped", torch.bfloat16, 4, 6, 0),
        ("resident", torch.bfloat16, 6, 6, 0),
        ("offloaded", torch.bfloat16, 4, 6, 6),
        ("swapped", torch.float32, 4, 4, 0),
        ("resident", torch.float32, 4, 4, 0),
        ("offloaded", torch.float32, 4, 8, 8),
    ],
)
def test_bytes_beside_the_model(
    monkeypatch: pytest.MonkeyPatch,
    placement: Placement,
    dtype: torch.dtype,
    beside: int,
    during: int,
    on_the_host: int,
) -> None:
    """Bytes a weight, between passes and within one; and how many of the latter are host memory."""
    parameters, masters, count = _model(dtype)
    hosted: list[Tensor] = []

    def watched(x: Tensor, to: torch.dtype | None = None) -> Tensor:
        hosted.append(on_host(x, to))
        return hosted[-1]

    monkeypatch.setattr(teacher_module, "on_host", watched)
    with LiveMemory() as memory:
        teacher = TeacherWeights(masters, "ema", 0.5, placement)
        with teacher.swapped_in(parameters):
            pass
        del hosted[len(masters) if placement == "offloaded" else 0 :]
        between = memory.live
        with teacher.swapped_in(parameters):
            within, held = memory.live, sum(x.nbytes for x in hosted)
        hosted.clear()
    assert (between, within, held) == (beside * count, during * count, on_the_host * count)
    assert memory.peak == within


def test_a_resident_copy_is_made_once_an_update() -> None:
    parameters, masters, count = _model(torch.bfloat16)
    teacher = TeacherWeights(masters, "ema", 0.5, "resident")
    with LiveMemory() as memory:
        addresses = []
        for _ in range(3):
            with teacher.swapped_in(parameters):
                addresses.append([p.data_ptr() for p in parameters])
        assert memory.live == 2 * count
        assert addresses[0] == addresses[1] == addresses[2]
        teacher.update([torch.zeros_like(master) for master in masters])
        with teacher.swapped_in(parameters):
            assert all(torch.equal(p, (m / 2).bfloat16()) for p, m in zip(parameters, masters, strict=True))
            assert memory.live == 2 * count


def test_a_write_behind_the_copys_back_is_refused() -> None:
    parameters, masters, _ = _model(torch.bfloat16)
    teacher = TeacherWeights(masters, "frozen", placement="resident")
    kept = teacher.tensors
    with teacher.swapped_in(parameters):
        pass
    kept[0].zero_()
    with pytest.raises(RuntimeError, match="changed through tensors asked for before"), teacher.swapped_in(parameters):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_weights_leave_the_device_empty(dtype: torch.dtype) -> None:
    """Pinned host memory, at most one fp32 tensor and its average on the device at a time."""
    parameters, masters, _ = _model(dtype, "cuda")
    device, largest = parameters[0].device, max(master.nbytes for master in masters)
    before = torch.cuda.memory_allocated()
    teacher = TeacherWeights(masters, "ema", 0.5, "offloaded")
    assert all(tensor.is_pinned() for tensor in teacher.tensors)

    def swap() -> None:
        with teacher.swapped_in(parameters):
            assert torch.cuda.memory_allocated() == before

    assert peak_bytes(swap, device) <= 2 * largest
    assert peak_bytes(lambda: teacher.update(masters), device) <= 2 * largest
    reference = TeacherWeights(masters, "ema", 0.5)
    reference.update(masters)
    assert all(torch.equal(a.cuda(), b) for a, b in zip(teacher.tensors, reference.tensors, strict=True))
