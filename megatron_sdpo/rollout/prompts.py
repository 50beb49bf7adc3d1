"""The stream of training questions: endless, shuffled by seed, addressed by step.

The question at (step, slot) is a pure function of the seed and the number of questions, so the
cursor of a checkpoint is one number and a resumed run draws what the first one would have drawn.
"""

import random
from collections.abc import Sequence

from megatron_sdpo.config import ConfigError
from megatron_sdpo.types import Question, Tokens


class PromptStream:
    """Epoch after epoch of the same questions, each epoch in its own order."""

    def __init__(self, questions: Sequence[Question], prompts_per_step: int, seed: int) -> None:
        if not questions:
            raise ConfigError("the task has no training questions; set task.options to a data set that has some")
        self._questions, self._per_step, self._seed = questions, prompts_per_step, seed
        self._orders: dict[int, list[int]] = {}

    def at(self, step: int) -> list[Question]:
        """The questions of a step, one a slot."""
        return [self._question(i) for i in range(step * self._per_step, self.cursor_after(step))]

    def cursor_after(self, step: int) -> int:
        """Questions drawn once the step's have been."""
        return (step + 1) * self._per_step

    def _question(self, index: int) -> Question:
        epoch, place = divmod(index, len(self._questions))
        if epoch not in self._orders:
            order = list(range(len(self._questions)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._questions[self._orders[epoch][place]]


ENGINE_RESERVE = 2
"""Positions of its context that SGLang keeps for itself; it cuts a response two tokens early without saying so."""


def check_lengths(questions: Sequence[Question], tokens: Tokens, max_new_tokens: int, max_length: int) -> None:
    """Refuse questions that leave no room for a response: ConfigError with their number and the longest one."""
    lengths = [len(tokens.prompt_ids(question.messages)) for question in questions]
    long = sum(n + max_new_tokens + ENGINE_RESERVE > max_length for n in lengths)
    if long:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        raise ConfigError(
            f"{long} of {len(lengths)} questions do not fit: {questions[longest].id!r} has {lengths[longest]} prompt"
            f" tokens, which with rollout.max_new_tokens {max_new_tokens} and the {ENGINE_RESERVE} positions that the"
            f" engine keeps exceeds model.max_length {max_length}; raise the latter or lower max_new_tokens"
        )
