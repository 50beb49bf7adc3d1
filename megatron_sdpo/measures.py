"""What every number of a row of ``metrics.jsonl`` means: for people, in ``megatron-sdpo metrics`` and the report.

A number that a run records and that is not here fails a test (tests/test_measures.py), as does one that no code writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LARGEST = "/max"
"""After the name of a mean over tokens: the largest of them."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Example: ``Measure("s", "publishing the new weights")``"""

    unit: str
    """Empty for a number without one; ``share`` lies between 0 and 1."""
    words: str


_SLOWEST = "by which its own work in the phase {} is more"
MEASURES: dict[str, Measure] = {
    "step": Measure("", "version of the weights: row v is about the batch that made version v of v - 1"),
    "generations": Measure("attempts", "sampled for training so far"),
    "eval/accuracy": Measure("reward", "mean of all attempts at held-out questions (avg@evaluation.attempts)"),
    "eval/any_correct": Measure("share", "of held-out questions with a reward above 0 among their attempts"),
    "eval/response_tokens": Measure("tokens", "mean length of held-out responses"),
    "rollout/response_tokens": Measure("tokens", "mean length of the batch's responses"),
    "rollout/cut_share": Measure("share", "of responses that ended at rollout.max_new_tokens"),
    "rollout/engines_replaced": Measure("engines", "that ended or hung, replaced so far"),
    "rollout/staleness": Measure("versions", "by which the weights that sampled were older than those trained, mean"),
    "verdict/reward": Measure("reward", "mean of the batch's attempts"),
    "verdict/solved_questions": Measure("share", "of the batch's questions with a reward above 0 among their attempts"),
    "context/demonstration": Measure("share", "of attempts whose teacher reads a successful attempt, no feedback"),
    "context/feedback": Measure("share", "of attempts whose teacher reads feedback, no successful attempt"),
    "context/both": Measure("share", "of attempts whose teacher reads both"),
    "context/none": Measure("share", "of attempts about which there is nothing to tell: no target"),
    "context/dropped": Measure("share", "of attempts whose teacher context was too long: no target"),
    "context/shortened": Measure("share", "of attempts whose teacher context was cut in the middle"),
    "context/attempt_shown": Measure("share", "of attempts that their teacher reads too"),
    "loss/total": Measure("", "what is minimised, all weights in it; falling need not mean better"),
    "loss/tokens": Measure("tokens", "with a weight in the loss, of one optimizer step"),
    "loss/divergence": Measure("nats", "between student and teacher, mean over tokens (objective.alpha says which)"),
    "loss/entropy": Measure("nats", "of the policy at a token, mean; towards 0 it explores no more"),
    "loss/drift_weight": Measure("", "importance weight pi_theta / pi_old, capped, mean over tokens; 1 on-policy"),
    "loss/mismatch": Measure("nats", "|log-prob of the trainer - log-prob of the engine| of sampled tokens, mean"),
    "loss/mismatch_weight": Measure("", "importance weight pi_old / pi_engine, capped, mean over tokens; 1 without"),
    "loss/ratio": Measure("", "GRPO: pi_theta / pi_old, mean over tokens"),
    "loss/clipped": Measure("share", "GRPO: of tokens whose loss is clipped"),
    "loss/reference_kl": Measure("nats", "GRPO: KL to the model at the start, estimated at sampled tokens, mean"),
    "loss/cross_entropy": Measure("nats", "of the given tokens, mean (objective.kind=next_token)"),
    "precision/floor": Measure("nats", "KL a token between student and teacher of the same weights: precision alone"),
    "optim/lr": Measure("", "learning rate of the batch, damping in it"),
    "optim/grad_norm": Measure("", "of the gradient before it is clipped (optim.clip_grad), mean over mini-batches"),
    "optim/guard": Measure("", "factor of the collapse guard; 1: it does nothing"),
    "optim/padding_share": Measure("share", "of the trained tokens that only fill a micro-batch up"),
    "optim/skipped_steps": Measure("steps", "of the optimizer left out as spikes (spikes.policy=skip)"),
    "flops/generate": Measure("FLOP", "of the model to sample the batch's attempts, a prompt once for all at it"),
    "flops/score_student": Measure("FLOP", "of the model in the student's scoring passes over the batch"),
    "flops/score_teacher": Measure("FLOP", "of the model in the teacher's"),
    "flops/train": Measure("FLOP", "of the model in training passes, forward and backward"),
    "perf/shared_tokens": Measure(
        "tokens", "that scoring passes did not compute again, as siblings read them once (layout.share_prefixes)"
    ),
    "perf/tokens_per_s": Measure("tokens/s", "of prompts and responses in all passes, of the whole trainer"),
    "perf/tflops_per_rank": Measure("TFLOP/s", "of the model in all passes, of one rank; what is recomputed not in it"),
    "perf/mfu": Measure("share", "the same, of the GPU's dense bf16 peak"),
    "perf/memory_gb": Measure(
        "GB", "most that the first rank has held so far: of its GPU in tensors, without one of the process"
    ),
    "perf/slowest_rank": Measure("", "the rank with the most own work beyond that of its likes"),
    "perf/slowest_share": Measure("share", "by which its own work is more than that of its likes"),
    "perf/slowest_seconds/score_student": Measure("s", _SLOWEST.format("score_student")),
    "perf/slowest_seconds/score_teacher": Measure("s", _SLOWEST.format("score_teacher")),
    "perf/slowest_seconds/train": Measure("s", _SLOWEST.format("train")),
    "sync/bytes": Measure("bytes", "of weights sent to an engine"),
    "sync/probe_gap": Measure("nats", "largest difference of a probe's log-prob, trainer to engine, after publishing"),
    "sync/released_bytes": Measure("bytes", "that engines on the trainer's GPUs gave back while it trained"),
    "sync/seconds": Measure("s", "from the first bucket to the last engine's confirmation"),
    "time/generate": Measure("s", "until the batch's last response; beside training if rollout.max_staleness is not 0"),
    "time/verify": Measure("s", "that verdicts took beyond that"),
    "time/wait": Measure("s", "that the trainer waited for the batch"),
    "time/score_student": Measure("s", "old log-probs and the student's most probable tokens"),
    "time/score_teacher": Measure("s", "the teacher's log-probs of these, in its context"),
    "time/train": Measure("s", "training passes, optimizer, teacher's update"),
    "time/sync": Measure("s", "publishing the new weights"),
    "time/step": Measure("s", "all of the trainer's step: wait, both scorings, train, sync"),
    "time/evaluate": Measure("s", "held-out questions, after the step"),
    "time/checkpoint": Measure("s", "that the checkpoint after the step before kept training waiting"),
    "time/checkpoint_background": Measure("s", "writing a checkpoint beside training, in the row when it was complete"),
}


def measure(key: str) -> Measure | None:
    """What a key means; None for one that nobody has described."""
    if key in MEASURES:
        return MEASURES[key]
    mean = MEASURES.get(key.removesuffix(LARGEST)) if key.endswith(LARGEST) else None
    if mean is None:
        return None
    return Measure(
        mean.unit, "largest of all tokens: " + mean.words.replace(", mean over tokens", "").replace(", mean", "")
    )


def in_order(keys: Iterable[str]) -> list[str]:
    """As they are listed here, a maximum after its mean; those that are not described last."""
    places = {key: place for place, key in enumerate(MEASURES)}
    return sorted(keys, key=lambda key: (places.get(key.removesuffix(LARGEST), len(places)), key))


def shown(value: Any) -> str:
    """A value for a table. Example: ``0.01234`` -> ``0.0123``; None, which was not finite, ``not finite``."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
