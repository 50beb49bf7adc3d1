"""Scoring passes in which siblings share the beginning of their prompts say what passes without that say."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdpo import batching
from megatron_sdpo.batching import RowCut
from megatron_sdpo.config import ConfigError, LayoutConfig, check
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore.dealing import Dealer, costs_of, shared_views
from megatron_sdpo.mcore.forward import score
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import load_hf
from megatron_sdpo.mcore.model import Model, build_model, transformer_config
from megatron_sdpo.mcore.modules import CausalAttention, packed_rows
from megatron_sdpo.mcore.te_attention import continuing
from megatron_sdpo.types import Sample
from recipes.minipipe import BASE_MODEL
from tests.dist_learner import parse
from tests.fp8_setup import BOTH, write_model
from tests.launch import run_ranks
from tests.learner_setup import VOCABULARY, comparable, make_config
from tests.same_numbers import TOLERANCE
from tests.sharing_setup import FAMILIES, check_same, scored, write_families
from tests.test_prefixes import siblings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    write_families(folder)
    return folder


@pytest.fixture(scope="module")
def models(folder: Path, groups: ParallelGroups) -> dict[str, Model]:
    built = {}
    for name in FAMILIES:
        built[name] = build_model(read_hf_config(folder / name), LayoutConfig(), groups, torch.float32)
        load_hf(built[name], folder / name, groups, LayoutConfig())
    return built


def hidden(model: Model, samples: list[Sample], budget: int, multiple: int, least: int | None) -> dict[int, Tensor]:
    cuts = batching.cuts_of(samples, [list(range(len(samples)))], "teacher", budget, least_shared=least)
    rows = batching.packed(samples, cuts, "teacher", 0, CPU, RowCut(multiple=multiple))
    found: dict[int, Tensor] = {}
    for row, hidden_NH in zip(rows, score(model, rows, lambda _, hidden_NH: hidden_NH), strict=True):
        found |= row.split(hidden_NH)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=15)
@given(siblings(), st.integers(1, 60), st.sampled_from([1, 4]))
def test_hidden_states_are_those_of_whole_sequences(
    models: dict[str, Model], family: str, found: list[tuple[list[int], list[int]]], budget: int, multiple: int
) -> None:
    """Nothing in common, equal prompts, one the beginning of another, beginnings of one token, empty responses."""
    samples = [Sample(str(i), 0, (), tuple(r), (), tuple(p), 0.0) for i, (p, r) in enumerate(found)]
    expected = hidden(models[family], samples, budget, multiple, None)
    shared = hidden(models[family], samples, budget, multiple, 1)
    assert shared.keys() == expected.keys() == set(range(len(samples)))
    for i, hidden_RH in expected.items():
        torch.testing.assert_close(shared[i], hidden_RH, rtol=0, atol=5e-5)


def test_long_beginnings_too(models: dict[str, Model]) -> None:
    """Several groups, of tails of all lengths, and samples without siblings between them."""
    draw = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(n))

    samples = []
    for group in range(4):
        context = ids(draw.randrange(100, 300))
        for _ in range(1 if group == 2 else 5):
            teacher = context + ids(draw.choice([0, 0, 7]))
            samples.append(Sample("", group, (), ids(draw.randrange(1, 80)), (), teacher, 0.0))
    for family, model in models.items():
        expected, shared = (hidden(model, samples, 2000, 1, least) for least in (None, 8))
        for i, hidden_RH in expected.items():
            torch.testing.assert_close(shared[i], hidden_RH, rtol=0, atol=5e-5, msg=f"{family} {i}")


def test_gradients_flow_through_shared_beginnings(models: dict[str, Model]) -> None:
    """No pass that trains shares, but nothing would be wrong: each sibling adds its part."""
    prompts, responses = ((5, 6, 7, 8), (5, 6, 7, 9), (5, 6, 7)), ((1, 2), (3,), (4, 5, 6))
    rows = [(i, p, r) for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    chosen = batching.beginnings.shared(dict(enumerate(prompts)), 1)
    gradients = []
    for row in (batching.pack(rows, CPU), batching.pack(rows, CPU, prefixes=chosen)):
        model = models["qwen2"]
        packed = packed_rows(row.lengths, CPU, starts=row.starts)
        states = model(row.ids_T[None], row.positions_T[None], None, packed_seq_params=packed)[:, 0]
        weights = torch.linspace(-1, 1, states[row.rows_N].numel()).view_as(states[row.rows_N])
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad((states[row.rows_N] * weights).sum(), parameters, allow_unused=True)
        gradients.append([x for x in found if x is not None])
    assert len(gradients[0]) > 20
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_row_says_where_its_pieces_begin() -> None:
    row = packed_rows((3, 2, 1, 4), CPU, starts=(0, 3, 3, 0))
    assert row.cu_seqlens_q.tolist() == [0, 3, 5, 6, 10] and row.cu_seqlens_kv.tolist() == [0, 3, 8, 12, 16]
    assert (row.max_seqlen_q, row.max_seqlen_kv) == (4, 5)
    table = torch.arange(5.0)[:, None]
    row.set_rotary(table, table)
    assert row.rotary is not None and row.rotary[0][:, 0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="no padding of their own"):
        packed_rows((3, 2), CPU, (4, 4), starts=(0, 3))


class _VariableLengths:
    """What Transformer Engine's attention does with packed rows, one sequence and head after the other: ``forward`` of
    its own, under Megatron's, which would not know the mask."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, _: None, **given: Any) -> Tensor:
        assert given["qkv_format"] == "thd" and given["max_seqlen_q"] <= given["max_seqlen_kv"]
        assert given["attn_mask_type"] == "padding_causal_bottom_right"
        ends_q, ends_k = (given[f"cu_seqlens_{side}"].tolist() for side in ("q", "kv"))
        assert (ends_q[-1], ends_k[-1]) == (len(query), len(key))
        out = torch.empty(len(query), query.shape[1] * query.shape[2])
        for (a, b), (c, d) in zip(itertools.pairwise(ends_q), itertools.pairwise(ends_k), strict=True):
            assert b - a <= given["max_seqlen_q"] and d - c <= given["max_seqlen_kv"]
            shared = query.shape[1] // key.shape[1]
            k, v = (x[c:d].repeat_interleave(shared, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[a:b], k) / query.shape[2] ** 0.5
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)).logical_not()
            weights = scores.masked_fill(hidden, -torch.inf).softmax(2)
            out[a:b] = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        return out


class _Megatrons(_VariableLengths):
    def forward(self, *args: Any, **given: Any) -> Any:
        return args, given


@settings(deadline=None, max_examples=30)
@given(siblings(), st.integers(0, 3))
def test_variable_lengths_say_the_same_as_blocks(found: list[tuple[list[int], list[int]]], fill: int) -> None:
    """What Transformer Engine is asked, answered by a plain one (no GPU here), is what the CPU's attention says."""
    prompts = {i: tuple(prompt) for i, (prompt, _) in enumerate(found)}
    chosen = batching.beginnings.shared(prompts, 1)
    order = sorted(prompts, key=lambda i: (chosen[i].first if i in chosen else i, i))
    row = batching.pack([(i, prompts[i], found[i][1]) for i in order], CPU, RowCut(multiple=1 + fill), chosen)
    rows = packed_rows(row.lengths, CPU, starts=row.starts)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(row.ids_T), h, 12, generator=generator) for h in (4, 2, 2))
    table = torch.randn(rows.max_seqlen_kv, 6, generator=generator).repeat(1, 2)
    rows.set_rotary(table.cos(), table.sin())
    config = transformer_config(read_hf_config(BASE_MODEL), LayoutConfig(), torch.float32)
    attention = continuing(_Megatrons)()
    if not rows.starts:
        assert attention.forward(query, key, value, None, packed_seq_params=rows)[1] == {"packed_seq_params": rows}
        return
    ours = CausalAttention(config, 1, None, "self", softmax_scale=12**-0.5)(query, key, value, packed_seq_params=rows)
    theirs = attention.forward(query, key, value, None, packed_seq_params=rows, attn_mask_type="causal")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


LAYOUTS = ("tp2:qwen2", "tp2-sp:llama", "pp2:qwen3-tied", "dp2ep2:qwen3_moe")
MORE = (
    "tp2-sp:qwen3_moe",
    "dp2:llama",
    "pp2vp2:qwen2",
    "dp2-overlap:qwen3-tied",
    "tp2:qwen3_moe",
    "tp2ep2et1-sp:qwen3_moe",
)
MOST = ("tp2pp2:qwen2", "tp2dp2-sp-do:qwen3-tied", "pp2dp2ep2:qwen3_moe")


@pytest.fixture(scope="module")
def single(folder: Path, groups: ParallelGroups) -> dict[str, list[dict[str, float]]]:
    """What one process says that shares nothing; and sharing, it says the same."""
    said = {}
    for family in FAMILIES:
        plain, said[family], nothing = scored(folder / family, groups, LayoutConfig(), "off")
        assert nothing == {"student": 0, "teacher": 0}
        kinds = {"teacher": {"teacher"}, "scoring": {"student", "teacher"}}
        for share, views in kinds.items() if family == "llama" else list(kinds.items())[1:]:
            found, metrics, spared = scored(folder / family, groups, LayoutConfig(), share)
            assert {view for view, tokens in spared.items() if tokens} == views
            check_same(found, plain)
            if share == "teacher":
                assert all(torch.equal(found["student"][i], x) for i, x in plain["student"].items())
            for ours, theirs in zip(metrics, said[family], strict=True):
                assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-9)
    return said


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(LAYOUTS, id="2"),
        pytest.param(MORE, id="2-more", marks=pytest.mark.slow),
        pytest.param(MOST, id="4", marks=pytest.mark.slow),
    ],
)
def test_every_layout_shares_as_one_process(
    folder: Path, single: dict[str, list[dict[str, float]]], cases: tuple[str, ...]
) -> None:
    ranks = parse(cases[0].split(":")[0]).world_size
    run_ranks("dist_sharing.py", ranks, [str(folder), *cases], timeout=400)
    for case in cases:
        metrics, spared = json.loads((folder / f"{case.replace(':', '-')}.json").read_text())
        for ours, theirs in zip(metrics, single[case.split(":")[1]], strict=True):
            assert comparable(ours) == pytest.approx(comparable(theirs), rel=TOLERANCE, abs=1e-9), case
        assert spared["teacher"] > 100 and spared["student"] > 50, case


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.support=vocabulary", "objective.sample_weighting=teacher_confidence"),
        ("teacher.kind=trust_region", "teacher.mixture=0.3"),
        ("objective.kind=hybrid", "objective.kl_coefficient=0.5", "layout.head_chunk_tokens=5"),
    ],
    ids=["vocabulary", "trust-region", "penalised"],
)
def test_every_kind_of_scoring_pass_shares(folder: Path, groups: ParallelGroups, overrides: tuple[str, ...]) -> None:
    plain, said, _ = scored(folder / "llama", groups, LayoutConfig(), "off", *overrides)
    found, metrics, spared = scored(folder / "llama", groups, LayoutConfig(), "scoring", *overrides)
    check_same(found, plain)
    assert all(spared.values())
    for ours, theirs in zip(metrics, said, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-9)


def test_emulated_fp8_makes_the_same_codes(tmp_path: Path, groups: ParallelGroups) -> None:
    """A row's blocks are its own; only where a sum was rounded otherwise a code may turn."""
    model = write_model(tmp_path)
    exact, _, _ = scored(model, groups, LayoutConfig(), "off", batches=0)
    plain, _, _ = scored(model, groups, LayoutConfig(), "off", *BOTH, batches=0)
    found, _, _ = scored(model, groups, LayoutConfig(), "scoring", *BOTH, batches=0)

    def apart(a: dict[int, Tensor], b: dict[int, Tensor]) -> float:
        return float(torch.cat([(a[i] - b[i]).abs().flatten() for i in a]).mean())

    for view in ("student", "teacher"):
        assert apart(found[view], plain[view]) < 0.1 * apart(plain[view], exact[view])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_shares_too(tmp_path: Path, groups: ParallelGroups, dtype: str) -> None:
    """fp32: the CPU's modules; bf16: Transformer Engine's, if it is there."""
    model = write_model(tmp_path)
    plain, _, _ = scored(model, groups, LayoutConfig(), "off", f"model.dtype={dtype}", batches=0)
    found, _, spared = scored(model, groups, LayoutConfig(), "scoring", f"model.dtype={dtype}", batches=0)
    assert all(spared.values()) and len(spared) == 2
    for view, expected in plain.items():
        apart = torch.cat([(found[view][i] - x).abs().flatten() for i, x in expected.items()])
        assert float(apart.mean()) < (1e-4 if dtype == "float32" else 0.03)


def test_it_repeats_to_the_bit(folder: Path, groups: ParallelGroups) -> None:
    first, second = (scored(folder / "qwen3_moe", groups, LayoutConfig(), "scoring") for _ in range(2))
    assert first[1:] == second[1:]
    check_same(first[0], second[0], tolerance=0.0)


def test_a_shared_beginning_weighs_once_for_all_its_readers() -> None:
    context, other = tuple(range(2, 42)), (1,) * 9
    samples = [
        Sample("", 0, (1, 2), (3,) * 5, (), (*context, 50), 0.0),
        Sample("", 0, (1, 2), (3,) * 6, (), context, 0.0),
        Sample("", 0, (1, 2), (3,) * 7, (), other, 0.0),
        Sample("", 1, (1, 2), (3,) * 8, (), context, 0.0),
        Sample("", 1, (1, 2), (3,) * 9, (), None, 0.0),
    ]
    plain = [4 * (2 + 5) + 46, 4 * (2 + 6) + 46, 4 * (2 + 7) + 16, 4 * (2 + 8) + 48, 4 * (2 + 9)]
    assert costs_of(samples, ()) == costs_of(samples, ("student",)) == plain
    assert costs_of(samples, ("teacher",)) == [plain[0] - 20, plain[1] - 20, *plain[2:]]
    dealer = Dealer(2, ("teacher",))
    assert dealer.shares(samples, range(5)) == dealer.shares(samples, range(5)) == [[1, 0, 2], [3, 4]]
    assert Dealer(2, ()).shares(samples, range(5)) != [[1, 0, 2], [3, 4]]


def test_who_shares_by_default_and_who_is_refused() -> None:
    def views(share: str, overrides: tuple[str, ...] = (), gpu: int | None = None) -> set[str]:
        config = make_config(Path("x"), (f"layout.share_prefixes={share}", *overrides))
        return set(shared_views(config, gpu))

    context = ("layout.context_parallel=2", "layout.world_size=2")
    assert views("auto") == views("teacher") == {"teacher"}
    assert views("scoring") == {"student", "teacher"}
    assert views("auto", gpu=9) == views("teacher", gpu=8) == {"teacher"}
    assert views("auto", context) == views("auto", gpu=8) == views("auto", gpu=10) == views("off") == set()
    assert views("auto", ("objective.kind=grpo",)) == views("scoring", ("objective.kind=next_token",)) == set()
    for share in ("teacher", "scoring"):
        config = make_config(Path("x"), (f"layout.share_prefixes={share}", *context))
        with pytest.raises(ConfigError, match=f"share_prefixes={share} packs sequences in pieces, but layout.context"):
            check(config)
