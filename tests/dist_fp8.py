"""Worker of test_fp8.py: emulated FP8 on layouts, one after another under torchrun.

Arguments: folder LAYOUT... Writes folder/LAYOUT.json, what a first batch said.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sdpo.mcore.groups import initialize, shutdown
from tests.dist_learner import parse
from tests.fp8_setup import BOTH, first_batch, learner_of


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        layout = parse(name)
        groups = initialize(layout, seed=0, timeout_s=60)
        said = first_batch(learner_of(folder / "blocks", groups, *BOTH, layout=layout))
        if dist.get_rank() == dist.get_world_size() - 1:  # a last stage
            (folder / f"{name}.json").write_text(json.dumps(said))
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
