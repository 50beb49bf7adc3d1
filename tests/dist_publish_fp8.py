"""Worker of test_publish_fp8.py: trainer ranks that publish to an FP8 engine.

Arguments: layout (tp2) config.json out.json. Publishes the checkpoint as it is and after a step; writes what was said.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_sdpo import config as configuration
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import publisher_for
from megatron_sdpo.mcore.groups import initialize, shutdown
from tests.conftest import TOKEN
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_learner


def main() -> None:
    layout = parse(sys.argv[1])
    config = replace(configuration.load(Path(sys.argv[2])), layout=layout)
    groups = initialize(layout, seed=0, timeout_s=120)
    learner = make_learner(config, groups)
    publisher = publisher_for(learner, RunDir(Path(config.run_dir)), config, TOKEN)
    said = []
    for version in (1, 2):
        metrics = publisher.publish(version)
        assert publisher.served is not None
        said.append({**metrics, "stamp": publisher.served.stamp})
        if version == 1:
            learn(learner, make_batch())
    publisher.close()
    if groups.rank == 0:
        Path(sys.argv[3]).write_text(json.dumps(said))
    shutdown()


if __name__ == "__main__":
    main()
