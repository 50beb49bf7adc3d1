"""A version of the weights goes out to every engine, and is checked against what they then serve.

The fleet is on the new version or on the previous one, never between two: generation is paused while
buckets travel, the version counts only when every engine's log-probs of a fixed probe equal the
trainer's, and after any failure the previous version is sent again from the senders' host copy. If
even that fails the engines stay paused and serve nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.config import PublishConfig
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.reshard.digest import describe, digest
from megatron_sdpo.reshard.gather import gather, is_sender
from megatron_sdpo.reshard.plan import plan
from megatron_sdpo.reshard.transport import StageTransport
from megatron_sdpo.rollout.control import EngineControl


class PublishError(RuntimeError):
    """A version did not reach the fleet; the message says why and what the fleet serves now."""


Tensors = list[tuple[str, Tensor]]


class Publisher:
    """One per trainer rank; all ranks call ``publish`` together.

    ``own`` gives the stage's parameters under canonical local names; ``probe_log_probs`` the trainer's log-probs of
    the probe (on every rank). Engines are controlled by the senders alone.
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
    ) -> None:
        self.config, self.hf_config, self.groups, self.own = config, hf_config, groups, own
        self.engines, self.host, self.probe_log_probs = list(engines), host, probe_log_probs
        element_bytes = next(iter(own.values())).element_size()
        self.buckets = plan(hf_config, groups.pipeline_size, element_bytes, config.bucket_bytes)
        self.probe = probe_ids(hf_config["vocab_size"], config.probe_tokens)
        self.transport: StageTransport | None = None
        self.generation = 0
        self.served: tuple[str, list[Tensors]] | None = None
        """The version that the fleet confirmed, and this sender's host copy of its buckets."""

    def publish(self, version: int) -> dict[str, float]:
        """Send the current weights as ``version``; returns ``sync/...`` numbers on every rank.

        Raises PublishError, on every rank, when any engine does not end up serving this version.
        """
        started = time.perf_counter()
        outgoing, lines, failure = self._gather_all()
        stamp = f"{version}-{digest(line for part in self._share(lines) for line in part)}"
        failure = self._first(failure) or self._transfer(outgoing, stamp)
        probe_gap = 0.0
        if failure is None:
            expected = self.probe_log_probs(self.probe)
            probe_gap, failure = self._on_first_rank(lambda: self._confirm(stamp, expected))
        if failure is not None:
            raise PublishError(f"version {version} was not published: {failure}; {self._roll_back()}")
        self.served = (stamp, outgoing)
        size = sum(tensor.nbytes for bucket in outgoing for _, tensor in bucket)
        return {
            "sync/bytes": float(sum(self._share(size))),
            "sync/probe_gap": probe_gap,
            "sync/seconds": time.perf_counter() - started,
        }

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def _gather_all(self) -> tuple[list[Tensors], list[str], str | None]:
        """This sender's buckets on the host, described; non-finite weights are refused before anything is sent.

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
            lines += [describe(name, tensor) for name, tensor in pairs]
            # A copy: the parameters move on with the next optimizer step, the previous version must not.
            outgoing.append([(name, tensor.to("cpu", copy=True)) for name, tensor in pairs])
        return outgoing, lines, failure

    def _transfer(self, outgoing: list[Tensors], stamp: str) -> str | None:
        """Pause, send every stage's buckets in turn, resume. None, or why it failed (the engines then stay paused)."""
        failure = self._on_first_rank(lambda: self._each_engine(_open))[1]
        for stage in range(self.groups.pipeline_size):
            # One stage after the other: two broadcasts that reach two engines in different order would wait for ever.
            mine = is_sender(self.groups) and self.groups.pipeline_rank == stage
            last = stage == self.groups.pipeline_size - 1
            error = self._send(outgoing, stamp if last else None) if mine and failure is None else None
            failure = failure or self._first(error)
        if failure is None:
            failure = self._on_first_rank(lambda: self._each_engine(_close))[1]
        return failure

    def _send(self, outgoing: list[Tensors], stamp: str | None) -> str | None:
        try:
            if self.transport is None:
                name = f"megatron-sdpo-stage{self.groups.pipeline_rank}-{self.generation}"
                self.transport = StageTransport(self.engines, name, self.host, self.config.timeout_s)
            for i, bucket in enumerate(outgoing):
                self.transport.send(self._on_device(bucket), stamp if i == len(outgoing) - 1 else None)
        except Exception as error:  # reported by all ranks together: publish raises it
            return str(error) or repr(error)
        return None

    def _on_device(self, bucket: Tensors) -> Tensors:
        device = next(iter(self.own.values())).device
        return [(name, tensor.to(device)) for name, tensor in bucket]

    def _confirm(self, stamp: str, expected: Sequence[float]) -> float:
        """Largest probe difference over the engines; raises when an engine serves another version or other numbers."""

        def check(engine: EngineControl) -> float:
            served = engine.weight_stamp()
            if served != stamp:
                raise PublishError(f"{engine.address.name} says it serves {served}, not {stamp}")
            got = engine.probe_log_probs(self.probe)
            gap = max(abs(a - b) for a, b in zip(got, expected, strict=True))
            if not gap <= self.config.probe_tolerance:
                raise PublishError(
                    f"{engine.address.name} serves weights whose log-probs differ by {gap:.2g} from the trainer's"
                    f" (publish.probe_tolerance {self.config.probe_tolerance:.2g})"
                )
            return gap

        return max(self._each_engine(check))

    def _roll_back(self) -> str:
        """Send the previous version again; a sentence on what the fleet serves now."""
        self.transport = None  # its engines may wait inside a broadcast: a new group has a new name
        self.generation += 1
        if self.served is None:
            self._on_first_rank(lambda: self._each_engine(_pause))
            return "no earlier version was published, so the engines are paused"
        stamp, buckets = self.served
        self._on_first_rank(lambda: self._each_engine(_abandon))
        failure = self._transfer(buckets, stamp)
        if failure is None:
            return f"the fleet serves version {stamp.split('-')[0]}"
        self._on_first_rank(lambda: self._each_engine(_pause))
        return f"going back to version {stamp.split('-')[0]} failed too ({failure}), so the engines are paused"

    def _each_engine(self, action: Callable[[EngineControl], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return list(pool.map(action, self.engines))

    def _on_first_rank(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """(result, failure) of an action that rank 0 alone performs, on every rank."""
        box: list[Any] = [(None, None)]
        if self.groups.rank == 0:
            try:
                box = [(action(), None)]
            except Exception as error:  # travels to every rank, which raise together
                box = [(None, str(error) or repr(error))]
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
    """Fixed token ids that visit the whole vocabulary; the same for every rank, step and run."""
    generator = torch.Generator().manual_seed(20_260_120)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def _open(engine: EngineControl) -> None:
    engine.pause_generation("retract")
    engine.begin_weight_update()


def _close(engine: EngineControl) -> None:
    engine.end_weight_update()
    engine.flush_cache()
    engine.continue_generation()


def _pause(engine: EngineControl) -> None:
    engine.pause_generation("retract")


def _abandon(engine: EngineControl) -> None:
    """Close a session that a failure left open; an engine without one refuses, which is as good."""
    engine.end_weight_update()
