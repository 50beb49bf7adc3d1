"""The command line as a user has it: a process, its exit code, its words. What is refused leaves no trace."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_sdpo import config as configuration
from megatron_sdpo.config import apply_overrides, layout_overrides
from megatron_sdpo.launch.run_dir import RunDir
from recipes.minipipe import BASE_MODEL, minipipe, minipipe_discovery

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(folder: Path, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sdpo.cli", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def refusal(folder: Path, *arguments: str) -> str:
    """The one sentence on standard error of a command that cannot work; the folder must be as it was before."""
    before = sorted(folder.rglob("*"))
    done = run(folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.learning_rate=1"], "unknown configuration key 'optim.learning_rate'; the keys of optim are lr, "),
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["steps=few"], "steps='few' does not fit: it must be a whole number"),
        (["optim.lr=NaN"], "numbers must be finite"),
        (["steps"], "override 'steps' has no '='"),
        (["task.options.machine=1"], "task 'minipipe' has no option 'machine'"),
        (["task.name=chess"], "unknown task 'chess'"),
        (
            ["--layout=tp3"],
            "layout.tensor_parallel 3 does not divide the model's 4 attention heads; set a divisor of 4",
        ),
        (["--layout=pp3"], "layout.pipeline_parallel 3 does not divide the model's 4 layers; set a divisor of 4"),
        (
            ["layout.world_size=3"],
            "3 is not a multiple of tensor_parallel * pipeline_parallel * context_parallel = 2; set",
        ),
        (["--layout=fast"], "--layout 'fast' is not a layout; write tp2"),
        (["--layout=cp2tp2"], "--layout 'cp2tp2' is not a layout; write tp2"),
        (
            ["--layout=pp2vp4"],
            "layout.pipeline_parallel 2 times layout.virtual_pipeline 4 does not divide the model's 4",
        ),
        (["--layout=tp1sp"], "layout.sequence_parallel divides tokens over tensor ranks, but"),
        (["--layout="], "--layout '' is not a layout"),
        (["--layout=tp0"], "layout.tensor_parallel is 0; it must be at least 1"),
        (["--run-dir="], "run_dir is empty"),
        (["model.path=nowhere"], "model.path nowhere is not a directory"),
        (["model.max_length=257"], "model.max_length 257 is beyond the model's 256 positions"),
        (["rollout.max_new_tokens=120"], "questions do not fit"),
        (["teacher_context.max_prompt_tokens=250"], "is beyond the model's 256 positions; lower teacher_context"),
        (["teacher_context.template={solution}{feedback}"], "teacher_context.template lacks {prompt}"),
        (["engine.host=203.0.113.7"], "cannot bind to engine.host 203.0.113.7"),
        (["rollout.verify_workers=0"], "rollout.verify_workers is 0; it must be at least 1"),
        (["evaluation.attempts=0"], "evaluation.attempts is 0; it must be at least 1"),
    ],
)
def test_a_run_that_cannot_work_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refusal(tmp_path, "train", "minipipe", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods=sdpo,luck"], "it must be a JSON list, each one of best_of_k, multi_turn, sdpo"),
        (["--methods="], "discovery.methods is empty; name one or more of best_of_k, multi_turn, sdpo"),
        (["--methods=sdpo,sdpo"], "discovery.methods sdpo,sdpo names one twice"),
        (["--questions=nowhere.jsonl"], "cannot read the questions file nowhere.jsonl"),
        (["discovery.budget=100"], "discovery.budget 100 is not a multiple of rollout.attempts_per_prompt 8"),
        (["discovery.best_of_k_samples=512"], "discovery.best_of_k_samples 512 cannot tell what discovery.budget 1024"),
        (["discovery.multi_turn_memory=[]"], "discovery.multi_turn_memory is []; give one or more different numbers"),
        (["discovery.multi_turn_memory=[1,0]"], "discovery.multi_turn_memory is [1, 0]; give"),
        (["steps=3"], "set discovery.budget instead of steps"),
        (["--layout=tp1", "steps=3"], "set discovery.budget instead of steps"),
        (["discovery.seeds=0"], "discovery.seeds is 0; it must be at least 1"),
        (["objective.kind=grpo"], "objective.kind=grpo learns nothing before the first success"),
        (["teacher_context.feedback=never"], "with teacher_context.feedback=never a trial learns nothing"),
        (["rollout.max_staleness=1"], "rollout.max_staleness is 1, but a trial trains on each group before"),
        (["--layout=tp3"], "layout.tensor_parallel 3 does not divide the model's 4 attention heads"),
        (["deterministic=true"], "trials are not sampled by seed; set deterministic=false"),
    ],
)
def test_a_discovery_that_cannot_work_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refusal(tmp_path, "discover", "minipipe-discovery", *arguments)


def test_baselines_alone_need_no_teacher(tmp_path: Path) -> None:
    arguments = ("--methods=best_of_k", "objective.kind=grpo", "discovery.budget=64", "--dry-run")
    done = run(tmp_path, "discover", "minipipe-discovery", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    config = json.loads(done.stdout)
    assert config["discovery"]["methods"] == ["best_of_k"]
    assert config["steps"] == 8  # those of one trial
    assert list(tmp_path.iterdir()) == []


def test_a_questions_file_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "a", "prompt": "sort, sum", "payload": {"operations": [["sort", null], ["sum", null]]}}\n')
    done = run(tmp_path, "discover", "minipipe-discovery", f"--questions={file}", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["task"]["options"]["questions"] == str(file)


def test_a_discovery_may_be_continued_with_more_seeds_but_not_with_another_budget(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    config = apply_overrides(minipipe_discovery(), [f"run_dir={run_dir.path}"])
    run_dir.prepare(config)
    (run_dir.attempts / "sdpo").mkdir()
    (run_dir.attempts / "sdpo" / "step-00000001.jsonl").touch()
    command = ("discover", "minipipe-discovery", f"--run-dir={run_dir.path}")
    assert "holds a run with discovery.budget=1024, not 512" in refusal(tmp_path, *command, "discovery.budget=512")
    done = run(tmp_path, *command, "discovery.seeds=5", "--methods=sdpo", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "holds a discovery, not a training run" in refusal(tmp_path, "train", *command[1:])
    (run_dir.attempts / "sdpo" / "step-00000001.jsonl").rename(run_dir.attempts / "step-00000001.jsonl")
    assert "holds a training run, not a discovery" in refusal(tmp_path, *command)


def test_a_mistake_before_an_option_and_after_it_is_refused_alike(tmp_path: Path) -> None:
    for arguments in (["steps=few", "--layout=tp1"], ["--layout=tp1", "steps=few"]):
        assert "steps='few'" in refusal(tmp_path, "train", "minipipe", *arguments)


def test_an_unknown_recipe_is_refused_with_what_is_like_it(tmp_path: Path) -> None:
    words = refusal(tmp_path, "train", "maxipipe")
    assert "there is no recipe 'maxipipe'; did you mean minipipe" in words


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def with_setting(**settings: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("tokenizer.json"), "has no tokenizer.json (tokenizer)"),
        (without("config.json"), "has no config.json"),
        (without("model.safetensors"), "has no *.safetensors"),
        (without("tokenizer_config.json"), "tokenizer_config.json"),
        (without("chat_template.jinja"), "has no chat template"),
        (lambda model: (model / "config.json").write_text("{"), "is not JSON (line 1"),
        (with_setting(architectures=["MambaForCausalLM"]), "architecture 'MambaForCausalLM'; supported are Llama"),
        (with_setting(hidden_size=None), "does not say hidden_size"),
        (with_setting(vocab_size=102), "has 104 ids, its model only 102"),
        (with_setting(rope_parameters={"rope_type": "yarn"}), "rope_type='yarn'; supported are plain rotary"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE_MODEL, model)
    change(model)
    assert words in refusal(tmp_path, "train", "minipipe", "model.path=model")


@pytest.mark.parametrize("command", ["serve", "evaluate"])
def test_engines_alone_want_a_model_too(tmp_path: Path, command: str) -> None:
    assert "model.path nowhere is not a directory" in refusal(tmp_path, command, "minipipe", "--model=nowhere")
    model = tmp_path / "model"
    shutil.copytree(BASE_MODEL, model)
    with_setting(architectures=["MambaForCausalLM"])(model)
    assert "architecture 'MambaForCausalLM'" in refusal(tmp_path, command, "minipipe", "--model=model")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            '{"id": "a", "prompt": "sort, sum", "payload": {"operations": [["sort", null]]}}\n{"id": "b"\n',
            "line 2: not a",
        ),
        ('\n{"id": "a"}\n', "line 1: the line is empty"),
        ('{"id": "a", "prompt": "x"}\n', "line 1: payload.operations must be a list"),
        ("", "is empty; write one JSON object a line"),
        (None, "cannot read the questions file"),
    ],
)
def test_a_malformed_questions_file_is_refused_by_line(tmp_path: Path, lines: str | None, words: str) -> None:
    file = tmp_path / "questions.jsonl"
    if lines is not None:
        file.write_text(lines)
    sentence = refusal(tmp_path, "train", "minipipe", f"task.options.questions={file}")
    assert words in sentence and str(file) in sentence


@pytest.mark.parametrize("command", ["train", "evaluate", "serve"])
def test_a_port_in_use_is_refused(tmp_path: Path, command: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        sentence = refusal(tmp_path, command, "minipipe", f"engine.port={port}")
    assert f"port {port} on 127.0.0.1 cannot be used" in sentence and "set engine.port" in sentence


def test_a_run_dir_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    places = ["file", "file/run", *([] if os.geteuid() == 0 else ["closed/run"])]  # root may write anywhere
    for place in places:
        assert f"run_dir {place} cannot be written" in refusal(tmp_path, "train", "minipipe", f"--run-dir={place}")


def test_a_place_that_only_looks_writable_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "minipipe", "--run-dir=/proc/run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run_dir /proc/run cannot be written") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_another_experiment_in_the_same_directory_is_refused(tmp_path: Path, flags: list[str]) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.prepare(apply_overrides(minipipe(), [f"run_dir={run_dir.path}"]))
    (run_dir.attempts / "step-00000000.jsonl").touch()
    config = run_dir.config.read_bytes()
    sentence = refusal(tmp_path, "train", "minipipe", f"--run-dir={run_dir.path}", "optim.lr=0.5", *flags)
    assert "holds a run with optim.lr=0.001, not 0.5; set another run_dir" in sentence
    assert run_dir.config.read_bytes() == config


@pytest.mark.timeout(240)
def test_an_engine_that_dies_at_start_ends_the_run_with_its_own_last_words(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run(
        tmp_path,
        *("train", "minipipe", "--layout=tp1", f"--run-dir={run_dir}", 'engine.extra_args=["--no-such-flag"]'),
        timeout_s=200,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: engine-0 at start: ended with exit code 2; the end of its log:\n")
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert "Traceback" not in done.stderr
    assert "no-such-flag" in (run_dir / "logs" / "engine-0.log").read_text()
    mine = [p.cmdline() for p in psutil.process_iter() if str(run_dir) in " ".join(command_of(p))]
    assert mine == []


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended
        return []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_comes_at_once(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        "import sys\nfrom megatron_sdpo.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "slow = {'torch', 'transformers', 'matplotlib', 'numpy', 'sglang', 'megatron.core'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(sorted(slow)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_checking_a_run_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom megatron_sdpo.cli import main\nmain(['train', 'minipipe', '--dry-run'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_names_the_commands_and_where_to_start(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("train", "discover", "evaluate", "serve", "convert", "report", "megatron-sdpo train minipipe"):
        assert words in done.stdout


def test_help_lists_every_key_with_type_and_default(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ") and line.split()}
    for key, (kind, default) in configuration.fields_by_name().items():
        assert configuration.type_words(kind) in lines[key], key
        if default is dataclasses.MISSING:
            assert lines[key].endswith("; set by the recipe")
        else:  # as it can be typed after key=
            assert lines[key].endswith(f"; default {json.dumps(default)}"), key
            shown = lines[key].partition("; default ")[2]
            assert configuration.apply_overrides(minipipe(), [f"{key}={shown}"])


def test_dry_run_prints_what_a_run_would_save(tmp_path: Path) -> None:
    overrides = ["optim.lr=1e-3", "task.options.hint=false", "engine.max_total_tokens=none"]
    done = run(
        tmp_path,
        "train",
        "minipipe",
        overrides[0],
        "--layout=tp2pp2dp2",
        "--dry-run",
        "--deterministic",
        *overrides[1:],
    )
    assert (done.returncode, done.stderr) == (0, "")
    layout = ["layout.tensor_parallel=2", "layout.pipeline_parallel=2", "layout.world_size=8"]
    file = tmp_path / "config.json"
    file.write_text(done.stdout)
    assert configuration.load(file) == apply_overrides(minipipe(), [*layout, *overrides, "deterministic=true"])


def test_a_layout_in_short_is_the_keys_in_long(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "minipipe", "--layout=tp2sppp2vp2cp2dp3do", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    keys = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "virtual_pipeline": 2}
    keys |= {"context_parallel": 2, "world_size": 24, "distributed_optimizer": True}
    layout = json.loads(done.stdout)["layout"]
    assert {key: layout[key] for key in keys} == keys


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ep2", {"expert_parallel": 2, "world_size": 2, "expert_tensor_parallel": None}),
        ("pp2ep2", {"expert_parallel": 2, "pipeline_parallel": 2, "world_size": 4}),
        ("tp2spep2et1", {"expert_parallel": 2, "expert_tensor_parallel": 1, "tensor_parallel": 2, "world_size": 2}),
        ("tp2ep2", {"expert_parallel": 2, "tensor_parallel": 2, "world_size": 4}),
        ("cp2ep4", {"expert_parallel": 4, "context_parallel": 2, "world_size": 4}),
        ("ep2dp4do", {"expert_parallel": 2, "world_size": 4, "distributed_optimizer": True}),
    ],
)
def test_experts_take_their_ranks_from_the_others(name: str, sizes: dict[str, int | bool | None]) -> None:
    layout = dataclasses.asdict(apply_overrides(minipipe(), layout_overrides(name)).layout)
    assert {key: layout[key] for key in sizes} == sizes


def test_a_report_on_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is not a run directory" in refusal(tmp_path, "report", str(tmp_path))
    assert "is not a run directory" in refusal(tmp_path, "report", str(tmp_path / "nowhere"))


def test_a_conversion_of_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "is neither a run directory nor a Hugging Face" in refusal(tmp_path, "convert", str(tmp_path), "new")
    assert "exists already" in refusal(tmp_path, "convert", BASE_MODEL, "there")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["train", "minipipe", "--fast"], ["metrics", ".", "a=1"]]
)
def test_wrong_usage_is_shown_the_right_one(tmp_path: Path, arguments: list[str]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: megatron-sdpo")
    assert list(tmp_path.iterdir()) == []
