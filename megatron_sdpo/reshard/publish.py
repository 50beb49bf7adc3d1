"""A version of the weights goes out to every engine, and is checked against what they then serve.

The fleet is on the new version or on the previous one, never between two: generation is paused while buckets travel,
the version counts only when every engine's log-probs of a fixed probe equal the trainer's, and after any failure the
previous version is sent again from the senders' host copy, and checked in the same way. If even that fails the engines
stay paused and serve nothing. (Engines do not probe while paused, so that generation goes on for the moment of the
check; its answers carry the version's number, which a failed check makes the end of the run.)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.config import PublishConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.reshard.background import background
from megatron_sdpo.reshard.digest import describe, digest
from megatron_sdpo.reshard.gather import gather, is_sender
from megatron_sdpo.reshard.handles import HandleTransport
from megatron_sdpo.reshard.host import HostCopies
from megatron_sdpo.reshard.plan import plan
from megatron_sdpo.reshard.transport import StageTransport
from megatron_sdpo.rollout.control import EngineControl, EngineError
from megatron_sdpo.types import EngineAddress

R = TypeVar("R")
Tensors = list[tuple[str, Tensor]]


class PublishError(RuntimeError):
    """A version did not reach the fleet; the message says why and what the fleet serves now."""


class Fleet(Protocol):
    """Engines that come and go (rollout.fleet.RunningFleet)."""

    def engines(self) -> Sequence[EngineAddress]:
        """Those that are there now, in order; asked of the first rank's."""
        ...

    def control(self, address: EngineAddress) -> EngineControl: ...

    def confirm(self, stamp: str, engines: Sequence[EngineAddress]) -> None:
        """These serve this version, and their probes have shown it."""
        ...


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the weights, as far as this rank sends it."""

    number: int
    stamp: str
    """``"7-705bea216cbd0425"``: number and digest of all tensors."""
    buckets: list[Tensors]
    """On the host; empty on ranks that do not send."""
    copies: int
    """The set of copies (host.py) that they lie in."""
    probe_log_probs: list[float]


class Publisher:
    """One per trainer rank; all ranks call ``publish`` together.

    ``own`` gives the rank's parameters under canonical local names; ``probe_log_probs`` the trainer's log-probs of
    the probe (on every rank). Engines are controlled by the senders alone. A sender holds its stage's tensors on the
    host twice: of this version, and of the one before for the way back. With a ``fleet`` the engines may change from
    version to version: those that it has are sent to, and one that is gone in the middle is left out while others are
    there.
    ``encoded`` makes of a bucket what FP8 engines load (quantize.py), where it is gathered.
    """

    def __init__(
        self,
        config: PublishConfig,
        hf_config: Mapping[str, Any],
        groups: ParallelGroups,
        own: Mapping[str, Tensor],
        engines: Sequence[EngineControl],
        host: str,
        probe_log_probs: Callable[[Sequence[int]], list[float]],
        fleet: Fleet | None = None,
        encoded: Callable[[Tensors], Tensors] | None = None,
        release_memory: bool = False,
    ) -> None:
        self.config, self.hf_config, self.groups, self.own = config, hf_config, groups, own
        self.engines, self.host, self.probe_log_probs = list(engines), host, probe_log_probs
        element_bytes = next(iter(own.values())).element_size()
        self.buckets = plan(hf_config, groups.pipeline_size, element_bytes, config.bucket_bytes, groups.virtual_size)
        self.fleet = fleet
        self.encoded: Callable[[Tensors], Tensors] = encoded or (lambda pairs: pairs)
        self.probe = probe_ids(hf_config["vocab_size"], config.probe_tokens)
        self.release_memory = release_memory
        self.copies = HostCopies()
        self.transport: StageTransport | HandleTransport | None = None
        self.served: Version | None = None
        """What the fleet last confirmed."""
        self._released: list[EngineControl] = []
        """Engines without memory; known to the first rank."""
        self._freed = 0
        """Bytes of this rank's GPU that engines gave back."""

    def publish(self, version: int) -> dict[str, float]:
        """Send the current weights as ``version``; returns ``sync/...`` numbers on every rank.

        Raises PublishError, on every rank, when any engine does not end up serving this version. Every wait for an
        engine ends after ``publish.timeout_s``.
        """
        started = time.perf_counter()
        self._resume()
        self._find_engines()
        copies = 0 if self.served is None else 1 - self.served.copies
        buckets, lines, failure = self._gather_all(copies)
        failure = self._first(failure)
        if failure is not None:
            raise PublishError(f"version {version} was not published: {failure}; {self._untouched()}")
        stamp = f"{version}-{digest(line for part in self._share(lines) for line in part)}"
        new = Version(version, stamp, buckets, copies, self.probe_log_probs(self.probe))
        probe_gap, failure = self._deliver(new)
        while failure is not None and self._leave_out_who_is_lost():
            probe_gap, failure = self._deliver(new)
        if failure is not None:
            raise PublishError(f"version {version} was not published: {failure}; {self._roll_back()}")
        self.served = new
        if self.fleet is not None and self.groups.rank == 0:
            self.fleet.confirm(stamp, [engine.address for engine in self.engines])
        size = sum(tensor.nbytes for bucket in buckets for _, tensor in bucket)
        released = {"sync/released_bytes": float(sum(self._share(self._freed)))} if self.release_memory else {}
        return {
            **released,
            "sync/bytes": float(sum(self._share(size))),
            "sync/probe_gap": probe_gap,
            "sync/seconds": time.perf_counter() - started,
        }

    def release(self) -> None:
        """With ``engine.release_memory``: idle engines give back the memory of weights and cache until ``publish``.

        PublishError, on every rank, when one does not: it is then as full as before, or as empty as it should be.
        """
        if not self.release_memory:
            return
        before = self._free()
        _, failure = self._on_first_rank(lambda: self._each_engine(self._release_one))
        if failure is not None:
            raise PublishError(f"an engine did not give its memory back: {failure}")
        self._freed = self._free() - before

    def _free(self) -> int:
        """Bytes of this rank's GPU that nobody holds; 0 on a CPU."""
        own = next(iter(self.own.values()))
        return torch.cuda.mem_get_info(own.device)[0] if own.is_cuda else 0

    def _release_one(self, engine: EngineControl) -> None:
        if self.fleet is not None and engine.is_gone():
            return  # the next publish leaves it out
        engine.flush_when_idle(self.config.timeout_s)  # SGLang ends when one that is busy has to give its memory back
        engine.release_memory()
        self._released.append(engine)

    def _resume(self) -> None:
        """The engines have their memory again; whoever has gone meanwhile is found out when it is sent to."""
        if not self.release_memory:
            return
        if next(iter(self.own.values())).is_cuda:
            torch.cuda.empty_cache()  # what training needed, and torch keeps, is theirs
        dist.barrier(group=self.groups.world)
        released, self._released = self._released, []

        def resume(engine: EngineControl) -> None:
            if not (self.fleet is not None and engine.is_gone()):
                engine.resume_memory()

        calls = [background(partial(resume, engine)) for engine in released]
        _, failure = self._on_first_rank(lambda: [call.result() for call in calls])
        if failure is not None:
            raise PublishError(f"an engine did not get its memory back: {failure}")

    def close(self) -> None:
        """Leave the engines' groups; they go on serving."""
        if self.transport is not None:
            self.transport.leave()
            self.transport = None

    def _find_engines(self) -> None:
        """Those that the fleet has now, as the first rank sees it."""
        if (fleet := self.fleet) is None:
            return
        found, failure = self._on_first_rank(lambda: list(fleet.engines()))
        if failure is None and found:
            self._send_to(found)

    def _leave_out_who_is_lost(self) -> bool:
        """Whether some engines are gone, or hang, and others do not; all ranks then go on with those."""
        if self.fleet is None:
            return False
        left, failure = self._on_first_rank(lambda: [e.address for e in self.engines if not e.is_lost()])
        if failure is not None or not left or len(left) == len(self.engines):
            return False
        self._send_to(left)
        return True

    def _send_to(self, addresses: Sequence[EngineAddress]) -> None:
        """A group of processes has the members that it has: other engines need another."""
        if self.fleet is None or [engine.address for engine in self.engines] == list(addresses):
            return
        self.close()
        self.engines = [self.fleet.control(address) for address in addresses]

    def _gather_all(self, copies: int) -> tuple[list[Tensors], list[str], str | None]:
        """This sender's buckets on the host, described; non-finite weights are a failure before anything is sent.

        Every rank goes through every bucket of its stage whatever happens, so that no collective waits for ever.
        """
        outgoing: list[Tensors] = []
        lines: list[str] = []
        failure = None
        for bucket in self.buckets:
            pairs = gather(bucket, self.own, self.hf_config, self.groups)
            if not pairs:
                continue
            broken = [name for name, tensor in pairs if not bool(torch.isfinite(tensor).all())]
            if broken:
                failure = failure or f"{broken[0]} holds values that are not finite"
            pairs = self.encoded(pairs)
            lines += [describe(name, tensor) for name, tensor in pairs]
            # Copies: the parameters move on with the next optimizer step, the previous version must not.
            outgoing.append(self.copies.copy(copies, len(outgoing), pairs))
        if next(iter(self.own.values())).is_cuda:
            torch.cuda.synchronize()
        return outgoing, lines, failure

    def _deliver(self, version: Version) -> tuple[float, str | None]:
        """Transfer and check: (the largest probe difference, None), or (0, why the fleet does not serve it)."""
        failure = self._transfer(version)
        if failure is not None:
            return 0.0, failure
        gap, failure = self._on_first_rank(lambda: max(self._each_engine(partial(self._check, version))))
        return gap or 0.0, failure

    def _transfer(self, version: Version) -> str | None:
        """Pause, send every stage's buckets in turn, resume. None, or why it failed (some engines then stay paused)."""
        failure = self._on_first_rank(lambda: self._each_engine(_open))[1]
        for stage in range(self.groups.pipeline_size):
            # One stage after the other: two broadcasts that reach two engines in different order would wait for ever.
            mine = is_sender(self.groups) and self.groups.pipeline_rank == stage
            last = stage == self.groups.pipeline_size - 1
            error = self._send(version.buckets, version.stamp if last else None) if mine and failure is None else None
            failure = failure or self._first(error)
        if failure is None:
            failure = self._on_first_rank(lambda: self._each_engine(_close))[1]
        return failure

    def _send(self, buckets: list[Tensors], stamp: str | None) -> str | None:
        try:
            if self.transport is None:
                self.transport = self._new_transport()
            device = "cpu" if self.transport.backend == "gloo" else next(iter(self.own.values())).device
            for i, bucket in enumerate(buckets):
                on_device = [(name, tensor.to(device)) for name, tensor in bucket]
                self.transport.send(on_device, stamp if i == len(buckets) - 1 else None)
        except Exception as error:  # reported by all ranks together: publish raises it
            self.close()
            return _words(error)
        return None

    def _new_transport(self) -> StageTransport | HandleTransport:
        backend = self._backend()
        if backend == "ipc":
            return HandleTransport(self.engines, self.config.timeout_s)
        name = f"megatron-sdpo-stage{self.groups.pipeline_rank}"
        return StageTransport(self.engines, name, self.host, self.config.timeout_s, backend)

    def _backend(self) -> str:
        on_gpu = next(iter(self.own.values())).is_cuda
        if self.config.backend == "nccl" and not on_gpu:
            raise PublishError("publish.backend=nccl goes from GPU to GPU, and the trainer has none; set it to auto")
        return ("nccl" if on_gpu else "gloo") if self.config.backend == "auto" else self.config.backend

    def _check(self, version: Version, engine: EngineControl) -> float:
        """Largest probe difference; raises PublishError when the engine serves another version or other numbers."""
        served = engine.weight_stamp()
        if served != version.stamp:
            raise PublishError(f"{engine.address.name} says it serves {served}, not {version.stamp}")
        got = engine.probe_log_probs(self.probe)
        gap = float((torch.tensor(got) - torch.tensor(version.probe_log_probs)).abs().max())  # nan stays nan
        if not gap <= self.config.probe_tolerance:
            raise PublishError(
                f"{engine.address.name} serves weights whose log-probs differ by {gap:.2g} from the trainer's"
                f" (publish.probe_tolerance {self.config.probe_tolerance:.2g})"
            )
        return gap

    def _untouched(self) -> str:
        if self.served is None:
            return "nothing was sent, and no earlier version was published"
        return f"nothing was sent, the fleet still serves version {self.served.number}"

    def _roll_back(self) -> str:
        """Send the previous version again; a sentence on what the fleet serves now."""
        if self.served is None:
            return f"no earlier version was published, so {self._pause_all()}"
        _, failure = self._deliver(self.served)
        if failure is None:
            return f"the fleet serves version {self.served.number} again"
        return f"going back to version {self.served.number} failed too ({failure}), so {self._pause_all()}"

    def _pause_all(self) -> str:
        """Pause whoever still answers; says who does not."""

        def pause(engine: EngineControl) -> str | None:
            try:
                engine.pause_generation("retract")
            except EngineError:
                return engine.address.name
            return None

        paused, failure = self._on_first_rank(lambda: self._each_engine(pause))
        silent = [name for name in paused or [] if name]
        if failure is not None or len(silent) == len(self.engines):
            return "no engine could be paused: none answers"
        return "the engines are paused" + (f", except {', '.join(silent)}: no answer" if silent else "")

    def _each_engine(self, action: Callable[[EngineControl], R]) -> list[R]:
        """The action's results, all engines at once; when one fails, its error, after all have ended."""
        calls = [background(partial(action, engine)) for engine in self.engines]
        wait(calls)
        return [call.result() for call in calls]

    def _on_first_rank(self, action: Callable[[], R]) -> tuple[R | None, str | None]:
        """(result, failure) of an action that rank 0 alone performs, on every rank."""
        box: list[Any] = [(None, None)]
        if self.groups.rank == 0:
            try:
                box = [(action(), None)]
            except Exception as error:  # travels to every rank, which raise together
                box = [(None, _words(error))]
        dist.broadcast_object_list(box, src=0, group=self.groups.world)
        return box[0]

    def _share(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        everyone: list[Any] = [None] * self.groups.world_size
        dist.all_gather_object(everyone, value, group=self.groups.world)
        return everyone

    def _first(self, failure: str | None) -> str | None:
        """The first failure of any rank, on every rank."""
        return next((found for found in self._share(failure) if found), None)


def probe_ids(vocab_size: int, length: int) -> list[int]:
    """Fixed token ids that visit the whole vocabulary but its last entry; the same for every rank, step and run.

    SGLang (0.5.15 and 0.5.21) says 0 instead of that one where it gives log-probs of a prompt.
    """
    generator = torch.Generator().manual_seed(20_260_120)
    return torch.randint(vocab_size - 1, (length,), generator=generator).tolist()


def _open(engine: EngineControl) -> None:
    engine.pause_generation("retract")
    engine.begin_weight_update()


def _close(engine: EngineControl) -> None:
    engine.end_weight_update()
    engine.flush_cache()
    engine.continue_generation()


def _words(error: Exception) -> str:
    return str(error) or repr(error)
