"""Worker of test_recompute.py: layouts one after another under torchrun, each with settings of recomputation.

Arguments: folder LAYOUT/MODEL/SETTING... Writes folder/results.json: for each argument what two batches said, and how
often rank 0 ran parts of the layers in the training passes of a third, with recomputation and without.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.mcore.groups import initialize, shutdown
from tests.dist_learner import parse
from tests.recompute_setup import calls_of_training, check_same, learner_of


def main() -> None:
    folder, results = Path(sys.argv[1]), {}
    dist.init_process_group("gloo")
    for argument in sys.argv[2:]:
        name, model, setting = argument.split("/")
        layout = parse(name)
        groups = initialize(layout, seed=0, timeout_s=60)
        plain, again = (learner_of(folder, model, which, groups, layout) for which in ("none", setting))
        found = check_same(setting, again, plain)
        results[argument] = (found, calls_of_training(again), calls_of_training(plain))
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
