"""The tree from overrides and JSON, and back: unknown keys and values of another type are refused."""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from megatron_sdpo.config.tree import Config, ConfigError


def fields_by_name(kind: type = Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (type, default) of every leaf; a default is ``dataclasses.MISSING`` when there is none."""
    leaves: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves |= fields_by_name(hints[f.name], f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]
        else:
            default = f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            leaves[prefix + f.name] = (hints[f.name], default)
    return leaves


def meanings(kind: type = Config, prefix: str = "") -> dict[str, str]:
    """Dotted name -> what it means, of every key: the words below it in the source; "" where there are none.

    A section's own words are under its name.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    words = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else ""
            words[node.target.id] = " ".join(str(text).split())
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found[prefix + name] = words[name]
        if dataclasses.is_dataclass(hint):
            found[prefix + name] = " ".join((inspect.getdoc(hint) or "").split())
            found |= meanings(hint, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
    return found


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """``["optim.lr=1e-3", "task.options.hint=false"]`` -> a changed copy; values are read as JSON, else as text.

    Another ``task.name`` starts without the options of the task before it, wherever in ``overrides`` it stands.
    """
    leaves = fields_by_name()
    named = [_literal(text) for key, _, text in (o.partition("=") for o in overrides) if key == "task.name"]
    if any(name != config.task.name for name in named):
        config = _replace(config, ["task", "options"], {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; write it as section.key=value")
        options = key.startswith("task.options.") and len(key) > len("task.options.")
        if key not in leaves and not options:
            raise ConfigError(f"unknown configuration key {key!r}{_hint(key, leaves)}")
        value = _literal(text)
        if options:
            name = key.removeprefix("task.options.")
            key, value = "task.options", {**config.task.options, name: value}
        config = _replace(config, key.split("."), _read(key, value, text, leaves[key][0]))
    return config


def _hint(key: str, leaves: Collection[str]) -> str:
    """What may have been meant: a similar key, else what is in the section that was named, else where all keys are."""
    section, _, last = key.rpartition(".")
    there = [leaf.rpartition(".")[2] for leaf in leaves if leaf.rpartition(".")[0] == section]
    inside = [leaf.removeprefix(f"{key}.") for leaf in leaves if leaf.startswith(f"{key}.")]
    if inside:
        return f": it is a section, whose keys are {', '.join(inside)}"
    if section and there:
        near = difflib.get_close_matches(last, there, n=1)
        return f"; did you mean {section}.{near[0]}?" if near else f"; the keys of {section} are {', '.join(there)}"
    if near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.8):
        return f"; did you mean {near[0]}?"
    near = difflib.get_close_matches(last, {leaf.rpartition(".")[2]: leaf for leaf in leaves}, n=1, cutoff=0.7)
    same = [leaf for leaf in leaves if near and leaf.rpartition(".")[2] == near[0]]
    return f"; did you mean {' or '.join(same)}?" if same else "; `megatron-sdpo train --help` lists the keys"


T = TypeVar("T")


def read_section(name: str, section: T, overrides: Sequence[str]) -> T:
    """``apply_overrides`` for one section alone, whose keys keep its name: ``sandbox.workers=4``."""
    leaves = fields_by_name(type(section), f"{name}.")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key not in leaves:
            raise ConfigError(f"{override!r} sets no key of {name}; the keys are {', '.join(leaves)}")
        section = _replace(section, key.split(".")[1:], _read(key, _literal(text), text, leaves[key][0]))
    return section


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # besides what is no JSON: numbers and nesting beyond all use
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _read(key: str, value: Any, text: str, kind: Any) -> Any:
    """The value of an override, or its text where that fits and looked like JSON: name=7, layout.recompute=none."""
    try:
        return _convert(key, value, kind)
    except ConfigError:
        if not isinstance(value, str):
            with suppress(ConfigError):
                return _convert(key, text, kind)
        raise


def read_value(key: str, text: str, kind: Any) -> Any:
    """The value of ``key=text``, of the type ``kind``: JSON, ``none``, or text; ConfigError when it does not fit."""
    return _read(key, _literal(text), text, kind)


def _convert(key: str, value: Any, kind: Any) -> Any:
    try:
        converted = msgspec.convert(value, type=kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ConfigError(f"{key}={value!r} does not fit: it must be {type_words(kind)}") from error
    if not _is_finite(converted):
        raise ConfigError(f"{key}={value!r} does not fit: numbers must be finite")
    return converted


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def type_words(kind: Any) -> str:
    """A type in the words of a help text or a refusal."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_words(a) for a in typing.get_args(kind))
    if origin is tuple:
        (item, _) = typing.get_args(kind)
        return "a JSON list" + (f", each {type_words(item)}" if typing.get_origin(item) is Literal else "")
    if origin is dict:
        return "a JSON object"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _replace(node: T, path: Sequence[str], value: Any) -> T:
    head, *rest = path
    new = _replace(getattr(node, head), rest, value) if rest else value
    return dataclasses.replace(node, **{head: new})  # pyright: ignore[reportArgumentType]


def save(config: Config, path: Path) -> None:
    """Write the resolved tree as JSON, atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    temporary.replace(path)


def load(path: Path) -> Config:
    """The inverse of ``save``; unknown keys and wrong types are refused."""
    data = read_json(path, "the configuration")
    try:
        return _build(Config, data, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file; ``what`` names it in a refusal."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from error


def _build(kind: type[T], data: Any, prefix: str) -> T:
    if not isinstance(data, dict):
        where = f"the section {prefix[:-1]!r}" if prefix else "the configuration"
        raise ConfigError(f"{where} is {str(data)[:40]!r}; it must be a JSON object")
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise ConfigError(f"unknown configuration key {prefix + min(unknown)!r}")
    values = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            values[name] = _convert(prefix + name, value, hints[name])
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"the configuration is not complete: {error}") from error
