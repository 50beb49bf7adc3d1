"""What is minimised: SDPO, GRPO, their hybrid and plain next-token loss, as pure functions of tensors.

The loss of a mini-batch is one plain weighted sum over its response tokens,

    L = sum_i w_i sum_t loss_it

and everything about aggregation is in the weights, which ``credit.token_weights`` makes once from the counts of
the whole mini-batch. So any split into micro-batches, ranks or packings gives the same loss and the same
gradient when their sums are added; nobody divides again. The hybrid adds two such sums, each with the weights
that it has alone: samples without a teacher context count in GRPO's and not in SDPO's.

Two importance weights, both detached and both of the sampled token, multiply a token's loss:

    policy drift      min(pi_theta / pi_old, policy_drift_clip)       SDPO only; GRPO clips the ratio itself
    engine mismatch   min(pi_old / pi_engine, engine_mismatch_cap)

``pi_old`` is the trainer's policy when the batch began, ``pi_engine`` the engine's at sampling.

``loss`` is a function of logits. Training calls ``loss_of_hidden``, which makes them a chunk of tokens at a time:
one more split of the same sum.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo.config import ObjectiveConfig
from megatron_sdpo.credit import sampled_advantages
from megatron_sdpo.divergence import divergence, full_divergence
from megatron_sdpo.fused import Head, fused_loss
from megatron_sdpo.vocabulary import Reading, read, sampled_log_probs

Metrics = dict[str, Tensor]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp; e^20 is far beyond every cap in use."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How the logits' vocabulary is held. Example: ``Vocabulary()`` is whole, in logits that somebody else needs."""

    group: dist.ProcessGroup | None = None
    """Ranks that share it."""
    overwrite: bool = False
    """The backward pass may write the gradient over the logits (``vocabulary.BinLogProbs``)."""


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """What the T response positions of one micro-batch are trained towards, in the order of the logits' rows.

    Float tensors are fp32, logs natural. Optional fields are None where the objective has no use for them;
    ``old_log_probs_T`` None says that the policy has not moved since the batch began (one optimizer step
    per batch), ``engine_log_probs_T`` None that no engine sampled this text.
    """

    response_ids_T: Tensor
    """int64, the tokens that were sampled; these the logits of their rows predict."""
    weights_T: Tensor
    """The weight w_i of each token's sample, from ``credit.token_weights``; in the hybrid, its weight in SDPO's sum."""
    old_log_probs_T: Tensor | None = None
    engine_log_probs_T: Tensor | None = None
    support_ids_TK: Tensor | None = None
    """int64, SDPO: the student's top-K ids."""
    teacher_log_probs_TK: Tensor | None = None
    """SDPO: the teacher's log-probs at these ids, in column K + 1 its tail if known; or [T, 1] at the sampled token."""
    teacher_logits_TV: Tensor | None = None
    """SDPO over the whole vocabulary: the teacher's logits, divided by the temperature, cut as the student's."""
    teacher_hidden_TH: Tensor | None = None
    """Instead of these, for ``loss_of_hidden``: the teacher's final hidden states, in any float dtype."""
    advantages_T: Tensor | None = None
    """GRPO: the advantage of each token's sample."""
    reference_log_probs_T: Tensor | None = None
    """GRPO with a penalty: log-probs of the sampled tokens under the reference."""
    teacher_advantages_T: Tensor | None = None
    """SDPO with one advantage a sequence: that of each token's sample, from ``credit.sequence_advantages``."""
    policy_weights_T: Tensor | None = None
    """hybrid: the weight of each token's sample in GRPO's sum."""

    def rows(self, index: Tensor | slice) -> "TokenTargets":
        """The targets of some positions; ``index`` int64, or a slice."""
        present = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: x[index] for name, x in present.items() if x is not None})


def loss_of_hidden(
    hidden_TH: Tensor,
    head: Head,
    targets: TokenTargets,
    config: ObjectiveConfig,
    teacher_head: Head | None = None,
) -> tuple[Tensor, Metrics]:
    """``loss`` of ``head.logits(hidden_TH)``, with gradient to ``hidden_TH`` and the head; a chunk at a time.

    ``teacher_head`` makes logits of ``targets.teacher_hidden_TH``, one chunk's as the student's. Rows of weight
    zero never meet a head.
    """
    hidden_TH, targets = _kept(hidden_TH, targets, _counted(targets, config))
    vocabulary = Vocabulary(head.group, overwrite=config.kind != "hybrid")  # whose two terms read the logits backward
    whole = config.has_teacher and config.support == "vocabulary"

    def loss_of(logits_CV: Tensor, rows: slice) -> tuple[Tensor, Metrics]:
        chunk = targets.rows(rows)
        if whole and teacher_head is not None and chunk.teacher_hidden_TH is not None:
            with torch.no_grad():
                chunk = dataclasses.replace(chunk, teacher_logits_TV=teacher_head.logits(chunk.teacher_hidden_TH))
        return _weighted_sum(logits_CV, chunk, config, vocabulary)

    value, metrics = fused_loss(hidden_TH, head, loss_of)
    return value, combined(metrics)


def combined(parts: Sequence[Metrics]) -> Metrics:
    """The metrics of a whole from those of its parts: sums of sums, maxima of maxima."""
    columns = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return {key: column.max() if key.endswith("/max") else column.sum() for key, column in columns.items()}


def loss(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Metrics]:
    """Weighted sum of the token losses (fp32 scalar, gradient to ``logits_TV``), and metrics.

    ``logits_TV`` [T, V] are the logits that predict ``targets.response_ids_T``, divided by the sampling
    temperature; the vocabulary may be cut over ``group``. A token of weight zero (in the hybrid, of both
    weights) is left out before anything is computed, so it has no influence whatever its numbers are. T = 0
    gives a zero that is connected to the logits.

    Metrics are detached fp32 scalars over the tokens of nonzero weight: a key that ends in ``/max`` is a
    maximum, every other key a sum, which divided by ``loss/tokens`` is a mean over tokens. Keys are the
    same for every micro-batch of a run; in the hybrid a token without a target adds nothing to SDPO's sums.
    ``ValueError`` when ``targets`` lacks what the kind needs.
    """
    return _weighted_sum(*_kept(logits_TV, targets, _counted(targets, config)), config, Vocabulary(group))


def _weighted_sum(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Metrics]:
    """``loss`` of tokens that all have a weight."""
    if config.kind == "hybrid":
        value, metrics = _hybrid(logits_TV, targets, config, vocabulary)
    else:
        values_T, metrics = _TOKEN_LOSSES[config.kind](logits_TV, targets, config, vocabulary)
        value = (targets.weights_T * values_T).sum()
    metrics["loss/tokens"] = torch.tensor(float(logits_TV.shape[0]), device=logits_TV.device)
    return value, metrics


def _counted(targets: TokenTargets, config: ObjectiveConfig) -> Tensor:
    """Which tokens have a weight, bool [T]."""
    counted_T = targets.weights_T != 0
    if config.kind == "hybrid":
        counted_T |= _needed(targets.policy_weights_T, "policy_weights_T", config) != 0
    return counted_T


def _kept(rows_T: Tensor, targets: TokenTargets, kept_T: Tensor) -> tuple[Tensor, TokenTargets]:
    """The rows where ``kept_T`` is True, of logits or hidden states; nothing is copied when that is all."""
    if len(rows_T) != len(kept_T):
        raise ValueError(f"{len(rows_T)} rows of logits or hidden states but {len(kept_T)} response tokens")
    if bool(kept_T.all()):
        return rows_T, targets
    index_L = kept_T.nonzero()[:, 0]
    return rows_T[index_L], targets.rows(index_L)


def _hybrid(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Metrics]:
    """``grpo_share`` of GRPO's weighted sum and the rest of SDPO's (paper eq. 3); a share of 0 or 1 leaves one."""
    policy_weights_T = _needed(targets.policy_weights_T, "policy_weights_T", config)
    grpo_T, metrics = _grpo(logits_TV, targets, config, vocabulary)
    taught_LV, taught = _kept(logits_TV, targets, targets.weights_T != 0)
    sdpo_L, sdpo_metrics = _sdpo(taught_LV, taught, config, vocabulary)
    grpo, sdpo = (policy_weights_T * grpo_T).sum(), (taught.weights_T * sdpo_L).sum()
    return config.grpo_share * grpo + (1.0 - config.grpo_share) * sdpo, {**sdpo_metrics, **metrics}


def _sdpo(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Metrics]:
    """Divergence to the teacher, at the chosen support, times the importance weights."""
    values_T, log_probs_T, found = _SUPPORTS[config.support](logits_TV, targets, config, vocabulary)
    old_T = log_probs_T if targets.old_log_probs_T is None else targets.old_log_probs_T
    drift_T = _capped_ratio(log_probs_T, old_T, config.policy_drift_clip)
    mismatch_T, metrics = _engine_mismatch(old_T, targets, config)
    metrics |= found | _summary("loss/drift_weight", drift_T)
    return values_T * drift_T * mismatch_T, metrics


def _at_top_k(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Metrics]:
    """Divergence over the student's top-K tokens and the tail; and log pi_theta of the sampled token, detached."""
    ids_TK = _needed(targets.support_ids_TK, "support_ids_TK", config)
    teacher_TK = _needed(targets.teacher_log_probs_TK, "teacher_log_probs_TK", config)
    found = read(logits_TV, ids_TK, vocabulary.group, sampled_ids_T=targets.response_ids_T, with_entropy=True)
    divergence_T = divergence(
        *(logits_TV, ids_TK, teacher_TK, config.alpha, config.tail),
        *(vocabulary.group, config.advantage_bounds, found, vocabulary.overwrite),
    )
    assert found.sampled_T is not None
    return divergence_T, found.sampled_T, _summary("loss/divergence", divergence_T) | _entropy(found)


def _at_sampled(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Metrics]:
    """Score function of KL(p || q) at the sampled token y: its gradient, averaged over y ~ p, is that of the KL.

    The value is no divergence; ``loss/divergence`` is the estimate log p(y) - log q(y), which may be negative.
    With one advantage a sequence it takes the place of the token's own.
    """
    teacher_T = _needed(targets.teacher_log_probs_TK, "teacher_log_probs_TK", config)[:, 0]
    log_probs_T, metrics = _sampled(logits_TV, targets, vocabulary)
    log_p_T = log_probs_T.detach()
    metrics["loss/divergence"] = -sampled_advantages(log_p_T, teacher_T, bounds=None).sum()
    if config.credit == "sequence":
        advantages_T = _needed(targets.teacher_advantages_T, "teacher_advantages_T", config)
    else:
        advantages_T = sampled_advantages(log_p_T, teacher_T, config.advantage_bounds)
    return -advantages_T * log_probs_T, log_p_T, metrics


def _at_vocabulary(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Metrics]:
    """Divergence over every token; and log pi_theta of the sampled token, detached."""
    teacher_TV = _needed(targets.teacher_logits_TV, "teacher_logits_TV", config)
    found = read(logits_TV, targets.response_ids_T[:, None], vocabulary.group, with_entropy=True)
    divergence_T = full_divergence(
        *(logits_TV, teacher_TV, config.alpha, vocabulary.group, config.advantage_bounds, vocabulary.overwrite)
    )
    return divergence_T, found.log_probs_TB[:, 0], _summary("loss/divergence", divergence_T) | _entropy(found)


def _sampled(logits_TV: Tensor, targets: TokenTargets, vocabulary: Vocabulary) -> tuple[Tensor, Metrics]:
    """Log-probs of the sampled tokens, with gradient."""
    ids_T = targets.response_ids_T
    found = read(logits_TV, ids_T[:, None], vocabulary.group, with_entropy=True)
    log_probs_T = sampled_log_probs(logits_TV, ids_T, vocabulary.group, found, vocabulary.overwrite)
    return log_probs_T, _entropy(found)


def _entropy(found: Reading) -> Metrics:
    assert found.entropy_T is not None
    return {"loss/entropy": found.entropy_T.float().sum()}


_SUPPORTS = {"top_k": _at_top_k, "vocabulary": _at_vocabulary, "sampled": _at_sampled}


def _grpo(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient: clip-higher, and dual clip for negative advantages; plus the penalty."""
    advantages_T = _needed(targets.advantages_T, "advantages_T", config)
    log_probs_T, of_policy = _sampled(logits_TV, targets, vocabulary)
    old_T = log_probs_T.detach() if targets.old_log_probs_T is None else targets.old_log_probs_T
    ratio_T = _ratio(log_probs_T, old_T)
    free_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    values_T = torch.maximum(free_T, clipped_T)
    if config.dual_clip is not None:
        bound_T = -advantages_T * config.dual_clip
        values_T = torch.where(advantages_T < 0, torch.minimum(values_T, bound_T), values_T)
    mismatch_T, metrics = _engine_mismatch(old_T, targets, config)
    metrics |= of_policy | _summary("loss/ratio", ratio_T)
    metrics["loss/clipped"] = (values_T != free_T).float().sum()
    values_T = values_T * mismatch_T
    if config.kl_coefficient:
        kl_T = reference_kl(log_probs_T, _needed(targets.reference_log_probs_T, "reference_log_probs_T", config))
        metrics |= _summary("loss/reference_kl", kl_T)
        values_T = values_T + config.kl_coefficient * kl_T
    return values_T, metrics


def reference_kl(log_probs_T: Tensor, reference_T: Tensor) -> Tensor:
    """KL(policy || reference) estimated at each sampled token: r - log r - 1 with r = reference / policy.

    Never negative and unbiased over tokens of the policy (the "k3" estimator); gradient to ``log_probs_T``.
    """
    log_ratio_T = (reference_T - log_probs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio_T) - log_ratio_T


def _next_token(
    logits_TV: Tensor, targets: TokenTargets, config: ObjectiveConfig, vocabulary: Vocabulary
) -> tuple[Tensor, Metrics]:
    """Cross entropy of the given tokens."""
    log_probs_T, metrics = _sampled(logits_TV, targets, vocabulary)
    return -log_probs_T, metrics | _summary("loss/cross_entropy", -log_probs_T)


_TOKEN_LOSSES = {"sdpo": _sdpo, "grpo": _grpo, "next_token": _next_token}


def _engine_mismatch(old_T: Tensor, targets: TokenTargets, config: ObjectiveConfig) -> tuple[Tensor, Metrics]:
    """Weight pi_old / pi_engine of each token, capped; and |log pi_old - log pi_engine| as a metric."""
    engine_T = old_T if targets.engine_log_probs_T is None else targets.engine_log_probs_T
    weight_T = _capped_ratio(old_T, engine_T, config.engine_mismatch_cap)
    metrics = _summary("loss/mismatch", (old_T - engine_T).abs()) | _summary("loss/mismatch_weight", weight_T)
    return weight_T, metrics


def _ratio(log_a_T: Tensor, log_b_T: Tensor) -> Tensor:
    return (log_a_T - log_b_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _capped_ratio(log_a_T: Tensor, log_b_T: Tensor, cap: float | None) -> Tensor:
    """a / b, at most ``cap``; one everywhere when ``cap`` is None. Both inputs are constants to autograd."""
    if cap is None:
        return torch.ones_like(log_a_T)
    return _ratio(log_a_T, log_b_T).clamp(max=cap)


def _summary(name: str, values_T: Tensor) -> Metrics:
    """Sum and maximum of a metric that is never negative; no tokens give zero."""
    values_T = values_T.detach().float()
    largest = values_T.max() if values_T.numel() else values_T.new_zeros(())
    return {name: values_T.sum(), f"{name}/max": largest}


def _needed(value: Tensor | None, name: str, config: ObjectiveConfig) -> Tensor:
    if value is None:
        raise ValueError(f"objective kind {config.kind} needs targets.{name}")
    return value
