"""Every recipe is a complete configuration that can start: here, or where its model, data and nodes are."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, ConfigError, SandboxConfig, apply_overrides
from megatron_sdpo.hf_config import check_model, read_hf_config
from megatron_sdpo.launch.local import TRAINING, _commands  # pyright: ignore[reportPrivateUsage]
from megatron_sdpo.launch.planning import PUBLISHED, architecture
from megatron_sdpo.launch.preflight import check_run
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.prompts import ENGINE_RESERVE
from megatron_sdpo.scaling import planner
from megatron_sdpo.scaling.assumed import Reach, usual_lengths
from megatron_sdpo.scaling.hardware import GPUS
from megatron_sdpo.tasks import TASKS, load_task, task_class
from recipes import Recipe, recipe, recipes
from recipes.minipipe_ladder import USUAL, WIDTHS
from tests.public_configs import OLMO3

ROOT = Path(__file__).parent.parent
NAMES = sorted(recipes())
MADE = [f"minipipe-w{width}" for width in WIDTHS if width != USUAL]
"""Their models are made by tools/pretrain_minipipe.py."""
HERE = [name for name in NAMES if name.startswith("minipipe") and name not in MADE]
AWAY = [name for name in NAMES if name not in HERE and name not in MADE]
QUESTION_TOKENS = 2048
"""The longest prompt of the paper's tasks."""
NODES = {  # of eight H100: trainers', engines'
    **{name: (1, 1) for name in AWAY if name.startswith(("qwen3-8b-", "ladder-"))},
    "ladder-32b": (2, 2),
    "own": (0.5, 0.5),
    "qwen3-30b-a3b-sdpo": (2, 2),
    "llama3.3-70b-sdpo-16n": (8, 8),
    "llama3.3-70b-sdpo-32n": (16, 16),
    "qwen2.5-72b-sdpo-16n": (8, 8),
    "qwen2.5-72b-sdpo-32n": (16, 16),
}


def documentation(made: Recipe) -> str | None:
    return made.func.__doc__ if isinstance(made, functools.partial) else made.__doc__


def planned(config: Config) -> planner.Plan:
    hf = read_hf_config(architecture(None, config))
    nodes = planner.nodes_of(config)
    return planner.plan(config, hf, nodes, GPUS["h100-80gb"], usual_lengths(config), Reach())


def test_the_names_that_others_start_by() -> None:
    tasks = [
        *(f"sciknoweval-{d}" for d in ("chemistry", "physics", "biology", "materials")),
        "tooluse",
        "livecodebench",
    ]
    ladder = [f"ladder-{size}b" for size in ("0.6", "1.7", "4", "8", "14", "32")]
    large = [f"{model}-sdpo-{n}n" for model in ("llama3.3-70b", "qwen2.5-72b") for n in (16, 32)]
    paper = [f"qwen3-8b-{task}-{kind}" for task in tasks for kind in ("sdpo", "sdpo-fp8", "grpo", "grpo-on-policy")]
    assert sorted(AWAY) == sorted([*paper, *ladder, *large, "qwen3-30b-a3b-sdpo", "own"])


@pytest.mark.parametrize("name", [*HERE, *AWAY])
def test_a_recipe_passes_every_check_that_needs_no_model(name: str) -> None:
    config = recipe(name)
    assert config == recipe(name)  # a function of nothing: the same each time
    assert config.name == name and config.run_dir == f"runs/{name}"
    assert documentation(recipes()[name])
    configuration.check(config)
    check_model(config, read_hf_config(architecture(None, config)))


@pytest.mark.parametrize("name", HERE)
def test_a_recipe_of_this_machine_passes_every_check(name: str) -> None:
    check_run(recipe(name))


@pytest.mark.parametrize("name", MADE)
def test_a_rung_of_minipipe_starts_once_its_model_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe(name)
    assert config == recipe(name) and config.name == name and config.run_dir == f"runs/{name}"
    with pytest.raises(ConfigError, match=f"model.path models/{name} is not a directory"):
        check_run(config)
    width = name.removeprefix("minipipe-w")
    made = ["--out", f"models/{name}", "--width", width, "--weights"]
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_minipipe_tokenizer.py"), *made], check=True)
    check_run(config)
    assert read_hf_config(config.model.path)["hidden_size"] == int(width)
    assert config.optim.lr * int(width) == pytest.approx(recipe("minipipe").optim.lr * USUAL)


@pytest.mark.parametrize("name", AWAY)
def test_a_model_that_is_not_there_is_refused_with_what_to_set(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    assert not Path(config.model.path).is_absolute()
    config = apply_overrides(config, [f"model.path={tmp_path / config.model.path}"])
    with pytest.raises(ConfigError, match=r"model\.path \S+ is not a directory; set it to a Hugging Face checkpoint"):
        check_run(config)


@pytest.mark.parametrize("name", [name for name in AWAY if recipe(name).task.name in TASKS])
def test_its_task_knows_its_options_and_misses_only_the_data(name: str, tmp_path: Path) -> None:
    task = recipe(name).task
    assert task.options["data"] == f"data/{task.name}"
    with pytest.raises(ConfigError, match=f"{tmp_path}/{task.options['data']}"):
        load_task(task.name, **{**task.options, "data": str(tmp_path / task.options["data"])})


@pytest.mark.parametrize("name", AWAY)
def test_a_recipe_fits_on_its_nodes(name: str) -> None:
    plan = planned(recipe(name))
    assert plan.fits, plan.rank
    assert plan.rank.total < 0.92 * plan.room  # a plan may be wrong by as much
    assert planner.nodes_of(plan.config) == sum(NODES[name])


@pytest.mark.parametrize("name", [*(n for n in AWAY if n.endswith(("16n", "32n"))), "qwen3-30b-a3b-sdpo"])
def test_what_a_docstring_says_of_the_plan_is_so(name: str) -> None:
    plan, words = planned(recipe(name)), documentation(recipes()[name])
    assert words is not None
    assert f"{plan.rank.total / 1e9:.1f} GB" in words and f"{plan.time.total:.0f} s a step" in words


def test_the_readme_says_what_is_planned() -> None:
    def gb(name: str) -> str:
        return f"{planned(recipe(name)).rank.total / 1e9:.0f}"

    words = (Path(__file__).parent.parent / "README.md").read_text()
    paper = "qwen3-8b-sciknoweval-chemistry-"
    assert f"1+1, {gb(paper + 'sdpo')} GB (FP8 {gb(paper + 'sdpo-fp8')}, GRPO {gb(paper + 'grpo')})" in words
    ladder = ", ".join(gb(f"ladder-{size}b") for size in ("0.6", "1.7", "4", "8", "14"))
    assert f"1+1; {ladder} GB" in words and f"2+2, {gb('ladder-32b')} GB" in words
    assert f"| `own` | SDPO of your model on your task | 4 + 4 GPUs of one node, {gb('own')} GB" in words
    assert f"mixture of 128 experts | 2+2, {gb('qwen3-30b-a3b-sdpo')} GB" in words
    for model in ("llama3.3-70b", "qwen2.5-72b"):
        assert f"8+8, {gb(f'{model}-sdpo-16n')} GB; 16+16, {gb(f'{model}-sdpo-32n')} GB" in words


@pytest.mark.parametrize("name", AWAY)
def test_token_budgets_are_consistent(name: str) -> None:
    config = recipe(name)
    positions = read_hf_config(architecture(None, config))["max_position_embeddings"]
    response = config.rollout.max_new_tokens
    assert config.model.max_length == QUESTION_TOKENS + response + ENGINE_RESERVE <= positions
    # the teacher reads the question, a demonstration and the instruction
    assert QUESTION_TOKENS + response <= config.teacher_context.max_prompt_tokens <= positions - response
    # an average sequence shares its micro-batch, the longest has one that is not much larger
    assert usual_lengths(config).response < config.layout.tokens_per_micro_batch <= config.model.max_length
    engine = planned(config).engine
    assert engine.tokens >= config.model.max_length
    samples = config.rollout.prompts_per_step * config.rollout.attempts_per_prompt
    assert samples % (config.engine.count * config.rollout.attempts_per_prompt) == 0  # engines have equally much to do
    assert samples % config.optim.mini_batches == 0


@pytest.mark.parametrize("name", AWAY)
def test_its_launch_renders(name: str, tmp_path: Path) -> None:
    """Every rank and engine has a GPU on nodes of eight, no engine crosses nodes."""
    config = recipe(name)
    trainers, engines = NODES[name]
    assert config.layout.world_size == trainers * 8
    assert 8 % config.engine.tensor_parallel == 0
    assert config.engine.count * config.engine.tensor_parallel == engines * 8
    commands = _commands(TRAINING, RunDir(tmp_path), config)
    assert f"--nproc-per-node={config.layout.world_size}" in commands["trainer"]
    assert all(str(tmp_path) in command for command in commands.values())


@pytest.mark.parametrize("name", HERE)
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


def test_starting_without_the_model_ends_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", "train", "llama3.3-70b-sdpo-16n", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    sentence = "model.path models/Llama-3.3-70B is not a directory; set it to a Hugging Face checkpoint directory"
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_recipes_do_not_share_names_or_directories() -> None:
    configs = [recipe(name) for name in NAMES]
    assert len({config.run_dir for config in configs}) == len({config.name for config in configs}) == len(NAMES)


def test_olmo3_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The paper's second model. There is no recipe, and a recipe pointed at it says why."""
    with pytest.raises(
        ConfigError, match="there is no Olmo3 recipe: megatron-core's layer has no norms on the outputs"
    ):
        recipe("olmo3-7b-sciknoweval-chemistry-sdpo")
    (tmp_path / "config.json").write_text(json.dumps(OLMO3))
    with pytest.raises(ConfigError, match=r"architecture 'Olmo3ForCausalLM', for which megatron-core has no norms on"):
        read_hf_config(architecture(str(tmp_path), recipe("qwen3-8b-sciknoweval-chemistry-sdpo")))


def test_models_are_those_whose_shapes_are_known() -> None:
    assert all((PUBLISHED / Path(recipe(name).model.path).name).is_dir() for name in AWAY)


@pytest.mark.parametrize("name", NAMES)
def test_every_thread_that_judges_programs_has_a_sandbox(name: str) -> None:
    config = recipe(name)
    if hasattr(task_class(config.task.name), "use_sandbox"):
        assert config.sandbox.workers == config.sandbox.warm == config.rollout.verify_workers
    else:
        assert config.sandbox == SandboxConfig()
