"""What the unmodified SGLang wheel needs to serve on a machine without CUDA.

``install()`` must run before ``sglang`` is imported, in every process of the engine; where a CUDA
device exists it does nothing. SGLang's files are not edited: the pieces below stand in for packages
which it imports unconditionally but does not call in plain serving.
"""

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

SPECULATIVE_KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
"""Names that SGLang imports from ``sgl_kernel`` on a CPU, for speculative decoding only."""

SERVER_ARGS: tuple[str, ...] = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--disable-overlap-schedule",
    "--disable-cuda-graph",
    "--sleep-on-idle",
    "--max-total-tokens=65536",
)
"""SGLang arguments for a CPU. Put them before the user's: the last occurrence of an argument holds."""

MEMORY_SAVER = "--enable-memory-saver"
"""Of SGLang: weights and KV cache lie where they can be given back. Its library manages CUDA memory alone, so on a CPU
they stay, and the two calls answer without doing anything."""

_kept_alive: list[Any] = []


def bind_cores(tensor_parallel: int) -> None:
    """Give each tensor-parallel worker a core, in turn; SGLang asks NUMA nodes otherwise, one a worker."""
    cores = sorted(os.sched_getaffinity(0))
    chosen = (str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(chosen))


def has_cuda() -> bool:
    """Whether torch sees a CUDA device. Imports torch."""
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Make ``import sglang`` work without CUDA; nothing when a CUDA device exists."""
    if has_cuda():
        return
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    provide_torchvision_operators()
    provide_kernel_placeholders()
    provide_triton()


def provide_torchvision_operators() -> None:
    """Let ``import torchvision`` (and with it transformers' models) succeed beside a CPU build of torch.

    PyPI's torchvision is linked to CUDA, so its compiled operators do not load beside a CPU torch,
    and its import fails while it describes two of them. Giving these a schema is enough; they are
    never called here. Nothing is done when torchvision imports as it is, or is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        importlib.import_module("torchvision")


def provide_kernel_placeholders() -> None:
    """An in-memory ``sgl_kernel`` whose functions raise when called.

    SGLang then finds no AMX kernels either, and takes its plain torch path in every layer.
    """
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = ModuleType("sgl_kernel", "Placeholders: no compiled CPU kernels are installed.")
    module.__spec__ = ModuleSpec("sgl_kernel", loader=None)
    for name in SPECULATIVE_KERNELS:
        setattr(module, name, _placeholder(name))
    sys.modules["sgl_kernel"] = module


def _placeholder(name: str) -> Callable[..., Any]:
    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build; speculative decoding needs a GPU")

    return missing


def provide_triton() -> None:
    """SGLang's own stand-in for triton, which it ships for macOS, where triton is not installed."""
    if importlib.util.find_spec("triton") is not None:
        return
    import torch

    # Asking for the path through find_spec("sglang._platform_stubs") would import sglang already.
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        return
    path = Path(package.origin).parent / "_platform_stubs.py"
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"this SGLang release has no {path.name}; install triton, or the pinned sglang")
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    with (
        mock.patch.object(sys, "platform", "darwin"),
        mock.patch.object(platform, "machine", lambda: "arm64"),
        mock.patch.object(torch.backends.mps, "is_available", lambda: True),
    ):
        stubs.install_platform_stubs()
