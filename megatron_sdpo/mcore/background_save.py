"""The files of one save, written here and now or by a process beside the one that trains.

Megatron plans a save (which rank writes what) and finishes it (the index of all files); what lies between is here.
The writing process is a fork: it sees memory as it was at that instant, so training may go on at once. What lives on
a GPU is copied to the host before. It touches no device, starts nothing, and ends with the
process that made it.

Page-locked memory is the exception: CUDA has the fork share it, later writes included. What is there already is copied,
and the copies from a GPU, which lie in such memory too, are not given back before the writer has read them: the next
who asked for some would write over them.
"""

import gc
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from megatron_sdpo.mcore import manifest
from megatron_sdpo.mcore.manifest import Digest
from megatron_sdpo.rollout import lifeline


class WriteError(RuntimeError):
    """A rank's files could not be written; the message says why."""


@dataclass(frozen=True, slots=True)
class Written:
    """``results``: what Megatron's index needs, by bucket; ``digests`` by file name; ``seconds`` since the plan."""

    results: dict[int, Any]
    digests: dict[str, Digest]
    seconds: float


class Save:
    """One rank's part of a save; all ranks make it, and ``finish`` it, together."""

    def __init__(self, state: dict[str, Any], folder: Path, asynchronous: bool) -> None:
        """Plan; then write all, or start to. What ``state`` refers to may change as soon as this returns."""
        self._results: queue.SimpleQueue[dict[int, Any]] = queue.SimpleQueue()
        # Where Megatron's last part looks for the results. Its own is a process that would outlive a kill.
        filesystem_async._results_queue = self._results  # pyright: ignore[reportAttributeAccessIssue]
        apply_factories(state)
        dict_list_map_inplace(_uncopied, state)
        self._request: Any = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        began = time.monotonic()
        self._process: Any = None
        self._written: Written | None = None
        self._read: Any = None
        """What the writer reads, until it has."""
        if self._request.async_fn is None:  # other ranks write all that this one has
            self._written = Written({}, {}, 0.0)
            return
        transforms = self._request.async_fn.args[0]
        buckets = self._request.preload_fn()  # on the host
        if asynchronous:
            self._read = buckets
            self._start(lambda: _write(buckets, transforms, began))
        else:
            self._written = _write(buckets, transforms, began)

    def _start(self, write: Callable[[], Written]) -> None:
        context = multiprocessing.get_context("fork")
        self._answer, end = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer_with, args=(write, end, os.getpid()), daemon=True)
        self._process.start()
        end.close()  # the writer's death is then the end of the line

    def is_written(self, wait: bool) -> bool:
        """Whether this rank's files are complete; WriteError when they never will be."""
        if self._written is None and (wait or self._answer.poll()):
            try:
                answer = self._answer.recv()
            except EOFError:
                self._process.join()
                raise WriteError(f"its writer ended with exit code {self._process.exitcode}") from None
            self._process.join()
            self._read = None
            if isinstance(answer, str):
                raise WriteError(answer)
            self._written = answer
        return self._written is not None

    def finish(self) -> Written:
        """Megatron's index of the files of all ranks. Every rank calls this, when the files of all are complete."""
        assert self._written is not None
        self._results.put(self._written.results)
        for finalize in self._request.finalize_fns:
            finalize()
        return self._written


def _uncopied(part: Any) -> Any:
    """A shard whose tensor seems to have memory of its own: Megatron copies those that are parts of others.

    It does so before the fork, which makes that copy needless; the waiting for a save is mostly this. Needed it is of
    page-locked memory.
    """
    if not isinstance(part, ShardedTensor) or part.data is None:
        return part
    if part.data.is_pinned():
        return replace(part, data=part.data.clone())
    return replace(part, data=own_storage(part.data))


def own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a storage of this tensor alone; what is on a GPU or has gaps stays as it is."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    octets = tensor.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(octets).view(tensor.dtype).view(tensor.shape)


def _answer_with(write: Callable[[], Written], answer: Connection, parent: int) -> None:
    lifeline.end_with(parent)
    torch.set_num_threads(1)  # the threads of the other process do not exist here
    gc.disable()  # what the other process holds on a GPU must not be freed here
    try:
        answer.send(write())
    except Exception as error:  # whatever it is, the trainer stops with these words
        answer.send(f"{type(error).__name__}: {error}")


def _write(buckets: list[Any], transforms: list[Any], began: float) -> Written:
    """Each bucket to its file, all at once, synced and digested."""

    def one(place: int) -> tuple[Any, Digest]:
        results: Any = queue.SimpleQueue()
        begun: Any = queue.Queue()  # Megatron counts here what has ended
        begun.put(place)
        FileSystemWriterAsync.write_preloaded_data(transforms, place, buckets[place], results, begun, True)
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        return found, manifest.digest(Path(buckets[place][0]))

    with ThreadPoolExecutor(len(buckets)) as pool:
        done = list(pool.map(one, range(len(buckets))))
    names = [bucket[1] for bucket in buckets]
    return Written(
        {place: found for place, (found, _) in enumerate(done)},
        {name: found for name, (_, found) in zip(names, done, strict=True)},
        time.monotonic() - began,
    )
