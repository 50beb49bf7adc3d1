"""Every recipe is a complete configuration that can start here."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import ConfigError
from megatron_sdpo.hf_config import check_model, read_hf_config
from megatron_sdpo.launch.preflight import check_run
from recipes import recipe, recipes

NAMES = sorted(recipes())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_every_check(name: str) -> None:
    config = recipe(name)
    assert config == recipe(name)  # a function of nothing: the same each time
    assert recipes()[name].__doc__
    configuration.check(config)
    check_model(config, read_hf_config(config.model.path))
    check_run(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(name: str, tmp_path: Path) -> None:
    override = "optim.lr=0.125"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "train", name, "--layout=tp1", "--dry-run", override],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = configuration.apply_overrides(
        recipe(name), ["layout.tensor_parallel=1", "layout.world_size=1", "layout.pipeline_parallel=1", override]
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert list(tmp_path.iterdir()) == []


def test_recipes_do_not_share_names_or_directories() -> None:
    configs = [recipe(name) for name in NAMES]
    assert len({config.run_dir for config in configs}) == len({config.name for config in configs}) == len(NAMES)


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"there is no recipe 'nope'; the recipes are {', '.join(NAMES)}"):
        recipe("nope")
