"""The planner against formulas, memory and speeds that others have published; each with its source and tolerance.

A tolerance is what was found and a little more: it says how far to trust a plan, and holds it there.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from megatron_sdpo.config import Config, apply_overrides, layout_overrides
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.launch.planning import PUBLISHED
from megatron_sdpo.scaling import planner
from megatron_sdpo.scaling.assumed import Lengths, Reach
from megatron_sdpo.scaling.engines import Sharing
from megatron_sdpo.scaling.hardware import GPUS
from megatron_sdpo.scaling.memory import MOMENTS, activations, held, layer_items, rank_memory
from recipes import recipe

MIB, GIB = 2**20, 2**30

KORTHIKANTI = {  # name: heads, hidden size, layers, tokens, tensor, pipeline, virtual pipeline, sequences at once
    "22B": (64, 6144, 48, 2048, 8, 1, 1, 4),
    "175B": (96, 12288, 96, 2048, 8, 8, 3, 1),
    "530B": (128, 20480, 105, 2048, 8, 35, 3, 1),
    "1T": (160, 25600, 128, 2048, 8, 64, 1, 1),
}
"""The models of Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198."""


def pretraining(layout: str, length: int, *more: str) -> Config:
    """Rows of one sequence of ``length``, no teacher, no scoring."""
    return apply_overrides(
        recipe("minipipe"),
        [
            *("model.dtype=bfloat16", "objective.kind=next_token", "engine.max_total_tokens=none"),
            *(f"model.max_length={length}", f"layout.tokens_per_micro_batch={length}", "optim.mini_batches=1"),
            *layout_overrides(layout),
            *more,
        ],
    )


def gpt(name: str) -> tuple[dict[str, Any], str, int]:
    """The paper's model in our terms, its layout, and tokens of a micro-batch.

    A plain MLP of 4 H keeps what a gated one of 8/3 H does: 8 H numbers.
    """
    heads, hidden, layers, length, tensor, pipeline, virtual, sequences = KORTHIKANTI[name]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": heads, "head_dim": hidden // heads, "intermediate_size": hidden * 8 / 3}
    return shape, f"tp{tensor}pp{pipeline}" + f"vp{virtual}" * (virtual > 1), sequences * length


@pytest.mark.parametrize("name", KORTHIKANTI)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_of_a_layer_are_those_of_the_paper(name: str, sequence_parallel: bool) -> None:
    """Exactly sbh (10 + 24 / t), with sequence parallelism sbh 34 / t: without the term 5as / h of attention's softmax
    and dropout, which flash attention does not keep. Ours have no dropout, and rotate."""
    hf, layout, tokens = gpt(name)
    hidden, t = hf["hidden_size"], KORTHIKANTI[name][4]
    config = pretraining(layout.replace(f"tp{t}", f"tp{t}sp") if sequence_parallel else layout, tokens)
    items = layer_items(config, hf, on_cpu=False, fp8=False)
    masks = 2 * hidden / (t if sequence_parallel else 1)
    paper = hidden * (34 / t if sequence_parallel else 10 + 24 / t)
    assert items.pop("rotated") == 4 * hidden / t
    assert sum(items.values()) + masks == pytest.approx(paper, rel=1e-12)


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_layers_in_flight_are_those_of_the_paper(name: str) -> None:
    """L on the first stage, interleaved L (1 + (p - 1) / (p m)); with everything computed again, 2sbh of each."""
    hf, layout, tokens = gpt(name)
    _, hidden, layers, _, _, pipeline, virtual, _ = KORTHIKANTI[name]
    config = pretraining(layout, tokens, "layout.recompute=full")
    factor = 1 + (pipeline - 1) / (pipeline * virtual) if virtual > 1 else 1
    assert activations(config, hf, 0, tokens) == pytest.approx(layers * factor * 2 * tokens * hidden, rel=1e-9)


LLAMA2_7B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("stage", "measured"), [(0, 30227.6), (1, 25079.3), (2, 20931.0), (3, 20115.1)])
def test_peaks_of_llama_2_7b_on_four_pipeline_stages(stage: int, measured: float) -> None:
    """Within 8 %. Megatron-LM's "max allocated" (MiB) after the first iteration on 8 GPUs of 48 GB, TP 1, PP 4, the
    distributed optimizer over 2: Infinigence AI, "NVIDIA 4090 / 4090D: best practice for training", 1 August 2025.
    Its throughput says that sequences have 4096 tokens; one in a micro-batch is our reading.

    In the first iteration the moments come only after the passes, so the peak is the passes' without them, or what
    stands afterwards.
    """
    config = pretraining("pp4dp2do", 4096)
    memory = rank_memory(config, LLAMA2_7B, stage)
    moments = MOMENTS * held(LLAMA2_7B, config.layout, stage).divided(config.layout)
    assert max(memory.total - moments, memory.standing) / MIB == pytest.approx(measured, rel=0.08)


def test_peak_of_qwen3_30b_a3b_on_sixteen_gpus() -> None:
    """Within 15 %: 61.35 GB on H100, BF16, one sequence in a micro-batch, nothing computed again: pull request 3880 of
    github.com/NVIDIA-NeMo/Megatron-Bridge, whose benchmarks cut this model into TP 1, PP 2, VP 12, EP 8 and have
    sequences of 4096. Whether its GB are 10^9 bytes or GiB is not said; in GiB we are within 8 %."""
    hf = read_hf_config(PUBLISHED / "Qwen3-30B-A3B")
    config = pretraining("pp2vp12ep8dp8do", 4096)
    peak = max(rank_memory(config, hf, stage).total for stage in range(2))
    assert 61.35e9 < peak < 61.35 * GIB * 1.08
    assert peak == pytest.approx(61.35e9, rel=0.15)


@pytest.mark.parametrize(
    ("name", "layout", "length", "sequences", "published", "lowest", "highest"),
    [
        ("Llama-3.3-70B", "tp4sppp8vp5dp2do", 8192, 256, 1621, 0.75, 1.0),
        ("Llama-3.1-8B", "dp8do", 8192, 128, 14451, 0.8, 1.0),  # published with FSDP
        ("Qwen3-30B-A3B", "pp2vp12ep8dp8do", 4096, 1024, 5113, 0.9, 1.25),
    ],
)
def test_tokens_a_second_of_pretraining_in_fp8(
    name: str, layout: str, length: int, sequences: int, published: int, lowest: float, highest: float
) -> None:
    """Training passes on H100, one scale a tensor: docs/performance-summary-archive.md of
    github.com/NVIDIA-NeMo/Megatron-Bridge (26.02; Llama 3 8B: 25.11). These are tuned; a plan stays below them where
    the model is dense."""
    config = pretraining(
        layout,
        length,
        *("fp8.student=tensorwise", "layout.overlap_grad_reduce=true", f"rollout.max_new_tokens={length - 1}"),
        *(f"rollout.prompts_per_step={sequences}", "rollout.attempts_per_prompt=1"),
    )
    lengths = Lengths(1, length - 1, 1)
    hf, nodes = read_hf_config(PUBLISHED / name), config.layout.world_size // 8 + 1
    time = planner.plan(config, hf, nodes, GPUS["h100-80gb"], lengths, Reach()).time
    reached = sequences * length / (time.train + time.exchange) / config.layout.world_size
    assert lowest < reached / published < highest


@pytest.mark.parametrize(
    ("name", "layout", "engines", "nodes", "mean", "ahead", "published", "lowest"),
    [
        ("Llama-3.1-8B", "pp2dp8do", (16, 1), 2, 1060, False, 97.7, 0.65),
        ("Llama-3.1-8B", "pp2dp4do", (8, 1), 2, 1129, True, 74.6, 0.65),
        ("Qwen3-32B", "tp4sppp4dp2do", (8, 4), 4, 3206, False, 393, 0.75),
        ("Qwen3-32B", "tp4sppp4dp2do", (8, 4), 8, 3207, True, 215, 0.75),
        ("Qwen3-30B-A3B", "tp2spep8et1dp16do", (8, 4), 4, 3154, False, 225, 0.45),
    ],
)
def test_seconds_of_reinforcement_learning_steps(
    name: str,
    layout: str,
    engines: tuple[int, int],
    nodes: int,
    mean: int,
    ahead: bool,
    published: float,
    lowest: float,
) -> None:
    """GRPO on H100 in BF16, 2048 samples in 4 mini-batches, responses up to 4096: docs/about/performance-summary.md of
    github.com/NVIDIA-NeMo/RL (v0.4). On policy its engines take turns with the trainer on the same GPUs; one step off
    they have half of them. A plan is too fast, by up to a third where the model is dense, by half with experts: it
    knows no time between phases and no verifiers, and believes that all engines finish together."""
    count, tensor = engines
    config = pretraining(
        layout,
        4096,
        *("objective.kind=grpo", "objective.kl_coefficient=0.01", "optim.mini_batches=4"),
        *("rollout.prompts_per_step=64", "rollout.attempts_per_prompt=32", "rollout.max_new_tokens=3900"),
        *(f"engine.count={count}", f"engine.tensor_parallel={tensor}", "engine.max_running_requests=1024"),
        *("layout.overlap_grad_reduce=true", f"rollout.max_staleness={int(ahead)}"),
    )
    sharing = Sharing.SEPARATE if ahead else Sharing.COLOCATED
    hf, lengths = read_hf_config(PUBLISHED / name), Lengths(150, mean - 150, 1)
    plan = planner.plan(config, hf, nodes, GPUS["h100-80gb"], lengths, Reach(), sharing)
    assert plan.gpus == nodes * 8
    assert lowest < plan.time.total / published < 1.0
