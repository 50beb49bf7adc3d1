"""teacher.py: the average in closed form, and a swap that leaves no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_sdpo.teacher import TeacherWeights, ema_update, mixed_logits


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def assert_all_equal(a: Any, b: Any) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_ema_closed_form(rate: float) -> None:
    """A teacher at 0 after n steps towards a constant 1 stands at 1 - (1 - rate)^n."""
    teacher, student = [torch.zeros(4), torch.zeros(2, 3)], [torch.ones(4), torch.ones(2, 3)]
    for step in range(1, 51):
        ema_update(teacher, student, rate)
        for tensor in teacher:
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1 - (1 - rate) ** step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1.0, 3.0), (0.25, 1.5)])
def test_ema_direction(rate: float, expected: float) -> None:
    teacher, student = [torch.tensor([1.0])], [torch.tensor([3.0])]
    address = teacher[0].data_ptr()
    ema_update(teacher, student, rate)
    assert teacher[0].item() == expected and teacher[0].data_ptr() == address
    assert student[0].item() == 3.0


def test_ema_of_a_bf16_student_moves_below_bf16_resolution() -> None:
    teacher, student = [torch.ones(3)], [torch.full((3,), 1.0078125, dtype=torch.bfloat16)]  # the next bf16 after 1
    ema_update(teacher, student, 0.01)
    torch.testing.assert_close(teacher[0], torch.full((3,), 1.000078125), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("teacher", "student", "rate", "message"),
    [
        ([torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(1)], 0.5, "tensor 1 is .3,. in the teacher"),
        ([torch.ones(2)], [torch.zeros(2), torch.zeros(2)], 0.5, "the teacher has 1 tensors and the student 2"),
        ([torch.ones(2), torch.ones(2).bfloat16()], [torch.zeros(2)] * 2, 0.5, "teacher tensor 1 is torch.bfloat16"),
        ([torch.ones(2)], [torch.zeros(2)], 1.5, "update_rate is 1.5"),
    ],
)
def test_ema_refuses_before_it_writes(teacher: Any, student: Any, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema_update(teacher, student, rate)
    assert all((tensor == 1).all() for tensor in teacher)


# ------------------------------------------------------------------------------------------------ kinds


def test_kinds_follow_or_stay() -> None:
    weights = [torch.zeros(3)]
    teachers = {kind: TeacherWeights(weights, kind, 0.25) for kind in ("ema", "frozen", "live")}
    for teacher in teachers.values():
        teacher.update([torch.ones(3)])
    assert_all_equal(teachers["ema"].tensors, [torch.full((3,), 0.25)])
    assert_all_equal(teachers["frozen"].tensors, [torch.zeros(3)])
    assert teachers["live"].tensors == []
    assert_all_equal(weights, [torch.zeros(3)])  # the teacher holds copies


def test_copies_are_fp32() -> None:
    (tensor,) = TeacherWeights([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], "ema").tensors
    assert tensor.dtype == torch.float32 and not tensor.requires_grad


# ------------------------------------------------------------------------------------------------- swap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ema", "frozen", "live"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_swap_shows_the_teacher_and_leaves_no_trace(dtype: torch.dtype, kind: Any, raises: bool) -> None:
    student, other = model(dtype, seed=0), model(dtype, seed=1)
    parameters = list(student.parameters())
    before, addresses = copies(parameters), [p.data_ptr() for p in parameters]
    teacher = TeacherWeights(list(other.parameters()), kind)
    kept = copies(teacher.tensors)  # pyright: ignore[reportArgumentType]
    x = torch.randn(4, 5, dtype=dtype)
    shown = student if kind == "live" else other
    try:
        with torch.no_grad(), teacher.swapped_in(parameters):
            assert torch.equal(student(x), shown(x))
            assert all(p.dtype == dtype for p in parameters)
            if raises:
                raise KeyError("inside")
    except KeyError:
        assert raises
    assert_all_equal(parameters, before)
    assert [p.data_ptr() for p in parameters] == addresses
    assert_all_equal(list(student.parameters()), before)
    assert_all_equal(teacher.tensors, kept)
    with teacher.swapped_in(parameters):  # and it can be done again
        pass


def test_fp32_parameters_borrow_the_teachers_storage() -> None:
    parameters = list(model().parameters())
    teacher = TeacherWeights(parameters, "ema")
    with teacher.swapped_in(parameters):
        assert [p.data_ptr() for p in parameters] == [t.data_ptr() for t in teacher.tensors]


def test_a_parameter_that_is_a_view_of_a_buffer_returns_to_it() -> None:
    """As Megatron keeps parameters: slices of one flat buffer."""
    buffer = torch.arange(6.0)
    parameters = [nn.Parameter(buffer[:2]), nn.Parameter(buffer[2:].view(2, 2))]
    teacher = TeacherWeights(parameters, "ema")
    teacher.update([torch.zeros(2), torch.zeros(2, 2)])
    with teacher.swapped_in(parameters):
        assert torch.equal(buffer, torch.arange(6.0))
    buffer += 1.0
    assert_all_equal(parameters, [torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])])


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_a_swap_inside_a_swap_is_refused(kind: Any) -> None:
    parameters = list(model().parameters())
    before = copies(parameters)
    teacher = TeacherWeights(parameters, kind)
    with teacher.swapped_in(parameters):
        with pytest.raises(RuntimeError, match="cannot be nested"), teacher.swapped_in(parameters):
            pass
        with pytest.raises(RuntimeError, match="after the swap"):
            teacher.update(before)
    assert_all_equal(parameters, before)


def test_a_teacher_of_another_model_is_refused() -> None:
    parameters = list(model().parameters())
    before = copies(parameters)
    teacher = TeacherWeights([torch.zeros(2)], "frozen")
    with pytest.raises(ValueError, match="the teacher has 1 tensors"), teacher.swapped_in(parameters):
        pass
    assert_all_equal(parameters, before)


def test_mixed_logits_by_hand() -> None:
    """(0.8, 0.2) and (0.2, 0.8): a quarter of the way, 4^(3/4 - 1/4) = 2 to one."""
    initial_NV, student_NV = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
    mixed_NV = mixed_logits(initial_NV, student_NV, 0.25)
    torch.testing.assert_close(mixed_NV.softmax(dim=1), torch.tensor([[2 / 3, 1 / 3]]))
    assert torch.equal(mixed_logits(initial_NV, student_NV, 0.0), initial_NV)
    assert torch.equal(mixed_logits(initial_NV, student_NV, 1.0), student_NV)
    assert mixed_logits(initial_NV.bfloat16(), student_NV.bfloat16(), 0.5).dtype == torch.float32
