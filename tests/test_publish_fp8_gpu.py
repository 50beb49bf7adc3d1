"""One GPU for both: Transformer Engine's blockwise FP8 in the trainer, SGLang's block FP8 in the engine.

SGLang and Transformer Engine must be importable; ``SDPO_TEST_ENGINE_ARGS`` are more arguments for
SGLang (``--fp8-gemm-backend=triton``, ``--attention-backend=triton`` where a kernel library is missing). Numbers are
printed (``pytest -m gpu -s``).
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sdpo.config import Config, apply_overrides
from megatron_sdpo.fp8_format import is_quantized
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.launch.trainer import publisher_for
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.fleet import Fleet
from megatron_sdpo.types import Batch, EngineAddress, Sample
from tests.conftest import TOKEN
from tests.learner_setup import learn, make_batch, make_config, make_learner
from tests.tiny_model import write_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
LAYERS = 4
PROMPT = (5, 17, 80, 33, 9, 61, 4, 28, 99, 12, 7, 50)
SMALL_ENGINE = ("--mem-fraction-static=0.3", "--disable-cuda-graph")


def config_of(folder: Path, kind: str) -> Config:
    """A trainer in bf16 on the engine's own GPU, whose passes are in this kind of FP8."""
    more = (*SMALL_ENGINE, *os.environ.get("SDPO_TEST_ENGINE_ARGS", "").split())
    own = [f"fp8.student={kind}", f"fp8.teacher={kind}", "engine.fp8=blockwise", "model.dtype=bfloat16"]
    own += ["publish.backend=gloo", "publish.probe_tolerance=1.0", "engine.max_total_tokens=16384"]
    base = make_config(folder / "model", (*own, f"run_dir={folder / 'run'}", "engine.start_timeout_s=600"))
    return apply_overrides(base, [f"engine.extra_args={list(more)}".replace("'", '"')])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, EngineAddress]]:
    folder = tmp_path_factory.mktemp("fp8")
    sizes = {"hidden_size": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "intermediate_size": 1536}
    write_tiny_checkpoint(
        folder / "model", 1, "qwen3", vocab_size=4096, layers=LAYERS, dtype=torch.bfloat16, std=0.04, **sizes
    )
    (folder / "run").mkdir()
    with Fleet(config_of(folder, "off"), folder / "run", TOKEN) as fleet:
        yield folder, fleet.engines[0]


def mismatch(learner: Learner, address: EngineAddress) -> float:
    """Mean difference between the engine's log-probs of what it samples and the trainer's scoring pass."""

    async def generate() -> list[Sample]:
        async with EngineClient([address], TOKEN, timeout_s=300.0) as client:
            found = await client.generate(PROMPT, n=8, max_new_tokens=64, temperature=1.0)
        return [Sample(f"0/0/{i}", 0, PROMPT, f.response_ids, f.log_probs, PROMPT, 0.0) for i, f in enumerate(found)]

    samples = asyncio.run(generate())
    scored = learner.score_student(Batch(0, tuple(samples), {}, cursor=1)).old_log_probs
    own = torch.cat([scored[i].float().cpu() for i in range(len(samples))])
    return float((own - torch.tensor([x for s in samples for x in s.engine_log_probs])).abs().mean())


def test_the_engine_serves_what_the_trainer_computes(
    engine: tuple[Path, EngineAddress], groups: ParallelGroups
) -> None:
    folder, address = engine
    apart: dict[str, list[float]] = {}
    for kind in ("blockwise" if torch.cuda.is_available() else "emulated", "off"):
        config = config_of(folder, kind)
        learner = make_learner(config, groups)
        publisher = publisher_for(learner, RunDir(folder / "run"), config, TOKEN)
        apart[kind] = []
        for version in (1, 2, 3):
            metrics = publisher.publish(version)
            apart[kind].append(mismatch(learner, address))
            print(f"student {kind}: {metrics}, {apart[kind][-1]:.2e} a sampled token")
            learn(learner, make_batch(version))
        publisher.close()
    in_fp8, in_bf16 = apart.values()
    assert max(in_fp8) < min(in_bf16), "the same codes leave less to correct"
    exact = load_file(folder / "model" / "model.safetensors")
    layers = sum(tensor.nbytes for name, tensor in exact.items() if is_quantized(name, LAYERS, 0))
    whole = sum(tensor.nbytes for tensor in exact.values())
    assert metrics["sync/bytes"] == whole - layers / 2 + layers / 2 / (128 * 128) * 4
