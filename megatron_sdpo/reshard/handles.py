"""Buckets handed to engines of the same machine as handles to the sender's memory; nothing travels.

A handle is CUDA IPC's, which is how an engine on the trainer's own GPU is reached: NCCL does not connect two processes
of one GPU. On a CPU the bytes themselves take the handle's place: torch's handle to shared memory wants a manager
process, which stays behind when the sender has ended.
"""

import base64
import pickle
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_sdpo.reshard.background import background
from megatron_sdpo.reshard.transport import TransportError, flat_bytes
from megatron_sdpo.rollout.control import EngineControl

_DEVICE = 6
"""Place of the device in what ``rebuild_cuda_tensor`` takes."""


class HandleTransport:
    """Sender's end. Engines must be on this machine, those of a GPU on GPUs that reach the sender's.

    Ran on one GPU that trainer and engine shared, and between CPUs; not yet between GPUs. A bucket's memory is given
    back when every engine has loaded it, so at most one is held. ``send`` raises TransportError as StageTransport's.
    """

    backend = "ipc"

    def __init__(self, engines: Sequence[EngineControl], timeout_s: float) -> None:
        self.engines, self.timeout_s = list(engines), timeout_s

    def send(self, tensors: Sequence[tuple[str, Tensor]], version: str | None) -> None:
        """Have every engine load one bucket from where it lies; ``version`` is stamped with the last one."""
        flat = flat_bytes(tensors)
        calls = [
            background(
                partial(
                    engine.update_weights_from_tensor,
                    # One handle a rank: each reader gives its own back.
                    payloads=[payload(flat, tensors) for _ in range(engine.address.tensor_parallel)],
                    weight_version=version,
                )
            )
            for engine in self.engines
        ]
        done, pending = wait(calls, self.timeout_s, FIRST_EXCEPTION)
        failure = next((error for call in done if (error := call.exception()) is not None), None)
        if failure is not None:
            raise TransportError(f"engines could not load weights: {failure}") from failure
        if pending:
            raise TransportError(f"engines did not load weights within {self.timeout_s:g} s (publish.timeout_s)")
        if flat.is_cuda:
            del flat
            torch.cuda.ipc_collect()

    def leave(self) -> None:
        """Nothing stays behind in the engines."""


def payload(flat: Tensor, tensors: Sequence[tuple[str, Tensor]]) -> str:
    """What SGLang's update_weights_from_tensor takes for one rank: base64 of a pickle with a handle to ``flat``, the
    bytes of ``tensors`` one after the other, and with their names, shapes and dtypes.

    Made of nothing that SGLang's restricted unpickler does not know (0.5.15, 0.5.21).
    """
    metadata, start = [], 0
    for name, tensor in tensors:
        end = start + tensor.nbytes
        fields: dict[str, Any] = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype}
        metadata.append(SimpleNamespace(**fields, start_idx=start, end_idx=end, numel=tensor.nbytes))
        start = end
    content = {"flattened_tensor": _Handle(flat) if flat.is_cuda else flat, "metadata": metadata}
    return base64.b64encode(pickle.dumps(content)).decode()


class _Handle:
    """A tensor on a GPU; whoever unpickles it has the same memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        # Engines may number the GPUs otherwise; SGLang finds them by this name.
        name = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
        return rebuild, (*arguments[:_DEVICE], name, *arguments[_DEVICE + 1 :])
