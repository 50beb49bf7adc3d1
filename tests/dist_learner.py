"""Worker of test_learner.py: some layouts one after another under torchrun, the same training on each.

Arguments: folder layout... (see ``parse``). Reads the models in folder; writes, as folder/LAYOUT/CASE,
the trained model and metrics.json (what each of three ``train`` calls said).
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import save_hf
from tests.learner_setup import MODELS, kv_heads, learn, make_batch, make_config, make_learner

BATCHES = 3
BUDGETS = (4096, 64, 1)
"""Tokens of a micro-batch: all sequences together; several; each alone."""
Overrides = tuple[str, ...]
_CASES: dict[str, tuple[str, Overrides]] = {
    "sdpo-sequence-mean": ("llama", ("objective.aggregation=sequence_mean", "objective.alpha=1")),
    "sdpo-mini-batches": (
        "llama",
        (
            *("optim.mini_batches=2", "objective.aggregation=sequence_mean"),
            *("guard.signal=reward", "guard.reward_window=1", "guard.drop=0"),
        ),
    ),
    "sdpo-one-sample-each": ("llama", ("optim.mini_batches=9",)),
    "sdpo-tied": ("qwen3-tied", ("optim.mini_batches=2", "rollout.temperature=0.7", "objective.tail=false")),
    "grpo": ("qwen3-tied", ("objective.kind=grpo", "optim.mini_batches=2", "objective.advantage_std=true")),
    "hybrid-vocabulary": (
        "qwen3-tied",
        (
            *("objective.kind=hybrid", "objective.grpo_share=0.4", "objective.kl_coefficient=0.5"),
            *("objective.support=vocabulary", "optim.mini_batches=2", "teacher.update_every=optimizer_step"),
        ),
    ),
    "trust-region-sequence": (
        "llama",
        (
            *("teacher.kind=trust_region", "teacher.mixture=0.3", "objective.support=sampled", "objective.alpha=1"),
            *("objective.credit=sequence", "objective.sample_weighting=teacher_confidence", "optim.mini_batches=2"),
        ),
    ),
    # the last mini-batch has one sample: some ranks have none, an interleaved pipeline a micro-batch too few
    "next-token": ("qwen3-tied", ("objective.kind=next_token", "optim.mini_batches=5")),
    "bf16-sdpo": ("llama", ("model.dtype=bfloat16", "optim.mini_batches=2")),
    "bf16-grpo": ("qwen3-tied", ("model.dtype=bfloat16", "objective.kind=grpo")),
}
CASES = {
    **{f"sdpo-{budget}": ("llama", (f"layout.tokens_per_micro_batch={budget}",)) for budget in BUDGETS},
    **{
        name: (model, (*overrides, "layout.tokens_per_micro_batch=64", "layout.head_chunk_tokens=10"))
        for name, (model, overrides) in _CASES.items()
    },
}
"""Name -> (model, overrides)."""


def cases_of(layout: LayoutConfig) -> dict[str, tuple[str, Overrides]]:
    """Those whose model has a layer for every stage and a key-value head for every tensor rank."""
    stages, ranks = layout.pipeline_parallel * layout.virtual_pipeline, layout.tensor_parallel
    return {k: case for k, case in CASES.items() if MODELS[case[0]] % stages == 0 == kv_heads(case[0]) % ranks}


def run_cases(
    folder: Path, groups: ParallelGroups, layout: LayoutConfig, out: Path, cases: Mapping[str, tuple[str, Overrides]]
) -> None:
    """Train each case from the start; every rank must report the same metrics."""
    for case, (model, overrides) in cases.items():
        config = make_config(folder / model, overrides, layout)
        learner = make_learner(config, groups, folder / f"{model}-teacher")
        metrics = [learn(learner, make_batch(step)) for step in range(BATCHES)]
        everywhere: list[list[dict[str, float]]] = [[]] * groups.world_size
        dist.all_gather_object(everywhere, metrics, group=groups.world)
        assert all(m == metrics for m in everywhere), f"{case}: ranks report different metrics: {everywhere}"
        save_hf(learner.model, out / case, groups, layout, folder / model)
        if groups.rank == 0:
            (out / case / "metrics.json").write_text(json.dumps(metrics))


SWITCHES: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "do": {"distributed_optimizer": True},
    "reduce": {"overlap_grad_reduce": True},
    "overlap": {
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "overlap_bucket_elements": 3000,  # several buckets, one of the head alone
    },
}
"""What may follow a layout's sizes."""


def parse(name: str) -> LayoutConfig:
    """Sizes of more than one and switches: ``tp2``, ``pp2vp2``, ``tp2cp2-sp-do``, ``dp2ep2`` (of experts: no more
    ranks)."""
    sizes, *switches = name.split("-")
    size = {kind: int(count) for kind, count in re.findall(r"([a-z]+)(\d+)", sizes)}
    tp, pp, dp, cp, vp = (size.get(kind, 1) for kind in ("tp", "pp", "dp", "cp", "vp"))
    more = {key: value for switch in switches for key, value in SWITCHES[switch].items()}
    return LayoutConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        virtual_pipeline=vp,
        context_parallel=cp,
        expert_parallel=size.get("ep", 1),
        expert_tensor_parallel=size.get("et"),
        world_size=tp * pp * dp * cp,
        **more,
    )


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        groups = initialize(parse(name), seed=0, timeout_s=60)
        run_cases(folder, groups, parse(name), folder / name, cases_of(parse(name)))
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
