"""Tasks: questions, how they are asked, and a verifier that answers with a reward and words.

``load_task("minipipe", hint=False)`` makes a task by name; ``load_task("my_package.my_module:MyTask")``
one of the user's own, any class with the three methods of ``types.Task``. Options are the keyword
arguments of the class, checked against their annotations.
"""

import difflib
import importlib
import inspect
import typing
from typing import Any

import msgspec

from megatron_sdpo.config import ConfigError
from megatron_sdpo.types import Task

TASKS = {
    "minipipe": "megatron_sdpo.tasks.minipipe:MiniPipe",
    "maths": "megatron_sdpo.tasks.maths:Maths",
    "sciknoweval": "megatron_sdpo.tasks.sciknoweval:SciKnowEval",
    "tooluse": "megatron_sdpo.tasks.tooluse:ToolUse",
}
"""Name -> where the class is. A module is imported only when its task is asked for."""

_METHODS = ("train_questions", "eval_questions", "verify")


def load_task(name: str, **options: Any) -> Task:
    """The task of a name in ``TASKS`` or of a dotted path ``package.module:Class``.

    An unknown name, an unknown, missing or ill-typed option, and a class that cannot be imported or
    is no task raise ConfigError.
    """
    kind = _task_class(name)
    task = kind(**_checked_options(name, kind, options))
    absent = [method for method in _METHODS if not callable(getattr(task, method, None))]
    if absent:
        raise ConfigError(f"task {name!r} is not a task: it has no method {' and no '.join(absent)}")
    return task


def _task_class(name: str) -> type:
    path = TASKS.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        choices = ", ".join(sorted(TASKS))
        raise ConfigError(f"unknown task {name!r}; {hint}There are {choices}, or give your own as package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way; the cause stays attached
        raise ConfigError(f"task {name!r}: importing {module_name} failed: {error}") from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise ConfigError(f"task {name!r}: module {module_name} has no class {class_name}")
    return kind


def _checked_options(name: str, kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the class's annotations want them: a JSON list becomes a tuple where a tuple is annotated."""
    try:
        signature = inspect.signature(kind).parameters.values()
        annotations = typing.get_type_hints(kind.__init__)
    except (ValueError, TypeError, NameError) as error:  # no Python signature, or an annotation of an unknown name
        raise ConfigError(f"task {name!r}: the options of its class cannot be read: {error}") from error
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = {p.name: p for p in signature if p.kind in by_name}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)
    choices = f"the options are {', '.join(parameters)}" if parameters else "it takes no options"
    for key in options:
        if key not in parameters and not takes_any:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"task {name!r} has no option {key!r}{hint}; {choices}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ConfigError(f"task {name!r} needs the option {key!r}; set task.options.{key}")
    return {key: _converted(name, key, value, annotations.get(key, Any)) for key, value in options.items()}


def _converted(name: str, key: str, value: Any, annotation: Any) -> Any:
    try:
        return msgspec.convert(value, type=annotation)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"task {name!r}: option {key!r} is {value!r}, which does not fit: {error}") from error
