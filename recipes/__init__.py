"""Recipes: functions that return a complete configuration, the same one for command line, Slurm and NeMo-Run.

One module a model family; modules whose name begins with an underscore hold pieces that several recipes use.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.scaling.study import Study

Recipe = Callable[[], Config]
_ABSENT = {
    "olmo3": "there is no Olmo3 recipe: megatron-core's layer has no norms on the outputs of attention and MLP, nor"
    " norms of queries and keys over all heads together; the paper's other model is qwen3-8b",
}
"""What one may well ask for, by the beginning of its name, and why it is not here."""


def recipes() -> dict[str, Recipe]:
    """Every recipe by name: the functions that a module of this package lists in its ``RECIPES``."""
    found: dict[str, Recipe] = {}
    for module in _modules():
        found |= module.RECIPES
    return found


def studies() -> dict[str, Study]:
    """Every scaling study by name: those that a module of this package lists in its ``STUDIES``."""
    return {study.name: study for module in _modules() for study in getattr(module, "STUDIES", ())}


def _modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            yield importlib.import_module(f"{__name__}.{module.name}")


def recipe(name: str) -> Config:
    """The configuration of a recipe; an unknown name is refused with the known ones."""
    known = recipes()
    for beginning, why in _ABSENT.items():
        if name.startswith(beginning):
            raise ConfigError(why)
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}; the recipes are {', '.join(sorted(known))}")
    return known[name]()
