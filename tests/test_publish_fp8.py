"""The trainer's weights in FP8 engines: SGLang's own loading, products of codes, and the trainer's same numbers."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo import cli
from megatron_sdpo import config as configuration
from megatron_sdpo.config import Config, apply_overrides
from megatron_sdpo.fp8_format import is_quantized
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import publisher_for
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.reshard.publish import Publisher, PublishError
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.types import Batch, Sample
from tests.conftest import TOKEN, engine_config
from tests.faulty_control import FaultyControl
from tests.fp8_setup import write_published
from tests.launch import run_ranks
from tests.learner_setup import learn, make_batch, make_config, make_learner

SAME = 2e-5
"""Log-probs from the same codes, where sums in another order have changed none of those of the activations."""
ONE_CODE = 0.15
"""Log-probs after some code of an activation, between two, was rounded the other way; few tokens have one."""
OWN = ("engine.fp8=blockwise", "fp8.student=emulated", "fp8.teacher=emulated", f"publish.probe_tolerance={ONE_CODE}")
PROMPT = (5, 17, 80, 33, 9, 61, 4, 28, 99, 12, 7, 50)
PROBE = list(range(3, 43))
SHORT = torch.randint(2, 103, (15, 8), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass(frozen=True)
class Served:
    model: Path
    config: Config
    control: EngineControl
    run: RunDir


def serving(folder: Path, family: str, *overrides: str, **engine: int) -> tuple[Config, Fleet]:
    """The configuration of a trainer whose engine is this fleet's."""
    model = write_published(folder / "model", family, layers=4 if "fp8.high_precision_layers=1" in overrides else 2)
    run = folder / "run"
    run.mkdir()
    config = apply_overrides(make_config(model), [*OWN, f"run_dir={run}", *overrides])
    config = replace(config, engine=replace(engine_config(run, model, **engine).engine, fp8=config.engine.fp8))
    configuration.save(config, folder / "config.json")
    return config, Fleet(config, run, TOKEN)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fp8")
    config, fleet = serving(folder, "qwen3")
    with fleet:
        control = EngineControl(fleet.engines[0], TOKEN, timeout_s=60.0)
        yield Served(folder / "model", config, control, RunDir(folder / "run"))


def publishes(served: Served, learner: Learner, **settings: object) -> Publisher:
    config = replace(learner.config, publish=replace(learner.config.publish, **settings))
    return publisher_for(learner, served.run, config, TOKEN)


def gaps(learner: Learner, control: EngineControl) -> torch.Tensor:
    """Largest difference in each of some short sequences between the student's passes and the engine, ascending."""
    found = []
    for ids in SHORT:
        with learner.precision.of(learner.config.fp8.student):
            own = torch.tensor(learner.log_probs(ids))
        found.append((own - torch.tensor(control.probe_log_probs(ids))).abs().max())
    return torch.stack(found).sort().values


def test_the_engine_serves_what_the_trainer_computes(served: Served, groups: ParallelGroups) -> None:
    learner = make_learner(served.config, groups)
    publisher = publishes(served, learner, bucket_bytes=100_000)
    assert len(publisher.buckets) > 3
    for version in (1, 2):
        metrics = publisher.publish(version)
        found = gaps(learner, served.control)
        assert found.median() < SAME and found.max() < ONE_CODE, found
        learn(learner, make_batch(version))
    publisher.close()
    exact = load_file(served.model / "model.safetensors")
    layers = {name: tensor for name, tensor in exact.items() if is_quantized(name, 2, 0)}
    rest = sum(tensor.nbytes for name, tensor in exact.items() if name not in layers)
    in_layers = sum(tensor.nbytes for tensor in layers.values())
    assert metrics["sync/bytes"] == rest + in_layers / 4 + in_layers / (128 * 128)


def test_attempts_have_the_log_probs_of_the_scoring_pass(served: Served, groups: ParallelGroups) -> None:
    learner = make_learner(served.config, groups)
    publisher = publishes(served, learner)
    publisher.publish(1)
    publisher.close()

    async def generate() -> list[Sample]:
        async with EngineClient([served.control.address], TOKEN, timeout_s=60.0) as client:
            found = await client.generate(PROMPT, n=4, max_new_tokens=24, temperature=1.0)
        return [Sample(f"0/0/{i}", 0, PROMPT, f.response_ids, f.log_probs, PROMPT, 0.0) for i, f in enumerate(found)]

    samples = asyncio.run(generate())
    scored = learner.score_student(Batch(0, tuple(samples), {}, cursor=1)).old_log_probs
    exact = make_learner(apply_overrides(served.config, ["fp8.student=off", "fp8.teacher=off"]), groups)
    unquantized = exact.score_student(Batch(0, tuple(samples), {}, cursor=1)).old_log_probs
    engine = torch.tensor([x for sample in samples for x in sample.engine_log_probs])
    own, exact_own = (torch.cat([values[i] for i in range(len(samples))]) for values in (scored, unquantized))
    assert (own - engine).abs().median() < SAME and (own - engine).abs().max() < ONE_CODE
    assert (exact_own - engine).abs().median() > 100 * SAME, "these are not FP8's numbers"


def test_a_student_in_full_precision_is_further_away(served: Served, groups: ParallelGroups) -> None:
    config = apply_overrides(served.config, ["fp8.student=off", "fp8.teacher=off"])
    learner = make_learner(config, groups)
    with pytest.raises(PublishError, match=r"log-probs differ by 0\.\d+ from the trainer's"):
        publishes(served, learner).publish(1)
    publisher = publishes(served, learner, probe_tolerance=1.0)
    assert ONE_CODE < publisher.publish(2)["sync/probe_gap"] < 1.0
    publisher.close()
    assert gaps(learner, served.control).median() > 0.01


def test_the_way_back_is_in_fp8_too(served: Served, groups: ParallelGroups) -> None:
    learner = make_learner(served.config, groups)
    publisher = publishes(served, learner, bucket_bytes=100_000)
    control = FaultyControl(served.control.address, TOKEN, 30.0, None)
    publisher.engines[:] = [control]
    publisher.publish(1)
    assert publisher.served is not None
    stamp, before = publisher.served.stamp, served.control.probe_log_probs(PROBE)
    learn(learner, make_batch())
    control.fail("update_weights_from_distributed", 3, "late")
    with pytest.raises(PublishError, match="failed on purpose, late; the fleet serves version 1 again"):
        publisher.publish(2)
    assert served.control.weight_stamp() == stamp
    assert served.control.probe_log_probs(PROBE) == before
    publisher.publish(3)
    assert served.control.probe_log_probs(PROBE) != before
    publisher.close()


def test_tensor_ranks_publish_the_same_codes(served: Served, groups: ParallelGroups, tmp_path: Path) -> None:
    config = served.run.path.parent / "config.json"
    run_ranks("dist_publish_fp8.py", 2, ["tp2", str(config), str(tmp_path / "said.json")])
    first, second = json.loads((tmp_path / "said.json").read_text())
    learner = make_learner(served.config, groups)
    publisher = publishes(served, learner)
    metrics = publisher.publish(1)
    assert publisher.served is not None and first["stamp"] == publisher.served.stamp
    assert first["sync/bytes"] == second["sync/bytes"] == metrics["sync/bytes"]
    assert second["stamp"] != first["stamp"]
    publisher.close()


def test_an_engine_loads_what_convert_writes(served: Served, groups: ParallelGroups, tmp_path: Path) -> None:
    publisher = publishes(served, make_learner(served.config, groups))
    publisher.publish(1)
    publisher.close()
    before = served.control.probe_log_probs(PROBE)
    cli.main(["convert", "--fp8", str(served.model), str(tmp_path / "in-fp8")])
    body = {
        "model_path": str(tmp_path / "in-fp8"),
        "weight_version": "7",
        "load_format": "auto",
    }  # it began with dummies
    served.control._call("POST", "/update_weights_from_disk", {**body, "flush_cache": True})
    assert served.control.weight_version() == 7
    assert served.control.probe_log_probs(PROBE) == before


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("family", "overrides", "engine"),
    [
        ("qwen3", ["fp8.high_precision_layers=1"], {"tensor_parallel": 2}),
        ("qwen3_moe", ["fp8.high_precision_layers=1"], {}),
    ],
)
def test_other_engines(
    tmp_path: Path, groups: ParallelGroups, family: str, overrides: list[str], engine: dict[str, int]
) -> None:
    """Cut over two ranks; of experts; the first and the last of four layers kept out."""
    config, fleet = serving(tmp_path, family, *overrides, **engine)
    with fleet:
        learner = make_learner(config, groups)
        publisher = publisher_for(learner, RunDir(tmp_path / "run"), config, TOKEN)
        control = EngineControl(fleet.engines[0], TOKEN, timeout_s=60.0)
        for version in (1, 2):
            publisher.publish(version)
            assert gaps(learner, control).median() < SAME
            learn(learner, make_batch(version))
        publisher.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_engine_starts_from_a_model_in_fp8(served: Served, groups: ParallelGroups, tmp_path: Path) -> None:
    target, run = tmp_path / "in-fp8", tmp_path / "run"
    run.mkdir()
    cli.main(["convert", "--fp8", str(served.model), str(target)])
    with Fleet(engine_config(run, target), run, TOKEN) as fleet:
        alone = EngineControl(fleet.engines[0], TOKEN, timeout_s=60.0).probe_log_probs(PROBE)
    publisher = publishes(served, make_learner(served.config, groups))
    publisher.publish(1)
    publisher.close()
    assert alone == served.control.probe_log_probs(PROBE)
