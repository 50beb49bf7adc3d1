"""MiniPipe: the interpreter, the held-out split, the corpus, and the model directory."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError, TeacherContextConfig
from megatron_sdpo.tasks.minipipe import (
    FEEDBACK_TEMPLATE,
    SOLUTION_TEMPLATE,
    TEACHER_TEMPLATE,
    MiniPipe,
    as_question,
    payload_steps,
    sequence,
)
from megatron_sdpo.tasks.minipipe_corpus import MIXTURE, documents, teacher_content
from megatron_sdpo.tasks.minipipe_language import ALL_NAMES, OPERATIONS, Machine, Step, question_text, run
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.types import Attempt, Group, Message, Question, Verdict

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "megatron_sdpo" / "data" / "minipipe-base"
TASK = MiniPipe()
STEPS = (Step("gt", 2), Step("sort"), Step("item", 1))
QUESTION = as_question("q", STEPS)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(MODEL)


def test_thirteen_operations_under_four_names_each() -> None:
    assert len(OPERATIONS) == 13
    assert len(set(ALL_NAMES)) == 52


def test_golden_question_and_answer() -> None:
    assert QUESTION.messages[-1].content == "keep over 2, sort, item 1"
    assert TASK.reference(QUESTION) == "above 2 | order | get 1"
    assert TASK.verify(QUESTION, "above 2 | order | get 1") == Verdict(1.0, "")


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("over 2 | order", "sh: over: not found, did you mean above?"),
        ("frobnicate | order", "sh: frobnicate: not found"),
        ("above | order", "sh: above: missing operand"),
        ("above 2 | order 3", "sh: order: extra operand"),
        ("above 2 | largest | order", "sh: order: input is not a list"),
        ("above 2 | order", "test failed: got [6,8], expected 6"),
        ("above 2 | order | get 9", "test failed: got 0, expected 6"),
        ("", "sh: syntax error"),
        ("above 2 |", "sh: syntax error"),
        ("above two", "sh: syntax error"),
        ("above ² | order", "sh: syntax error"),
        ("above " + "9" * 5000, "sh: syntax error"),
        ("<q> above 2", "sh: syntax error"),
    ],
)
def test_feedback_is_the_first_error(response: str, feedback: str) -> None:
    assert TASK.verify(QUESTION, response) == Verdict(0.0, feedback)


def test_without_hint_the_right_name_stays_hidden() -> None:
    assert MiniPipe(hint=False).verify(QUESTION, "over 2") == Verdict(0.0, "sh: over: not found")


def test_digits_may_stand_apart(chat: Chat) -> None:
    question = as_question("q", (Step("add", 12), Step("sum")))
    answer = TASK.reference(question)
    decoded = chat.text((*chat.encode(answer), chat.eos_id))
    assert decoded == "inc 1 2 | total"
    assert TASK.verify(question, decoded) == TASK.verify(question, answer) == Verdict(1.0)


def test_machine_may_count_from_zero() -> None:
    task = MiniPipe(index_base=0)
    assert task.reference(QUESTION) == "above 2 | order | get 0"
    assert task.verify(QUESTION, "above 2 | order | get 0").reward == 1
    assert task.verify(QUESTION, "above 2 | order | get 1").reward == 0


def test_ranks_bound_the_machine() -> None:
    assert set(MiniPipe(ranks=(3,)).machine.ranks.values()) == {3}
    assert set(TASK.machine.ranks.values()) == {1, 2}
    assert MiniPipe(machine_seed=2).machine != TASK.machine


PROGRAMS = st.lists(
    st.one_of(st.sampled_from([*ALL_NAMES, "|", "|", "1", "2", "3"]), st.text(max_size=6)), max_size=24
).map(" ".join)


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.text(), PROGRAMS), st.integers(0, len(TASK.eval_questions()) - 1))
@example(" | ".join(["sq"] * 5000), 0)
@example("inc 999999999 | " * 3 + "total", 0)
def test_any_text_has_a_verdict(response: str, index: int) -> None:
    question = TASK.eval_questions()[index]
    verdict = TASK.verify(question, response)
    assert verdict.reward in (0.0, 1.0)
    assert (verdict.feedback == "") == (verdict.reward == 1.0)
    assert TASK.verify(question, response) == verdict


@given(st.integers(0, 10_000), st.sampled_from([(0,), (0, 1, 2, 3), (1, 2)]), st.integers(0, 1), st.data())
@settings(deadline=None)
def test_the_reference_passes_on_every_machine(
    seed: int, ranks: tuple[int, ...], base: int, data: st.DataObject
) -> None:
    task = MiniPipe(machine_seed=seed, ranks=ranks, index_base=base, train_size=20, eval_size=5)
    question = data.draw(st.sampled_from([*task.train_questions(), *task.eval_questions()]))
    assert task.verify(question, task.reference(question)) == Verdict(1.0)


def test_operations_compute_what_they_say() -> None:
    values = [3, 8, 1, 6]
    results = {key: run((Step(key, 2 if op.takes_operand else None),), values, 1) for key, op in OPERATIONS.items()}
    assert results == {
        "odd": [3, 1], "even": [8, 6], "gt": [3, 8, 6], "sq": [9, 64, 1, 36], "add": [5, 10, 3, 8],
        "sort": [1, 3, 6, 8], "rev": [6, 1, 8, 3], "first": [3, 8], "sum": 18, "max": 8, "min": 1,
        "count": 4, "item": 8,
    }  # fmt: skip


def test_held_out_sequences_are_not_trained_on() -> None:
    train, held_out = (
        [sequence(payload_steps(q)) for q in qs] for qs in (TASK.train_questions(), TASK.eval_questions())
    )
    assert (len(set(train)), len(set(held_out))) == (600, 80)
    assert set(train).isdisjoint(held_out)
    assert {key for keys in train for key in keys} == set(OPERATIONS)
    ids = [q.id for q in (*TASK.train_questions(), *TASK.eval_questions())]
    assert len(set(ids)) == 680


def test_another_question_seed_asks_nothing_that_the_standard_set_holds_out() -> None:
    def sequences(questions: Sequence[Question]) -> set[tuple[str, ...]]:
        return {sequence(payload_steps(question)) for question in questions}

    other = MiniPipe(question_seed=100)
    train, held_out = sequences(other.train_questions()), sequences(other.eval_questions())
    assert (len(train), len(held_out)) == (600, 80)
    assert not train & held_out
    assert not (train | held_out) & sequences(TASK.eval_questions())
    assert held_out != sequences(MiniPipe(question_seed=101).eval_questions())
    assert TASK.eval_questions() == MiniPipe(question_seed=0).eval_questions()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": ()}, "ranks"),
        ({"ranks": (4,)}, "ranks"),
        ({"index_base": 2}, "index_base"),
        ({"min_ops": 3, "max_ops": 2}, "min_ops"),
        ({"max_ops": 99}, "max_ops"),
        ({"eval_size": 0}, "eval_size"),
        ({"max_ops": 2}, "too few for 680"),
        ({"max_ops": 2, "train_size": 20, "eval_size": 30, "question_seed": 1}, "too few for 80"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MiniPipe(**options)


def _file(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_questions(tmp_path: Path) -> None:
    trained = TASK.train_questions()[0]
    rows = [{"id": "mine", "prompt": trained.messages[0].content, "payload": trained.payload}]
    task = MiniPipe(questions=_file(tmp_path / "q.jsonl", *rows))
    assert [q.id for q in task.train_questions()] == ["mine"]
    assert task.verify(task.train_questions()[0], task.reference(trained)).reward == 1
    assert task.eval_questions() == TASK.eval_questions()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({}, "must be a list"),
        ({"operations": []}, "must be a list"),
        ({"operations": ["sort"]}, "not an .* pair"),
        ({"operations": [["shuffle", None]]}, "unknown operation 'shuffle'"),
        ({"operations": [[["gt"], 1]]}, "unknown operation"),
        ({"operations": [["sort", 1]]}, "takes no operand"),
        ({"operations": [["gt", None]]}, "positive whole number"),
        ({"operations": [["gt", True]]}, "positive whole number"),
        ({"operations": [["sum", None], ["sort", None]]}, "can only come last"),
        (TASK.eval_questions()[0].payload, "held-out"),
    ],
)
def test_bad_own_questions_are_refused_by_line(tmp_path: Path, payload: dict, words: str) -> None:
    good = {"id": "a", "prompt": "sort", "payload": {"operations": [["sort", None]]}}
    path = _file(tmp_path / "q.jsonl", good, {"id": "b", "prompt": "?", "payload": payload})
    with pytest.raises(ConfigError, match=rf"q\.jsonl, line 2: .*{words}"):
        MiniPipe(questions=path)


def _attempt(chat: Chat, text: str) -> Attempt:
    ids = (*chat.encode(text), chat.eos_id)
    return Attempt((), ids, (0.0,) * len(ids), chat.text(ids), "stop", 0)


def test_corpus_and_training_make_the_same_contexts(chat: Chat) -> None:
    config = TeacherContextConfig(
        template=TEACHER_TEMPLATE, solution_template=SOLUTION_TEMPLATE, feedback_template=FEEDBACK_TEMPLATE
    )
    text, wrong, right = QUESTION.messages[0].content, "over 2 | order | get 1", TASK.reference(QUESTION)
    for responses, content in [
        ((wrong, right), teacher_content(text, solution=right)),
        (
            (wrong, wrong),
            teacher_content(text, feedback=FEEDBACK_TEMPLATE.format(feedback=TASK.verify(QUESTION, wrong).feedback)),
        ),
    ]:
        attempts = tuple(_attempt(chat, r) for r in responses)
        verdicts = tuple(TASK.verify(QUESTION, a.text) for a in attempts)
        contexts, _ = build_contexts(Group(0, 0, QUESTION, attempts, verdicts), config, chat)
        expected = chat.prompt_ids((Message("user", content),))
        assert contexts[0].prompt_ids == expected
    assert chat.text(expected) == (
        "<q> keep over 2 , sort , item 1 <fb> sh : over : not found , did you mean above ? <again> <a>"
    )


def test_corpus_documents(chat: Chat) -> None:
    drawn = list(itertools.islice(documents(3, chat), 3000))
    assert drawn[:50] == list(itertools.islice(documents(3, chat), 50))
    unknown = chat.encode("日")
    kinds = Counter(document.kind for document in drawn)
    for kind, share in MIXTURE.items():
        assert abs(kinds[kind] / len(drawn) - share) < 0.03
    for document in drawn:
        assert len(document.ids) <= 128
        assert not set(unknown) & set(document.ids)
        answer_start, end = document.loss_spans[-1]
        assert end == len(document.ids)
        assert document.ids[-1] == chat.eos_id
        assert document.ids[answer_start - 1] == chat.encode("<a>")[0]
        assert len(document.loss_spans) == (2 if document.kind == "solution" else 1)


def test_a_solution_document_learns_its_demonstration_too(chat: Chat) -> None:
    document = next(d for d in documents(0, chat) if d.kind == "solution")
    demonstration, answer = document.samples("pretrain/0")
    assert (*demonstration.response_ids, chat.eos_id) == answer.response_ids
    assert demonstration.prompt_ids[-1:] == chat.encode("<sol>")
    assert answer.prompt_ids + answer.response_ids == document.ids
    assert answer.prompt_ids[: len(demonstration.prompt_ids)] == demonstration.prompt_ids
    assert [s.id for s in (demonstration, answer)] == ["pretrain/0/0", "pretrain/0/1"]


def test_single_feedback_documents_report_a_real_error(chat: Chat) -> None:
    texts = [chat.text(d.ids) for d in itertools.islice(documents(1, chat), 300) if d.kind == "feedback"]
    assert all(t.count("<fb>") == 1 for t in texts)
    assert any("did you mean" in t for t in texts)
    assert any("not found <again>" in t for t in texts)
    assert any("<att>" in t for t in texts)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, ROOT / "tools" / "make_minipipe_tokenizer.py", "--out", folder, "--weights"]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder


def test_the_shipped_tokenizer_is_what_the_tool_writes(written: Path) -> None:
    for file in written.glob("*.json"):
        assert json.loads(file.read_text()) == json.loads((MODEL / file.name).read_text()), file.name
    assert (written / "chat_template.jinja").read_text() == (MODEL / "chat_template.jinja").read_text()


def test_initial_weights(written: Path) -> None:
    weights = load_file(written / "model.safetensors")
    assert len(weights) == 3 + 4 * 9
    assert all(w.dtype == np.float32 for w in weights.values())
    deviation = {name: float(w.std()) for name, w in weights.items()}
    assert deviation["model.embed_tokens.weight"] == pytest.approx(1, rel=0.05)
    assert deviation["lm_head.weight"] == pytest.approx(0.02, rel=0.05)
    assert deviation["model.layers.3.self_attn.o_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert deviation["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert deviation["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(96**-0.5, rel=0.05)
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (176, 96)
    assert np.all(weights["model.norm.weight"] == 1)


def test_every_text_of_the_task_is_in_the_vocabulary(chat: Chat) -> None:
    (unknown,) = chat.encode("日")
    assert chat.vocab_size == 104
    for question in (*TASK.train_questions(), *TASK.eval_questions()):
        for text in (question_text(payload_steps(question)), TASK.reference(question)):
            assert unknown not in chat.encode(text)
    for response in (*ALL_NAMES, "above 2 | largest | order", "above", "order 1", "total", "|"):
        assert unknown not in chat.encode(TASK.verify(QUESTION, response).feedback)


def test_machines_are_the_same_in_every_process() -> None:
    code = (
        "from megatron_sdpo.tasks.minipipe import MiniPipe; t = MiniPipe(); print(t.reference(t.eval_questions()[7]))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "99"}
    shown = subprocess.run(command, check=True, timeout=60, env=environment, capture_output=True, text=True).stdout
    assert shown.strip() == TASK.reference(TASK.eval_questions()[7])
    assert Machine.drawn(1) == TASK.machine
