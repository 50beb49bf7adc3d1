"""Plans of published models: hand numbers, verdicts, refusals, suggestions, and the command."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sdpo.config import Config, ConfigError, apply_overrides, layout_name, layout_overrides
from megatron_sdpo.flops import batch_flops
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.launch import planning
from megatron_sdpo.launch.planning import PUBLISHED, plan_words
from megatron_sdpo.scaling import planner
from megatron_sdpo.scaling.assumed import Lengths, Reach
from megatron_sdpo.scaling.engines import (
    RESIDUE,
    SHARE,
    Sharing,
    engine_memory,
    generation_seconds,
    kv_bytes,
    model_bytes,
)
from megatron_sdpo.scaling.hardware import GPUS, gpu_of
from megatron_sdpo.scaling.memory import FP8_BYTES, held
from megatron_sdpo.scaling.page import page, ranking
from megatron_sdpo.scaling.timing import step_flops
from megatron_sdpo.types import Sample
from recipes import recipe
from tests.public_configs import DENSE, EXPERTS

PAPER = (
    *("model.max_length=10240", "rollout.max_new_tokens=8192", "model.dtype=bfloat16", "teacher.kind=ema"),
    *("teacher_context.max_prompt_tokens=10240", "engine.max_total_tokens=none", "objective.top_k=100"),
    *("optim.mini_batches=1", "rollout.prompts_per_step=32", "layout.tokens_per_micro_batch=8192"),
)
LENGTHS = Lengths(256, 2048, 2304)
H100 = GPUS["h100-80gb"]


def config_of(layout: str, *more: str) -> Config:
    return apply_overrides(recipe("minipipe"), [*PAPER, *layout_overrides(layout), *more])


def architecture(name: str) -> dict[str, Any]:
    return read_hf_config(PUBLISHED / name)


def planned(name: str, layout: str, nodes: int, *more: str, gpu: str = "h100-80gb") -> planner.Plan:
    return planner.plan(config_of(layout, *more), architecture(name), nodes, GPUS[gpu], LENGTHS, Reach())


@pytest.mark.parametrize("name", DENSE | EXPERTS)
def test_one_rank_holds_every_weight_once(name: str) -> None:
    hf = architecture(name)
    mine = held(hf, config_of("tp1").layout, 0)
    assert mine.dense + mine.experts == (DENSE | EXPERTS)[name][1]
    assert model_bytes(hf, 2) == 2 * (mine.dense + mine.experts)


@pytest.mark.parametrize(
    "name, layout",
    [("Qwen3-8B", "tp2sppp2dp2do"), ("Llama-3.3-70B", "tp8sppp4vp2dp2do"), ("Qwen3-30B-A3B", "pp2ep4dp8do")],
)
def test_ranks_hold_the_model_together(name: str, layout: str) -> None:
    """All but norms and routers, which every tensor rank has; the vocabulary of these is divisible."""
    hf, cut = architecture(name), config_of(layout).layout
    ranks = [held(hf, cut, rank) for rank in range(cut.pipeline_parallel)]
    total = sum(cut.tensor_parallel * r.dense + cut.expert_parallel * cut.expert_tensor * r.experts for r in ranks)
    whole = (DENSE | EXPERTS)[name][1]
    assert 0 <= total - whole <= 1e-3 * whole * (cut.tensor_parallel > 1)


def test_hand_numbers_of_a_70b_rank() -> None:
    """Tensor 8, pipeline 4, data 2: of each weight an eighth of a quarter, optimizer and teacher halved again."""
    found = planned("Llama-3.3-70B", "tp8sppp4dp2do", 16, "engine.count=8", "engine.tensor_parallel=8")
    weights = (20 * 855_654_400 + 128256 * 8192) / 8  # 20 layers and the embedding
    assert found.stage == 0
    assert found.rank.weights == pytest.approx(2 * weights, rel=1e-3)
    assert found.rank.gradients == pytest.approx(4 * weights, rel=1e-3)
    assert found.rank.optimizer == pytest.approx(12 * weights / 2, rel=1e-3)
    assert found.rank.teacher == pytest.approx(4 * weights / 2, rel=1e-3)
    # 4 micro-batches of 10,240 tokens in flight; 8 key-value heads of 128
    numbers = (4 * 8192 + 3 * (64 + 8) * 128 + 3 * 28672) / 8
    assert found.rank.activations == pytest.approx(4 * 20 * 10240 * 2 * numbers, rel=1e-6)
    assert kv_bytes(architecture("Llama-3.3-70B"), 2) == 2 * 80 * 8 * 128 * 2
    assert found.engine.weights == pytest.approx(70_553_706_496 * 2 / 8, rel=1e-6)
    assert found.fits and found.gpus == 128


FP8 = ("fp8.student=blockwise", "fp8.teacher=blockwise")
SEVENTY = ("Llama-3.3-70B", "tp8sppp4dp2do", 16, "engine.count=8", "engine.tensor_parallel=8")


def test_scoring_reads_the_teachers_longer_context() -> None:
    """Where little is kept for a backward pass, the pass over 10240 + 8192 tokens beside a copy is the peak."""
    rank = planned("Qwen3-8B", "tp2sppp1dp4do", 2, "engine.count=8", "layout.recompute=full").rank
    numbers = (4 * 4096 + 3 * (32 + 8) * 128 + 3 * 12288) / 2
    assert rank.scoring == pytest.approx(18432 * 2 * numbers, rel=1e-9)
    assert rank.activations < rank.swap
    assert rank.training < rank.swap + rank.scoring
    assert rank.total == rank.standing + rank.scores + rank.swap + rank.scoring
    grpo = planned("Qwen3-8B", "tp2sppp1dp4do", 2, "engine.count=8", "objective.kind=grpo").rank
    assert grpo.scoring == pytest.approx(10240 * 2 * numbers, rel=1e-9)


def test_fp8_keeps_copies_of_weights_and_smaller_inputs() -> None:
    plain, both = planned(*SEVENTY), planned(*SEVENTY, *FP8)
    linears = 20 * (855_654_400 - 2 * 8192) / 8  # all of a layer but its norms
    assert plain.rank.quantised == 0
    assert both.rank.quantised == pytest.approx(linears * 2 * FP8_BYTES, rel=1e-9)
    assert planned(*SEVENTY, "fp8.teacher=blockwise").rank.quantised == pytest.approx(linears * FP8_BYTES, rel=1e-9)
    ends = planned(*SEVENTY, *FP8, "fp8.high_precision_layers=2").rank
    assert ends.quantised == pytest.approx(both.rank.quantised * 18 / 20, rel=1e-9)
    # what enters the four linears: two norms' outputs, the MLP's product; attention's output is kept twice
    less = (2 * 8192 + 28672) * (2 - FP8_BYTES) - 64 * 128 * FP8_BYTES
    assert plain.rank.activations - both.rank.activations == pytest.approx(4 * 20 * 10240 * less / 8, rel=1e-6)
    assert both.rank.activations < ends.activations < plain.rank.activations
    emulated = planned(*SEVENTY, "fp8.student=emulated", "fp8.teacher=emulated")
    assert emulated.rank == plain.rank and emulated.time == plain.time


def test_fp8_products_are_faster_where_the_gpu_has_them() -> None:
    plain, both, teacher = (planned(*SEVENTY, *more).time for more in ((), FP8, FP8[1:]))
    assert 1.5 < plain.train / both.train < 2.0  # attention and head stay in bf16
    assert teacher.train == plain.train and teacher.score_teacher == both.score_teacher < plain.score_teacher
    with pytest.raises(
        ConfigError, match=r"fp8 blockwise needs a GPU with FP8 matrix products, which a100-80gb has not"
    ):
        planned(*SEVENTY, *FP8, gpu="a100-80gb")


def test_what_an_engine_holds() -> None:
    hf = architecture("Llama-3.3-70B")
    config = config_of("tp8", "engine.tensor_parallel=8", "engine.max_running_requests=1000")
    found = engine_memory(config, hf, H100, LENGTHS)
    cache = H100.memory_gb * 1e9 * SHARE - 70_553_706_496 * 2 / 8
    assert found.cache == pytest.approx(cache, rel=1e-6)
    assert found.tokens == int(found.cache // (2 * 80 * 128 * 2))  # one of eight key-value heads on each GPU
    assert found.sequences == found.tokens // (256 + 2048)
    less = apply_overrides(config, ["engine.max_total_tokens=20480"])
    assert engine_memory(less, hf, H100, LENGTHS).sequences == 20480 // 2304
    few = apply_overrides(config, ["engine.max_running_requests=16"])
    assert engine_memory(few, hf, H100, LENGTHS).sequences == 16
    # four key-value heads on eight GPUs: two hold the same one
    assert kv_bytes(architecture("Qwen3-30B-A3B"), 2, 8) == kv_bytes(architecture("Qwen3-30B-A3B"), 2, 4)


def test_an_engine_in_fp8_holds_reads_and_is_sent_half_of_the_layers() -> None:
    """All linears of 36 layers, of which 4 are kept; the norms, the embedding and the head are as they were."""
    layout = ("Qwen3-8B", "tp2sppp1dp4do", 2, "engine.count=8")
    plain, found, ends = (
        planned(*layout, *more)
        for more in ((), ("engine.fp8=blockwise",), ("engine.fp8=blockwise", "fp8.high_precision_layers=2", *FP8))
    )
    linear = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288
    saved = linear * (2 - 1 - 4 / 128**2)
    assert plain.engine.weights - found.engine.weights == pytest.approx(36 * saved, rel=1e-6)
    assert plain.engine.weights - ends.engine.weights == pytest.approx(32 * saved, rel=1e-6)
    assert plain.sync_bytes - found.sync_bytes == pytest.approx(36 * saved, rel=1e-6)
    assert found.engine.cache - plain.engine.cache == pytest.approx(36 * saved, rel=1e-6)
    assert found.time.generate < plain.time.generate and found.time.sync < 0.6 * plain.time.sync
    experts = planned("Qwen3-30B-A3B", "pp2ep4dp8do", 3, "engine.count=8", "engine.fp8=blockwise").engine.weights
    assert experts < 0.53 * model_bytes(architecture("Qwen3-30B-A3B"), 2)
    note = "FP8 engines: published rollouts gain 1.1 to 1.4 times"
    assert note in page(found, 2, Reach(), []) and note not in page(plain, 2, Reach(), [])


def test_engines_in_fp8_read_and_multiply_codes() -> None:
    """Against sums by hand: a decoding step that reads all weights, and prefill of long questions that computes."""
    hf = architecture("Qwen3-8B")
    one = ("rollout.prompts_per_step=1", "rollout.attempts_per_prompt=1")

    def seconds(lengths: Lengths, *more: str) -> float:
        config = config_of("tp1", f"rollout.max_new_tokens={lengths.response}", *one, *more)
        return generation_seconds(config, hf, H100, lengths, Reach(), sequences=1)

    linear = 36 * (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288)
    rest = model_bytes(hf, 2) - 2 * linear  # norms, embedding and head stay in bf16
    short = Lengths(prompt=1, response=1000, teacher_prompt=1)
    cache = 501 * kv_bytes(hf, 2)
    for more, bytes_ in (((), 2.0), (("engine.fp8=blockwise",), 1 + 4 / 128**2)):
        read = (linear * bytes_ + rest + cache) / (3350e9 * 0.5)
        assert seconds(short, *more) == pytest.approx(1000 * read, rel=1e-4)
    long = Lengths(prompt=30_000, response=1, teacher_prompt=1)
    gained = seconds(long) - seconds(long, "engine.fp8=blockwise")
    products = 2 * 30_000 * linear / 0.4 * (1 / 989.4e12 - 1 / 1978.9e12)
    assert gained == pytest.approx(products + linear * (1 - 4 / 128**2) / (3350e9 * 0.5), rel=1e-4)


def test_fp8_engines_need_a_gpu_and_a_model_for_them() -> None:
    where = ("tp2sppp1dp4do", 2, "engine.count=8", "engine.fp8=blockwise")
    with pytest.raises(ConfigError, match=r"engine.fp8=blockwise needs a GPU with FP8 matrix products, which a100"):
        planned("Qwen3-8B", *where, gpu="a100-80gb")
    with pytest.raises(ConfigError, match="SGLang leaves out the scales of LlamaForCausalLM"):
        planned("Llama-3.1-8B", *where)


def test_without_nodes_a_plan_takes_those_that_the_recipe_fills() -> None:
    usual = (None, "h100-80gb", None, (None, None, None), False)
    assert "16 of 16 h100-80gb" in plan_words(recipe("ladder-8b"), *usual)
    assert "128 of 128 h100-80gb" in plan_words(recipe("llama3.3-70b-sdpo-16n"), *usual)
    colocated = plan_words(recipe("ladder-8b"), *usual, colocated=True)
    assert "8 of 8 h100-80gb" in colocated


def test_few_sequences_meet_few_experts() -> None:
    """A step of one sequence reads 8 of 128 experts; 256 sequences meet all but e^-16 of them."""

    def decoded(attempts: int) -> float:
        config = config_of("tp1", "rollout.prompts_per_step=1", f"rollout.attempts_per_prompt={attempts}")
        lengths = Lengths(1, 8192, 1)  # every response is the longest
        return generation_seconds(config, architecture("Qwen3-30B-A3B"), H100, lengths, Reach(), attempts) / 8192

    bandwidth = H100.memory_gb_s * 1e9 * Reach().memory
    cached = kv_bytes(architecture("Qwen3-30B-A3B"), 2) * (1 + 4096)
    experts = 48 * 128 * 3 * 2048 * 768 * 2
    met = model_bytes(architecture("Qwen3-30B-A3B"), 2) - experts
    assert decoded(1) == pytest.approx((met + experts / 16 + cached) / bandwidth, rel=1e-3)
    assert decoded(256) == pytest.approx((met + experts + 256 * cached) / bandwidth, rel=1e-3)


def test_an_engine_without_room_for_the_longest_sequence_does_not_fit() -> None:
    long = ("engine.count=8", "layout.recompute=full", "model.max_length=32768")
    found = planned("Qwen3-32B", "tp8sppp1dp2do", 4, *long)
    assert found.rank.total <= found.room and not found.fits
    assert "set engine.tensor_parallel higher" in page(found, 4, Reach(), [])
    assert planned("Qwen3-32B", "tp8sppp1dp2do", 4, *long, "engine.tensor_parallel=2").fits
    (line,) = planner.changes(found, architecture("Qwen3-32B"), 4, Reach())
    assert line.startswith("engine.tensor_parallel=2 engine.count=4: ")
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel 16 crosses nodes of 8 GPUs"):
        planned("Llama-3.3-70B", "tp8sppp4dp2do", 16, "engine.tensor_parallel=16")


def test_colocated_engines_have_what_the_trainer_leaves() -> None:
    config, hf = config_of("tp8spdp2do", "engine.count=8", "engine.tensor_parallel=2"), architecture("Qwen3-14B")
    apart = planner.plan(config, hf, 4, H100, LENGTHS, Reach())
    shared = planner.plan(config, hf, 2, H100, LENGTHS, Reach(), Sharing.COLOCATED)
    assert (apart.gpus, shared.gpus) == (32, 16)
    assert shared.rank == apart.rank and shared.room == apart.room - RESIDUE
    kept = shared.rank.weights + shared.rank.gradients + shared.rank.optimizer + shared.rank.teacher
    assert shared.engine.beside == kept
    assert apart.engine.cache - shared.engine.cache == pytest.approx(kept, rel=1e-6)
    assert shared.time.sync < apart.time.sync  # within the node
    ahead = apply_overrides(config, ["rollout.max_staleness=1"])
    time = planner.plan(ahead, hf, 2, H100, LENGTHS, Reach(), Sharing.COLOCATED).time
    assert time.total == time.generate + time.trainer  # they cannot overlap
    assert "take turns on the same GPUs, as engine.release_memory" in page(shared, 2, Reach(), [])
    text = plan_words(config, 2, "h100-80gb", "Qwen3-14B", (256, 2048, 2304), suggest=False, colocated=True)
    assert text == page(shared, 2, Reach(), [] if shared.fits else planner.changes(shared, hf, 2, Reach()))
    so_set = apply_overrides(config, ["engine.release_memory=true", "publish.backend=ipc"])
    assert plan_words(so_set, 2, "h100-80gb", "Qwen3-14B", (256, 2048, 2304), suggest=False) == text


def test_flops_are_those_of_a_run() -> None:
    """As launch/observation.py counts a batch's (flops.py), and what is computed again on top."""
    samples = [Sample(str(i), 0, (1,) * 256, (1,) * 2048, (0.0,) * 2048, (1,) * 2304, 1.0) for i in range(256)]
    config = config_of("tp8sppp4dp2do", "rollout.prompts_per_step=32", "rollout.attempts_per_prompt=8")
    hf = architecture("Llama-3.3-70B")
    counted = batch_flops(hf, samples, config.objective)
    assert step_flops(config, hf, LENGTHS).total == pytest.approx(counted, rel=1e-12)
    again = apply_overrides(config, ["layout.recompute=full", *FP8])
    flops = step_flops(again, hf, LENGTHS)
    assert flops.train.total == pytest.approx(4 * flops.score_student.total, rel=1e-12)


def test_the_architecture_is_the_models_the_named_or_the_one_the_directory_is_called_after(tmp_path: Path) -> None:
    config = config_of("tp1")
    assert planning.architecture(None, config) == Path(config.model.path)
    missing = apply_overrides(config, [f"model.path={tmp_path / 'Qwen3-8B'}"])
    assert planning.architecture(None, missing) == PUBLISHED / "Qwen3-8B"
    (tmp_path / "Qwen3-8B").mkdir()  # it is there, so it must be whole
    assert planning.architecture(None, missing) == tmp_path / "Qwen3-8B"
    assert planning.architecture("Qwen3-8B", config) == PUBLISHED / "Qwen3-8B"
    with pytest.raises(ConfigError, match=f"--architecture {tmp_path} has no config.json; set it to a Hugging Face"):
        planning.architecture(str(tmp_path), config)


def test_what_does_not_fit_is_told_what_would() -> None:
    found = planned("Qwen3-8B", "tp2spdp2do", 1, "engine.count=4")
    assert not found.fits
    lines = planner.changes(found, architecture("Qwen3-8B"), 1, Reach())
    assert any(line.startswith("layout.recompute=full: ") for line in lines)
    for line in lines:
        words = line.split(":")[0]
        extra = ["layout.world_size=8"] if words == "layout.tensor_parallel=8" else []
        assert planned("Qwen3-8B", "tp2spdp2do", 1, "engine.count=4", words, *extra).fits
    text = page(found, 1, Reach(), lines)
    assert "it does not fit: a trainer rank lacks" in text and "would fit: layout.recompute=full" in text


def test_a_gpu_with_more_memory_fits_more() -> None:
    assert not planned("Qwen3-8B", "tp2spdp2do", 1, "engine.count=4").fits
    assert planned("Qwen3-8B", "tp2spdp2do", 1, "engine.count=4", gpu="h200-141gb").fits


@pytest.mark.parametrize(
    "name, layout, nodes, more, words",
    [
        ("Qwen3-8B", "tp4dp2", 1, (), r"8 trainer ranks and 1 engines of 1 GPUs need 9 GPUs, but 1 node\(s\) have 8"),
        ("Llama-3.3-70B", "tp64", 9, (), "does not divide the model's 8 key-value heads"),
        ("Qwen2.5-7B", "tp8", 2, (), "does not divide the model's 28 attention heads"),
        ("Qwen3-14B", "pp3", 1, (), "does not divide the model's 40 layers"),
        ("Qwen3-8B", "tp1", 1, ("layout.world_size=3", "layout.tensor_parallel=2"), "is not a multiple of"),
    ],
)
def test_layouts_that_cannot_work_are_refused(
    name: str, layout: str, nodes: int, more: Sequence[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(name, layout, nodes, *more)


def test_suggested_layouts_fit_and_are_ranked() -> None:
    config, hf = config_of("tp8sppp4dp2do", "engine.count=8", "engine.tensor_parallel=8"), architecture("Llama-3.3-70B")
    found = planner.suggest(config, hf, 16, H100, LENGTHS, Reach())
    fitting = [plan for plan in found if plan.fits]
    assert fitting and found[: len(fitting)] == fitting
    seconds = [plan.time.total for plan in fitting]
    assert seconds == sorted(seconds)
    assert all(plan.config.layout.world_size == 64 for plan in found)
    text = ranking(found, 3)
    assert text.splitlines()[1].startswith(layout_name(fitting[0].config.layout))
    for plan in fitting[:5]:  # a name says all that --layout needs
        again = apply_overrides(recipe("minipipe"), layout_overrides(layout_name(plan.config.layout))).layout
        same = ("tensor_parallel", "pipeline_parallel", "context_parallel", "sequence_parallel", "world_size")
        assert all(getattr(again, key) == getattr(plan.config.layout, key) for key in same)
    small = dataclasses.replace(config, layout=config_of("tp8").layout)
    assert ranking(planner.suggest(small, hf, 16, H100, LENGTHS, Reach()), 3).endswith("none fits")


def test_time_moves_with_what_it_is_made_of() -> None:
    def seconds(*more: str, gpu: str = "h100-80gb", layout: str = "tp4sppp1dp2do", **lengths: int) -> Any:
        mean = dataclasses.replace(LENGTHS, **lengths)
        config = config_of(layout, "engine.count=8", *more)
        return planner.plan(config, architecture("Qwen3-8B"), 2, GPUS[gpu], mean, Reach()).time

    plain = seconds()
    assert seconds("layout.recompute=full").train == pytest.approx(plain.train * 4 / 3, rel=0.05)
    assert seconds(teacher_prompt=4608).score_teacher > 1.4 * plain.score_teacher
    assert seconds("objective.kind=grpo").score_teacher == 0.0
    assert seconds("objective.kind=next_token").score_student == 0.0
    assert seconds(layout="tp4sppp2dp1").train > plain.train  # a pipeline waits
    assert seconds(gpu="h200-141gb").generate < plain.generate
    assert plain.total == pytest.approx(plain.generate + plain.trainer)
    assert seconds("rollout.max_staleness=1").total == max(plain.generate, plain.trainer)
    # 6 N D at 40 % of eight GPUs; attention, head and what tensor ranks exchange come on top
    flops = 3 * 2 * 7_568_000_000 * 256 * 2304
    assert 1.0 < plain.train / (flops / (8 * 989.4e12 * Reach().training)) < 1.4


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu v100 is not known; known are a100-80gb"):
        gpu_of("v100")


@pytest.mark.parametrize("suggest", [False, True])
@pytest.mark.parametrize(
    "nodes, lengths, words",
    [
        (0, (None, None, None), "--nodes is 0; it must be at least 1"),
        (1, (-5, None, None), "--prompt-tokens is -5; it must be at least 1"),
        (1, (None, 0, None), "--response-tokens is 0; it must be at least 1"),
        (1, (None, 9000, None), "--response-tokens 9000 is beyond rollout.max_new_tokens 8192"),
        (1, (None, None, None), r"8 trainer ranks and 1 engines of 1 GPUs need 9 GPUs, but 1 node\(s\) have 8"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    nodes: int, lengths: tuple[int | None, ...], words: str, suggest: bool
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_words(config_of("tp4dp2"), nodes, "h100-80gb", "Qwen3-8B", lengths, suggest)


def test_a_large_recipe_is_planned_without_its_model() -> None:
    text = plan_words(recipe("llama3.3-70b-sdpo-16n"), 16, "h100-80gb", None, (None, None, None), suggest=False)
    lines = {line.split("  ")[1]: line.split()[-1] for line in text.splitlines() if line.startswith("  ")}
    assert text.endswith("it fits") and "predicted, not yet compared with a run on GPUs" in text
    assert float(lines["FP8 copies of weights"]) > 4.0
    assert "  weights to engines: 141.11 GB to each of 8" in text.splitlines()
    with pytest.raises(ConfigError, match=r"need 128 GPUs, but 8 node\(s\) have 64"):
        plan_words(recipe("llama3.3-70b-sdpo-16n"), 8, "h100-80gb", None, (None, None, None), suggest=False)


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megatron_sdpo.cli", "plan", "minipipe"]
    done = subprocess.run([*command, "--layout=tp1"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("it fits"), done.stderr
    done = subprocess.run([*command, "--architecture=GPT-5"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "is neither a directory nor one of Llama-3.1-8B" in done.stderr
