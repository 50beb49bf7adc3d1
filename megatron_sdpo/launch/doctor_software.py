"""What is installed here, whether it loads, and whether it is what this project was tested with."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from threading import Lock
from typing import Any

from packaging.requirements import Requirement

import megatron_sdpo
from megatron_sdpo.launch.doctor import Finding, Needs, probe

_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        found["gpus"].append([p.name, p.major * 10 + p.minor, total / 1e9, free / 1e9])
found["nccl_built"] = torch.distributed.is_nccl_available()
print(json.dumps(found))
"""
_TRANSFORMER_ENGINE = """
import json, torch, transformer_engine.pytorch as te
found = {"blockwise": [False, "no GPU"], "tensorwise": [False, "no GPU"]}
if torch.cuda.is_available():  # without a driver the questions raise
    found["blockwise"] = te.is_fp8_block_scaling_available(return_reason=True)
    found["tensorwise"] = te.is_fp8_available(return_reason=True)
print(json.dumps(found))
"""
_APEX = """
import json
from apex.normalization import FusedLayerNorm
import fused_weight_gradient_mlp_cuda
print(json.dumps({}))
"""
_SGLANG = """
import json
from megatron_sdpo.rollout import cpu_platform
cpu_platform.install()
import sglang.srt.server_args, sglang_router.launch_router
print(json.dumps({}))
"""
OLDEST_DRIVER = 580
"""Of NVIDIA, for CUDA 13."""


def requirements() -> dict[str, list[Requirement]]:
    """Those of this package by extra, "" for those without: from the checkout's pyproject.toml, else as installed."""
    file = Path(megatron_sdpo.__file__ or "").parents[1] / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}
    found: dict[str, list[Requirement]] = {"": []}
    for line in requires("megatron-sdpo") or ():
        need = Requirement(line)
        extra = str(need.marker).partition("extra == ")[2].strip("\"'") if need.marker else ""
        need.marker = None
        found.setdefault(extra, []).append(need)
    return found


def wrong_versions(extra: str) -> list[str]:
    """What is missing of an extra's packages, or of another version than they must be."""
    wrong = []
    for need in requirements()[extra]:
        try:
            found = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"no {need.name}")
            continue
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} {found}, not {need.specifier}")
    return wrong


def python(needs: Needs) -> Finding:
    seen = platform.python_version()
    if platform.python_version_tuple()[:2] not in (("3", "11"), ("3", "12")):
        return Finding("python", "fail", seen, "use Python 3.11 or 3.12")
    return Finding("python", "ok", seen)


def packages(needs: Needs) -> Finding:
    wrong = wrong_versions("")
    if wrong:
        return Finding("packages", "fail", ", ".join(wrong), "run `make setup`, or install what pyproject.toml says")
    return Finding("packages", "ok", f"{len(requirements()[''])} as pyproject.toml asks for")


_ONE_AT_A_TIME = Lock()
"""Checks that want the same probe wait for the one that makes it."""


def _torch() -> dict[str, Any]:
    with _ONE_AT_A_TIME:
        return _probed(_TORCH)


@cache
def _probed(program: str) -> dict[str, Any]:
    return probe(program)


def torch(needs: Needs) -> Finding:
    found = _torch()
    if "error" in found:
        return Finding("torch", "fail", f"does not load: {found['error']}", "run `make setup` again")
    return Finding("torch", "ok", f"{found['version']}, {'CUDA ' + found['cuda'] if found['cuda'] else 'CPU only'}")


def gpu(needs: Needs) -> Finding:
    """Devices that torch can use, against those that the driver has and those that the recipe needs."""
    found, driver = _torch().get("gpus", []), _driver_gpus()
    if driver and not found:
        todo = "install a CUDA build of torch that the driver supports; see CUDA_VISIBLE_DEVICES, too"
        return Finding("gpu", "fail", f"{len(driver)} by the driver ({driver[0]}), none by torch", todo)
    if len(found) < needs.gpus:
        seen = f"{len(found)} where {needs.gpus} are needed" if found else "none"
        return Finding("gpu", "fail", seen, f"the recipe needs {needs.gpus} in a node; choose a recipe for fewer")
    if not found:
        return Finding("gpu", "absent", "none", "models beyond a few million parameters need them")
    kinds = sorted({name for name, *_ in found})
    if len(kinds) > 1:
        return Finding("gpu", "warn", f"several kinds: {', '.join(kinds)}", "use one kind")
    seen = f"{len(found)} x {kinds[0]}, {found[0][2]:.0f} GB"
    versions = [int(major) for major in re.findall(r", (\d+)\.[\d.]+$", "\n".join(driver), re.MULTILINE)]
    if versions and min(versions) < OLDEST_DRIVER:
        todo = f"CUDA 13 wants a driver of {OLDEST_DRIVER} or newer"
        return Finding("gpu", "warn", f"{seen}, driver {min(versions)}", todo)
    busy = [i for i, (_, _, total, free) in enumerate(found) if free < 0.9 * total]
    if busy:
        return Finding("gpu", "warn", f"{seen}; memory of {busy} is in use", "end what uses it: nvidia-smi shows it")
    return Finding("gpu", "ok", seen)


def _driver_gpus() -> list[str]:
    """``["NVIDIA H100 80GB HBM3, 580.65.06", ...]``; empty without nvidia-smi, or where it finds none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    return done.stdout.splitlines() if done.returncode == 0 else []


def nccl(needs: Needs) -> Finding:
    found = _torch()
    if found.get("nccl"):
        return Finding("nccl", "ok", found["nccl"])
    state = "fail" if needs.gpus else "absent"
    todo = "install the CUDA build of torch" if needs.gpus else "only GPUs need it; CPUs use gloo"
    return Finding("nccl", state, "built in, but no GPU" if found.get("nccl_built") else "not in this torch", todo)


def _transformer_engine() -> dict[str, Any] | None:
    """None where it is not installed."""
    if not _installed("transformer_engine"):
        return None
    with _ONE_AT_A_TIME:
        return _probed(_TRANSFORMER_ENGINE)


def transformer_engine(needs: Needs) -> Finding:
    """Where its libraries are missing it raises RuntimeError, not ImportError: megatron-core fails with it."""
    name, found = "transformer engine", _transformer_engine()
    if found is None:
        if needs.fp8:
            return Finding(name, "fail", "not installed", "install it as the Dockerfile does, or set fp8.* to off")
        return Finding(name, "absent", "not installed", "FP8 and fused layers need it: the Dockerfile shows how")
    wrong = wrong_versions("gpu")
    if all(map(_distributed, ("transformer-engine-cu12", "transformer-engine-cu13"))):
        todo = "pip uninstall transformer-engine-cu12, which its source package asks for whatever the CUDA is"
        return Finding(name, "fail", "two cores, of which that for CUDA 12 is loaded", todo)
    if "error" in found:
        todo = "on a machine without GPUs uninstall it; on one with, see that CUDA's and cuDNN's libraries are found"
        return Finding(name, "fail", f"does not load: {found['error']}", todo)
    if wrong:
        return Finding(name, "fail" if needs.fp8 else "warn", ", ".join(wrong), "install it as the Dockerfile does")
    return Finding(name, "ok", version("transformer-engine"))


def fp8(needs: Needs) -> Finding:
    """Not yet run on a GPU."""
    found = _transformer_engine()
    gpus = _torch().get("gpus", [])
    if found is None or "error" in found or not gpus:
        seen = "no GPU" if not gpus else "no Transformer Engine that loads"
        if needs.fp8:
            return Finding("fp8", "fail", seen, "set fp8.* to off, or to emulated to test the numbers")
        return Finding("fp8", "absent", seen, "fp8.*=emulated has its numbers on any device, slowly")
    missing = [f"no {kind}: {found[kind][1]}" for kind in needs.fp8 if not found[kind][0]]
    if missing:
        return Finding("fp8", "fail", "; ".join(missing), "set fp8.* to off, or use Hopper with CUDA 12.9 or newer")
    can, why = found["blockwise"]
    if not can:
        return Finding("fp8", "absent", f"no blockwise: {why}", "it needs Hopper and CUDA 12.9 or newer")
    if os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES") == "0":
        return Finding("fp8", "warn", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0", "unset it: engines have fp32 scales")
    return Finding("fp8", "ok", f"blockwise on {gpus[0][0]}")


def apex(needs: Needs) -> Finding:
    """The package of this name on PyPI is another project's."""
    if not _installed("apex"):
        return Finding("apex", "absent", "not installed", "only layout.gradient_accumulation_fusion=on needs it")
    if not _installed("apex.normalization"):
        todo = "pip uninstall apex, then install the extra apex, which is NVIDIA's repository"
        return Finding("apex", "fail", "PyPI's apex, an unrelated package", todo)
    found = probe(_APEX)
    if "error" in found:
        todo = "build it with --cpp_ext and --cuda_ext against this torch, or uninstall it"
        return Finding("apex", "fail", f"does not load: {found['error']}", todo)
    return Finding("apex", "ok", "with fused gradient accumulation")


def sglang(needs: Needs) -> Finding:
    if not _installed("sglang"):
        todo = "install the extra engine, here or in the engines' own environment"
        return Finding("sglang", "absent" if needs.config is None else "fail", "not installed", todo)
    wrong = wrong_versions("engine")
    if wrong:
        return Finding("sglang", "fail", ", ".join(wrong), "install the extra engine as it is pinned")
    found = probe(_SGLANG)
    if "error" in found:
        return Finding("sglang", "fail", f"does not load: {found['error']}", "install the extra engine again")
    return Finding("sglang", "ok", f"{version('sglang')}, router {version('sglang-router')}")


def _distributed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _installed(module: str) -> bool:
    """Looks for a module without running any of it, but for the packages above it."""
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not rest:
        return spec is not None
    places = spec.submodule_search_locations or []
    return any((Path(place) / rest).exists() or (Path(place) / f"{rest}.py").exists() for place in places)


CHECKS = (python, packages, torch, gpu, nccl, transformer_engine, fp8, apex, sglang)
