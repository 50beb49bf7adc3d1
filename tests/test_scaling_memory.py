"""The planner's bytes against what small models hold: tensors exactly, the peak of a training pass within 10 %."""

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_sdpo.config import Config, LayoutConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.scaling.memory import layers_alive, rank_memory
from megatron_sdpo.types import Batch, Sample
from tests.learner_setup import make_config
from tests.tiny_model import write_tiny_checkpoint
from tools.live_memory import peak_bytes

WITHIN = 0.1
SHAPES = {
    "small": {},
    "deep": {"layers": 8},
    "wide": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 704},
    "grouped": {"family": "qwen3", "kv_heads": 2},
    "large-vocabulary": {"vocab_size": 8192},
}
RECOMPUTE = {
    "mlp": ("layout.recompute=selective", 'layout.recompute_modules=["mlp"]'),
    "uniform": ("layout.recompute=full",),
    "block": ("layout.recompute=full", "layout.recompute_method=block", "layout.recompute_num_layers=2"),
}


def model(path: Path, **shape: object) -> Path:
    sizes: dict[str, object] = {"vocab_size": 1024, "hidden_size": 128, "layers": 4, "head_dim": 32}
    sizes |= {"intermediate_size": 352, **shape}
    return write_tiny_checkpoint(path / "model", 0, **sizes)  # pyright: ignore[reportArgumentType]


def drawn_batch(sequences: int, length: int) -> Batch:
    """Prompts of one token, so that nearly all tokens meet the head; all of one length, so that none is padded."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 1000, (count,), generator=generator).tolist())

    response = length - 1
    samples = [
        Sample(str(i), i // 4, ids(1), ids(response), (-7.0,) * response, ids(1), float(i % 2))
        for i in range(sequences)
    ]
    return Batch(0, tuple(samples), {}, 0)


def training_peak(learner: Learner, batch: Batch, device: str = "cpu") -> int:
    student = learner.score_student(batch)
    teacher = learner.score_teacher(batch, student)
    learner.train(batch, student, teacher)  # the optimizer's moments are there from the first step on
    return peak_bytes(partial(learner.train, batch, student, teacher), torch.device(device))


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_and_peak_of_one_rank(tmp_path: Path, groups: ParallelGroups, shape: str) -> None:
    path = model(tmp_path, **SHAPES[shape])
    lengths = ("rollout.max_new_tokens=127", "teacher_context.max_prompt_tokens=1")
    config = make_config(path, ("layout.tokens_per_micro_batch=2048", "teacher.kind=ema", *lengths))
    learner, batch = Learner(config, groups), drawn_batch(16, 128)
    peak = training_peak(learner, batch)
    planned = rank_memory(config, read_hf_config(path), 0, on_cpu=True)
    masters = learner.weights.masters()
    assert planned.weights == sum(p.nbytes for p in learner.model.parameters())
    assert planned.optimizer == sum(
        x.nbytes for kind in optim.moments(learner.optimizer, masters).values() for x in kind
    )
    assert planned.teacher == sum(x.nbytes for x in learner.teacher.tensors)
    assert planned.gradients == sum(p.main_grad.nbytes for p in learner.model.parameters())  # pyright: ignore
    assert planned.training == pytest.approx(peak, rel=WITHIN)
    scored = peak_bytes(lambda: learner.score_teacher(batch, learner.score_student(batch)), torch.device("cpu"))
    assert 0.6 * planned.scoring < scored < 1.1 * planned.scoring  # a layer lets go of most before its end


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_peak_with_recomputation(tmp_path: Path, groups: ParallelGroups, kind: str) -> None:
    path = model(tmp_path, layers=8)
    config = make_config(path, ("layout.tokens_per_micro_batch=2048", *RECOMPUTE[kind]))
    peak = training_peak(Learner(config, groups), drawn_batch(16, 128))
    planned = rank_memory(config, read_hf_config(path), 0, on_cpu=True)
    assert planned.training == pytest.approx(peak, rel=WITHIN)


def test_a_bf16_model_has_masters_and_a_teacher_in_fp32(tmp_path: Path, groups: ParallelGroups) -> None:
    path = model(tmp_path)
    config = make_config(path, ("model.dtype=bfloat16", "teacher.kind=ema"))
    learner, planned = Learner(config, groups), rank_memory(config, read_hf_config(path), 0)
    masters = learner.weights.masters()
    moments = optim.moments(learner.optimizer, masters)
    assert planned.weights == sum(p.nbytes for p in learner.model.parameters()) == planned.swap
    assert planned.optimizer == sum(x.nbytes for kind in (masters, *moments.values()) for x in kind)
    assert planned.teacher == sum(x.nbytes for x in learner.teacher.tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["none", "full"])
def test_peak_on_a_gpu(tmp_path: Path, groups: ParallelGroups, kind: str) -> None:
    """8 layers of 1024 in bf16, one micro-batch of 16384 tokens, within 15 %."""
    path = model(
        tmp_path,
        family="qwen3",
        hidden_size=1024,
        layers=8,
        heads=16,
        head_dim=64,
        kv_heads=4,
        intermediate_size=3072,
        max_positions=2048,
    )
    rows = ("layout.tokens_per_micro_batch=16384", f"layout.recompute={kind}")
    config = make_config(path, ("model.dtype=bfloat16", "teacher.kind=ema", *rows))
    peak = training_peak(Learner(config, groups), drawn_batch(16, 1024), "cuda")
    planned = rank_memory(config, read_hf_config(path), 0)
    assert planned.training == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    "pipeline, virtual, alive",
    # micro-batches times layers, counted in Megatron's schedules for 8 layers
    [(1, 1, [8]), (2, 1, [8, 4]), (4, 1, [8, 6, 4, 2]), (2, 2, [10, 6])],
)
def test_layers_alive(tmp_path: Path, pipeline: int, virtual: int, alive: list[int]) -> None:
    config = Config(
        **{
            **vars_of(make_config(model(tmp_path, layers=8))),
            "layout": LayoutConfig(pipeline_parallel=pipeline, virtual_pipeline=virtual, world_size=pipeline),
        }
    )
    hf = read_hf_config(config.model.path)
    assert [layers_alive(config, hf, rank) for rank in range(pipeline)] == alive


def vars_of(config: Config) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
