"""Every layout over NCCL: two ranks against one, in Transformer Engine's modules, on one GPU or on two.

As a program, one rank: ``python -m gpu_sections.layouts MODEL LAYOUT OUT [key=value ...]`` in torchrun's environment.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu_sections.common import (
    QWEN3_8B,
    SMALL,
    Finding,
    at_most,
    draw_batch,
    mixed_lengths,
    qwen3,
    step_of,
    write_model,
)
from megatron_sdpo.config import apply_overrides, layout_overrides

CHECKED = ("loss/total", "optim/grad_norm")
SAMPLED = ("objective.support=sampled", "objective.alpha=1")
"""Rounding would choose another top-K."""
FP8 = ("fp8.student=blockwise", "fp8.teacher=blockwise")
EXPERTS = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tp2": ("dense", "tp2", ()),
    "tp2sp": ("dense", "tp2sp", ()),
    "pp2": ("dense", "pp2", ()),
    "pp2vp2": ("dense", "pp2vp2", ()),
    "cp2": ("dense", "cp2", ()),
    "dp2do": ("dense", "dp2do", ("layout.overlap_grad_reduce=true",)),
    "tp2sp, blockwise": ("dense", "tp2sp", FP8),
    "cp2, blockwise": ("dense", "cp2", FP8),
    "ep2, experts": ("experts", "ep2", ()),
    "tp2sp, experts in slices": ("experts", "tp2sp", ()),
    "tp2spep2et1, experts whole": ("experts", "tp2spep2et1", ()),
}
"""Name -> (model, layout, what else is set)."""
BOUND = {"dense": 0.01, "experts": 0.03, "blockwise": 0.03}
"""Relative, of two steps: bf16 rounds otherwise in slices, near ties experts are chosen otherwise."""
LIMIT_S = 150.0
AT_ONCE = 4


def layouts() -> list[Finding]:
    """Loss and gradient norm of two steps, the second with the first one's weights, of two ranks against one."""
    findings = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(name)
        models = {"dense": folder / "dense", "experts": folder / "experts"}
        write_model(models["dense"], qwen3(**SMALL))
        published = QWEN3_8B.parents[1] / "Qwen3-30B-A3B" / "config.json"
        write_model(models["experts"], {**json.loads(published.read_text()), **EXPERTS})
        alone = {(model, more) for model, _, more in CASES.values()}
        ones = {key: pool.submit(_run, models[key[0]], "tp1", 1, key[1]) for key in sorted(alone)}
        twos = {case: pool.submit(_run, models[m], layout, 2, more) for case, (m, layout, more) in CASES.items()}
        for case, (model, _, more) in CASES.items():
            bound = BOUND["blockwise" if FP8[0] in more else model]
            try:
                found, wanted = twos[case].result(), ones[model, more].result()
            except RuntimeError as error:
                findings.append(Finding(case, str(error)[-600:], "runs", False))
                continue
            for key in CHECKED:
                off = max(abs(mine[key] / one[key] - 1) for mine, one in zip(found, wanted, strict=True))
                findings.append(at_most(f"{case}: {key} of two steps, from one rank's, relative", off, bound))
    return findings


def _run(model: Path, layout: str, ranks: int, more: tuple[str, ...]) -> list[dict[str, float]]:
    """Each step's metrics. RuntimeError with the end of what a rank said."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    out = Path(tempfile.mkdtemp(dir=model.parent)) / "metrics.json"
    command = [sys.executable, "-m", "gpu_sections.layouts", str(model), layout, str(out), *more]
    spread = torch.cuda.device_count() >= ranks
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank if spread else 0, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in own.items()}}
        if not spread:  # NCCL refuses two ranks on one GPU of one host, and takes a process's word for its host
            environment |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=LIMIT_S)[0])
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{layout} did not end within {LIMIT_S:g} s") from late
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{layout}: " + "\n".join(words[-500:] for words in said))
    return json.loads(out.read_text())


def _rank(model: Path, layout: str, out: Path, more: list[str]) -> None:
    from gpu_sections.common import config_of
    from megatron_sdpo.mcore.groups import initialize, shutdown
    from megatron_sdpo.mcore.learner import Learner

    base = config_of(model, *SAMPLED, "layout.tokens_per_micro_batch=1024")
    config = apply_overrides(base, [*layout_overrides(layout), *more])
    groups = initialize(config.layout, seed=0, timeout_s=120)
    learner = Learner(config, groups)
    found = []
    for step in range(2):
        batch = draw_batch(SMALL["vocab_size"], mixed_lengths(16, seed=step), seed=step, step=step)
        metrics = step_of(learner, batch)[0]
        found.append({key: metrics[key] for key in CHECKED})
    if groups.rank == 0:
        out.write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
