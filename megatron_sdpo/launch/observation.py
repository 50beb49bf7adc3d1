"""Where the roles of a run are looked at: ``debug.timeline`` and ``debug.profile_*``. Nothing by default."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.phases import Follower
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.sampler import Asked, Sampler
from megatron_sdpo.rollout.wire import Handler, Kind
from megatron_sdpo.timeline import PhaseTimeline, Timeline
from megatron_sdpo.types import EngineAddress, Group

if TYPE_CHECKING:  # the coordinator does without torch
    from megatron_sdpo.mcore.learner import Learner


def timeline_of(config: Config, run_dir: RunDir, writer: str) -> Timeline | None:
    """A process's part of the timeline, where one is asked for."""
    return Timeline(run_dir.timeline, writer) if config.debug.timeline else None


class TrainerObservation:
    """Of one trainer rank."""

    def __init__(self, config: Config, run_dir: RunDir, rank: int) -> None:
        self._track = (f"trainer rank {rank}", "phases")
        self._timeline = timeline_of(config, run_dir, f"trainer-{rank}")
        self.followers: list[Follower] = []
        """For ``Phases``."""
        if self._timeline is not None:
            self.followers.append(PhaseTimeline(self._timeline, self._track))
        debug = config.debug
        if debug.profile_steps and rank in debug.profile_ranks:
            from megatron_sdpo.profiler import Profiler  # loads torch

            self.followers.append(Profiler(run_dir.profile, rank, debug.profile_steps, debug.profile_details))

    def watch(self, learner: "Learner") -> None:
        """Draw its micro-batches too."""
        if self._timeline is not None:
            from megatron_sdpo.mcore.passes import watch_passes

            watch_passes(learner.model, self._timeline, self._track)

    def control(self, address: EngineAddress, token: str, timeout_s: float) -> EngineControl:
        """``EngineControl``, whose calls are drawn as the engine's work."""
        if self._timeline is None:
            return EngineControl(address, token, timeout_s)
        return _DrawnControl(self._timeline, address, token, timeout_s)

    def close(self) -> None:
        if self._timeline is not None:
            self._timeline.close()


class _DrawnControl(EngineControl):
    def __init__(self, timeline: Timeline, address: EngineAddress, token: str, timeout_s: float) -> None:
        super().__init__(address, token, timeout_s)
        self._timeline = timeline

    def _call(self, method: str, endpoint: str, body: Any = None, timeout_s: float | None = None) -> Any:
        with (
            self._timeline.lane(self.address.name, "control") as lane,
            self._timeline.span(lane, endpoint.removeprefix("/")),
        ):
            return super()._call(method, endpoint, body, timeout_s)


class DrawnSampler(Sampler):
    """A sampler whose groups are drawn as they are generated and verified, and how many the engines have in hand."""

    def __init__(self, timeline: Timeline, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeline, self._in_hand = timeline, 0

    async def _group(self, ask: Asked, generated: Callable[[], None]) -> Group:
        with self.timeline.lane("coordinator", "group") as lane:

            def judging() -> None:
                self._count(-ask.attempts)
                self.timeline.end(lane)
                self.timeline.begin(lane, "verify")
                generated()

            name = f"{ask.purpose} {ask.step}/{ask.slot}"
            with self.timeline.span(lane, name, question=ask.question.id, attempts=ask.attempts):
                self._count(ask.attempts)
                self.timeline.begin(lane, "generate")
                try:
                    return await super()._group(ask, judging)
                finally:
                    self.timeline.end(lane)

    def _count(self, more: int) -> None:
        self._in_hand += more
        self.timeline.count(("engines", "requests"), "attempts in hand", self._in_hand)


def drawn(handlers: dict[Kind, Handler], timeline: Timeline | None) -> dict[Kind, Handler]:
    """Handlers of the trainer's requests, one at a time, drawn with the waiting in between."""
    if timeline is None:
        return handlers
    track = ("coordinator", "requests")

    def one(kind: Kind, handler: Handler) -> Handler:
        async def answer(argument: Any) -> Any:
            timeline.end(track)
            try:
                with timeline.span(track, kind, argument=argument):
                    return await handler(argument)
            finally:
                timeline.begin(track, "wait")

        return answer

    timeline.begin(track, "wait")
    return {kind: one(kind, handler) for kind, handler in handlers.items()}
