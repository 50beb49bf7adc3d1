"""A vocabulary that the tensor ranks do not divide: its padding has no probability, no gradient, and no name."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.divergence import entropy, sampled_log_probs, student_support, support_log_probs
from megatron_sdpo.fused import Head, fused_divergence
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.streaming import export_hf
from megatron_sdpo.objective import loss_of_hidden
from megatron_sdpo.teacher import mixed_logits
from tests.dist_checkpoint import differences
from tests.dist_family import CASES, continue_from, train_cases
from tests.launch import run_ranks
from tests.learner_setup import MODELS, write_models
from tests.test_fused import CONFIGS, make_case

PADDING = 3
VOCABULARY = 105
TP2 = "tp2pp1dp1"


def padded(weight_VH: torch.Tensor) -> torch.Tensor:
    """With rows whose logits would win everywhere."""
    return F.pad(weight_VH, (0, 0, 0, PADDING), value=100.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_objective_sees_the_padding(name: str) -> None:
    case, config = make_case(), CONFIGS[name]
    found = []
    for weight_VH, teacher_VH in (
        (case.weight_VH, case.teacher_VH),
        (padded(case.weight_VH), padded(case.teacher_VH)),
    ):
        hidden_TH, head_VH = case.hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        head, teacher_head = (
            Head(x_VH, 0.7, chunk=5, vocabulary=len(case.weight_VH)) for x_VH in (head_VH, teacher_VH)
        )
        loss, metrics = loss_of_hidden(hidden_TH, head, case.targets, config, teacher_head)
        loss.backward()
        assert hidden_TH.grad is not None
        assert head_VH.grad is not None
        found.append({"loss": loss.detach(), "hidden": hidden_TH.grad, "head": head_VH.grad, **metrics})
    expected, got = found
    assert not got["head"][-PADDING:].any()
    got["head"] = got["head"][:-PADDING]
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_no_score_sees_the_padding() -> None:
    case = make_case()
    size, ids_T = len(case.weight_VH), case.targets.response_ids_T
    exact_TV = Head(case.weight_VH).logits(case.hidden_TH)
    initial_TV, logits_TV = (
        Head(padded(x_VH), vocabulary=size).logits(case.hidden_TH) for x_VH in (case.teacher_VH, case.weight_VH)
    )
    ids_TV = student_support(logits_TV, size)
    assert torch.equal(ids_TV, student_support(exact_TV, size))  # all that exist, and no other
    for score in (entropy, lambda x: sampled_log_probs(x, ids_T), lambda x: support_log_probs(x, ids_TV[:, :5])):
        torch.testing.assert_close(score(logits_TV), score(exact_TV))
    mixed_TV = mixed_logits(initial_TV, logits_TV, 0.3)
    assert (mixed_TV[:, size:] == -torch.inf).all()
    mixed_exactly_TV = mixed_logits(Head(case.teacher_VH).logits(case.hidden_TH), exact_TV, 0.3)
    torch.testing.assert_close(mixed_TV[:, :size], mixed_exactly_TV)
    targets = case.targets
    assert targets.support_ids_TK is not None
    assert targets.teacher_log_probs_TK is not None
    values = [
        fused_divergence(
            case.hidden_TH, head_VH, targets.support_ids_TK, targets.teacher_log_probs_TK, 0.5, vocabulary=size
        )
        for head_VH in (case.weight_VH, padded(case.weight_VH))
    ]
    torch.testing.assert_close(*values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 105 entries; two tensor ranks (53 and 52 entries, and one that pads) have trained, saved, exported."""
    folder = tmp_path_factory.mktemp("padded")
    write_models(folder, VOCABULARY)
    run_ranks("dist_family.py", 2, [TP2, str(folder), *MODELS], timeout=200)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_train_and_export_as_one_without_padding(folder: Path, groups: ParallelGroups, model: str) -> None:
    """Head beside the embedding, and tied to it; each objective whose logits are taken in another way."""
    expected = train_cases(folder, model, groups, LayoutConfig(), folder / "single", list(CASES))
    got = torch.load(folder / TP2 / f"{model}.pt")
    assert expected.keys() == got.keys()
    for case in expected:
        for ours, theirs in zip(got[case], expected[case], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9), case
        before, one, two = (
            load_file(path / "model.safetensors")
            for path in (folder / model, folder / "single" / model / case, folder / TP2 / model / case)
        )
        assert {name: t.shape for name, t in two.items()} == {name: t.shape for name, t in before.items()}
        assert two["model.embed_tokens.weight"].shape[0] == VOCABULARY
        moved, apart = (
            math.sqrt(sum((one[name].double() - other[name].double()).pow(2).sum().item() for name in one))
            for other in (before, two)
        )
        assert apart <= 1e-5 * moved, case


def test_what_is_published_has_no_padding(folder: Path) -> None:
    """Every bucket, as the sender has it, is the checkpoint itself."""
    for model in MODELS:
        sent = torch.load(folder / TP2 / f"{model}-sent-0.pt")
        assert differences(sent, load_file(folder / model / "model.safetensors")) == []


@pytest.mark.parametrize("model", MODELS)
def test_one_process_continues_what_two_padded(folder: Path, groups: ParallelGroups, model: str) -> None:
    """Weights, moments and teacher come from a checkpoint with another padding."""
    saved = folder / TP2 / "checkpoints" / model
    weights, metrics = continue_from(folder, model, saved, groups, LayoutConfig(), folder / f"continued-{model}")
    expected_weights, expected_metrics = torch.load(folder / TP2 / f"{model}-continued.pt")
    assert differences(weights, expected_weights) == []
    hf, out = read_hf_config(folder / model), folder / f"{model}-converted"
    export_hf(checkpoint.find(saved, None), hf, torch.float32, groups, out, folder / model, lambda _: None)
    assert differences(load_file(out / "model.safetensors"), expected_weights) == []
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-9)
