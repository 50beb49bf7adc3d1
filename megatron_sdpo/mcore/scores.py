"""What the passes over a batch find, by the sample's position in the batch; on the last stage of its data rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StudentScores:
    """Per sample position, on the last stage: log-probs fp32 ``[R]``, and for SDPO support ids int64 ``[R, K]``."""

    old_log_probs: dict[int, Tensor]
    support_ids: dict[int, Tensor]
    reference_log_probs: dict[int, Tensor] = field(default_factory=dict)
    """fp32 ``[R]``, where GRPO is penalised for leaving the reference."""


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """On the last stage: hidden states ``[R, H]`` by sample position, in the model's dtype, and their head."""

    hidden: dict[int, Tensor]
    head_VH: Tensor | None


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """Per sample position, on the last stage: log-probs fp32 ``[R, K + 1]``, at the student's support and the tail.

    ``[R, 1]``, at the sampled token, where the support is that.
    """

    log_probs: dict[int, Tensor]
    entropies: dict[int, Tensor] = field(default_factory=dict)
    """fp32 ``[R]``, where tokens are weighted by them."""
    states: TeacherStates | None = None
    """Instead of log-probs, where the whole vocabulary is compared: what training makes the teacher's logits of."""


@dataclass(frozen=True, slots=True)
class SampleNumbers:
    """What every token of a sample shares, by the sample's position in the batch."""

    has_target: Sequence[bool]
    weights: Sequence[float]
    """``TokenTargets.weights_T``; zero outside the mini-batch."""
    policy_weights: Sequence[float]
    """``TokenTargets.policy_weights_T``, likewise."""
    advantages: Sequence[float]
    """GRPO's."""
