"""Teacher contexts: who demonstrates, which feedback, and what is cut, on the real MiniPipe tokenizer."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError
from megatron_sdpo.teacher_context import ELLIPSIS, build_contexts, check_templates, fill, without_thinking
from megatron_sdpo.types import Message, Question, TeacherContext
from tests.context_setup import CHAT, MINIPIPE, group, read

KINDS = ("demonstration", "feedback", "both", "none", "dropped")


def _counts(**counted: float) -> dict[str, float]:
    return {f"context/{name}": float(counted.get(name, 0)) for name in (*KINDS, "shortened", "attempt_shown")}


WRONG = ("over 2 | sort", 0.0, "sh: over: not found")
RIGHT = ("above 2 | order", 1.0, "")
ALSO_RIGHT = ("above 2 | order | order", 1.0, "")
SILENT = ("over 3", 0.0, "")


def test_a_sibling_demonstrates_and_feedback_is_for_want_of_one() -> None:
    texts, counts = read(group(WRONG, RIGHT), MINIPIPE)
    assert texts == ["count <q> keep over 2 , sort <sol> above 2 | order <again> <a>", None]
    assert counts == _counts(demonstration=1, none=1)
    texts, counts = read(group(WRONG, WRONG), MINIPIPE)
    assert texts == ["count <q> keep over 2 , sort <fb> sh : over : not found <again> <a>"] * 2
    assert counts == _counts(feedback=2)


def test_the_first_success_demonstrates_to_all_but_itself() -> None:
    texts, counts = read(group(RIGHT, WRONG, ALSO_RIGHT), MINIPIPE)
    shown = [text and text.split("<sol> ")[1].split(" <again>")[0] for text in texts]
    assert shown == ["above 2 | order | order", "above 2 | order", "above 2 | order"]
    assert counts == _counts(demonstration=3)


def test_a_random_success_demonstrates_and_the_draw_is_pinned() -> None:
    """By seed, step, slot and attempt: another process, a resumed run and another order of calls draw the same."""
    config = replace(MINIPIPE, demonstration="random")
    rights = [(f"above {n}", 1.0, "") for n in range(4)]

    def drawn(seed: int = 0, step: int = 4, slot: int = 0) -> list[str]:
        texts, _ = read(group(*rights, *[WRONG] * 4, step=step, slot=slot), config, seed)
        return [(text or "").split("above ")[1][0] for text in texts]

    assert drawn() == list("30321030")
    others = [drawn(seed=1), drawn(step=5), drawn(slot=1)]
    assert drawn() == drawn()
    assert len({tuple(draw) for draw in (drawn(), *others)}) == 4
    table = [drawn(step=step) for step in range(300)]
    for attempt in range(8):  # uniform over the successes, its own excepted: 4 standard deviations
        allowed = {str(n) for n in range(4)} - {str(attempt)}
        share = {n: sum(draw[attempt] == n for draw in table) / 300 for n in map(str, range(4))}
        assert all(abs(share[n] - 1 / len(allowed)) < 0.11 for n in allowed)
        assert sum(share[n] for n in allowed) == pytest.approx(1.0)


def test_a_draw_is_among_those_that_have_something_to_show() -> None:
    outcomes = (WRONG, ("<think>x</think>", 1.0, ""), ("", 1.0, ""), RIGHT, SILENT)
    for step in range(20):
        texts, counts = read(group(*outcomes, step=step), replace(MINIPIPE, demonstration="random"))
        assert [text and "above 2 | order" in text for text in texts] == [True, True, True, None, True]
        assert counts == _counts(demonstration=4, none=1)


def test_an_attempt_is_shown_to_the_teacher_of_a_failure_and_never_alone() -> None:
    config = replace(MINIPIPE, include_attempt=True)
    texts, counts = read(group(WRONG, SILENT), config)
    assert texts == ["count <q> keep over 2 , sort <att> over 2 | sort <fb> sh : over : not found <again> <a>", None]
    assert counts == _counts(feedback=1, none=1, attempt_shown=1)
    texts, counts = read(group(SILENT, RIGHT, ("above 2 | sort", 0.5, "slow")), config)
    question = "count <q> keep over 2 , sort"
    assert texts[0] == f"{question} <sol> above 2 | order <att> over 3 <again> <a>"
    assert [text and "<att>" in text for text in texts] == [True, False, False]
    assert counts == _counts(demonstration=3, attempt_shown=1)


def test_nothing_to_tell_is_no_context() -> None:
    contexts, counts = build_contexts(group(SILENT, ("x", 0.0, "  \n")), MINIPIPE, CHAT)
    assert contexts == (TeacherContext("none"), TeacherContext("none"))
    assert counts == _counts(none=2)


def test_threshold() -> None:
    half = ("above 2 | order", 0.5, "")
    assert read(group(WRONG, half), MINIPIPE)[1] == _counts(demonstration=1, none=1)
    assert read(group(WRONG, half), replace(MINIPIPE, success_threshold=0.6))[1] == _counts(feedback=1, none=1)


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
    assert read(group(WRONG, RIGHT), config)[1] == _counts(**counted)


def test_both_sections_in_order() -> None:
    texts, _ = read(group(WRONG, RIGHT), replace(MINIPIPE, feedback="always"))
    assert texts[0] == "count <q> keep over 2 , sort <sol> above 2 | order <fb> sh : over : not found <again> <a>"


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
    texts, _ = read(group(WRONG, thoughts, RIGHT), MINIPIPE)
    assert texts[0] == "count <q> keep over 2 , sort <sol> above 2 | order <again> <a>"
    assert read(group(WRONG, thoughts), MINIPIPE)[1] == _counts(feedback=1, none=1)
    kept, _ = read(group(SILENT, thoughts), replace(MINIPIPE, remove_thinking=False))
    assert kept[0] is not None


LONG = "sort | " * 30 + "sum"
LONG_WRONG = ("x", 0.0, "first " + "odds " * 40 + "last")


def test_too_long_may_be_dropped_or_fatal() -> None:
    attempts = group(LONG_WRONG, SILENT)
    texts, counts = read(attempts, replace(MINIPIPE, max_prompt_tokens=30, too_long="drop"))
    assert texts == [None, None]
    assert counts == _counts(dropped=1, none=1)
    with pytest.raises(ConfigError, match=r"question 'q' has \d+ tokens.*30"):
        read(attempts, replace(MINIPIPE, max_prompt_tokens=30, too_long="fail"))


def test_shortening_cuts_the_middle_and_keeps_the_frame() -> None:
    attempts = group(("x", 0.0, "count max min sort sum add"))
    full = "count <q> keep over 2 , sort <fb> count max min sort sum add <again> <a>"
    assert read(attempts, replace(MINIPIPE, max_prompt_tokens=16))[0] == [full]
    texts, counts = read(attempts, replace(MINIPIPE, max_prompt_tokens=15))
    assert texts == ["count <q> keep over 2 , sort <fb> count max … sum add <again> <a>"]
    assert counts == _counts(feedback=1, shortened=1)
    assert read(attempts, replace(MINIPIPE, max_prompt_tokens=12))[0] == [
        "count <q> keep over 2 , sort <fb> count … <again> <a>"
    ]
    texts, counts = read(attempts, replace(MINIPIPE, max_prompt_tokens=11))
    assert (texts, counts) == ([None], _counts(dropped=1))


def test_feedback_is_cut_before_the_demonstration() -> None:
    config = replace(MINIPIPE, feedback="always")
    attempts = group(("x", 0.0, "count max min sort sum add"), RIGHT)
    frame = "count <q> keep over 2 , sort <sol> above 2 | order"
    assert read(attempts, replace(config, max_prompt_tokens=19))[0][0] == f"{frame} <fb> count max … add <again> <a>"
    texts, counts = read(attempts, replace(config, max_prompt_tokens=15))
    assert texts[0] == f"{frame} <again> <a>"
    assert counts == _counts(demonstration=1, shortened=1, none=1)
    assert read(attempts, replace(config, max_prompt_tokens=13))[0][0] == (
        "count <q> keep over 2 , sort <sol> above … order <again> <a>"
    )


ATTEMPTED = ("over 3 | sort", 0.0, "count max min sum")
SOL, ATT, FB = "<sol> above 2 | order", "<att> over 3 | sort", "<fb> count max min sum"  # 5 tokens each, 9 around them


@pytest.mark.parametrize(
    ("too_long", "limit", "shown", "kind"),
    [
        ("shorten", 23, f"{SOL} <att> over … sort {FB}", "both"),
        ("shorten", 21, f"{SOL} {FB}", "both"),
        ("shorten", 18, f"{SOL} <fb> count … sum", "both"),
        ("shorten", 16, f"{SOL}", "demonstration"),
        ("shorten", 13, "<sol> above … order", "demonstration"),
        ("shorten", 11, None, "dropped"),
        ("shorten_feedback", 23, f"{SOL} {ATT} <fb> count … sum", "both"),
        ("shorten_feedback", 20, f"{SOL} {ATT}", "demonstration"),
        ("shorten_feedback", 18, None, "dropped"),
        ("shorten_demonstration", 23, f"<sol> above … order {ATT} {FB}", "both"),
        ("shorten_demonstration", 20, f"{ATT} {FB}", "feedback"),
        ("shorten_demonstration", 18, None, "dropped"),
        ("drop", 23, None, "dropped"),
    ],
)
def test_each_policy_cuts_its_own_sections(too_long, limit: int, shown: str | None, kind: str) -> None:
    config = replace(MINIPIPE, feedback="always", include_attempt=True, too_long=too_long, max_prompt_tokens=limit)
    texts, counts = read(group(ATTEMPTED, RIGHT), config)
    assert texts[0] == (shown and f"count <q> keep over 2 , sort {shown} <again> <a>")
    cut = {"shortened": 1.0, "attempt_shown": float("<att>" in shown)} if shown else {}
    assert counts == _counts(**{kind: 1.0, "none": 1.0}, **cut)
    whole, counts = read(group(ATTEMPTED, RIGHT), replace(config, max_prompt_tokens=24))
    assert whole[0] == f"count <q> keep over 2 , sort {SOL} {ATT} {FB} <again> <a>"
    assert counts == _counts(both=1, none=1, attempt_shown=1)


def test_an_attempt_goes_with_the_last_thing_to_tell() -> None:
    """Without its feedback the attempt alone would be left: 14 tokens that say nothing new."""
    config = replace(MINIPIPE, include_attempt=True, too_long="shorten_feedback")
    assert read(group(ATTEMPTED), replace(config, max_prompt_tokens=17))[0] == [
        f"count <q> keep over 2 , sort {ATT} <fb> count … <again> <a>"
    ]
    assert read(group(ATTEMPTED), replace(config, max_prompt_tokens=16)) == ([None], _counts(dropped=1))


WORDS = st.lists(st.sampled_from(["sort", "|", "over 12", "odds", "x", "日", "<think>", "{prompt}"]), max_size=30)
OUTCOMES = st.tuples(WORDS.map(" ".join), st.sampled_from([0.0, 0.4, 1.0]), WORDS.map(" ".join))
MARKS = {mark: CHAT.encode(mark)[0] for mark in ("<sol>", "<att>", "<fb>", "<again>")}


def _shown_ids(prompt_ids: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """``{"<sol>": ids, ...}``: what stands behind each mark of a context."""
    places = [place for place, id in enumerate(prompt_ids) if id in MARKS.values()]
    names = {id: mark for mark, id in MARKS.items()}
    ends = [*places[1:], len(prompt_ids)]
    return {names[prompt_ids[a]]: prompt_ids[a + 1 : b] for a, b in zip(places, ends, strict=True)}


@settings(deadline=None, max_examples=200)
@given(
    asked=WORDS.map(" ".join),
    outcomes=st.lists(OUTCOMES, min_size=1, max_size=5),
    limit=st.integers(1, 90),
    config=st.builds(
        replace,
        st.just(MINIPIPE),
        feedback=st.sampled_from(["without_solution", "always", "never"]),
        too_long=st.sampled_from(["drop", "shorten", "shorten_feedback", "shorten_demonstration", "fail"]),
        demonstration=st.sampled_from(["first", "random"]),
        exclude_own_success=st.booleans(),
        include_attempt=st.booleans(),
    ),
)
def test_every_context_fits_and_keeps_question_and_frame(asked, outcomes, limit, config) -> None:
    question = Question("q", (Message("system", "count"), Message("user", asked)))
    attempts = group(*outcomes, question=question)
    whole, all_told = build_contexts(attempts, replace(config, max_prompt_tokens=10_000), CHAT)
    assert all_told["context/dropped"] == all_told["context/shortened"] == 0
    fits = all(context.prompt_ids is None or len(context.prompt_ids) <= limit for context in whole)
    limited = replace(config, max_prompt_tokens=limit)
    if config.too_long == "fail" and not fits:
        with pytest.raises(ConfigError, match="raise that or set"):
            build_contexts(attempts, limited, CHAT)
        return
    contexts, counts = build_contexts(attempts, limited, CHAT)
    assert len(contexts) == len(outcomes) == sum(counts[f"context/{kind}"] for kind in KINDS)
    assert counts["context/none"] == all_told["context/none"]
    assert (contexts == whole) == fits == (counts["context/shortened"] == counts["context/dropped"] == 0)
    head, tail = CHAT.prompt_ids(question.messages)[:-1], CHAT.encode("<again> <a>")
    shown_attempts = 0
    for context, unlimited, (_, reward, _) in zip(contexts, whole, outcomes, strict=True):
        assert (context.kind == "none") == (context.prompt_ids is None)
        if context.prompt_ids is None or unlimited.prompt_ids is None:
            continue
        assert len(context.prompt_ids) <= limit
        assert context.prompt_ids[: len(head)] == head
        assert context.prompt_ids[-len(tail) :] == tail
        shown, all_shown = _shown_ids(context.prompt_ids), _shown_ids(unlimited.prompt_ids)
        assert set(shown) <= set(all_shown)
        assert "<sol>" in shown or "<fb>" in shown
        assert "<att>" not in shown or (config.include_attempt and reward < config.success_threshold)
        shown_attempts += "<att>" in shown
        changed = {mark for mark in all_shown if shown.get(mark) != all_shown[mark]}
        assert changed <= MAY_CHANGE[config.too_long]
        if config.too_long == "shorten" and "<sol>" in changed:
            assert set(shown) == {"<sol>", "<again>"}
        if config.too_long == "shorten" and "<fb>" in changed:
            assert "<att>" not in shown
    assert counts["context/attempt_shown"] == shown_attempts


MAY_CHANGE = {
    "drop": set(),
    "fail": set(),
    "shorten": {"<sol>", "<att>", "<fb>"},
    "shorten_feedback": {"<fb>"},
    "shorten_demonstration": {"<sol>"},
}


def test_shortening_uses_the_room_there_is() -> None:
    """On this tokenizer every token count is reachable, so a cut context fills its limit exactly."""
    for limit in range(12, 50):
        contexts, _ = build_contexts(group(LONG_WRONG), replace(MINIPIPE, max_prompt_tokens=limit), CHAT)
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
        ({"template": "{prompt}{solution}{feedback}", "include_attempt": True}, "template lacks {attempt}"),
        ({"attempt_template": "look"}, "attempt_template lacks {attempt}"),
    ],
)
def test_templates_without_their_placeholder_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_contexts(group(WRONG), replace(MINIPIPE, **changes), CHAT)


def test_unused_sections_need_no_placeholder() -> None:
    check_templates(replace(MINIPIPE, template="{prompt}{solution}", feedback="never"))
    check_templates(replace(MINIPIPE, template="{prompt}{feedback}", demonstrations=False))
    check_templates(replace(MINIPIPE, template="{prompt}{solution}{feedback}"))


def test_a_question_without_user_message_is_refused() -> None:
    with pytest.raises(ConfigError, match="no user message"):
        build_contexts(group(WRONG, question=Question("q", (Message("system", "x"),))), MINIPIPE, CHAT)
