"""FLOPs of a model, counted from its configuration: matrix products and attention, a multiply and an add each.

Norms, rotary embedding and softmax are left out, as is usual; a causal token attends to itself and those before it;
the head meets response positions only. What is computed twice to save memory (activation recompute) is no *model* FLOP
and does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.types import Sample

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 TFLOP/s of a GPU by a part of its name, as the manufacturer states them (SXM)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One pass over some sequences. Example: prompts of 2 and 3 tokens, a response of 1 each: ``Tokens(7, 16, 2)``."""

    tokens: int
    pairs: int
    """Of a token and one that it attends to: the sum of n (n + 1) / 2 over lengths n."""
    responses: int
    """Tokens whose prediction meets the head."""


NO_TOKENS = Tokens(0, 0, 0)


def counted(lengths: Sequence[tuple[int, int]]) -> Tokens:
    """From (prompt tokens, response tokens) of each sequence."""
    whole = [prompt + response for prompt, response in lengths]
    return Tokens(sum(whole), sum(n * (n + 1) // 2 for n in whole), sum(response for _, response in lengths))


def layer_parameters(hf_config: Mapping[str, Any]) -> int:
    """Weights of one layer that a token is multiplied by; of a mixture of experts those of its chosen ones."""
    width, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    d = hf_config.get("head_dim") or width // heads
    groups = hf_config.get("num_key_value_heads") or heads
    attention = width * d * (2 * heads + 2 * groups)
    if experts := hf_config.get("num_experts"):
        chosen = hf_config["num_experts_per_tok"]
        return attention + width * experts + 3 * width * hf_config["moe_intermediate_size"] * chosen
    return attention + 3 * width * hf_config["intermediate_size"]


def forward_flops(hf_config: Mapping[str, Any], tokens: Tokens) -> int:
    """One forward pass. Backward is twice as much."""
    heads, width = hf_config["num_attention_heads"], hf_config["hidden_size"]
    d = hf_config.get("head_dim") or width // heads
    layers = hf_config["num_hidden_layers"]
    linear = 2 * tokens.tokens * layers * layer_parameters(hf_config)
    attention = 4 * tokens.pairs * layers * heads * d  # scores, and the weighted sum of values
    return linear + attention + 2 * tokens.responses * width * hf_config["vocab_size"]


def batch_passes(samples: Sequence[Sample], objective: ObjectiveConfig) -> tuple[Tokens, int, Tokens]:
    """The student's view of a generation batch, how often it is only scored (also as reference), the teacher's view.

    Besides these passes every response is trained once, in whichever mini-batch, also where its weight is zero.
    Successes that ``sample_weighting=failed_only`` keeps from the teacher are counted as scored.
    """
    student = counted([(len(s.prompt_ids), len(s.response_ids)) for s in samples])
    scorings = 0 if objective.kind == "next_token" else 2 if objective.kl_coefficient else 1
    views = [(len(s.teacher_prompt_ids), len(s.response_ids)) for s in samples if s.teacher_prompt_ids is not None]
    return student, scorings, counted(views if objective.has_teacher else [])


def batch_tokens(samples: Sequence[Sample], objective: ObjectiveConfig) -> int:
    """Tokens of prompts and responses in all passes over a generation batch, without padding."""
    student, scorings, teacher = batch_passes(samples, objective)
    return (1 + scorings) * student.tokens + teacher.tokens


def pass_flops(hf_config: Mapping[str, Any], samples: Sequence[Sample], objective: ObjectiveConfig) -> dict[str, int]:
    """Of a generation batch's passes in the trainer, by phase; training is three forward passes."""
    student, scorings, teacher = batch_passes(samples, objective)
    forward = forward_flops(hf_config, student)
    return {
        "score_student": scorings * forward,
        "score_teacher": forward_flops(hf_config, teacher),
        "train": 3 * forward,
    }


def batch_flops(hf_config: Mapping[str, Any], samples: Sequence[Sample], objective: ObjectiveConfig) -> int:
    """Of all passes over a generation batch in the trainer."""
    return sum(pass_flops(hf_config, samples, objective).values())


def generation_flops(hf_config: Mapping[str, Any], samples: Sequence[Sample]) -> int:
    """Of sampling the responses: a prompt once for all attempts at it (engines keep it), then token by token.

    A model FLOP count, as that of training is: of attempts that reached the trainer, by a model in full.
    """
    prompts = {(s.group, s.prompt_ids) for s in samples}
    read = counted([(len(ids), 0) for _, ids in prompts])
    whole = counted([(len(s.prompt_ids), len(s.response_ids)) for s in samples])
    asked = counted([(len(s.prompt_ids), 0) for s in samples])
    once = Tokens(read.tokens - asked.tokens, read.pairs - asked.pairs, 0)
    return forward_flops(hf_config, Tokens(whole.tokens + once.tokens, whole.pairs + once.pairs, whole.responses))


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name; None for one that is not known (and for CPUs)."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)
