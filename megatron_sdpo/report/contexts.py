"""What the teacher read of the attempts that a page shows: made again from the journal, as in the run."""

from collections.abc import Sequence

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.types import Group

NO_TARGET = "(nothing, or more than fits: the attempt has no target)"


def teacher_reads(config: Config | None, groups: Sequence[Group]) -> tuple[list[list[str]], str]:
    """For every group the teacher's prompt for each attempt, in words; and why there are none, where there are none.

    The tokenizer is that of ``model.path``, which need not be on this machine.
    """
    if config is None or not groups or not config.objective.has_teacher:
        return [], ""
    try:
        tokens = Chat(config.model.path, config.model.thinking)
        return [_of_group(group, config, tokens) for group in groups], ""
    except ConfigError as error:
        return [], str(error)


def _of_group(group: Group, config: Config, tokens: Chat) -> list[str]:
    contexts, _ = build_contexts(group, config.teacher_context, tokens, config.seed)
    return [NO_TARGET if c.prompt_ids is None else tokens.text(c.prompt_ids) for c in contexts]
