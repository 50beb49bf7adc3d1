"""What the README names is there: files, commands, options, configuration keys, recipes."""

import argparse
import re
from pathlib import Path

from megatron_sdpo.cli import _parser  # pyright: ignore[reportPrivateUsage]
from megatron_sdpo.config import fields_by_name
from recipes import recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
KEYS = fields_by_name()
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
COMMANDS = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_links_and_paths_lead_to_files() -> None:
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    named = re.findall(r"(?<![\w/])(?:tools|slurm|tests|results|recipes)/[\w./-]*\w", README)
    absent = [path for path in {*linked, *named} if not (ROOT / path).exists()]
    assert len(linked) > 20 and set(absent) <= {"slurm/latest"}  # below a run's directory


def test_commands_and_their_options_exist() -> None:
    lines = re.findall(r"megatron-sdpo ([a-z]+)\b([^\n`|]*)", README)
    assert {command for command, _ in lines} >= {"train", "plan", "keys", "metrics", "recipes", "report", "serve"}
    for command, rest in lines:
        assert command in COMMANDS, command
        options = COMMANDS[command]._option_string_actions
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", rest.partition("#")[0]):
            assert option in options, f"{command} {option}"


def test_every_command_is_in_the_table() -> None:
    table = README[README.index("| command | does |") :].partition("\n\n")[0]
    assert [name for name in COMMANDS if not re.search(rf"`(megatron-sdpo )?{name}\b", table)] == []


def test_configuration_keys_exist() -> None:
    set_somewhere = re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_.]+)=", README)
    named = [
        key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", README) if not key.endswith((".py", ".json", ".jsonl"))
    ]
    wrong = [
        key
        for key in {*set_somewhere, *named}
        if key.partition(".")[0] in SECTIONS and key not in KEYS and not key.startswith("task.options.")
    ]
    assert len(named) > 10 and wrong == []


def test_recipes_exist() -> None:
    asked = re.findall(r"megatron-sdpo (?:train|discover|evaluate|serve|plan) ([a-z][\w.-]*)(?![\w.:-])", README)
    assert asked and set(asked) <= set(recipes()), set(asked) - set(recipes())
