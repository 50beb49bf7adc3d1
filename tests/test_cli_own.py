"""A user's own recipe and task in the working directory, by the installed command; what a misspelt name is answered.

The command is started as pip's script does it: unlike ``python -m`` that does not put the working directory on the
path of modules.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo.config import ConfigError, apply_overrides, check
from recipes import recipe, recipes

ROOT = Path(__file__).parent.parent
SCRIPT = "import sys; from megatron_sdpo.cli import main; sys.exit(main())"
RECIPE = """
from dataclasses import replace

from megatron_sdpo.config import Config, TaskConfig
from recipes import recipe


def sums() -> Config:
    return replace(recipe("minipipe"), name="sums", run_dir="runs/sums", task=TaskConfig(name="sums:Sums"))


def nothing() -> None:
    return None


def wants(size):
    return sums()


def misspelt():
    return replace(recipe("minipipe"), stepz=3)


number = 3
"""


def readme_block(first_line: str) -> str:
    """The Python block of the README that begins so."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sums.py").write_text(readme_block("# sums.py"))
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As the installed script: ``sys.path`` begins with the script's folder, which is not the working directory."""
    script = folder / "bin" / "megatron-sdpo"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = [sys.executable, str(script), *arguments]
    return subprocess.run(done, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_readmes_task_from_the_working_directory(folder: Path) -> None:
    """Options of the recipe's own task do not stay."""
    own = ("task.options.largest=20", "task.name=sums:Sums")
    done = command(folder, "train", "minipipe", *own, "model.max_length=200", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == {"name": "sums:Sums", "options": {"largest": 20}}


def test_a_recipe_of_ones_own(folder: Path) -> None:
    done = command(folder, "train", "mine:sums", "optim.lr=0.5", "--dry-run")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["name"], made["task"]["name"], made["optim"]["lr"]) == ("sums", "sums:Sums", 0.5)
    done = command(folder, "plan", "mine:sums")
    assert done.returncode == 0 and "it fits" in done.stdout, done.stderr


def test_the_readmes_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readme_recipe.py").write_text(readme_block("# mine.py"))
    monkeypatch.syspath_prepend(tmp_path)
    made = recipe("readme_recipe:sums")
    assert (made.name, made.task.options, made.optim.lr, made.steps) == ("sums", {"largest": 20}, 2e-6, 100)
    check(made)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine:number", "module mine has no function 'number'"),
        ("mine:absent", "module mine has no function 'absent'"),
        ("mien:sums", "importing mien failed: No module named 'mien'"),
        ("mine:nothing", "recipe 'mine:nothing' returned NoneType; it must return a Config"),
        ("mine:wants", "recipe 'mine:wants' cannot be made: "),
        ("mine:misspelt", "unexpected keyword argument 'stepz'"),
        ("minipip", "there is no recipe 'minipip'; did you mean minipipe or "),
        ("zzz", "there is no recipe 'zzz'; `megatron-sdpo recipes` lists them"),
    ],
)
def test_what_is_no_recipe_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ConfigError, match=re.escape(words)):
        recipe(name)
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no digits')", "task 'own:Sums' fails on an empty answer to '0+0': ValueError('no digits')"),
        ("return 1.0", "verify of task 'own:Sums' returned 1.0; it must return a Verdict(reward, feedback)"),
        ("return Verdict(7.0)", "verify of task 'own:Sums' gave the reward 7.0; a reward lies in [0, 1]"),
    ],
)
def test_a_verifier_that_does_not_work_is_told_before_engines_start(folder: Path, body: str, words: str) -> None:
    before, _, _ = (folder / "sums.py").read_text().partition("        right = str")
    (folder / "own.py").write_text(f"{before}        {body}\n")
    done = command(folder, "train", "minipipe", "task.name=own:Sums", "model.max_length=200", "--dry-run")
    assert (done.returncode, done.stderr) == (2, f"error: {words}\n")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", "; the keys of optim are lr, lr_decay, "),
        ("optim.lrr=1", "; did you mean optim.lr?"),
        ("optm.lr=1", "; did you mean optim.lr?"),
        ("lr=1", "; did you mean optim.lr?"),
        ("temperature=1", "; did you mean rollout.temperature or evaluation.temperature?"),
        ("fp8=blockwise", ": it is a section, whose keys are student, teacher, "),
        ("batch=1", "; `megatron-sdpo train --help` lists the keys"),
    ],
)
def test_what_may_have_been_meant(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        apply_overrides(recipe("minipipe"), [override])


def test_the_same_task_keeps_its_options_and_another_has_none() -> None:
    base = recipe("minipipe")
    assert apply_overrides(base, ["task.name=minipipe", "task.options.hint=false"]).task.options == {
        **base.task.options,
        "hint": False,
    }
    assert apply_overrides(base, ['task.name="minipipe"']).task == base.task
    assert apply_overrides(base, ["task.options.data=d", "task.name=maths"]).task.options == {"data": "d"}


def test_the_list_of_recipes(tmp_path: Path) -> None:
    done = command(tmp_path, "recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["recipe", *recipes()]


def test_keys_that_are_written_as_options(tmp_path: Path) -> None:
    done = command(tmp_path, "train", "minipipe", "--optim.lr=1", "--steps", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --optim.lr=1 --steps 3 (configuration keys have no dashes: optim.lr=VALUE)" in (
        done.stderr
    )
    assert command(tmp_path, "train").stderr.endswith("the following arguments are required: recipe\n")


def test_output_that_nobody_reads_to_its_end(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "megatron_sdpo.cli", "train", "minipipe", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
