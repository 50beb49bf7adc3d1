"""Recipes: functions that return a complete configuration, the same one for command line, Slurm and NeMo-Run.

One module a model family; modules whose name begins with an underscore hold pieces that several recipes use. A recipe
of the user's own is a function in any module, asked for as ``package.module:function``.
"""

import difflib
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


def study(name: str) -> Study:
    """A scaling study by name, or by ``package.module:NAME`` one of the user's own; what is none is refused."""
    if ":" not in name:
        known = studies()
        if name not in known:
            raise ConfigError(
                f"there is no study {name!r}; the studies are {', '.join(sorted(known))}, and module:NAME is your own"
            )
        return known[name]
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # a user's module may fail in any way; the cause stays attached
        raise ConfigError(f"study {name!r}: importing {module_name} failed: {error}") from error
    if not isinstance(found, Study):
        raise ConfigError(f"study {name!r}: module {module_name} has no Study {attribute!r}")
    return found


def _modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            yield importlib.import_module(f"{__name__}.{module.name}")


def recipe(name: str) -> Config:
    """The configuration of a recipe by name or by ``package.module:function``; what is none is refused."""
    if ":" in name:
        return _own(name)
    known = recipes()
    for beginning, why in _ABSENT.items():
        if name.startswith(beginning):
            raise ConfigError(why)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"there is no recipe {name!r}; {hint}`megatron-sdpo recipes` lists them, and module:function is one of"
            " your own"
        )
    return known[name]()


def _own(path: str) -> Config:
    """Of a function in the user's module, which may use ``recipe`` for what it changes."""
    module_name, _, function_name = path.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # a user's module may fail in any way; the cause stays attached
        raise ConfigError(f"recipe {path!r}: importing {module_name} failed: {error}") from error
    if not callable(made):
        raise ConfigError(f"recipe {path!r}: module {module_name} has no function {function_name!r}")
    try:
        config = made()
    except TypeError as error:  # it wants arguments, or a configuration's key is misspelt
        raise ConfigError(f"recipe {path!r} cannot be made: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"recipe {path!r} returned {type(config).__name__}; it must return a Config")
    return config
