"""Worker of test_spikes.py: steps made, skipped and refused, on some layouts under torchrun.

Arguments: folder layout... (see dist_learner.parse). Asserts on every rank; writes
folder/LAYOUT.json, case -> sentence.
"""

from pathlib import Path

import torch.distributed as dist

from megatron_sdpo.config import LayoutConfig
from megatron_sdpo.mcore import finite
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.finite import SpikeError
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.spikes import History
from tests.dist_checkpoint import differences, state_of
from tests.dist_finite import main, same_bits, state
from tests.learner_setup import learn, make_batch, make_config, make_learner

EXPERTS = "qwen3_moe"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "clipped": ("llama", ("optim.mini_batches=2",)),
    "not clipped": ("llama", ("optim.clip_grad=0",)),
    "bf16": ("llama", ("model.dtype=bfloat16",)),
    "experts": (EXPERTS, ("optim.mini_batches=2",)),
}
LOW = History((1e-6,))
"""Against this every norm is a spike."""
SPIKES = ("spikes.window=1", "optim.mini_batches=2", "teacher.update_every=optimizer_step")


def check_step_is_megatrons(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> None:
    """To the bit: Megatron's whole ``step``, which finds the norm for itself, against the two halves."""
    for model, overrides in CASES.values():
        if layout.expert_parallel > 1 and model != EXPERTS:
            continue
        config = make_config(folder / model, overrides, layout)
        ours, theirs = make_learner(config, groups), make_learner(config, groups)
        for step in range(2):
            metrics = learn(ours, make_batch(step))
            halves = optim.step
            optim.step = lambda optimizer, norm: optimizer.step()  # the reference
            try:
                assert learn(theirs, make_batch(step)) == metrics
            finally:
                optim.step = halves
            assert differences(state_of(ours), state_of(theirs)) == []


def skip_and_stop(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> dict[str, str]:
    """Case -> the sentence that ended it."""
    found = {}
    model = folder / (EXPERTS if layout.expert_parallel > 1 else "llama")
    config = make_config(model, (*SPIKES, "spikes.policy=skip"), layout)
    learner, undisturbed = make_learner(config, groups), make_learner(config, groups)
    for one in (learner, undisturbed):
        one.norms = History()
        assert learn(one, make_batch(0))["optim/skipped_steps"] <= 1.0  # the first of two is judged by nothing
    learner.norms, before = LOW, state(learner)
    metrics = learn(learner, make_batch(1))
    assert (metrics["optim/skipped_steps"], learner.norms) == (2.0, History(LOW.norms, 2)) and learner.step == 2
    assert metrics["optim/grad_norm"] > 1e-3 and metrics["loss/total"] > 0.0
    assert same_bits(state(learner), before)
    found["patience"] = stopped(learner, 2)
    batchwise = (*SPIKES, "spikes.policy=skip", "teacher.update_every=generation_batch")
    once = make_learner(make_config(model, batchwise, layout), groups)
    learn(once, make_batch(0))
    once.norms, before = LOW, state(once)
    assert learn(once, make_batch(1))["optim/skipped_steps"] == 2.0 and same_bits(state(once), before)
    undisturbed.norms = learner.norms = History()
    assert learn(learner, make_batch(3)) == learn(undisturbed, make_batch(3))  # as if nothing had been
    assert differences(state_of(learner)["weights"], state_of(undisturbed)["weights"]) == []

    stops = make_learner(make_config(model, (*SPIKES, "spikes.policy=stop"), layout), groups)
    learn_off = make_learner(make_config(model, SPIKES, layout), groups)
    stops.norms = learn_off.norms = LOW
    found["stop"] = stopped(stops, 0)
    assert "optim/skipped_steps" not in learn(learn_off, make_batch(0)) and learn_off.norms != LOW
    return found


def stopped(learner, step: int) -> str:
    before = state(learner)
    try:
        learn(learner, make_batch(step))
    except SpikeError as error:
        assert same_bits(state(learner), before) and learner.step == step and error.batch == make_batch(step)
        return str(error)
    raise AssertionError("nothing stopped it")


def run_cases(folder: Path, groups: ParallelGroups, layout: LayoutConfig) -> dict[str, str]:
    check_step_is_megatrons(folder, groups, layout)
    # Should ranks find other norms, all judge the largest.
    assert finite.check_step(make_batch(0), [0], [], [], 1.0 + groups.rank, groups) == groups.world_size
    found = skip_and_stop(folder, groups, layout)
    everywhere: list[dict[str, str]] = [{}] * groups.world_size
    dist.all_gather_object(everywhere, found, group=groups.world)
    assert all(other == found for other in everywhere), everywhere
    return found


if __name__ == "__main__":
    main(run_cases)
