"""One process group from a stage's sender to every engine rank, and buckets broadcast through it."""

import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _new_process_group_helper, _world  # no public way to join a second world

from megatron_sdpo.reshard.background import background
from megatron_sdpo.rollout.control import EngineControl, EngineError

LEAVE_S = 10.0
"""How long engines have to leave a group; one that is dead or hangs is then left alone."""
_GRACE_S = 1.0
"""How long after a first failure the others have to say something too."""


class TransportError(RuntimeError):
    """A bucket did not reach every engine; the message says which engine and why."""


def own_address(url: str) -> str:
    """The address of this machine from which the one in ``url`` is reached: whoever is there can join a rendezvous.

    Example: ``own_address("http://127.0.0.1:31000")`` is ``"127.0.0.1"``; towards another node it is the address in the
    network between the two. Nothing is sent.
    """
    host = urlsplit(url).hostname
    if host is None:
        raise ValueError(f"{url!r} names no host")
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


class StageTransport:
    """Sender's end of a process group: rank 0 here, then every engine's ranks in order.

    ``backend``: gloo between CPUs, or through host memory between GPUs; NCCL between GPUs (it ran on one GPU, each end
    saying that it is another host; not yet between two). The rendezvous listens on ``host`` only. Joining and each
    bucket may take ``timeout_s``. The first failure, which may be that of joining, raises TransportError and is this
    group's end on both sides: make another transport.
    """

    def __init__(
        self, engines: Sequence[EngineControl], name: str, host: str, timeout_s: float, backend: str = "gloo"
    ) -> None:
        self.engines, self.timeout_s, self.backend = list(engines), timeout_s, backend
        # Engines remember names for as long as they live, which may be longer than this process does.
        self.name = f"{name}-{secrets.token_hex(4)}"
        self._calls: list[Future[Any]] = []
        self._group: dist.ProcessGroup | None = None
        self._server: TCPStore | None = None
        self._join(host)

    def send(self, tensors: Sequence[tuple[str, Tensor]], version: str | None) -> None:
        """Broadcast one bucket and wait until every engine has loaded it; ``version`` is stamped with the last one.

        Raises TransportError as soon as any engine refuses; what the engines hold is then a mixture.
        """
        flat = flat_bytes(tensors)
        loads = [
            partial(
                engine.update_weights_from_distributed,
                names=[name for name, _ in tensors],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                shapes=[list(tensor.shape) for _, tensor in tensors],
                group_name=self.name,
                weight_version=version,
                flush_cache=False,  # SGLang dies when it cannot; asked for it afterwards, it says so
                load_format="flattened_bucket",
            )
            for engine in self.engines
        ]
        self._together([*loads, partial(dist.broadcast, flat, src=0, group=self._group)], "load weights")

    def leave(self) -> None:
        """Take the group apart on both sides, in whatever state it is.

        Whoever still waits for another in it is set free, because that other one's connections close.
        """
        leaving = [background(partial(engine.destroy_weights_update_group, self.name)) for engine in self.engines]
        if self._group is None:
            # Members that wait for others to join are set free by losing the rendezvous. Not at once: a connection to
            # it ends, but one that has not been made yet is tried for half an hour.
            wait(self._calls, _GRACE_S)
            self._server = None
        _, hanging = wait([*self._calls, *leaving], LEAVE_S)
        if self._group is not None and not hanging.intersection(self._calls):
            wait([background(partial(dist.destroy_process_group, self._group))], LEAVE_S)
        self._group = self._server = None
        self._calls = []

    def _join(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        port = listener.getsockname()[1]
        world_size = 1 + sum(engine.address.tensor_parallel for engine in self.engines)
        timeout = timedelta(seconds=self.timeout_s)
        backend = self.backend
        self._server = TCPStore(
            host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        store = TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
        joins = []
        offset = 1
        for engine in self.engines:
            join = partial(engine.init_weights_update_group, master_address=host, master_port=port, backend=backend)
            joins.append(partial(join, rank_offset=offset, world_size=world_size, group_name=self.name))
            offset += engine.address.tensor_parallel
        here = partial(_create_group, self.name, store, world_size, backend, timeout)
        *_, self._group = self._together([*joins, here], "join the weight group")

    def _together(self, calls: Sequence[partial[Any]], what: str) -> list[Any]:
        """The results of all; the first failure ends the group, since the others may then wait for ever."""
        self._calls = [background(call) for call in calls]
        done, pending = wait(self._calls, self.timeout_s, FIRST_EXCEPTION)
        if not pending and all(call.exception() is None for call in done):
            return [call.result() for call in self._calls]
        reason = self._reason()
        self.leave()
        if reason is None:
            raise TransportError(f"engines did not {what} within {self.timeout_s:g} s (publish.timeout_s)")
        raise TransportError(f"engines could not {what}: {reason}") from reason

    def _reason(self) -> BaseException | None:
        """Why a call failed, in an engine's own words if there are any: a broken connection shows first, says less."""
        failures = self._failures()
        if failures and not any(isinstance(failure, EngineError) for failure in failures):
            wait(self._calls[:-1], _GRACE_S, FIRST_EXCEPTION)
            failures = self._failures()
        return next((failure for failure in failures if isinstance(failure, EngineError)), next(iter(failures), None))

    def _failures(self) -> list[BaseException]:
        return [failure for call in self._calls if call.done() and (failure := call.exception()) is not None]


def flat_bytes(tensors: Sequence[tuple[str, Tensor]]) -> Tensor:
    """The tensors' bytes, one after the other; uint8."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])


def _create_group(name: str, store: TCPStore, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Rank 0's end, once all others have come."""
    group: Any
    group, _ = _new_process_group_helper(
        world_size, 0, [], dist.Backend(backend), PrefixStore(name, store), cast(Any, name), timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
