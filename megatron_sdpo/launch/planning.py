"""``megatron-sdpo plan``: what a recipe needs on given nodes, predicted from its configuration alone."""

from pathlib import Path

import megatron_sdpo
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.scaling import planner
from megatron_sdpo.scaling.assumed import Lengths, Reach, usual_lengths
from megatron_sdpo.scaling.engines import Sharing
from megatron_sdpo.scaling.hardware import gpu_of
from megatron_sdpo.scaling.page import page, ranking

PUBLISHED = Path(megatron_sdpo.__file__ or "").parent / "data" / "architectures"
"""config.json of published models, by name."""
_LENGTHS = ("prompt-tokens", "response-tokens", "teacher-prompt-tokens")
MOST = 15
"""Layouts that --suggest shows."""


def architecture(name: str | None, config: Config) -> Path:
    """A directory with a config.json: the recipe's model, another directory, or a published model by name.

    Where the recipe's model is not here, the published one that its directory is called after: ``models/Qwen3-8B``.
    """
    if name is None:
        own = Path(config.model.path)
        published = PUBLISHED / own.name
        return published if not own.exists() and published.is_dir() else own
    names = sorted(path.name for path in PUBLISHED.iterdir())
    if name in names:
        return PUBLISHED / name
    known = ", ".join(names)
    if not Path(name).is_dir():
        raise ConfigError(f"--architecture {name} is neither a directory nor one of {known}")
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"--architecture {name} has no config.json; set it to a Hugging Face checkpoint directory or one of {known}"
        )
    return Path(name)


def plan_words(
    config: Config,
    nodes: int | None,
    gpu: str,
    model: str | None,
    lengths: tuple[int | None, ...],
    suggest: bool,
    colocated: bool = False,
) -> str:
    """What to print. ``nodes``: None takes as many as the recipe fills. ``lengths``: of prompt, response, teacher
    prompt; None takes the usual. ``colocated``: as if the engines took turns with the trainer on its GPUs, as
    engine.release_memory has them do."""
    for option, number in zip(("nodes", *_LENGTHS), (nodes, *lengths), strict=True):
        if number is not None and number < 1:
            raise ConfigError(f"--{option} is {number}; it must be at least 1")
    if (response := lengths[1]) is not None and response > config.rollout.max_new_tokens:
        raise ConfigError(
            f"--response-tokens {response} is beyond rollout.max_new_tokens {config.rollout.max_new_tokens};"
            " lower the one or raise the other"
        )
    hf_config = read_hf_config(architecture(model, config))
    usual = usual_lengths(config)
    defaults = (usual.prompt, usual.response, usual.teacher_prompt)
    mean = Lengths(*(default if n is None else n for n, default in zip(lengths, defaults, strict=True)))
    device, reach = gpu_of(gpu), Reach()
    sharing = Sharing.COLOCATED if colocated or config.engine.release_memory else Sharing.SEPARATE
    if nodes is None:
        nodes = planner.nodes_of(config, sharing)
    if suggest:
        return ranking(planner.suggest(config, hf_config, nodes, device, mean, reach, sharing), MOST)
    found = planner.plan(config, hf_config, nodes, device, mean, reach, sharing)
    changes = [] if found.fits else planner.changes(found, hf_config, nodes, reach)
    return page(found, nodes, reach, changes)
