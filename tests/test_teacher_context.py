"""Teacher contexts: who demonstrates, which feedback, and what is cut, on the real MiniPipe tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError, TeacherContextConfig
from megatron_sdpo.tasks.minipipe import FEEDBACK_TEMPLATE, SOLUTION_TEMPLATE, TEACHER_TEMPLATE
from megatron_sdpo.teacher_context import ELLIPSIS, build_contexts, check_templates, fill, without_thinking
from megatron_sdpo.types import Attempt, Group, Message, Question, TeacherContext, Verdict

CHAT = Chat(Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base")
PLAIN = TeacherContextConfig()
MINIPIPE = TeacherContextConfig(
    template=TEACHER_TEMPLATE, solution_template=SOLUTION_TEMPLATE, feedback_template=FEEDBACK_TEMPLATE
)
QUESTION = Question("q", (Message("system", "count"), Message("user", "keep over 2 , sort")))
KINDS = ("demonstration", "feedback", "both", "none", "dropped")


class ReadableChat(Chat):
    """The real chat, with the texts that were rendered kept for reading: words outside MiniPipe have no ids."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.rendered: list[str] = []

    def prompt_ids(self, messages):
        self.rendered.append(self.render(messages))
        return super().prompt_ids(messages)


def _group(*outcomes: tuple[str, float, str], question: Question = QUESTION) -> Group:
    """One attempt for each (text, reward, feedback)."""
    attempts = tuple(Attempt((5,), (7, 1), (0.0, 0.0), text, "stop", 0) for text, _, _ in outcomes)
    return Group(4, 0, question, attempts, tuple(Verdict(reward, feedback) for _, reward, feedback in outcomes))


def _read(group: Group, config: TeacherContextConfig) -> tuple[list[str | None], dict[str, float]]:
    contexts, counts = build_contexts(group, config, CHAT, seed=0)
    return [c.prompt_ids and CHAT.text(c.prompt_ids) for c in contexts], counts


def _counts(**counted: float) -> dict[str, float]:
    return {f"context/{name}": float(counted.get(name, 0)) for name in (*KINDS, "shortened")}


WRONG = ("over 2 | sort", 0.0, "sh: over: not found")
RIGHT = ("above 2 | order", 1.0, "")
ALSO_RIGHT = ("above 2 | order | order", 1.0, "")
SILENT = ("over 3", 0.0, "")


def test_a_sibling_demonstrates_and_feedback_is_for_want_of_one() -> None:
    texts, counts = _read(_group(WRONG, RIGHT), MINIPIPE)
    assert texts == ["count <q> keep over 2 , sort <sol> above 2 | order <again> <a>", None]
    assert counts == _counts(demonstration=1, none=1)
    texts, counts = _read(_group(WRONG, WRONG), MINIPIPE)
    assert texts == ["count <q> keep over 2 , sort <fb> sh : over : not found <again> <a>"] * 2
    assert counts == _counts(feedback=2)


def test_the_first_success_demonstrates_to_all_but_itself() -> None:
    texts, counts = _read(_group(RIGHT, WRONG, ALSO_RIGHT), MINIPIPE)
    shown = [text and text.split("<sol> ")[1].split(" <again>")[0] for text in texts]
    assert shown == ["above 2 | order | order", "above 2 | order", "above 2 | order"]
    assert counts == _counts(demonstration=3)


def test_a_lone_success_may_show_itself_if_configured() -> None:
    texts, _ = _read(_group(RIGHT, WRONG), replace(MINIPIPE, exclude_own_success=False))
    assert texts[0] == texts[1]
    assert texts[0] is not None


def test_nothing_to_tell_is_no_context() -> None:
    contexts, counts = build_contexts(_group(SILENT, ("x", 0.0, "  \n")), MINIPIPE, CHAT)
    assert contexts == (TeacherContext("none"), TeacherContext("none"))
    assert counts == _counts(none=2)


def test_threshold() -> None:
    half = ("above 2 | order", 0.5, "")
    assert _read(_group(WRONG, half), MINIPIPE)[1] == _counts(demonstration=1, none=1)
    assert _read(_group(WRONG, half), replace(MINIPIPE, success_threshold=0.6))[1] == _counts(feedback=1, none=1)


@pytest.mark.parametrize(
    ("feedback", "demonstrations", "counted"),
    [
        ("without_solution", True, {"demonstration": 1, "none": 1}),
        ("always", True, {"both": 1, "none": 1}),
        ("never", True, {"demonstration": 1, "none": 1}),
        ("without_solution", False, {"feedback": 1, "none": 1}),
        ("never", False, {"none": 2}),
    ],
)
def test_feedback_policies(feedback, demonstrations: bool, counted: dict[str, float]) -> None:
    config = replace(MINIPIPE, feedback=feedback, demonstrations=demonstrations)
    assert _read(_group(WRONG, RIGHT), config)[1] == _counts(**counted)


def test_both_sections_in_order() -> None:
    texts, _ = _read(_group(WRONG, RIGHT), replace(MINIPIPE, feedback="always"))
    assert texts[0] == "count <q> keep over 2 , sort <sol> above 2 | order <fb> sh : over : not found <again> <a>"


def test_golden_text_of_the_default_templates() -> None:
    chat = ReadableChat(Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base")
    build_contexts(_group(WRONG, RIGHT), replace(PLAIN, feedback="always"), chat)
    assert chat.rendered == [
        "count <q> keep over 2 , sort\nCorrect solution:\n\nabove 2 | order\n\n"
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\nsh: over: not found\n\n"
        "\n\nCorrectly solve the original question.\n <a>"
    ]


def test_only_the_last_user_message_changes() -> None:
    chat = ReadableChat(Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base")
    turns = (Message("system", "s"), Message("user", "one"), Message("assistant", "1"), Message("user", "two"))
    build_contexts(_group(WRONG, question=Question("q", turns)), MINIPIPE, chat)
    assert chat.rendered == ["s <q> one <a> 1 <eos> <q> two <fb> sh: over: not found <again> <a>"]


def test_placeholders_in_texts_stay_literal() -> None:
    chat = ReadableChat(Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base")
    tricky = Question("q", (Message("user", "{feedback} {solution}"),))
    right = ("{prompt} {solution} {0} {} {{x}} \\1", 1.0, "")
    wrong = ("x", 0.0, "{prompt} %s {feedback}")
    build_contexts(_group(wrong, right, question=tricky), replace(MINIPIPE, feedback="always"), chat)
    assert chat.rendered == [
        "<q> {feedback} {solution} <sol> {prompt} {solution} {0} {} {{x}} \\1 <fb> {prompt} %s {feedback} <again> <a>"
    ]


def test_fill_leaves_other_braces_alone() -> None:
    assert fill('{"a": {prompt}} {other} {solution}', prompt="1") == '{"a": 1} {other} {solution}'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("<think>a\n</think>\n\nb <think>c</think> d", "b  d"),
        ("opened in the prompt</think>\nb", "b"),
        ("<think>never closed", "<think>never closed"),
        ("<think>only thoughts</think>", ""),
    ],
)
def test_thinking_is_removed(text: str, kept: str) -> None:
    assert without_thinking(text) == kept


def test_thoughts_alone_do_not_demonstrate() -> None:
    thoughts = ("<think>order</think>", 1.0, "")
    texts, _ = _read(_group(WRONG, thoughts, RIGHT), MINIPIPE)
    assert texts[0] == "count <q> keep over 2 , sort <sol> above 2 | order <again> <a>"
    assert _read(_group(WRONG, thoughts), MINIPIPE)[1] == _counts(feedback=1, none=1)
    kept, _ = _read(_group(SILENT, thoughts), replace(MINIPIPE, remove_thinking=False))
    assert kept[0] is not None


LONG = "sort | " * 30 + "sum"
LONG_WRONG = ("x", 0.0, "first " + "odds " * 40 + "last")


def test_too_long_may_be_dropped_or_fatal() -> None:
    group = _group(LONG_WRONG, SILENT)
    texts, counts = _read(group, replace(MINIPIPE, max_prompt_tokens=30, too_long="drop"))
    assert texts == [None, None]
    assert counts == _counts(dropped=1, none=1)
    with pytest.raises(ConfigError, match=r"question 'q' has \d+ tokens.*30"):
        _read(group, replace(MINIPIPE, max_prompt_tokens=30, too_long="fail"))


def test_shortening_cuts_the_middle_and_keeps_the_frame() -> None:
    group = _group(("x", 0.0, "count max min sort sum add"))
    full = "count <q> keep over 2 , sort <fb> count max min sort sum add <again> <a>"
    assert _read(group, replace(MINIPIPE, max_prompt_tokens=16))[0] == [full]
    texts, counts = _read(group, replace(MINIPIPE, max_prompt_tokens=15))
    assert texts == ["count <q> keep over 2 , sort <fb> count max … sum add <again> <a>"]
    assert counts == _counts(feedback=1, shortened=1)
    assert _read(group, replace(MINIPIPE, max_prompt_tokens=12))[0] == [
        "count <q> keep over 2 , sort <fb> count … <again> <a>"
    ]
    texts, counts = _read(group, replace(MINIPIPE, max_prompt_tokens=11))
    assert (texts, counts) == ([None], _counts(dropped=1))


def test_feedback_is_cut_before_the_demonstration() -> None:
    config = replace(MINIPIPE, feedback="always")
    group = _group(("x", 0.0, "count max min sort sum add"), RIGHT)
    frame = "count <q> keep over 2 , sort <sol> above 2 | order"
    assert _read(group, replace(config, max_prompt_tokens=19))[0][0] == f"{frame} <fb> count max … add <again> <a>"
    texts, counts = _read(group, replace(config, max_prompt_tokens=15))
    assert texts[0] == f"{frame} <again> <a>"
    assert counts == _counts(demonstration=1, shortened=1, none=1)
    assert _read(group, replace(config, max_prompt_tokens=13))[0][0] == (
        "count <q> keep over 2 , sort <sol> above … order <again> <a>"
    )


WORDS = st.lists(st.sampled_from(["sort", "|", "over 12", "odds", "x", "日", "<think>", "{prompt}"]), max_size=30)
OUTCOMES = st.tuples(WORDS.map(" ".join), st.sampled_from([0.0, 0.4, 1.0]), WORDS.map(" ".join))


@settings(deadline=None, max_examples=200)
@given(
    outcomes=st.lists(OUTCOMES, min_size=1, max_size=5),
    limit=st.integers(1, 60),
    feedback=st.sampled_from(["without_solution", "always", "never"]),
    too_long=st.sampled_from(["drop", "shorten"]),
    own=st.booleans(),
)
def test_every_context_fits_and_keeps_question_and_frame(outcomes, limit, feedback, too_long, own) -> None:
    config = replace(MINIPIPE, max_prompt_tokens=limit, feedback=feedback, too_long=too_long, exclude_own_success=own)
    contexts, counts = build_contexts(_group(*outcomes), config, CHAT)
    assert len(contexts) == len(outcomes) == sum(counts[f"context/{kind}"] for kind in KINDS)
    head, tail = CHAT.encode("count <q> keep over 2 , sort"), CHAT.encode("<again> <a>")
    for context in contexts:
        assert (context.kind == "none") == (context.prompt_ids is None)
        if context.prompt_ids is not None:
            assert len(context.prompt_ids) <= limit
            assert context.prompt_ids[: len(head)] == head
            assert context.prompt_ids[-len(tail) :] == tail
    unlimited = replace(config, max_prompt_tokens=10_000)
    whole, all_told = build_contexts(_group(*outcomes), unlimited, CHAT)
    assert all_told["context/dropped"] == all_told["context/shortened"] == 0
    assert counts["context/none"] == all_told["context/none"]
    if counts["context/shortened"] == counts["context/dropped"] == 0:
        assert contexts == whole


def test_shortening_uses_the_room_there_is() -> None:
    """On this tokenizer every token count is reachable, so a cut context fills its limit exactly."""
    for limit in range(12, 50):
        contexts, _ = build_contexts(_group(LONG_WRONG), replace(MINIPIPE, max_prompt_tokens=limit), CHAT)
        assert contexts[0].prompt_ids is not None
        assert len(contexts[0].prompt_ids) == limit


def test_the_ellipsis_is_one_token_of_the_tokenizer() -> None:
    ids = CHAT.encode(ELLIPSIS)
    assert len(ids) == 1
    assert CHAT.text(ids) == ELLIPSIS.strip()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "{solution}{feedback}"}, "template lacks {prompt}"),
        ({"template": "{prompt}{feedback}"}, "template lacks {solution}"),
        ({"template": "{prompt}{solution}"}, "template lacks {feedback}"),
        ({"solution_template": "look"}, "solution_template lacks {solution}"),
        ({"feedback_template": "{feed}"}, "feedback_template lacks {feedback}"),
    ],
)
def test_templates_without_their_placeholder_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_contexts(_group(WRONG), replace(MINIPIPE, **changes), CHAT)


def test_unused_sections_need_no_placeholder() -> None:
    check_templates(replace(MINIPIPE, template="{prompt}{solution}", feedback="never"))
    check_templates(replace(MINIPIPE, template="{prompt}{feedback}", demonstrations=False))


def test_a_question_without_user_message_is_refused() -> None:
    with pytest.raises(ConfigError, match="no user message"):
        build_contexts(_group(WRONG, question=Question("q", (Message("system", "x"),))), MINIPIPE, CHAT)
