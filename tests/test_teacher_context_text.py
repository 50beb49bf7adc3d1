"""Whole teacher prompts as text: every combination of sections, and the attempts that need care."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_sdpo.config import TeacherContextConfig
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.types import Group, Message, Question
from tests.context_setup import ReadableChat, group, write_chatml

DEFAULT = TeacherContextConfig(max_prompt_tokens=100_000)
QUESTION = Question("q", (Message("system", "You write shell."), Message("user", "keep over 2, sort")))
WRONG = ("gt 2 | sort", 0.0, "sh: gt: not found")
RIGHT = ("above 2 | order", 1.0, "")
Prompts = Callable[[Group, TeacherContextConfig], list[str | None]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """Each attempt's teacher prompt as text, None for those without."""
    folder = write_chatml(tmp_path_factory.mktemp("chat") / "chatml")

    def of(attempts: Group, config: TeacherContextConfig) -> list[str | None]:
        chat = ReadableChat(folder)
        contexts, _ = build_contexts(attempts, config, chat)
        by_ids = {chat.encode(text): text for text in chat.rendered}
        assert len(by_ids) == len(set(chat.rendered)) == len(chat.rendered)  # equal contexts are rendered once
        return [context.prompt_ids and by_ids[context.prompt_ids] for context in contexts]

    return of


FRAME = """\
<|system|>
You write shell.<eos>
<|user|>
keep over 2, sort{sections}

Correctly solve the original question.
<eos>
<|assistant|>
"""
DEMONSTRATION = """
Correct solution:

above 2 | order

"""
ATTEMPT = """
The following is your unsuccessful earlier attempt:

gt 2 | sort

"""
FEEDBACK = """
The following is feedback from your unsuccessful earlier attempt:

sh: gt: not found

"""


@pytest.mark.parametrize(
    ("siblings", "feedback", "include_attempt", "sections"),
    [
        ((RIGHT,), "without_solution", False, DEMONSTRATION),
        ((RIGHT,), "always", False, DEMONSTRATION + FEEDBACK),
        ((RIGHT,), "never", True, DEMONSTRATION + ATTEMPT),
        ((RIGHT,), "always", True, DEMONSTRATION + ATTEMPT + FEEDBACK),
        ((), "without_solution", False, FEEDBACK),
        ((), "without_solution", True, ATTEMPT + FEEDBACK),
        ((), "never", True, None),
    ],
)
def test_every_combination_of_sections(prompts: Prompts, siblings, feedback, include_attempt, sections) -> None:
    config = replace(DEFAULT, feedback=feedback, include_attempt=include_attempt)
    found = prompts(group(WRONG, *siblings, question=QUESTION), config)[0]
    assert found == (sections and FRAME.format(sections=sections))


def test_a_whole_prompt_in_one_piece(prompts: Prompts) -> None:
    """The pieces of the other tests, once as a reader of the run would see them."""
    config = replace(DEFAULT, feedback="always", include_attempt=True)
    assert prompts(group(WRONG, RIGHT, question=QUESTION), config) == [
        """\
<|system|>
You write shell.<eos>
<|user|>
keep over 2, sort
Correct solution:

above 2 | order


The following is your unsuccessful earlier attempt:

gt 2 | sort


The following is feedback from your unsuccessful earlier attempt:

sh: gt: not found



Correctly solve the original question.
<eos>
<|assistant|>
""",
        None,
    ]


DEMONSTRATED = FRAME.format(sections=DEMONSTRATION)
TOLD = FRAME.format(sections=FEEDBACK)
TRUNCATED = ("<think>\nfirst, the", 0.0, "no answer")
THOUGHT = ("<think>\nhm\n</think>\n\nabove 2 | order", 1.0, "")


@pytest.mark.parametrize(
    ("outcomes", "changes", "expected"),
    [
        ((RIGHT, WRONG), {}, (None, DEMONSTRATED)),
        ((RIGHT, WRONG), {"exclude_own_success": False}, (DEMONSTRATED, DEMONSTRATED)),
        ((RIGHT,), {"exclude_own_success": False, "include_attempt": True}, (DEMONSTRATED,)),
        ((WRONG, WRONG), {}, (TOLD, TOLD)),
        ((WRONG, WRONG), {"feedback": "never"}, (None, None)),
        ((RIGHT, RIGHT), {"include_attempt": True}, (DEMONSTRATED, DEMONSTRATED)),
        ((("", 0.0, "sh: gt: not found"), ("", 1.0, "")), {"include_attempt": True}, (TOLD, None)),
        ((THOUGHT, WRONG), {}, (None, DEMONSTRATED)),
        (
            (TRUNCATED,),
            {"include_attempt": True},
            (
                FRAME.format(
                    sections=ATTEMPT.replace("gt 2 | sort", "<think>\nfirst, the")
                    + FEEDBACK.replace("sh: gt: not found", "no answer")
                ),
            ),
        ),
        (
            (("<think>a</think>gt 2 | sort", 0.0, ""), THOUGHT),
            {"include_attempt": True},
            (FRAME.format(sections=DEMONSTRATION + ATTEMPT), None),
        ),
        (
            (("<think>a</think>gt 2 | sort", 0.0, ""), THOUGHT),
            {"include_attempt": True, "remove_thinking": False},
            (
                FRAME.format(
                    sections=DEMONSTRATION.replace("above", "<think>\nhm\n</think>\n\nabove")
                    + ATTEMPT.replace("gt 2", "<think>a</think>gt 2")
                ),
                None,
            ),
        ),
    ],
    ids=[
        "lone success",
        "lone success, own shown",
        "own success is no failed attempt",
        "all fail",
        "all fail, no feedback",
        "all succeed",
        "empty responses",
        "thinking removed",
        "cut while thinking",
        "thinking removed from both",
        "thinking kept",
    ],
)
def test_attempts_that_need_care(prompts: Prompts, outcomes, changes, expected) -> None:
    assert prompts(group(*outcomes, question=QUESTION), replace(DEFAULT, **changes)) == list(expected)


def test_only_the_last_user_message_changes(prompts: Prompts) -> None:
    turns = (
        Message("system", "s"),
        Message("user", "one"),
        Message("assistant", "<think>x</think>1"),
        Message("system", "t"),
        Message("user", "two"),
    )
    (found,) = prompts(
        group(WRONG, question=Question("q", turns)), replace(DEFAULT, template="{prompt}!{solution}{feedback}")
    )
    assert found == (
        "<|system|>\ns<eos>\n<|user|>\none<eos>\n<|assistant|>\n<think>x</think>1<eos>\n<|system|>\nt<eos>\n"
        f"<|user|>\ntwo!{FEEDBACK}<eos>\n<|assistant|>\n"
    )


def test_placeholders_in_texts_stay_literal(prompts: Prompts) -> None:
    tricky = Question("q", (Message("user", "{feedback} {solution} {attempt}"),))
    right = ("{prompt} {solution} {0} {} {{x}} \\1", 1.0, "")
    wrong = ("{feedback} {attempt}", 0.0, "{prompt} %s {attempt}")
    config = replace(
        DEFAULT,
        feedback="always",
        include_attempt=True,
        template="{prompt}{solution}{attempt}{feedback}",
        solution_template=" S {solution}",
        attempt_template=" A {attempt}",
        feedback_template=" F {feedback}",
    )
    assert prompts(group(wrong, right, question=tricky), config)[0] == (
        "<|user|>\n{feedback} {solution} {attempt} S {prompt} {solution} {0} {} {{x}} \\1 A {feedback} {attempt}"
        " F {prompt} %s {attempt}<eos>\n<|assistant|>\n"
    )
