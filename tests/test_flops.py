"""flops.py against what torch counts in transformers' forward pass, and by hand."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sdpo import flops
from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.types import Sample
from tests import hf_reference
from tests.tiny_model import write_tiny_checkpoint

ONE = {  # by hand: one layer, one head
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 8,
    "vocab_size": 10,
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_forward_pass_has_the_flops_that_torch_counts(family: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, 0, family, kv_heads=2)
    hf_config, n = read_hf_config(tmp_path), 11
    model = hf_reference._load(tmp_path)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, n, dtype=torch.int64))
    everything = flops.Tokens(n, n * n, n)  # transformers also multiplies what a causal mask then hides
    angles = hf_config["head_dim"] * n  # which transformers makes by a product
    assert flops.forward_flops(hf_config, everything) == counter.get_total_flops() - angles


def test_flops_by_hand() -> None:
    assert flops.counted([(2, 1), (3, 2)]) == flops.Tokens(8, 6 + 15, 3)
    per_token = 2 * (4 * 4 * 4 + 3 * 4 * 8)
    assert flops.forward_flops(ONE, flops.counted([(2, 1)])) == 3 * per_token + 4 * 6 * 4 + 2 * 4 * 10
    experts = {**ONE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
    assert flops.layer_parameters(experts) == 4 * 4 * 4 + 4 * 8 + 2 * 3 * 4 * 3


def test_a_batch_counts_every_pass_of_its_objective() -> None:
    def sample(teacher: tuple[int, ...] | None) -> Sample:
        return Sample("0/0/0", 0, (1, 2), (3, 4, 5), (), teacher, 0.0)

    samples = [sample(None), sample((1, 2, 3, 4))]
    student = 2 * flops.forward_flops(ONE, flops.counted([(2, 3)]))
    teacher = flops.forward_flops(ONE, flops.counted([(4, 3)]))
    cases = {
        "next_token": (ObjectiveConfig(kind="next_token"), 3 * student),
        "grpo": (ObjectiveConfig(kind="grpo"), 4 * student),
        "penalised": (ObjectiveConfig(kind="grpo", kl_coefficient=0.1), 5 * student),
        "sdpo": (ObjectiveConfig(), 4 * student + teacher),
        "hybrid": (ObjectiveConfig(kind="hybrid"), 4 * student + teacher),
    }
    for name, (objective, expected) in cases.items():
        assert flops.batch_flops(ONE, samples, objective) == expected, name


def test_sampling_reads_a_prompt_once_for_all_attempts_at_it() -> None:
    """Two attempts of 3 and 1 tokens at a prompt of 2, one of 1 token at the same words in another group."""
    samples = [
        Sample("0/0/0", 0, (1, 2), (3, 4, 5), (), None, 0.0),
        Sample("0/0/1", 0, (1, 2), (3,), (), None, 0.0),
        Sample("0/1/0", 1, (1, 2), (3,), (), None, 0.0),
    ]
    read, attended = 2 + 2, 3 + 3  # two prompts, each of 1 + 2 pairs
    sampled, seen = 3 + 1 + 1, (3 + 4 + 5) + 3 + 3
    by_hand = flops.forward_flops(ONE, flops.Tokens(read + sampled, attended + seen, sampled))
    assert flops.generation_flops(ONE, samples) == by_hand


def test_a_known_gpu_has_a_peak_and_a_cpu_none() -> None:
    assert flops.peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert flops.peak_tflops("AMD EPYC 9654") is None
