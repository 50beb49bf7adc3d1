"""The frozen records that pass between stages, in the order of the flow.

A stage takes the previous stage's record and returns a new one; nothing fills in fields of an old
record. All of them cross process borders as msgpack (``encode``/``decode`` at the end of the file)
and the journal as JSON lines, so they hold plain Python values: no tensors, no tokenizers.

Axes, here and everywhere: ``P`` prompts in a step, ``G`` attempts per prompt, ``B = P * G``,
``R`` response tokens, ``T`` packed tokens of a micro-batch, ``K`` kept vocabulary entries,
``V`` vocabulary (the local shard under tensor parallel), ``H`` hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import msgspec


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn.

    Example: ``Message("user", "keep over 2, sort, item 1")``
    """

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what its verifier needs to judge an answer.

    Example: ``Question("train/17", (Message("user", "keep over 2, sum"),), {"operations": [["gt", 2], ["sum"]]})``

    ``payload`` is JSON data that only the task which made the question reads, but for a text under ``"category"``,
    by which tables of scores are divided.
    """

    id: str
    messages: tuple[Message, ...]
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One sampled response.

    Example: ``Attempt((5, 9, 6), (31, 44, 1), (-0.7, -1.2, -0.1), "above 2 | total", "stop", 3)``

    ``engine_log_probs`` are the engine's log-probabilities of ``response_ids`` under the sampling
    distribution, natural log, one per response token. ``finish`` is ``"stop"`` when the model ended
    its turn (the end token is then the last of ``response_ids``) and ``"length"`` when it was cut.
    ``weight_version`` is the version of the weights that the engine said it was serving.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    engine_log_probs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]
    weight_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says of one attempt: ``reward`` in [0, 1], and words ("" when there are none).

    Example: ``Verdict(0.0, "sh: over: not found, did you mean above?")``
    """

    reward: float
    feedback: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """All attempts at one question: the unit that is journalled to disk before anybody trains on it.

    Example: ``Group(step=4, slot=0, question=q, attempts=(a0, a1), verdicts=(v0, v1))`` is the first
    question of the batch which takes the weights from version 4 to version 5.
    """

    step: int
    slot: int
    question: Question
    attempts: tuple[Attempt, ...]
    verdicts: tuple[Verdict, ...]


ContextKind = Literal["demonstration", "feedback", "both", "none"]


@dataclass(frozen=True, slots=True)
class TeacherContext:
    """What the self-teacher reads before it re-reads the attempt.

    Example: ``TeacherContext("demonstration", (5, 9, 2, 40, 4, 6))``

    ``prompt_ids`` is None for kind ``"none"``: no sibling succeeded and there is no feedback, so the
    teacher would know nothing that the student does not. Such a sample has no SDPO target.
    """

    kind: ContextKind
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One attempt as the trainer sees it.

    Example: ``Sample("4/0/1", 0, (5, 9, 6), (31, 44, 1), (-0.7, -1.2, -0.1), (5, 9, 2, 40, 4, 6), 0.0)``

    ``group`` is the slot of the question, the scope of GRPO's mean reward. ``engine_log_probs`` is
    empty for text that no engine sampled (plain next-token training).
    """

    id: str
    group: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    engine_log_probs: tuple[float, ...]
    teacher_prompt_ids: tuple[int, ...] | None
    reward: float


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one generation batch, and what the coordinator measured while making it.

    Example: ``Batch(step=4, samples=(s0, s1), metrics={"verdict/reward": 0.5, "time/generate": 1.2})``

    ``step`` is the version of the weights before this batch is trained on. ``cursor`` is where the
    prompt stream stands after this batch; it is checkpointed with the weights.
    """

    step: int
    samples: tuple[Sample, ...]
    metrics: dict[str, float]
    cursor: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out scores of one version of the weights.

    Example: ``Evaluation(version=8, metrics={"eval/accuracy": 0.71, "time/evaluate": 3.1})``
    """

    version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine or the router answers HTTP.

    Example: ``EngineAddress("engine-0", "http://127.0.0.1:31000", 1)``
    """

    name: str
    url: str
    tensor_parallel: int


class Task(Protocol):
    """A family of questions and its verifier; see tasks/."""

    def train_questions(self) -> Sequence[Question]: ...

    def eval_questions(self) -> Sequence[Question]: ...

    def verify(self, question: Question, response: str) -> Verdict:
        """Judge the text of a response. Pure: the same input gives the same verdict."""
        ...


class Tokens(Protocol):
    """What stages need of chat.Chat: text in, token ids out, and back."""

    eos_id: int

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    def text(self, response_ids: Sequence[int]) -> str: ...


class BatchSource(Protocol):
    """The trainer's view of the coordinator (loop.py)."""

    def batch(self, step: int) -> Batch: ...

    def evaluate(self, version: int) -> Evaluation: ...

    def published(self, version: int) -> None: ...


class WeightsPublisher(Protocol):
    """Takes the learner's weights to where attempts are sampled (loop.py); reshard.publish.Publisher."""

    def publish(self, version: int) -> dict[str, float]:
        """All ranks call this; what was measured."""
        ...

    def release(self) -> None:
        """Until the next version nothing is sampled: whoever samples on the trainer's own GPUs may make room there.
        All ranks call this."""
        ...

    def close(self) -> None: ...


class Checkpoints(Protocol):
    """Writes the trainer's state when it is time to, beside training (loop.py)."""

    def save_if_due(self, cursor: int) -> dict[str, float]:
        """After every step; what was measured of a checkpoint that has become complete since. Raises, once the state is
        on disk, when the run was asked to stop."""
        ...

    def finish(self) -> None:
        """Wait until what is being written is complete."""
        ...


class MetricsLog(Protocol):
    """Takes the numbers of one step; tracking.Tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


R = TypeVar("R")


def encode(record: Any) -> bytes:
    """A record as msgpack bytes."""
    return msgspec.msgpack.encode(record)


def decode(data: bytes, kind: type[R]) -> R:
    """The inverse of ``encode``; data of another shape raises msgspec.ValidationError."""
    return msgspec.msgpack.decode(data, type=kind)
