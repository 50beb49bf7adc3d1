"""The learner where the answer is known: several optimizer steps a batch, teachers at their extremes, odd groups."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sdpo import batching
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, TeacherContextConfig
from megatron_sdpo.loop import make_batch as batch_of_groups
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.rollout.sampler import Sampler
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.minipipe import FEEDBACK_TEMPLATE, SOLUTION_TEMPLATE, TEACHER_TEMPLATE
from megatron_sdpo.types import Attempt, Batch, EngineAddress, Group, Message, Question, Verdict
from recipes.minipipe import BASE_MODEL
from tests.learner_setup import VOCABULARY, learn, make_batch, make_config, make_learner
from tests.reference.step_naive import first_step, load, steps

TOLERANCE = 1e-5
MICRO_BATCHES = "layout.tokens_per_micro_batch=64"


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum((a[name].double() - b[name].double()).pow(2).sum().item() for name in a))


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


# ------------------------------------------------------------------------- several optimizer steps a batch


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.policy_drift_clip=1.05", "rollout.temperature=0.7"),
        ("objective.kind=grpo", "objective.clip_low=0.05", "objective.clip_high=0.1", "objective.kl_coefficient=0.1"),
        ("objective.kind=hybrid", "objective.alpha=1", "objective.aggregation=sequence_mean"),
        ("objective.support=sampled", "objective.alpha=1", "objective.credit=sequence"),
        ("teacher.kind=trust_region", "teacher.mixture=0.4", "objective.policy_drift_clip=none"),
    ],
    ids=["sdpo", "grpo", "hybrid", "sequence-credit", "trust-region"],
)
def test_two_mini_batches_equal_transformers_and_autograd(
    folder: Path, groups: ParallelGroups, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """The second step compares with the policy, the support and the teacher of before the first."""
    together = (MICRO_BATCHES, "optim.mini_batches=2", "optim.lr=1e-2", *overrides)
    config, batch = make_config(folder / "llama", together), make_batch()
    learner = make_learner(config, groups, folder / "llama-teacher")
    metrics = learn(learner, batch)
    drift = metrics["loss/ratio/max" if config.objective.kind == "grpo" else "loss/drift_weight/max"]
    weighed = config.objective.kind == "grpo" or config.objective.policy_drift_clip is not None
    assert drift > 1.04 if weighed else drift == 1.0
    mini_batches = batching.deal(len(batch.samples), 2, config.seed, batch.step)
    student, teacher = load(folder / "llama"), load(folder / "llama-teacher")
    found, weights = steps(student, teacher, batch.samples, mini_batches, config)
    losses, norms = zip(*found, strict=True)
    largest = max(map(abs, losses))  # two losses may cancel each other
    assert metrics["loss/total"] == pytest.approx(sum(losses) / 2, rel=TOLERANCE, abs=TOLERANCE * largest)
    assert metrics["optim/grad_norm"] == pytest.approx(sum(norms) / 2, rel=TOLERANCE)
    save_hf(learner.model, tmp_path / "after", groups, config.layout, folder / "llama")
    ours, before = (load_file(path / "model.safetensors") for path in (tmp_path / "after", folder / "llama"))
    assert _distance(ours, weights) <= 1e-4 * _distance(weights, before)


# ------------------------------------------------------------------------------- teachers at their extremes


def _write_successor(model: Path, path: Path) -> None:
    """A model whose tokens each foretell the next number, with certainty: no layer adds anything to the embedding."""
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    directions = torch.randn(VOCABULARY, 48, generator=torch.Generator().manual_seed(8))
    directions = directions / directions.norm(dim=1, keepdim=True)
    weights["model.embed_tokens.weight"] = directions
    weights["model.norm.weight"] = torch.ones(48)
    weights["lm_head.weight"] = 30.0 * directions.roll(1, dims=0)
    path.mkdir()
    (path / "config.json").write_text((model / "config.json").read_text())
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _counting(batch: Batch, step: int) -> Batch:
    """Responses that count in steps of ``step``, and teacher prompts whose last token comes before them."""
    samples = []
    for i, sample in enumerate(batch.samples):
        response = tuple((11 * i + step * t) % VOCABULARY for t in range(len(sample.response_ids)))
        prompt = (*(sample.teacher_prompt_ids or (3, 4)), (response[0] - step) % VOCABULARY)
        samples.append(replace(sample, response_ids=response, teacher_prompt_ids=prompt))
    return replace(batch, samples=tuple(samples))


@pytest.mark.parametrize("support", ["objective.top_k=103", "objective.support=vocabulary"])
def test_a_teacher_that_knows_the_next_token_teaches_that_token_there(
    folder: Path, groups: ParallelGroups, tmp_path: Path, support: str
) -> None:
    """KL(teacher||student) of such a teacher is the cross entropy of the response: one position off, and it is not."""
    _write_successor(folder / "llama", tmp_path / "successor")
    taught = ("objective.alpha=0", "objective.engine_mismatch_cap=none", support)
    told = ("objective.kind=next_token",)

    def trained(overrides: Sequence[str], step: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        config = make_config(folder / "llama", (MICRO_BATCHES, *overrides))
        learner = make_learner(config, groups, tmp_path / "successor")
        before = _weights(learner)
        metrics, after = learn(learner, _counting(make_batch(), step)), _weights(learner)
        return [metrics["loss/total"], metrics["optim/grad_norm"], _distance(after, before)], after

    (numbers, weights), (expected, expected_weights) = trained(taught, 1), trained(told, 1)
    assert numbers == pytest.approx(expected, rel=TOLERANCE)
    assert _distance(weights, expected_weights) <= 5e-5 * expected[2]
    assert trained(taught, 2)[0] != pytest.approx(trained(told, 2)[0], rel=1e-2)


@pytest.mark.parametrize(("mixture", "kind"), [(0.0, "frozen"), (1.0, "live")])
def test_a_trust_region_ends_in_the_frozen_and_in_the_live_teacher(
    folder: Path, groups: ParallelGroups, mixture: float, kind: str
) -> None:
    """Each reads its context; after the first batch initial and current weights differ."""

    def trained(*overrides: str) -> list[dict[str, float]]:
        learner = make_learner(make_config(folder / "llama", (MICRO_BATCHES, "optim.lr=1e-2", *overrides)), groups)
        return [learn(learner, make_batch(step)) for step in range(3)]

    found = trained("teacher.kind=trust_region", f"teacher.mixture={mixture}")
    for ours, theirs in zip(found, trained(f"teacher.kind={kind}"), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-9)
    other = trained(f"teacher.kind={'live' if kind == 'frozen' else 'frozen'}")
    assert found[0] == pytest.approx(other[0], rel=TOLERANCE, abs=1e-9)
    assert found[2]["loss/total"] != pytest.approx(other[2]["loss/total"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ odd groups

CHAT = Chat(BASE_MODEL)
RIGHT, WRONG = "above 2 | order", "over 2 | sort"
# (text, reward, feedback, whether the model ended its turn); text None: no token at all
GROUPS: dict[str, tuple[tuple[tuple[str | None, float, str, bool], ...], str]] = {
    "lone success": (((RIGHT, 1.0, "", True), (WRONG, 0.0, "not found", True), ("over 3", 0.0, "", True)), "-xx"),
    "all fail": (((WRONG, 0.0, "not found", True), ("over 3", 0.0, "", True), ("sort", 0.2, "not found", True)), "x-x"),
    "all succeed": (((RIGHT, 1.0, "", True), (f"{RIGHT} | order", 1.0, "", True), (RIGHT, 0.5, "", True)), "xxx"),
    "empty": (((RIGHT, 1.0, "", True), (None, 0.0, "not found", False), ("", 0.0, "", True)), "-xx"),
    "an empty success": ((("", 1.0, "", True), (WRONG, 0.0, "", True), (WRONG, 0.0, "not found", True)), "--x"),
    "cut": (((WRONG, 0.0, "not found", False), ("over 3", 0.0, "", False), ("above 2", 0.0, "", False)), "x--"),
}
"""Name -> attempts, and which of them are taught."""


def _group(slot: int, question: Question, outcomes: Sequence[tuple[str | None, float, str, bool]]) -> Group:
    attempts = []
    for text, _, _, ended in outcomes:
        ids = (*CHAT.encode(text or ""), *([CHAT.eos_id] * ended))
        engine = tuple(-0.5 - 0.25 * place for place in range(len(ids)))
        prompt = CHAT.prompt_ids(question.messages)
        attempts.append(Attempt(prompt, ids, engine, text or "", "stop" if ended else "length", 0))
    return Group(0, slot, question, tuple(attempts), tuple(Verdict(reward, words) for _, reward, words, _ in outcomes))


def _batch(journal: Journal, config: Config) -> Batch:
    """What the coordinator makes of groups that are finished already."""
    questions = [Question(name, (Message("user", f"keep over 2 , item {i}"),)) for i, name in enumerate(GROUPS)]
    prompts = PromptStream(questions, len(questions), seed=0)
    for slot, question in enumerate(prompts.at(0)):
        journal.append(_group(slot, question, GROUPS[question.id][0]))
    client = EngineClient([EngineAddress("none", "", 1)], "token")
    sampler = Sampler(client, CHAT, load_task("minipipe", machine_seed=1), 16, 1)
    return asyncio.run(batch_of_groups(0, config, prompts, sampler, journal, CHAT))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.aggregation=sequence_mean",),
        ("objective.kind=hybrid", "objective.sample_weighting=question_difficulty"),
        ("objective.support=sampled", "objective.alpha=1", "objective.credit=sequence"),
    ],
    ids=["token-mean", "sequence-mean", "hybrid-difficulty", "sequence-credit"],
)
def test_odd_groups_from_their_verdicts_to_the_step(
    groups: ParallelGroups, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    templates = TeacherContextConfig(
        template=TEACHER_TEMPLATE, solution_template=SOLUTION_TEMPLATE, feedback_template=FEEDBACK_TEMPLATE
    )
    config = replace(make_config(BASE_MODEL, (MICRO_BATCHES, *overrides)), teacher_context=templates)
    journal = Journal(tmp_path)
    batch = _batch(journal, config)
    taught = "".join("-" if s.teacher_prompt_ids is None else "x" for s in batch.samples)
    assert taught == "".join(GROUPS[group.question.id][1] for _, group in sorted(journal.groups(0).items()))
    metrics = learn(make_learner(config, groups), batch)
    loss, grad_norm, _ = first_step(load(BASE_MODEL), load(BASE_MODEL), batch.samples, config)
    assert loss != 0.0 and metrics["loss/total"] == pytest.approx(loss, rel=TOLERANCE)
    assert metrics["optim/grad_norm"] == pytest.approx(grad_norm, rel=TOLERANCE)
    if config.objective.kind == "sdpo":
        taught_tokens = [len(s.response_ids) for s, mark in zip(batch.samples, taught, strict=True) if mark == "x"]
        assert metrics["loss/tokens"] == sum(taught_tokens)
