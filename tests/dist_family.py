"""Worker of test_padded_vocabulary.py: train, export, publish and save models on two ranks.

Arguments: layout folder model... (tp2pp1dp1). Reads folder/MODEL; writes, in folder/LAYOUT, MODEL/CASE (the exported
models), MODEL.pt (metrics), MODEL-sent-STAGE.pt (what would be published), checkpoints/MODEL after one batch, and
MODEL-continued.pt (its weights, and the metrics of the next batch).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore import checkpoint
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import canonical_parameters, save_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.reshard.gather import gather
from megatron_sdpo.reshard.plan import plan
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_config, make_learner

CASES: dict[str, tuple[str, ...]] = {
    "top-k": ("layout.head_chunk_tokens=10", "rollout.temperature=0.7"),
    "vocabulary": ("objective.support=vocabulary", "objective.sample_weighting=teacher_confidence"),
    "trust-region": ("teacher.kind=trust_region", "teacher.mixture=0.3", "objective.tail=false"),
    "hybrid": (
        "objective.kind=hybrid",
        "objective.kl_coefficient=0.5",
        "objective.support=sampled",
        "objective.alpha=1",
    ),
}


def train_cases(
    folder: Path, model: str, groups: ParallelGroups, layout: LayoutConfig, out: Path, cases: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """Two batches of each case; the trained models go to ``out``."""
    metrics = {}
    for case in cases:
        overrides = CASES[case]
        learner = make_learner(make_config(folder / model, overrides, layout), groups, folder / f"{model}-teacher")
        metrics[case] = [learn(learner, make_batch(step)) for step in range(2)]
        save_hf(learner.model, out / model / case, groups, layout, folder / model)
    return metrics


def continue_from(
    folder: Path, model: str, saved: Path, groups: ParallelGroups, layout: LayoutConfig, out: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loaded weights (on rank 0), and what the batch after the checkpoint says."""
    learner = make_learner(make_config(folder / model, (), layout), groups)
    assert checkpoint.load_latest(learner, saved) == checkpoint.Resumed(1, 3)
    save_hf(learner.model, out, groups, layout, folder / model)
    return load_file(out / "model.safetensors"), learn(learner, make_batch(1))


def _saved(folder: Path, model: str, groups: ParallelGroups, layout: LayoutConfig, out: Path) -> Learner:
    learner = make_learner(make_config(folder / model, (), layout), groups, folder / f"{model}-teacher")
    learn(learner, make_batch(0))
    checkpoint.save(learner, out / "checkpoints" / model, cursor=3, keep=1)
    return learner


def _sent(folder: Path, model: str, groups: ParallelGroups, layout: LayoutConfig) -> dict[str, Tensor]:
    learner = make_learner(make_config(folder / model, (), layout), groups)
    own = canonical_parameters(learner.model, groups)
    buckets = plan(learner.hf_config, groups.pipeline_size, 4, 20_000)
    pairs = [pair for bucket in buckets for pair in gather(bucket, own, learner.hf_config, groups)]
    return {name: tensor.clone() for name, tensor in pairs}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    layout = parse(name)
    groups = initialize(layout, seed=0, timeout_s=60)
    out = folder / name
    for model in sys.argv[3:]:
        sent = _sent(folder, model, groups, layout)
        metrics = train_cases(folder, model, groups, layout, out, list(CASES))
        learner = _saved(folder, model, groups, layout, out)
        save_hf(learner.model, out / f"{model}-saved", groups, layout, folder / model)
        after = learn(learner, make_batch(1))
        if groups.tensor_rank == 0:
            torch.save(sent, out / f"{model}-sent-{groups.pipeline_rank}.pt")
        if groups.rank == 0:
            torch.save(metrics, out / f"{model}.pt")
            weights = load_file(out / f"{model}-saved" / "model.safetensors")
            torch.save((weights, after), out / f"{model}-continued.pt")
    shutdown()


if __name__ == "__main__":
    main()
