"""Recipes: functions that return a complete configuration, the same one for command line, Slurm and NeMo-Run."""

import importlib
import pkgutil
from collections.abc import Callable

from megatron_sdpo.config import Config, ConfigError

Recipe = Callable[[], Config]


def recipes() -> dict[str, Recipe]:
    """Every recipe by name: the functions that a module of this package lists in its ``RECIPES``."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").RECIPES
    return found


def recipe(name: str) -> Config:
    """The configuration of a recipe; an unknown name is refused with the known ones."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}; the recipes are {', '.join(sorted(known))}")
    return known[name]()
