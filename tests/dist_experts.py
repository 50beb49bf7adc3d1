"""Worker of test_experts.py, under torchrun: some layouts one after another, the same training on each.

Arguments: folder layout... Reads the model in folder; writes, as folder/LAYOUT/CASE, the trained model and
metrics.json (what each of three ``train`` calls said).
"""

import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.mcore.groups import initialize, shutdown
from tests.dist_learner import Overrides, parse, run_cases

MODEL, LAYERS = "qwen3_moe", 4
_SMALL = ("layout.tokens_per_micro_batch=64", "layout.head_chunk_tokens=10")
CASES: dict[str, tuple[str, Overrides]] = {
    "sdpo": (MODEL, ("optim.mini_batches=2", "objective.aggregation=sequence_mean", *_SMALL)),
    "sdpo-one-sample-each": (MODEL, ("optim.mini_batches=9", *_SMALL)),
    "grpo": (MODEL, ("objective.kind=grpo", "objective.kl_coefficient=0.5", *_SMALL)),
    "next-token": (MODEL, ("objective.kind=next_token", *_SMALL)),
    "bf16-sdpo": (MODEL, ("model.dtype=bfloat16", *_SMALL)),
}
"""Name -> (model, overrides)."""


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        groups = initialize(parse(name), seed=0, timeout_s=60)
        run_cases(folder, groups, parse(name), folder / name, CASES)
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
