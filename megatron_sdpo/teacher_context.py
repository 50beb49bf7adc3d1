"""What the self-teacher reads before it re-reads an attempt: who demonstrates, which feedback, what is cut.

For each attempt of a group: a successful *sibling*, the first or one drawn by chance, demonstrates;
without one the attempt's own feedback is shown; with neither the teacher would know nothing more than
the student, and there is no context. By switch a failed attempt is shown to its own teacher too, but
never alone: the teacher reads it anyway, as the response. Texts go into the last user message through
the configured templates; system prompts and earlier turns stay as they are.

An over-long context loses from the middle of its sections: ``shorten`` takes from the attempt, then
from the feedback, then from the demonstration; the other policies from one of them or from none. The
question, the templates' own words and the chat frame are never cut, and the response is not part of
the context at all: whoever needs context and response to fit a model together lowers
``max_prompt_tokens`` accordingly.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError, TeacherContextConfig
from megatron_sdpo.types import Attempt, ContextKind, Group, Message, Question, TeacherContext

ELLIPSIS = " … "
"""Stands where text was cut."""

_PLACEHOLDER = re.compile(r"\{(prompt|solution|attempt|feedback)\}")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_NO_CONTEXT = TeacherContext("none")
_COUNTED = ("demonstration", "feedback", "both", "none", "dropped", "shortened", "attempt_shown")
_CUT: dict[str, tuple[str, ...]] = {
    # The attempt goes first: it is the response once more, and showing it does not help (paper table 6).
    "shorten": ("attempt", "feedback", "solution"),
    "shorten_feedback": ("feedback",),
    "shorten_demonstration": ("solution",),
    "drop": (),
}
"""Sections that each policy cuts, in order."""


@dataclass(frozen=True, slots=True)
class _Sections:
    """What the teacher is told besides the question; "" is an absent section."""

    solution: str = ""
    attempt: str = ""
    feedback: str = ""

    @property
    def kind(self) -> ContextKind:
        """An attempt alone is "none": it tells the teacher nothing new."""
        if self.solution:
            return "both" if self.feedback else "demonstration"
        return "feedback" if self.feedback else "none"


@dataclass(frozen=True, slots=True)
class _Made:
    """A context, and the counts to which it adds one."""

    context: TeacherContext
    counted: tuple[str, ...]


def build_contexts(
    group: Group, config: TeacherContextConfig, tokens: Chat, seed: int = 0
) -> tuple[tuple[TeacherContext, ...], dict[str, float]]:
    """One context for each attempt, in order, and how often what happened, as sums over the attempts.

    The counts ``context/demonstration``, ``context/feedback``, ``context/both``, ``context/none`` (nothing
    to tell) and ``context/dropped`` (something to tell, but too long) add up to the attempts;
    ``context/shortened`` counts those of the first three that were cut, ``context/attempt_shown`` those that
    show the attempt. A demonstration drawn by chance is a function of ``seed``, the group's step and slot, and
    the attempt's index. Templates without their placeholder, a question without a user message, and a too long
    context under ``too_long="fail"`` raise ConfigError.
    """
    check_templates(config)
    counts: dict[str, float] = dict.fromkeys(_COUNTED, 0.0)
    # Failed siblings may share their demonstration, and then most contexts of a group are the same.
    made: dict[_Sections, _Made] = {}
    contexts: list[TeacherContext] = []
    for index in range(len(group.attempts)):
        sections = _sections(group, index, config, seed)
        if sections not in made:
            made[sections] = _made(group, sections, config, tokens)
        contexts.append(made[sections].context)
        for name in made[sections].counted:
            counts[name] += 1
    return tuple(contexts), {f"context/{name}": count for name, count in counts.items()}


def check_templates(config: TeacherContextConfig) -> None:
    """Refuse templates that would silently leave out what they are for."""
    in_use = {
        "prompt": True,
        "solution": config.demonstrations,
        "attempt": config.include_attempt,
        "feedback": config.feedback != "never",
    }
    needed = {
        "template": [placeholder for placeholder, used in in_use.items() if used],
        "solution_template": ["solution"],
        "attempt_template": ["attempt"],
        "feedback_template": ["feedback"],
    }
    for name, placeholders in needed.items():
        for placeholder in placeholders:
            if f"{{{placeholder}}}" not in getattr(config, name):
                raise ConfigError(f"teacher_context.{name} lacks {{{placeholder}}}; add it where that text belongs")


def fill(template: str, **values: str) -> str:
    """The template with its ``{prompt}``, ``{solution}``, ``{attempt}`` and ``{feedback}`` replaced, in one pass:
    braces in a value, and any other braces in the template, stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def contextual(
    question: Question,
    config: TeacherContextConfig,
    *,
    solution: str = "",
    attempt: str = "",
    feedbacks: Sequence[str] = (),
) -> tuple[Message, ...]:
    """The question's messages with the last user message put into the templates; "" and () are absent sections.

    Each of several feedbacks is put into its template, one after the other.
    """
    messages = list(question.messages)
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    if not asked:
        raise ConfigError(f"question {question.id!r} has no user message, so a teacher context has no place in it")
    place = asked[-1]
    told = {
        "solution": fill(config.solution_template, solution=solution) if solution else "",
        "attempt": fill(config.attempt_template, attempt=attempt) if attempt else "",
        "feedback": "".join(fill(config.feedback_template, feedback=feedback) for feedback in feedbacks),
    }
    content = fill(config.template, prompt=messages[place].content, **told)
    messages[place] = Message("user", content)
    return tuple(messages)


def without_thinking(text: str) -> str:
    """The text without its closed ``<think>...</think>`` parts.

    Some chat templates open the first one in the prompt, so a text may begin inside it.
    """
    return _THINKING.sub("", text).rpartition("</think>")[2].strip()


def _sections(group: Group, index: int, config: TeacherContextConfig, seed: int) -> _Sections:
    verdict = group.verdicts[index]
    solution = _demonstration(group, index, config, seed) if config.demonstrations else ""
    feedback = verdict.feedback
    if not feedback.strip() or config.feedback == "never" or (solution and config.feedback == "without_solution"):
        feedback = ""
    sections = _Sections(solution, feedback=feedback)
    failed = verdict.reward < config.success_threshold
    if config.include_attempt and failed and sections.kind != "none":
        sections = replace(sections, attempt=_shown(group.attempts[index], config))
    return sections


def _demonstration(group: Group, index: int, config: TeacherContextConfig, seed: int) -> str:
    """What a successful attempt shows to attempt ``index``; "" when none may, or none has anything to show."""
    shown: list[str] = []
    for other, (attempt, verdict) in enumerate(zip(group.attempts, group.verdicts, strict=True)):
        own = other == index and config.exclude_own_success
        if verdict.reward >= config.success_threshold and not own and (text := _shown(attempt, config)):
            shown.append(text)
    if not shown:
        return ""
    if config.demonstration == "first":
        return shown[0]
    return random.Random(f"{seed}/{group.step}/{group.slot}/{index}").choice(shown)


def _shown(attempt: Attempt, config: TeacherContextConfig) -> str:
    return without_thinking(attempt.text) if config.remove_thinking else attempt.text.strip()


def _made(group: Group, sections: _Sections, config: TeacherContextConfig, tokens: Chat) -> _Made:
    """The context of these sections, cut or dropped when its length calls for that."""
    if sections.kind == "none":
        return _Made(_NO_CONTEXT, ("none",))

    def rendered(candidate: _Sections) -> tuple[int, ...]:
        feedbacks = (candidate.feedback,) if candidate.feedback else ()
        told = contextual(
            group.question, config, solution=candidate.solution, attempt=candidate.attempt, feedbacks=feedbacks
        )
        return tokens.prompt_ids(told)

    ids, kept, limit = rendered(sections), sections, config.max_prompt_tokens
    if len(ids) > limit:
        if config.too_long == "fail":
            raise ConfigError(
                f"the teacher prompt of question {group.question.id!r} has {len(ids)} tokens, more than"
                f" teacher_context.max_prompt_tokens {limit}; raise that or set teacher_context.too_long to shorten"
            )
        kept = _shortened(sections, _CUT[config.too_long], lambda s: len(rendered(s)) <= limit, tokens)
        if kept.kind == "none":
            return _Made(_NO_CONTEXT, ("dropped",))
        ids = rendered(kept)
    shortened = ("shortened",) if kept != sections else ()
    attempt_shown = ("attempt_shown",) if kept.attempt else ()
    return _Made(TeacherContext(kept.kind, ids), (kept.kind, *shortened, *attempt_shown))


def _shortened(sections: _Sections, names: Sequence[str], fits: Callable[[_Sections], bool], tokens: Chat) -> _Sections:
    """The sections with as much of the first named one as ``fits`` accepts, else without it and with as much of the
    next, and so on; a section of which not even one token fits is left out. ``_Sections()`` when nothing fits.
    """
    for name in names:
        text = _longest(getattr(sections, name), _with_section(sections, name, fits), tokens)
        sections = replace(sections, **{name: text})
        if text or (sections.kind != "none" and fits(sections)):
            return sections
    return _Sections()


def _with_section(sections: _Sections, name: str, fits: Callable[[_Sections], bool]) -> Callable[[str], bool]:
    return lambda text: fits(replace(sections, **{name: text}))


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
