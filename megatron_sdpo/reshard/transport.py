"""One process group from a stage's sender to every engine rank, and buckets broadcast through it."""

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _new_process_group_helper, _world  # no public way to join a second world

from megatron_sdpo.rollout.control import EngineControl


class TransportError(RuntimeError):
    """A bucket did not reach every engine; the message says which engine and why."""


class StageTransport:
    """Sender's end of the group ``name``: rank 0 here, then every engine's ranks in order.

    gloo between CPUs, NCCL between GPUs (the NCCL path has not run yet). The rendezvous listens on ``host`` only.
    """

    def __init__(self, engines: Sequence[EngineControl], name: str, host: str, timeout_s: float) -> None:
        self.engines, self.name, self.timeout_s = list(engines), name, timeout_s
        self.pool = ThreadPoolExecutor(len(self.engines) + 1, thread_name_prefix=name)
        self.group = self._join(host)

    def send(self, tensors: Sequence[tuple[str, Tensor]], version: str | None) -> None:
        """Broadcast one bucket and wait until every engine has loaded it; ``version`` is stamped with the last one.

        Raises TransportError as soon as any engine refuses; what the engines hold is then a mixture, and this
        transport is of no further use.
        """
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])
        described = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
        }

        def load(engine: EngineControl) -> None:
            engine.update_weights_from_distributed(
                **described,
                group_name=self.name,
                weight_version=version,
                flush_cache=version is not None,
                load_format="flattened_bucket",
            )

        loads = [self.pool.submit(load, engine) for engine in self.engines]
        self._all([*loads, self.pool.submit(dist.broadcast, flat, src=0, group=self.group)], "load weights")

    def close(self) -> None:
        """Leave the group on both sides; engines that do not answer any more are left alone."""
        for engine in self.engines:
            try:
                engine.destroy_weights_update_group(self.name)
            except Exception as error:
                print(f"warning: {engine.address.name} did not leave the weight group: {error}")
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _join(self, host: str) -> dist.ProcessGroup:
        listener = socket.socket()
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        world_size = 1 + sum(engine.address.tensor_parallel for engine in self.engines)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=self.timeout_s)
        store = dist.TCPStore(
            host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        joins: list[Callable[[], Any]] = []
        offset = 1
        for engine in self.engines:
            joins.append(_join_call(engine, host, port, offset, world_size, self.name, backend))
            offset += engine.address.tensor_parallel
        futures = [self.pool.submit(join) for join in joins]
        here = self.pool.submit(self._create, store, world_size, backend, timeout)
        self._all([*futures, here], "join the weight group")
        return here.result()

    def _create(self, store: dist.TCPStore, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
        group, _ = _new_process_group_helper(
            world_size, 0, [], dist.Backend(backend), dist.PrefixStore(self.name, store), self.name, timeout=timeout
        )
        _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        return group

    def _all(self, futures: Sequence[Future[Any]], what: str) -> None:
        """Wait for all; the first failure ends the wait, since the others may then never finish."""
        done, pending = wait(futures, timeout=self.timeout_s, return_when=FIRST_EXCEPTION)
        for future in done:
            if future.exception() is not None:
                raise TransportError(f"engines could not {what}: {future.exception()}") from future.exception()
        if pending:
            raise TransportError(f"engines did not {what} within {self.timeout_s:.0f} s (publish.timeout_s)")


def _join_call(
    engine: EngineControl, host: str, port: int, offset: int, world_size: int, name: str, backend: str
) -> Callable[[], Any]:
    return lambda: engine.init_weights_update_group(
        master_address=host,
        master_port=port,
        rank_offset=offset,
        world_size=world_size,
        group_name=name,
        backend=backend,
    )
