"""Exact peak of tensor memory on any device, by watching every operation: what an allocator's counter is on a GPU."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within the block, bytes of storages that operations create, forward and backward; earlier ones do not count.

    ``peak`` is the most that was alive at one time, ``live`` what is. Scratch memory inside one kernel is not seen; a
    storage that is emptied by hand, as by activation recompute, counts as gone from the next operation on.

    Example:
        with LiveMemory() as memory:
            loss(logits).backward()
        print(memory.peak)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        self._sizes: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._look_again()
        for x in tree_leaves((args, kwargs)):
            self._see(x, 0)  # made before the block, or by nobody who can be watched
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self._see(x, 1)
        return out

    def _see(self, x: Any, made_here: int) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() * made_here
        self._known[key] = weakref.finalize(storage, self._freed, key)
        if made_here:
            self._sizes[key] = (weakref.ref(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _look_again(self) -> None:
        for key, (reference, size) in list(self._sizes.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self._sizes[key] = (reference, storage.nbytes())
                self.live += storage.nbytes() - size

    def _freed(self, key: int) -> None:
        del self._known[key]
        _, size = self._sizes.pop(key, (None, 0))
        self.live -= size


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``run`` had allocated at one time beyond what was there before; bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveMemory() as memory:
        run()
    return memory.peak
