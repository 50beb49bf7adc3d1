"""fused.py and the objective through it, against whole logits in float64: any chunks, 1, 2 and 4 ranks, memory."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo import objective, vocabulary
from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.divergence import divergence, sampled_log_probs, student_support, support_log_probs
from megatron_sdpo.fused import Head, fused_divergence, fused_loss, scored
from megatron_sdpo.objective import TokenTargets
from tests.test_objective import CONFIGS
from tools.live_memory import LiveMemory

TOKENS, VOCABULARY, HIDDEN, K, TEMPERATURE = 12, 32, 7, 6, 0.7
SIZES = (1, 2, 4)
WORLD = 4


@dataclasses.dataclass(frozen=True)
class Case:
    hidden_TH: Tensor
    weight_VH: Tensor
    targets: TokenTargets
    """With everything that any kind needs; two tokens have no weight in SDPO's sum, one has none at all."""
    teacher_VH: Tensor

    def shard(self, columns: slice) -> "Case":
        """What a rank with these entries of the vocabulary has."""
        return dataclasses.replace(self, weight_VH=self.weight_VH[columns], teacher_VH=self.teacher_VH[columns])


def make_case(tokens: int = TOKENS, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Case:
    """The policy a little away from where the batch began, and the teacher a little further."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_TH, weight_VH = normal(tokens, HIDDEN), normal(vocabulary, HIDDEN)
    teacher_TH, teacher_VH = hidden_TH + 0.4 * normal(tokens, HIDDEN), weight_VH + 0.1 * normal(vocabulary, HIDDEN)
    old_TV = Head(weight_VH, TEMPERATURE).logits(hidden_TH + 0.1 * normal(tokens, HIDDEN))
    ids_TK = student_support(old_TV, K)
    response_ids_T = torch.randint(vocabulary, (tokens,), generator=generator)
    old_T = sampled_log_probs(old_TV, response_ids_T)
    weights_T = torch.rand(tokens, generator=generator) + 0.1
    policy_weights_T = torch.linspace(0.2, 0.4, tokens)
    weights_T[2:4] = policy_weights_T[3:4] = 0.0
    teacher_TV = Head(teacher_VH, TEMPERATURE).logits(teacher_TH)
    targets = TokenTargets(
        response_ids_T=response_ids_T,
        weights_T=weights_T,
        policy_weights_T=policy_weights_T,
        old_log_probs_T=old_T,
        engine_log_probs_T=old_T + 0.3 * normal(tokens),
        support_ids_TK=ids_TK,
        teacher_log_probs_TK=support_log_probs(teacher_TV, ids_TK, with_tail=True),
        teacher_hidden_TH=teacher_TH,
        advantages_T=normal(tokens),
        teacher_advantages_T=normal(tokens),
        reference_log_probs_T=old_T + normal(tokens),
    )
    return Case(hidden_TH.to(dtype), weight_VH.to(dtype), targets, teacher_VH)


Found = dict[str, Any]


def fused(case: Case, config: ObjectiveConfig, chunk: int, group: Any = None) -> Found:
    """Loss, metrics and both gradients, of three times the loss."""
    hidden_TH, weight_VH = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    head, teacher_head = (Head(x_VH, TEMPERATURE, group, chunk) for x_VH in (weight_VH, case.teacher_VH))
    value, metrics = objective.loss_of_hidden(hidden_TH, head, case.targets, config, teacher_head)
    (3.0 * value).backward()
    return {"value": value.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad, **metrics}


def whole(case: Case, config: ObjectiveConfig, dtype: torch.dtype = torch.float64) -> Found:
    """The same of whole logits, by autograd."""
    hidden_TH, weight_VH = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden_TH, case.weight_VH))
    assert case.targets.teacher_hidden_TH is not None
    teacher_TV = case.targets.teacher_hidden_TH.to(dtype) @ case.teacher_VH.to(dtype).t() / TEMPERATURE
    targets = dataclasses.replace(case.targets, teacher_logits_TV=teacher_TV)
    value, metrics = objective.loss(hidden_TH @ weight_VH.t() / TEMPERATURE, targets, config)
    (3.0 * value).backward()
    return {"value": value.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad, **metrics}


def check(found: Found, expected: Found, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[key].double(), rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_match_whole_logits(name: str) -> None:
    case, config = make_case(), CONFIGS[name]
    expected = whole(case, config)
    assert expected["weight"].abs().max() > 0.01
    results = [fused(case, config, chunk) for chunk in (1, 5, TOKENS, 1000)]
    for found in results:
        check(found, expected)
        check(found, results[0], rtol=1e-5, atol=2e-6)
    unfused = whole(case, config, torch.float32)
    check(results[-1], unfused, rtol=1e-5, atol=2e-6)


def test_double_precision_matches_to_rounding() -> None:
    case = make_case(dtype=torch.float64)
    for config in CONFIGS.values():
        check(fused(case, config, 5), whole(case, config), rtol=1e-6, atol=1e-7)  # targets are fp32 on both sides


def per_token(case: Case, chunk: int, alpha: float, tail: bool, group: Any = None) -> Found:
    hidden_TH, weight_VH = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    ids_TK, teacher_TK = case.targets.support_ids_TK, case.targets.teacher_log_probs_TK
    assert ids_TK is not None and teacher_TK is not None
    values_T = fused_divergence(hidden_TH, weight_VH, ids_TK, teacher_TK, alpha, tail, group, chunk, TEMPERATURE)
    (values_T * torch.linspace(-1.0, 2.0, len(values_T))).sum().backward()
    return {"value": values_T.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad}


def per_token_whole(case: Case, alpha: float, tail: bool) -> Found:
    hidden_TH, weight_VH = (x.double().requires_grad_() for x in (case.hidden_TH, case.weight_VH))
    ids_TK, teacher_TK = case.targets.support_ids_TK, case.targets.teacher_log_probs_TK
    assert ids_TK is not None and teacher_TK is not None
    values_T = divergence(hidden_TH @ weight_VH.t() / TEMPERATURE, ids_TK, teacher_TK, alpha, tail)
    (values_T * torch.linspace(-1.0, 2.0, len(values_T))).sum().backward()
    return {"value": values_T.detach(), "hidden": hidden_TH.grad, "weight": weight_VH.grad}


ALPHAS_AND_TAILS = list(itertools.product((0.0, 0.5, 1.0), (True, False)))


@pytest.mark.parametrize(("alpha", "tail"), ALPHAS_AND_TAILS)
def test_the_divergence_of_each_token_matches_whole_logits(alpha: float, tail: bool) -> None:
    for chunk in (1, 5, 1000):
        check(per_token(make_case(), chunk, alpha, tail), per_token_whole(make_case(), alpha, tail))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 40), chunk=st.integers(1, 50), data=st.data())
def test_scores_are_those_of_whole_logits(tokens: int, chunk: int, data: st.DataObject) -> None:
    """Each chunk's rows are its own, in order; chunks hold what they are allowed."""
    case = make_case(max(tokens, 5))
    hidden_TH, seen = case.hidden_TH[:tokens], []

    def of_logits(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        seen.append((rows.start, rows.stop))
        assert len(logits_CV) == rows.stop - rows.start <= chunk
        return logits_CV.argmax(dim=1), logits_CV[:, :2]

    head = Head(case.weight_VH, chunk=chunk)
    ids_T, first_T2 = scored(hidden_TH, head, of_logits)
    logits_TV = hidden_TH @ case.weight_VH.t()
    assert torch.equal(ids_T, logits_TV.argmax(dim=1))
    torch.testing.assert_close(first_T2, logits_TV[:, :2], rtol=1e-5, atol=1e-5)
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])] and seen[-1][1] == tokens
    assert not first_T2.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tokens_give_a_connected_zero(name: str) -> None:
    case = make_case()
    empty = dataclasses.replace(case, hidden_TH=case.hidden_TH[:0], targets=case.targets.rows(slice(0, 0)))
    found, full = fused(empty, CONFIGS[name], 5), fused(case, CONFIGS[name], 5)
    assert found.keys() == full.keys()
    assert found["hidden"].shape == (0, HIDDEN) and found["weight"].shape == case.weight_VH.shape
    assert all((value == 0).all() for value in found.values())
    alone = per_token(empty, 5, 0.5, True)
    assert alone["value"].shape == (0,) and (alone["weight"] == 0).all()


def test_gradients_are_handed_out_once() -> None:
    hidden_TH = torch.ones(3, HIDDEN, requires_grad=True)
    head = Head(torch.ones(VOCABULARY, HIDDEN, requires_grad=True))
    loss, rests = fused_loss(hidden_TH, head, lambda logits_CV, rows: (logits_CV.sum(), rows))
    assert rests == [slice(0, 3)]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass needs a new forward pass"):
        loss.backward()


def test_rows_that_do_not_fit_are_refused() -> None:
    case, head = make_case(), Head(make_case().weight_VH)
    targets = case.targets
    assert targets.support_ids_TK is not None and targets.teacher_log_probs_TK is not None
    with pytest.raises(ValueError, match="11 rows of logits or hidden states but 12 response tokens"):
        objective.loss_of_hidden(case.hidden_TH[1:], head, targets, ObjectiveConfig())
    with pytest.raises(ValueError, match="each needs a row for every token"):
        fused_divergence(case.hidden_TH[1:], case.weight_VH, targets.support_ids_TK, targets.teacher_log_probs_TK, 0.5)


def test_a_bf16_head_accumulates_in_fp32() -> None:
    """Ones in every place: a bf16 sum of single tokens stays at 256, where the next number is 258."""
    hidden_TH = torch.ones(512, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.ones(VOCABULARY, HIDDEN, dtype=torch.bfloat16, requires_grad=True), chunk=1)
    dtypes = set()

    def loss_of(logits_CV: Tensor, _: slice) -> tuple[Tensor, None]:
        dtypes.add(logits_CV.dtype)
        return logits_CV.float().sum(), None

    loss, _ = fused_loss(hidden_TH, head, loss_of)
    loss.backward()
    assert dtypes == {torch.bfloat16} and loss == 512 * VOCABULARY * HIDDEN
    for gradient, expected in ((head.weight_VH.grad, 512.0), (hidden_TH.grad, float(VOCABULARY))):
        assert gradient is not None and gradient.dtype == torch.bfloat16 and (gradient == expected).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bf16_head_matches_to_its_rounding(name: str) -> None:
    case = make_case(dtype=torch.bfloat16)
    found, expected = fused(case, CONFIGS[name], 5), whole(case, CONFIGS[name])
    for key in ("value", "hidden", "weight"):
        distance = (found[key].double() - expected[key]).norm() / expected[key].norm()
        assert distance < 0.03, key


# ----------------------------------------------------------------------------------- the caller's own gradient


def into_main_grad(case: Case, config: ObjectiveConfig, chunk: int, begun: float = 0.0) -> Found:
    """Loss, metrics and both gradients, the head's beyond the ``begun`` that its buffer holds in every place."""
    hidden_TH, weight_VH = case.hidden_TH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    main_grad_VH = torch.full_like(weight_VH, begun, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
    head = Head(weight_VH, TEMPERATURE, chunk=chunk, main_grad_VH=main_grad_VH.detach())
    value, metrics = objective.loss_of_hidden(hidden_TH, head, case.targets, config, Head(case.teacher_VH, TEMPERATURE))
    value.backward()
    assert weight_VH.grad is None
    return {"value": value.detach(), "hidden": hidden_TH.grad, "weight": main_grad_VH - begun, **metrics}


def unscaled(found: Found) -> Found:
    return {**found, "hidden": found["hidden"] / 3.0, "weight": found["weight"] / 3.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_added_to_what_the_caller_holds(name: str) -> None:
    case, config = make_case(), CONFIGS[name]
    expected = unscaled(whole(case, config))
    for chunk, begun in ((5, 0.0), (1000, 2.5)):
        check(into_main_grad(case, config, chunk, begun), expected)
    double = make_case(dtype=torch.float64)
    check(into_main_grad(double, config, 5, 2.5), unscaled(whole(double, config)), rtol=1e-6, atol=1e-7)
    narrow = make_case(dtype=torch.bfloat16)
    found, expected = into_main_grad(narrow, config, 5), unscaled(whole(narrow, config))
    assert found["weight"].dtype == torch.float32
    assert (found["weight"].double() - expected["weight"]).norm() / expected["weight"].norm() < 0.03


def test_micro_batches_add_up_in_fp32() -> None:
    """257 times one: bf16 stays at 256."""
    weight_VH = torch.ones(VOCABULARY, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    main_grad_VH = torch.zeros(VOCABULARY, HIDDEN)
    head = Head(weight_VH, main_grad_VH=main_grad_VH)
    for _ in range(257):
        hidden_TH = torch.ones(1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        loss, _ = fused_loss(hidden_TH, head, lambda logits_CV, _: (logits_CV.float().sum(), None))
        loss.backward()
    assert (main_grad_VH == 257.0).all()


def test_a_loss_that_is_scaled_afterwards_is_refused() -> None:
    hidden_TH = torch.ones(3, HIDDEN, requires_grad=True)
    weight_VH = torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    head = Head(weight_VH, main_grad_VH=torch.zeros(VOCABULARY, HIDDEN))
    loss, _ = fused_loss(hidden_TH, head, lambda logits_CV, rows: (logits_CV.sum(), rows))
    with pytest.raises(RuntimeError, match=r"not times 0\.5; scale the loss within loss_of"):
        (loss * 0.5).backward()
    assert hidden_TH.grad is None


# --------------------------------------------------------------------------------------------------- memory


def peak(run: Callable[[], object]) -> int:
    with LiveMemory() as memory:
        run()
    return memory.peak


CHUNK_TENSORS = {"vocabulary": 2, "hybrid": 4}
"""Logits, which become their gradient; the teacher's too; a gradient of each of two sums, and both together."""


@pytest.mark.parametrize("name", CONFIGS)
def test_no_more_than_a_chunk_is_ever_alive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a chunk costs its logits, each other token none, forward and backward."""
    tokens, width = 48, 3000
    monkeypatch.setitem(vocabulary.BLOCK, "cpu", width)  # wide copies of one row
    case, logits = make_case(tokens, width), 4 * tokens * width
    few, many = (peak(lambda chunk=chunk: fused(case, CONFIGS[name], chunk)) for chunk in (4, 20))
    assert (many - few) / (4 * 16 * width) == pytest.approx(CHUNK_TENSORS.get(name, 1), abs=0.05)
    more = make_case(2 * tokens, width)
    assert peak(lambda: fused(more, CONFIGS[name], 4)) - few < 0.03 * logits
    assert peak(lambda: whole(case, CONFIGS[name], torch.float32)) > 2 * logits


def test_a_gradient_that_the_caller_holds_costs_no_more() -> None:
    """Beyond it: a chunk's logits, a wide copy of some rows, and what is counted in tokens."""
    tokens, width, hidden = 48, 3000, 500
    hidden_TH = torch.randn(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    weight_VH = torch.randn(width, hidden, dtype=torch.bfloat16).requires_grad_()
    main_grad_VH = torch.zeros(width, hidden)

    def run(held: Tensor | None) -> None:
        loss, _ = fused_loss(hidden_TH, Head(weight_VH, chunk=8, main_grad_VH=held), lambda z_CV, _: (z_CV.sum(), None))
        loss.backward()

    own, none = peak(lambda: run(None)), peak(lambda: run(main_grad_VH))
    of_head, product = 4 * width * hidden, 2 * width * hidden  # on a CPU a product is made before it is added
    assert own > of_head + product
    assert none < product + 3 * 2 * 8 * width + 8 * tokens * hidden


def test_no_more_than_a_chunk_is_alive_for_the_divergence_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.BLOCK, "cpu", 3000)
    case = make_case(48, 3000)
    few, many = (peak(lambda chunk=chunk: per_token(case, chunk, 0.5, True)) for chunk in (4, 20))
    assert (many - few) / (4 * 16 * 3000) == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------------------------- over process groups


def count_collectives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("all_reduce", "all_gather"):
        inner = getattr(dist, name)

        def counted(*args: Any, inner: Any = inner, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(dist, name, counted)
    return calls


def worker(rank: int, folder: str) -> None:
    """Every configuration on every group size, the collectives of each backward pass, and those without tokens."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results: dict[Any, Any] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = count_collectives(monkeypatch)
        for size in SIZES:
            groups = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
            group: Any = groups[rank // size]
            width = VOCABULARY // size
            first = dist.get_rank(group) * width
            case = make_case().shard(slice(first, first + width))
            for name, config in CONFIGS.items():
                results[size, name] = fused(case, config, 5, group)
            for alpha, tail in ALPHAS_AND_TAILS:
                results[size, alpha, tail] = per_token(case, 5, alpha, tail, group)
            results[size, "collectives"] = _collectives(case, group, calls)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


def _collectives(case: Case, group: Any, calls: list[str]) -> dict[str, list[str]]:
    """Forward of one chunk and of none, backward of the sum and of each token's divergence."""
    found = {}
    for name, rows in (("chunk", slice(4, 8)), ("nothing", slice(0, 0))):
        hidden_TH = case.hidden_TH[rows].clone().requires_grad_()
        calls.clear()
        loss, _ = objective.loss_of_hidden(
            hidden_TH, Head(case.weight_VH, group=group), case.targets.rows(rows), CONFIGS["sdpo"]
        )
        found[name] = list(calls)
        calls.clear()
        loss.backward()
        found[f"{name} backward"] = list(calls)
    hidden_TH, targets = case.hidden_TH.clone().requires_grad_(), case.targets
    assert targets.support_ids_TK is not None and targets.teacher_log_probs_TK is not None
    values_T = fused_divergence(
        hidden_TH, case.weight_VH, targets.support_ids_TK, targets.teacher_log_probs_TK, 0.5, group=group, chunk=5
    )
    calls.clear()
    values_T.sum().backward()
    return {**found, "tokens backward": list(calls)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Results of four ranks: four groups of one, two of two, one of four."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def gathered(ranks: list[dict[Any, Any]], members: range, key: tuple[Any, ...]) -> Found:
    """One rank's numbers, which all share, with the head's gradient of all."""
    mine = ranks[members[0]][key]
    for rank in members:
        assert all(torch.equal(ranks[rank][key][name], mine[name]) for name in mine if name != "weight")
    return {**mine, "weight": torch.cat([ranks[rank][key]["weight"] for rank in members])}


@pytest.mark.parametrize("size", SIZES)
def test_shards_match_whole_logits(ranks: list[dict[Any, Any]], size: int) -> None:
    for first in range(0, WORLD, size):
        members = range(first, first + size)
        for name, config in CONFIGS.items():
            check(gathered(ranks, members, (size, name)), whole(make_case(), config))
        for alpha, tail in ALPHAS_AND_TAILS:
            check(gathered(ranks, members, (size, alpha, tail)), per_token_whole(make_case(), alpha, tail))


def test_backward_only_sums_the_gradient_of_the_hidden_states(ranks: list[dict[Any, Any]]) -> None:
    """And a rank enters the same collectives whether it has tokens or not."""
    for found, size in itertools.product(ranks, SIZES):
        calls = found[size, "collectives"]
        assert calls["chunk"] == calls["nothing"] != []
        for backward in ("chunk backward", "nothing backward", "tokens backward"):
            assert calls[backward] == ["all_reduce"]
