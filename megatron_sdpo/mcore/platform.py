"""Unmodified megatron-core on a machine without a GPU.

Megatron spells "cuda" in its source. Where torch sees no CUDA device, ``redirect_torch`` (before
megatron is imported) and ``redirect_megatron`` (before a model is built) send these places to the
CPU, for the whole process; where there is a device, they leave these places alone. Training and sharded
checkpoints are covered, Megatron's inference engines are not.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "linspace", "eye"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like"),
)

_GPU_SETTINGS = {
    # Transformer Engine reads it when it is imported: scales in fp32, not powers of two, as checkpoints have them.
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
    # Megatron's overlap of tensor-parallel communication with products relies on the order of launches.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def device() -> torch.device:
    """Where this rank computes: its CUDA device, or the CPU when there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def backend() -> str:
    """The torch.distributed backend of ``device()``: "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def gpu_generation() -> int | None:
    """The major number of the GPU's compute capability, 9 for Hopper; None without a GPU."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


@functools.cache
def redirect_torch() -> None:
    """Make torch.cuda's entry points that Megatron uses answer for the CPU; call before importing megatron."""
    if torch.cuda.is_available():
        for key, value in (_GPU_SETTINGS | _cudnn_of_torch()).items():
            os.environ.setdefault(key, value)
        return
    # At import Megatron warns of each GPU library that is absent; here they always are.
    warnings.filterwarnings("ignore", module=r"megatron\.core\b")
    _no_compile()
    torch.cuda.current_device = _returns(_CPU)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(torch.cuda, name, _returns())
    _streams()
    _factories()
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    _type_names()
    _generators()


def _cudnn_of_torch() -> dict[str, str]:
    """Where Transformer Engine shall look for cuDNN first: with that of the system beside torch's, attention fails."""
    found = importlib.util.find_spec("nvidia.cudnn") if importlib.util.find_spec("nvidia") else None
    places = list(found.submodule_search_locations or ()) if found else []
    return {"CUDNN_HOME": places[0]} if places else {}


@functools.cache
def redirect_megatron() -> None:
    """The redirections inside megatron's own modules; call once megatron may be imported."""
    import megatron.core.tensor_parallel.random as random

    if not random.HAVE_TE:
        _without_fp8(random)
    if torch.cuda.is_available():
        return
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Its fork() warns when the CPU state changed inside; here that state is the very one it forks.
    message = "CPU RNG state changed within GPU RNG context"
    logging.getLogger(random.__name__).addFilter(lambda record: message not in record.getMessage())
    # 0.16.1 never binds this name without Transformer Engine: every router forward is a NameError.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Split sizes become lists only when they come from a GPU; all_to_all_single refuses tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _without_fp8(random: Any) -> None:
    """0.16.1 asks Transformer Engine about FP8 wherever it recomputes a norm: without it a NameError."""
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=_returns(False))
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()


def _returns(value: Any = None) -> Callable[..., Any]:
    """A new function each time: dynamo refuses one object under two of torch's names."""
    return lambda *args, **kwargs: value


def _no_compile() -> None:
    """Megatron's jit_fuser is torch.compile: minutes of a C++ compiler for nothing on tiny CPU models."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch._dynamo" in sys.modules:  # else it reads the environment when it is imported
        sys.modules["torch._dynamo"].config.disable = True


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = synchronize = _returns()
    query = _returns(True)
    elapsed_time = _returns(0.0)


class _Stream:
    """A CUDA stream on which everything has already run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = _returns()
    query = _returns(True)

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


def _streams() -> None:
    one = _Stream()
    replacements = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _returns(one),
        "default_stream": _returns(one),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = _returns()


def _cpu_if_cuda(where: Any) -> Any:
    if isinstance(where, str):
        return "cpu" if where.startswith("cuda") else where
    if isinstance(where, torch.device):
        return _CPU if where.type == "cuda" else where
    if isinstance(where, int) and not isinstance(where, bool):
        return _CPU
    return where


def _factories() -> None:
    """torch.zeros(..., device="cuda") and pin_memory=True."""
    # `with torch.device("meta")` finds the factories by identity in a cached set. Fill it with the originals first,
    # or transformers' from_pretrained leaves rotary buffers uninitialised, silently.
    from torch.utils import _device

    _device._device_constructors()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None:
                kwargs["device"] = _cpu_if_cuda(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return on_cpu

    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name)))


def _type_names() -> None:
    """Megatron's optimizers sort parameters by ``param.type() == "torch.cuda.FloatTensor"``."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def on_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(name, str) or name.startswith("torch.cuda."):
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = on_cpu


def _generators() -> None:
    """Megatron's tracker of CUDA generator states drives the one CPU generator."""
    seed = torch.default_generator.manual_seed  # torch.manual_seed itself calls torch.cuda.manual_seed_all
    torch.cuda.manual_seed = lambda value: seed(int(value))  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.manual_seed_all = _returns()
    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())  # noqa: B010
        setattr(module, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))  # noqa: B010
