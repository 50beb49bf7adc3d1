"""The collapse guard: signals that a run is getting worse damp its updates until they have recovered.

Moving teachers, and constant learning rates that were right for the start of a run, collapse late, after the task
is solved: the reward falls from its best within a few batches. What is watched is known before the batch is
trained on: the mean rewards of the generation batches, and held-out accuracies. A signal is averaged over a window;
when it lies more than ``drop`` below the best that it has been, the step's learning rate, and the rate at which an
EMA teacher follows, are multiplied by ``damping``.

Both rates, because damping is then no more than a slower clock. With the learning rate alone damped, the teacher
would follow the fallen student faster than before by comparison, and with it goes the way back.

The price: a dip that would have passed by itself lasts longer, since recovering is training too. On MiniPipe the
guard gained nothing at twice the recommended learning rates, where runs recover, and something at four times SDPO's,
where they do not. It is no replacement for a lower learning rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_sdpo.config import GuardConfig


@dataclass(frozen=True, slots=True)
class History:
    """What the guard has seen, oldest first; a checkpoint keeps it. Example: ``History((0.1, 0.3), (0.02,))``"""

    rewards: tuple[float, ...] = ()
    """Mean reward of each generation batch."""
    accuracies: tuple[float, ...] = ()
    """Held-out accuracy of each version that was evaluated."""

    def with_reward(self, reward: float) -> "History":
        return replace(self, rewards=(*self.rewards, reward))

    def with_accuracy(self, accuracy: float) -> "History":
        return replace(self, accuracies=(*self.accuracies, accuracy))


def factor(history: History, config: GuardConfig) -> float:
    """What the rates of the next training step are multiplied by: 1, or ``damping`` while a watched signal is down."""
    down = {
        "reward": fallen(history.rewards, config.reward_window) > config.drop,
        "accuracy": fallen(history.accuracies, config.accuracy_window) > config.drop,
    }
    watched = {"off": (), "both": ("reward", "accuracy")}.get(config.signal, (config.signal,))
    return config.damping if any(down[signal] for signal in watched) else 1.0


def fallen(values: Sequence[float], window: int) -> float:
    """How far the mean of the last ``window`` values lies below the best such mean so far; at least 0.

    Only whole windows count, so a few lucky batches at the start are no best: 0 until there is one.
    """
    # fsum: a rounded sum could fall where no value does
    means = [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    return max(means) - means[-1] if means else 0.0
