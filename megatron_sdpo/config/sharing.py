"""Engines on the trainer's own GPUs: what a configuration must say for that."""

from megatron_sdpo.config.tree import Config, ConfigError


def check_sharing(config: Config) -> None:
    """ConfigError for ``engine.release_memory`` where engines sample while ranks train, or are not reached."""
    if not config.engine.release_memory:
        return
    if config.rollout.max_staleness:
        raise ConfigError(
            f"engine.release_memory lets engines sleep while a batch is trained on, but rollout.max_staleness is"
            f" {config.rollout.max_staleness}, so they sample then; set rollout.max_staleness=0"
        )
    if config.publish.backend not in ("ipc", "gloo"):
        raise ConfigError(
            f"engine.release_memory is for engines on the trainer's own GPUs, which publish.backend="
            f"{config.publish.backend} does not reach; set publish.backend=ipc"
        )
