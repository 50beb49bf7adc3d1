"""Worker of test_reset.py: a learner that has trained goes back to the base, beside one that is new.

Arguments: folder layout. Asserts on every rank; what is compared is everything that training depends on, to the bit,
before and after the next two batches.
"""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore.groups import ParallelGroups, initialize, shutdown
from megatron_sdpo.mcore.learner import Learner
from tests.dist_checkpoint import differences, state_of
from tests.dist_learner import parse
from tests.learner_setup import learn, make_batch, make_config, make_learner

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sdpo": ("llama", ("optim.mini_batches=2",)),
    "tied-live": ("qwen3-tied", ("teacher.kind=live",)),
    "bf16": ("llama", ("model.dtype=bfloat16",)),
    "hybrid": (
        "llama",
        ("objective.kind=hybrid", "objective.kl_coefficient=0.5", "teacher.update_every=optimizer_step"),
    ),
}
"""Name -> (model, overrides)."""


def check_reset(model: Path, overrides: tuple[str, ...], groups: ParallelGroups, layout: LayoutConfig) -> None:
    config = make_config(model, overrides, layout)
    used, new = make_learner(config, groups), make_learner(config, groups)
    base = new.log_probs([3, 5, 8, 13])
    trained = [learn(used, make_batch(step)) for step in (0, 1, 2)]
    assert used.log_probs([3, 5, 8, 13]) != base, "three batches must have changed the model"
    check_swap(used)
    used.reset()
    assert differences(state_of(used), state_of(new)) == []
    assert used.log_probs([3, 5, 8, 13]) == base
    assert [learn(used, make_batch(step)) for step in (0, 1, 2)] == trained
    for step in (0, 1, 2):
        learn(new, make_batch(step))
    assert differences(state_of(used), state_of(new)) == []
    assert all(torch.isfinite(weight).all() for weight in used.model.parameters())


def check_swap(learner: Learner) -> None:
    """Every rank's model has the teacher's weights, whole, and afterwards its own to the bit, whatever happens."""
    named = learner.weights.named
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    live = learner.teacher.kind == "live"
    shown = before if live else learner.weights.joined(learner.teacher.tensors)
    assert live or any(not torch.equal(shown[name].to(weight.dtype), weight) for name, weight in before.items())
    for raises in (False, True):
        try:
            with learner.teacher.swapped_in(learner.weights):
                assert all(torch.equal(named[name], weight.to(named[name].dtype)) for name, weight in shown.items())
                if raises:
                    raise KeyError("inside")
        except KeyError:
            assert raises
        assert differences(dict(named), before) == []
    assert differences(learner.weights.joined(learner.weights.cut(before)), before) == []


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    groups = initialize(parse(name), seed=0, timeout_s=60)
    for model, overrides in CASES.values():
        check_reset(folder / model, overrides, groups, parse(name))
    parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()
