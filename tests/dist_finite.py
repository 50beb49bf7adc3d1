"""Worker of test_finite.py: learners that meet numbers which are not finite, on some layouts under torchrun.

Arguments: folder layout... (see dist_learner.parse). Reads the models in folder; writes folder/LAYOUT.json,
case -> sentence.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.finite import NonFiniteError
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.hf import load_hf
from megatron_sdpo.mcore.learner import Learner
from megatron_sdpo.types import Batch
from tests.dist_learner import parse
from tests.learner_setup import VOCABULARY, learn, make_batch, make_config, make_learner

POISON = VOCABULARY - 1
"""A token that no sample holds unless a case puts it there; in ``llama-poisoned`` its embedding is NaN."""
MICRO_BATCHES = ("layout.tokens_per_micro_batch=64",)


def clean_batch() -> Batch:
    """The learner's batch without ``POISON``."""

    def ids(given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return given and tuple(2 if i == POISON else i for i in given)

    batch = make_batch()
    fields = ("prompt_ids", "response_ids", "teacher_prompt_ids")
    samples = (dataclasses.replace(s, **{field: ids(getattr(s, field)) for field in fields}) for s in batch.samples)
    return dataclasses.replace(batch, samples=tuple(samples))


def with_sample(batch: Batch, position: int, **changes: object) -> Batch:
    changed = dataclasses.replace(batch.samples[position], **changes)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(batch, samples=(*batch.samples[:position], changed, *batch.samples[position + 1 :]))


def with_log_prob(batch: Batch, position: int, place: int, value: float) -> Batch:
    numbers = list(batch.samples[position].engine_log_probs)
    numbers[place] = value
    return with_sample(batch, position, engine_log_probs=tuple(numbers))


def state(learner: Learner) -> list[Tensor]:
    """Copies of everything that training changes: weights, optimizer state, teacher."""
    moments = [x for _, values in learner.optimizer.state.items() for x in values.values() if isinstance(x, Tensor)]
    return [x.detach().clone() for x in (*learner.model.parameters(), *moments, *learner.teacher.tensors)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def stopped(learner: Learner, run: Callable[[], object]) -> tuple[str, Batch]:
    """The sentence and the batch of a run that must stop; nothing that training changes may have changed."""
    before, step = state(learner), learner.step
    try:
        run()
    except NonFiniteError as error:
        assert same_bits(state(learner), before) and learner.step == step
        return str(error), error.batch
    raise AssertionError("nothing stopped it")


def run_cases(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> dict[str, str]:
    """Case -> what stopped it, the same on every rank."""

    def learner_of(*overrides: str, model: str = "llama") -> Learner:
        teacher = folder / "llama-teacher" if model == "llama" else None
        return make_learner(make_config(folder / model, (*MICRO_BATCHES, *overrides), layout), groups, teacher)

    batch = clean_batch()
    found: dict[str, str] = {}

    learner = learner_of()
    learn(learner, make_batch(1))  # so that the optimizer has moments
    for name, spoilt in {
        "engine": with_log_prob(batch, 5, 3, math.nan),
        "engine of a masked sample": with_log_prob(with_log_prob(batch, 7, 0, -math.inf), 7, 2, -math.inf),
    }.items():
        found[name], kept = stopped(learner, lambda spoilt=spoilt: learn(learner, spoilt))
        assert kept == spoilt
    fresh = learner_of()
    learn(fresh, make_batch(1))
    assert learn(learner, batch) == learn(fresh, batch)  # as if nothing had been
    assert same_bits(state(learner), state(fresh))

    poisoned = learner_of(model="llama-poisoned")
    for name, position, field in (("student", 5, "prompt_ids"), ("teacher", 6, "teacher_prompt_ids")):
        spoilt = with_sample(batch, position, **{field: (POISON, *(getattr(batch.samples[position], field)[1:]))})
        found[name], _ = stopped(poisoned, lambda spoilt=spoilt: learn(poisoned, spoilt))
    states = learner_of("objective.support=vocabulary", model="llama-poisoned")
    found["teacher's states"], _ = stopped(states, lambda: learn(states, spoilt))

    broken = learner_of()
    asked = with_sample(batch, 5, prompt_ids=(POISON, *batch.samples[5].prompt_ids[1:]))
    scores = broken.score_student(asked)
    taught = broken.score_teacher(asked, scores)
    load_hf(broken.model, folder / "llama-poisoned", groups, layout)
    found["loss"], _ = stopped(broken, lambda: broken.train(asked, scores, taught))

    steep = learner_of("objective.kind=grpo", "objective.kl_coefficient=1e30")
    found["gradient"], _ = stopped(steep, lambda: learn(steep, batch))

    everywhere: list[dict[str, str]] = [{}] * groups.world_size
    dist.all_gather_object(everywhere, found, group=groups.world)
    assert all(other == found for other in everywhere), everywhere
    return found


def main(run_cases: Callable[[Path, ParallelGroups, LayoutConfig], dict[str, str]]) -> None:
    """folder/LAYOUT.json, case -> sentence, of each layout."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        groups = initialize(parse(name), seed=0, timeout_s=60)
        found = run_cases(folder, groups, parse(name))
        if groups.rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main(run_cases)
