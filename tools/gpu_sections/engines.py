"""Weights to a real SGLang engine by every way there is, in bf16 and in FP8, and its memory given back and taken again.

``SDPO_TEST_ENGINE_ARGS`` are more arguments for SGLang (``--attention-backend=triton`` where its kernels are missing).
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from gpu_sections.common import DEVICE, SMALL, Finding, at_least, at_most, config_of, groups_of_one, qwen3, write_model
from megatron_sdpo.config import Config
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import publisher_for
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.fleet import Fleet, Share

Backend = Literal["nccl", "gloo", "ipc"]
ONE_GPU = {"NCCL_HOSTID": "trainer", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
"""NCCL refuses two processes on one GPU of one host, but takes a process's word for its host: then it goes through
sockets, which says nothing of its speed, but shows its group, its buckets and their order to be right."""
ENGINE = {"TORCH_COMPILE_DISABLE": "1"}
"""It starts sooner, and samples hardly anything here."""
APART = {"off": 0.5, "blockwise": 1.0}
"""Log-probs of a probe of random tokens, between two implementations in bf16 or of block FP8."""


def engines() -> list[Finding]:
    """On the trainer's device by CUDA IPC, gloo and NCCL; where there is a next GPU, by NCCL to that one."""
    if importlib.util.find_spec("sglang") is None:
        return [Finding("SGLang is not installed here", "nothing was tried")]
    gpus = torch.cuda.device_count()
    here: tuple[Backend, ...] = ("ipc", "gloo", "nccl") if gpus == 1 else ("ipc", "gloo")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, _told(ONE_GPU if gpus == 1 else {}):
        model = write_model(Path(name) / "model", qwen3(**SMALL))
        findings = []
        for fp8 in ("off", "blockwise"):
            findings += served(Path(name) / fp8, model, fp8, here)
            if gpus > 1:  # not yet run on two GPUs
                findings += served(Path(name) / f"{fp8}-next", model, fp8, ("nccl",), gpu=1)
    return findings


def served(folder: Path, model: Path, fp8: str, backends: tuple[Backend, ...], gpu: int = 0) -> list[Finding]:
    """One engine, which every backend publishes to; before each it has given its memory back, unless it is apart."""
    shared = gpu == 0
    more = [f"engine.fp8={fp8}", f"engine.release_memory={str(shared).lower()}", f"publish.backend={backends[0]}"]
    more += ["engine.max_total_tokens=16384", f"publish.probe_tolerance={APART[fp8]}", f"run_dir={folder}"]
    if DEVICE.type == "cuda":
        more += ["fp8.student=blockwise", "fp8.teacher=blockwise"] if fp8 == "blockwise" else []
        arguments = ["--mem-fraction-static=0.1", "--disable-cuda-graph", *_given()]
        more.append("engine.extra_args=" + str(arguments).replace("'", '"'))
    config = config_of(model, *more)
    run_dir = RunDir(folder)
    run_dir.prepare(config)
    learner = Learner(config, groups_of_one())
    findings = []
    with ExitStack() as stack:
        with _told(ENGINE | ({"NCCL_HOSTID": "engine"} if "nccl" in backends and shared else {})):
            share = Share(range(1), config.engine.host, first_gpu=gpu)
            stack.enter_context(Fleet(config, folder, run_dir.token(), share))
        for version, backend in enumerate(backends, 1):
            findings += _published(config, learner, run_dir, backend, version)
    return findings


@contextmanager
def _told(variables: dict[str, str]) -> Iterator[None]:
    """The environment that this process, and what it starts, has meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _published(config: Config, learner: Learner, run_dir: RunDir, backend: Backend, version: int) -> list[Finding]:
    """Twice by this backend: with memory given back in between."""
    as_set = replace(config, publish=replace(config.publish, backend=backend))
    publisher = publisher_for(learner, run_dir, as_set, run_dir.token())
    what = f"{backend}, engine's fp8 {config.engine.fp8}"
    publisher.publish(2 * version)
    publisher.release()
    found = publisher.publish(2 * version + 1)
    publisher.close()
    findings = [
        at_most(f"{what}: probe gap", found["sync/probe_gap"], config.publish.probe_tolerance),
        Finding(f"{what}: MB, s", f"{found['sync/bytes'] / 1e6:.1f}, {found['sync/seconds']:.2f}"),
    ]
    if config.engine.release_memory and DEVICE.type == "cuda":
        findings.append(at_least(f"{what}: MB given back", found["sync/released_bytes"] / 1e6, 10.0))
    return findings


def _given() -> list[str]:
    return os.environ.get("SDPO_TEST_ENGINE_ARGS", "").split()
