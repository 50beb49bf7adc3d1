"""What the self-teacher reads before it re-reads an attempt: who demonstrates, which feedback, what is cut.

For each attempt of a group: the first successful *sibling* demonstrates; without one the attempt's own
feedback is shown; with neither the teacher would know nothing more than the student, and there is no
context. The failed attempt itself is never shown. Texts go into the last user message through the
configured templates; system prompts and earlier turns stay as they are.

An over-long context loses from the middle of its feedback first, then of its demonstration. The
question, the templates' own words and the chat frame are never cut, and the response is not part of
the context at all: whoever needs context and response to fit a model together lowers
``max_prompt_tokens`` accordingly.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError, TeacherContextConfig
from megatron_sdpo.types import Attempt, ContextKind, Group, Message, Question, TeacherContext

ELLIPSIS = " … "
"""Stands where text was cut."""

_PLACEHOLDER = re.compile(r"\{(prompt|solution|feedback)\}")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_NO_CONTEXT = TeacherContext("none")
_COUNTED = ("demonstration", "feedback", "both", "none", "shortened", "dropped")


@dataclass(frozen=True, slots=True)
class _Sections:
    """What the teacher is told besides the question; "" is an absent section."""

    solution: str = ""
    feedback: str = ""

    @property
    def kind(self) -> ContextKind:
        if self.solution:
            return "both" if self.feedback else "demonstration"
        return "feedback" if self.feedback else "none"


def build_contexts(
    group: Group, config: TeacherContextConfig, tokens: Chat, seed: int = 0
) -> tuple[tuple[TeacherContext, ...], dict[str, float]]:
    """One context for each attempt, in order, and how often what happened, as sums over the attempts.

    The counts ``context/demonstration``, ``context/feedback``, ``context/both``, ``context/none`` (nothing
    to tell) and ``context/dropped`` (something to tell, but too long) add up to the attempts;
    ``context/shortened`` counts those of the first three that were cut. ``seed`` is for choices by
    chance; taking the first success makes none. Templates without their placeholder, a question without
    a user message, and a too long context under ``too_long="fail"`` raise ConfigError.
    """
    check_templates(config)
    counts: dict[str, float] = dict.fromkeys(_COUNTED, 0.0)
    # Failed siblings share their demonstration, so most contexts of a group are the same.
    made: dict[_Sections, tuple[TeacherContext, str | None]] = {}
    contexts: list[TeacherContext] = []
    for index in range(len(group.attempts)):
        sections = _sections(group, index, config)
        if sections not in made:
            made[sections] = _context(group, sections, config, tokens)
        context, treatment = made[sections]
        contexts.append(context)
        if treatment != "dropped":
            counts[context.kind] += 1
        if treatment is not None:
            counts[treatment] += 1
    return tuple(contexts), {f"context/{name}": count for name, count in counts.items()}


def check_templates(config: TeacherContextConfig) -> None:
    """Refuse templates that would silently leave out what they are for."""
    needed = {
        "template": ("prompt", *(["solution"] * config.demonstrations), *(["feedback"] * (config.feedback != "never"))),
        "solution_template": ("solution",),
        "feedback_template": ("feedback",),
    }
    for name, placeholders in needed.items():
        for placeholder in placeholders:
            if f"{{{placeholder}}}" not in getattr(config, name):
                raise ConfigError(f"teacher_context.{name} lacks {{{placeholder}}}; add it where that text belongs")


def fill(template: str, **values: str) -> str:
    """The template with its ``{prompt}``, ``{solution}`` and ``{feedback}`` replaced, in one pass: braces
    in a value, and any other braces in the template, stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def without_thinking(text: str) -> str:
    """The text without its closed ``<think>...</think>`` parts.

    Some chat templates open the first one in the prompt, so a text may begin inside it.
    """
    return _THINKING.sub("", text).rpartition("</think>")[2].strip()


def _sections(group: Group, index: int, config: TeacherContextConfig) -> _Sections:
    solution = _demonstration(group, index, config) if config.demonstrations else ""
    feedback = group.verdicts[index].feedback
    if not feedback.strip() or config.feedback == "never" or (solution and config.feedback == "without_solution"):
        feedback = ""
    return _Sections(solution, feedback)


def _demonstration(group: Group, index: int, config: TeacherContextConfig) -> str:
    """The first successful attempt that may demonstrate to attempt ``index`` and has something to show, or ""."""
    for other, (attempt, verdict) in enumerate(zip(group.attempts, group.verdicts, strict=True)):
        own = other == index and config.exclude_own_success
        if verdict.reward >= config.success_threshold and not own:
            text = _shown(attempt, config)
            if text:
                return text
    return ""


def _shown(attempt: Attempt, config: TeacherContextConfig) -> str:
    return without_thinking(attempt.text) if config.remove_thinking else attempt.text.strip()


def _context(
    group: Group, sections: _Sections, config: TeacherContextConfig, tokens: Chat
) -> tuple[TeacherContext, str | None]:
    """The context, and ``"shortened"`` or ``"dropped"`` when its length called for that."""
    if sections.kind == "none":
        return _NO_CONTEXT, None

    def rendered(candidate: _Sections) -> tuple[int, ...]:
        return tokens.prompt_ids(_messages(group.question, candidate, config))

    ids = rendered(sections)
    if len(ids) <= config.max_prompt_tokens:
        return TeacherContext(sections.kind, ids), None
    if config.too_long == "fail":
        raise ConfigError(
            f"the teacher prompt of question {group.question.id!r} has {len(ids)} tokens, more than"
            f" teacher_context.max_prompt_tokens {config.max_prompt_tokens}; raise that or set"
            " teacher_context.too_long to shorten"
        )
    if config.too_long == "shorten":
        shortened = _shortened(sections, lambda s: len(rendered(s)) <= config.max_prompt_tokens, tokens)
        if shortened.kind != "none":
            return TeacherContext(shortened.kind, rendered(shortened)), "shortened"
    return _NO_CONTEXT, "dropped"


def _messages(question: Question, sections: _Sections, config: TeacherContextConfig) -> tuple[Message, ...]:
    """The question's messages with the last user message put into the templates."""
    messages = list(question.messages)
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    if not asked:
        raise ConfigError(f"question {question.id!r} has no user message, so a teacher context has no place in it")
    place = asked[-1]
    solution = fill(config.solution_template, solution=sections.solution) if sections.solution else ""
    feedback = fill(config.feedback_template, feedback=sections.feedback) if sections.feedback else ""
    content = fill(config.template, prompt=messages[place].content, solution=solution, feedback=feedback)
    messages[place] = Message("user", content)
    return tuple(messages)


def _shortened(sections: _Sections, fits: Callable[[_Sections], bool], tokens: Chat) -> _Sections:
    """The sections with as much of the feedback, else of the demonstration, as ``fits`` accepts.

    A section of which not even one token fits is left out; ``_Sections()`` when nothing fits.
    """
    if sections.feedback:
        text = _longest(sections.feedback, lambda text: fits(replace(sections, feedback=text)), tokens)
        sections = replace(sections, feedback=text)
        if text:
            return sections
    if sections.solution:
        if fits(sections):
            return sections
        text = _longest(sections.solution, lambda text: fits(replace(sections, solution=text)), tokens)
        return replace(sections, solution=text)
    return sections


def _longest(text: str, fits: Callable[[str], bool], tokens: Chat) -> str:
    """The text with the fewest tokens cut from its middle such that it fits, by bisection; "" if none does.

    Every candidate is rendered and counted again: what a tokenizer makes of joined pieces is not the sum
    of what it makes of each.
    """
    spans = tokens.spans(text)
    best, low, high = "", 1, len(spans) - 1
    while low <= high:
        kept = (low + high) // 2
        candidate = _cut(text, spans, kept)
        if fits(candidate):
            best, low = candidate, kept + 1
        else:
            high = kept - 1
    return best


def _cut(text: str, spans: Sequence[tuple[int, int]], kept: int) -> str:
    """The first and last tokens of a text, ``kept`` (at least 1) together, and an ellipsis between."""
    tail = kept // 2
    start = text[: spans[kept - tail - 1][1]].rstrip()
    end = text[spans[-tail][0] :].lstrip() if tail else ""
    return f"{start}{ELLIPSIS}{end}".rstrip()
