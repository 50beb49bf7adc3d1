"""A trainer rank's process of a discovery: ``torchrun ... -m megatron_sdpo.launch.discovery_trainer RUN_DIR``."""

from megatron_sdpo import config as configuration
from megatron_sdpo.discovery import discover
from megatron_sdpo.launch.role import play
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import SharedCoordinator, connect, kept, publisher_for, start, watchdog_of
from megatron_sdpo.mcore import groups as parallel
from megatron_sdpo.mcore.finite import StoppedError
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.phases import Phases
from megatron_sdpo.rollout.fleet_files import has_newcomers
from megatron_sdpo.rollout.wire import CoordinatorClient
from megatron_sdpo.types import Batch


class SharedTrials(SharedCoordinator):
    """The coordinator of a discovery as all ranks see it (discovery.TrialSource)."""

    def __init__(self, client: CoordinatorClient | None, groups: ParallelGroups, run_dir: RunDir) -> None:
        super().__init__(client, groups)
        self._run_dir = run_dir

    def baselines(self) -> bool:
        return self._ask("baselines", 0, bool)

    def has_newcomers(self) -> bool:
        return self._as_first_rank(lambda: has_newcomers(self._run_dir.path))

    def next_trial(self) -> int | None:
        return self._ask("next_trial", 0, int | None)

    def batch(self, version: int) -> Batch | None:
        return self._ask("batch", version, Batch | None)

    def trained(self, numbers: dict[str, float]) -> None:
        self._ask("trained", numbers, type(None))


def run(run_dir: RunDir) -> None:
    """Build the parts, go through the trials."""
    config, token = configuration.load(run_dir.config), run_dir.token()
    watchdog = watchdog_of(config, run_dir)
    phases = Phases([watchdog])
    with phases("start"):
        groups = start(config)
    with phases("build"):
        learner = Learner(config, groups)
    with phases("wait"):
        client = connect(run_dir, config, token, groups)
        publisher = publisher_for(learner, run_dir, config, token)
    phases.taken()
    try:
        discover(SharedTrials(client, groups, run_dir), learner, publisher, phases)
    except StoppedError as failure:  # on all ranks
        with phases("stop"):
            raise kept(failure, run_dir, groups) from failure
    publisher.close()
    watchdog.close()
    parallel.shutdown()


if __name__ == "__main__":
    play("trainer", run)
