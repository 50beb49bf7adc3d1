"""Worker of test_experts.py: a mixture of experts under some layouts, one after another, under torchrun.

Arguments: folder layout... Reads the model, the checkpoint of one process and ``single`` in folder; writes, in
folder/LAYOUT, CASE (the trained model, and what each of three ``train`` calls said), sent-RANK.pt (what would be
published) and, for the layouts of ``SAVED``, checkpoints; for those of ``TAKEN_OVER`` what became of another's.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import canonical_parameters, load_hf, save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.mcore.model import build_model
from megatron_sdpo.reshard.gather import gather, is_sender
from megatron_sdpo.reshard.plan import plan
from tests.dist_learner import Overrides, parse, run_cases
from tests.dist_reset import check_reset
from tests.learner_setup import learn, make_batch, make_config, make_learner

MODEL, LAYERS = "qwen3_moe", 4
IDLE = f"{MODEL}-idle"
"""No token goes to its experts from the fifth on."""
_SMALL = ("layout.tokens_per_micro_batch=64", "layout.head_chunk_tokens=10")
CASES: dict[str, tuple[str, Overrides]] = {
    "sdpo": (MODEL, ("optim.mini_batches=2", "objective.aggregation=sequence_mean", *_SMALL)),
    # Ranks without a sample have padding alone, and most experts no token.
    "sdpo-one-sample-each": (MODEL, ("optim.mini_batches=9", *_SMALL)),
    "idle": (IDLE, ("optim.mini_batches=2", *_SMALL)),
    "grpo": (MODEL, ("objective.kind=grpo", "objective.kl_coefficient=0.5", *_SMALL)),
    "next-token": (MODEL, ("objective.kind=next_token", *_SMALL)),
    "bf16-sdpo": (MODEL, ("model.dtype=bfloat16", *_SMALL)),
}
"""Name -> (model, overrides)."""
LAYOUTS = {
    "dp2ep2-overlap": tuple(CASES),
    "tp2ep2et1-sp": ("sdpo", "grpo"),
    "cp2ep2-do": ("sdpo", "idle"),
    "pp2vp2": ("sdpo", "next-token"),
    "tp2": ("sdpo", "grpo"),
}
"""Two ranks -> cases. Others, which take minutes, have all cases."""
SAVED = {"dp2ep2-overlap": "bfloat16", "tp2ep2et1-sp": "float32"}
"""Layout -> the dtype in which its checkpoint is written."""
TAKEN_OVER = {
    "dp2ep2-overlap": ("single-float32", "single-bfloat16"),
    "tp2ep2et1-sp": ("single-bfloat16",),
    "cp2ep2-do": ("dp2ep2-overlap", "tp2ep2et1-sp"),
    "tp2": ("dp2ep2-overlap",),
}
"""Layout -> (whose checkpoints it loads, saves again, and continues)."""


def cases_of(layout: str) -> dict[str, tuple[str, Overrides]]:
    return {case: CASES[case] for case in LAYOUTS.get(layout, CASES)}


def write_idle(folder: Path) -> None:
    """``IDLE`` and its teacher, made of ``MODEL``: a token's one expert is the best of four whose gates are a, -a, b
    and -b, which is far better than those whose gates are zero."""
    for suffix in ("", "-teacher"):
        path = shutil.copytree(folder / f"{MODEL}{suffix}", folder / f"{IDLE}{suffix}")
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(settings | {"num_experts_per_tok": 1, "norm_topk_prob": False}))
        tensors = load_file(path / "model.safetensors")
        for name, gate_EH in tensors.items():
            if name.endswith("mlp.gate.weight"):
                a, b = 4 * gate_EH[:2]
                gate_EH.copy_(torch.stack([a, -a, b, -b, *torch.zeros(len(gate_EH) - 4, len(a))]))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def dtype_of(run: str) -> str:
    return SAVED.get(run) or run.removeprefix("single-")


def learner_of(folder: Path, run: str, groups: ParallelGroups, layout: LayoutConfig, taught: bool) -> Learner:
    overrides = (f"model.dtype={dtype_of(run)}", "optim.mini_batches=2")
    config = make_config(folder / MODEL, overrides, layout)
    return make_learner(config, groups, folder / f"{MODEL}-teacher" if taught else None)


def save_run(folder: Path, run: str, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """A checkpoint after one batch, and what the two after it say."""
    learner = learner_of(folder, run, groups, layout, taught=True)
    learn(learner, make_batch(0))
    out = folder / run
    checkpoint.save(learner, out / "checkpoints", cursor=3, keep=1)
    save_hf(learner.model, out / "saved", groups, layout, folder / MODEL)
    (out / "saved" / "metrics.json").write_text(json.dumps([learn(learner, make_batch(step)) for step in (1, 2)]))


def take_over(folder: Path, run: str, groups: ParallelGroups, layout: LayoutConfig, out: Path) -> None:
    """Load another layout's checkpoint, write it again to ``out``, and train on."""
    learner = learner_of(folder, run, groups, layout, taught=False)
    assert checkpoint.load_latest(learner, folder / run / "checkpoints") == checkpoint.Resumed(1, 3)
    checkpoint.save(learner, out, cursor=3, keep=1)
    (out / "metrics.json").write_text(json.dumps([learn(learner, make_batch(step)) for step in (1, 2)]))


def sent(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> dict[str, Tensor]:
    """What this rank would publish of the model's directory."""
    hf = read_hf_config(folder / MODEL)
    model = build_model(hf, layout, groups, torch.float32)
    load_hf(model, folder / MODEL, groups, layout)
    own = canonical_parameters(model, groups)
    held: dict[str, Tensor] = {}
    for bucket in plan(hf, groups.pipeline_size, 4, 20_000, groups.virtual_size):
        pairs = gather(bucket, own, hf, groups)
        here = is_sender(groups) and groups.pipeline_rank == bucket.rank
        assert [name for name, _ in pairs] == ([t.name for t in bucket.tensors] if here else [])
        held |= {name: tensor.clone() for name, tensor in pairs}
    return held


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        layout, out = parse(name), folder / name
        groups = initialize(layout, seed=0, timeout_s=60)
        run_cases(folder, groups, layout, out, cases_of(name))
        torch.save(sent(folder, groups, layout), out / f"sent-{groups.rank}.pt")
        if name in SAVED:
            save_run(folder, name, groups, layout)
        if name == "dp2ep2-overlap":
            check_reset(folder / MODEL, ("optim.mini_batches=2",), groups, layout)
        for run in TAKEN_OVER.get(name, ()):
            take_over(folder, run, groups, layout, out / run)
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":  # checkpoint writers start processes which import this module again
    main()
