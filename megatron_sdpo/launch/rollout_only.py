"""In a trainer's place, where only attempts are wanted: ``python -m megatron_sdpo.launch.rollout_only RUN_DIR``."""

import msgspec

from megatron_sdpo import config as configuration
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir, wait_for
from megatron_sdpo.rollout.wire import CoordinatorClient
from megatron_sdpo.tracking import Tracker
from megatron_sdpo.types import Batch


def run(run_dir: RunDir) -> None:
    """Have the coordinator journal every step's attempts, all by the weights that the engines started with."""
    config, token = configuration.load(run_dir.config), run_dir.token()
    tracker = Tracker(config, run_dir.path, is_writer=True)
    tracker.truncate_after(-1)
    url = wait_for(run_dir.coordinator_address, "the coordinator", config.engine.start_timeout_s)
    client = CoordinatorClient(url, token, run_dir.coordinator_beat, config.ranks.timeout_s)
    for step in range(config.steps):
        client.ask("published", step)
        tracker.log(step + 1, msgspec.msgpack.decode(client.ask("batch", step), type=Batch).metrics)
    tracker.close()


if __name__ == "__main__":
    play("trainer", run)
