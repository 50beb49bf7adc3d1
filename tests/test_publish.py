"""Weights from Megatron shards to a real engine: every layout, and every way in which it can fail.

The cases are in dist_publish.py, which runs as trainer ranks; here is what they are run on.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo.reshard.digest import describe, digest
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.types import EngineAddress
from tests.conftest import TOKEN, Engine, engine_config
from tests.dist_learner import parse
from tests.launch import ROOT, run_ranks
from tests.learner_setup import MODELS, write_models
from tests.tiny_model import reference_log_probs, write_tiny_checkpoint

LAYOUTS = ("tp1", "tp2", "pp2", "tp2pp2", "pp2vp2", "cp2")
PROBES = ([5, 17, 80, 33, 9, 61, 4], list(range(3, 43)), [99, 99, 2, 50] * 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints a and b of the engines' architecture, and other models that no engine sees."""
    folder = tmp_path_factory.mktemp("publish")
    write_models(folder)
    for seed, name in enumerate("ab", 11):
        write_tiny_checkpoint(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def prepare(folder: Path) -> Callable[..., None]:
    return preparation(folder, list(MODELS))


def preparation(folder: Path, models: Sequence[str] = ()) -> Callable[..., None]:
    """Writes down what the workers need to know, transformers' log-probs of every probe under a and b among it."""
    size = sum(tensor.nbytes for tensor in load_file(folder / "a" / "model.safetensors").values())
    log_probs = {name: [reference_log_probs(folder / name, ids) for ids in PROBES] for name in "ab"}

    def write(engines: Sequence[EngineAddress], leaders: Sequence[int] = ()) -> None:
        setup = {
            "engines": list(engines),
            "leaders": list(leaders),
            "token": TOKEN,
            "models": {name: folder / name for name in models},
            "checkpoints": {name: folder / name for name in "ab"},
            "bytes": size,
            "probes": PROBES,
            "log_probs": log_probs,
        }
        torch.save(setup, folder / "setup.pt")

    return write


@pytest.fixture
def shared(engine: Engine, folder: Path, prepare: Callable[..., None]) -> Iterator[Path]:
    """The shared engine is told to the workers; afterwards it serves its own weights again, whatever they did."""
    prepare([engine.address])
    yield folder
    control = EngineControl(engine.address, engine.token, timeout_s=60.0)
    with control.weight_update():
        pass
    control.continue_generation()
    control.update_weights_from_disk(str(engine.checkpoint), 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_publishes(shared: Path, name: str) -> None:
    more = {"tp1": ["handles", "under_load"], "pp2": ["faults", "no_way_back", "not_finite", "handles"]}.get(name, [])
    layout, out = parse(name), shared / name
    run_ranks("dist_publish.py", layout.world_size, [name, str(shared), "gathers", "versions", *more])
    per_stage = layout.tensor_parallel * layout.context_parallel
    stages = layout.pipeline_parallel * layout.virtual_pipeline
    models = [model for model, layers in MODELS.items() if layers % stages == 0]
    assert_gathered(shared, out, models, senders={rank * per_stage for rank in range(layout.pipeline_parallel)})
    contents = {name: load_file(shared / name / "model.safetensors") for name in "ab"}
    digests = {name: digest(describe(*item) for item in tensors.items()) for name, tensors in contents.items()}
    assert torch.load(out / "stamps.pt") == {1: f"1-{digests['a']}", 2: f"2-{digests['b']}", 3: f"3-{digests['a']}"}


def assert_gathered(folder: Path, out: Path, models: list[str], senders: set[int]) -> None:
    """Together the senders hold the checkpoint, to the bit; nobody else holds anything."""
    for name in models:
        expected = load_file(folder / name / "model.safetensors")
        for bucket_bytes in (20_000, 1 << 30):
            files = {int(file.stem): load_file(file) for file in (out / f"{name}-{bucket_bytes}").iterdir()}
            assert {rank for rank, held in files.items() if held} == senders
            union = [item for held in files.values() for item in held.items()]
            assert sorted(key for key, _ in union) == sorted(expected)
            for key, tensor in union:
                assert tensor.dtype == expected[key].dtype
                assert torch.equal(tensor, expected[key]), key


def run_alone(folder: Path, scenario: str) -> tuple[int, str, float]:
    """One rank without torchrun, whose own end would hide how the rank ends: exit code, output, seconds at exit."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "tests" / "dist_publish.py"), "tp1", str(folder), scenario]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    ended = re.search(r"^ended at (.*)$", done.stdout, re.MULTILINE)
    return done.returncode, done.stdout, time.time() - float(ended[1]) if ended else -1.0


def test_a_hanging_engine_holds_nobody_up(shared: Path) -> None:
    code, output, seconds = run_alone(shared, "hanging")
    assert code == 0, output
    assert seconds < 5, f"the process took {seconds:.1f} s to end"


def test_a_trainer_that_was_killed_is_followed_by_another(shared: Path) -> None:
    code, output, _ = run_alone(shared, "dying")
    assert code == 9, output
    code, output, _ = run_alone(shared, "versions")
    assert code == 0, output


@pytest.mark.slow
def test_two_engines_stay_together(folder: Path, engine: Engine, prepare: Callable[..., None], tmp_path: Path) -> None:
    with Fleet(engine_config(tmp_path, engine.checkpoint, count=2), tmp_path, TOKEN) as fleet:
        leaders = [fleet.process_ids()[address.name] for address in fleet.engines]
        prepare(fleet.engines, leaders)
        run_ranks("dist_publish.py", 2, ["pp2", str(folder), "versions", "two_engines"], timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks", "scenario"), [("pp2", 2, "left_out"), ("tp1", 1, "left_out_at_rest")])
def test_an_engine_that_is_gone_is_left_out(
    folder: Path,
    engine: Engine,
    prepare: Callable[..., None],
    tmp_path: Path,
    layout: str,
    ranks: int,
    scenario: str,
) -> None:
    """While weights travel; or while it has given its memory back."""
    with Fleet(engine_config(tmp_path, engine.checkpoint, count=2), tmp_path, TOKEN) as fleet:
        prepare(fleet.engines, [fleet.process_ids()[address.name] for address in fleet.engines])
        run_ranks("dist_publish.py", ranks, [layout, str(folder), scenario], timeout=200)


@pytest.mark.slow
def test_an_engine_of_two_ranks(folder: Path, engine: Engine, prepare: Callable[..., None], tmp_path: Path) -> None:
    with Fleet(engine_config(tmp_path, engine.checkpoint, tensor_parallel=2), tmp_path, TOKEN) as fleet:
        prepare(fleet.engines)
        run_ranks("dist_publish.py", 2, ["pp2", str(folder), "versions", "faults", "handles"], timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_of_two_ranks_reach_an_engine(tmp_path: Path) -> None:
    """Neither rank holds them all; the engine serves what transformers makes of the whole."""
    for seed, name in enumerate("ab", 21):
        write_tiny_checkpoint(tmp_path / name, seed, family="qwen3_moe", kv_heads=2)
    (tmp_path / "run").mkdir()
    prepare = preparation(tmp_path)
    with Fleet(engine_config(tmp_path / "run", tmp_path / "a"), tmp_path / "run", TOKEN) as fleet:
        prepare(fleet.engines)
        for layout in ("dp2ep2-overlap", "tp2ep2et1-sp"):
            run_ranks("dist_publish.py", 2, [layout, str(tmp_path), "versions"], timeout=200)
