"""The trainer's handle on the model: score, train, teach, probe. One per rank; all ranks call in step.

What the scoring passes find stays on the rank that needs it (last stage, same data rank), keyed by
the sample's position in the batch; see ``batching.assign``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdpo import batching, guard, objective, spikes
from megatron_sdpo.batching import MicroBatch, RowCut, View
from megatron_sdpo.config import Config, ConfigError
from megatron_sdpo.divergence import entropy, sampled_log_probs, student_support, support_log_probs
from megatron_sdpo.flops import Tokens
from megatron_sdpo.fused import Head, scored
from megatron_sdpo.hf_config import read_hf_config
from megatron_sdpo.mcore import dealing, finite, platform
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.forward import forward_backward, of_all_ranks, score
from megatron_sdpo.mcore.fp8 import Precision, token_multiple
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.hf import load_hf
from megatron_sdpo.mcore.model import build_model, chunks_of
from megatron_sdpo.mcore.performance import performance
from megatron_sdpo.mcore.scores import StudentScores, TeacherScores, TeacherStates
from megatron_sdpo.mcore.targets import Targets
from megatron_sdpo.prefixes import LEAST_TOKENS
from megatron_sdpo.teacher import TeacherWeights, mixed_logits
from megatron_sdpo.types import Batch, Sample

OnHidden = Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]
TOTAL = "loss/total"
"""The weighted sum that is minimised: already whole, not to be divided by tokens."""
_ROW_TOKENS, _PADDING = "row_tokens", "padding_tokens"
"""Tokens of the training passes, and those of them that belong to no sample: they fill rows and micro-batches."""
_SKIPPED = "optim/skipped_steps"
"""Of the optimizer steps of a batch, those that were not made: a count, not a mean."""


class Learner:
    """Model, optimizer and teacher of one rank. ``step``, the version of the weights, counts generation batches."""

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        self.config, self.groups = config, groups
        self.device = platform.device()
        self.hf_config = read_hf_config(config.model.path)
        self.targets = Targets(config, self.hf_config["hidden_size"], self.device)
        self.model = build_model(self.hf_config, config.layout, groups, getattr(torch, config.model.dtype), config.fp8)
        self.precision = Precision(chunks_of(self.model), config.fp8)
        load_hf(self.model, config.model.path, groups, config.layout)
        self.wrapped, self.optimizer, self.weights = optim.wrap(self.model, config.optim, config.layout)
        masters, placement = self.weights.masters(), config.teacher.placement
        kind = config.teacher.kind if config.objective.has_teacher else "live"  # else nobody would ever read a copy
        self.teacher = TeacherWeights(masters, kind, config.teacher.update_rate, placement)
        # Read from the model's directory at every start, so no checkpoint needs it.
        penalised = config.objective.kl_coefficient > 0
        self.reference = TeacherWeights(masters, "frozen", placement=placement) if penalised else None
        tensor_ranks = groups.tensor_size if config.layout.sequence_parallel else 1
        self.row = RowCut(groups.context_rank, groups.context_size, tensor_ranks * token_multiple(config.fp8))
        self._count_multiple = groups.pipeline_size if config.layout.virtual_pipeline > 1 else 1
        self._shared_views = dealing.shared_views(config, platform.gpu_generation())
        self._dealer = dealing.Dealer(groups.data_size, self._shared_views)
        self._spared: dict[View, Tokens] = {}
        """What scoring passes over the last batch did not compute, on all ranks, as siblings share beginnings."""
        self.step = 0
        self.history = guard.History()
        """What the collapse guard has seen; the same on every rank, as batches and evaluations are."""
        self.norms = spikes.History()
        """What is known of gradient norms; the same on every rank."""
        self._damping = 1.0
        self._stepped = True
        """Whether any optimizer step of the last batch was made."""
        self._floor: dict[str, float] | None = None
        """What precision alone makes of the objective; None until the first batch after a start."""

    def reset(self) -> None:
        """Back to the model's directory: what follows is, to the bit, what a new learner would do."""
        load_hf(self.model, self.config.model.path, self.groups, self.config.layout)
        optim.reset(self.optimizer, self.config.optim)
        self.teacher.reset(self.weights.masters())
        self.step, self.history, self.norms, self._damping = 0, guard.History(), spikes.History(), 1.0
        self._floor, self._spared = None, {}

    def score_student(self, batch: Batch) -> StudentScores:
        """Forward only: log-probs of the sampled tokens before this batch's first step, and the top-K support.

        Plain next-token training needs neither and runs nothing.
        """
        if self.config.objective.kind == "next_token":
            return StudentScores({}, {})
        wanted = self.config.objective.has_teacher and self.config.objective.support == "top_k"

        def of_logits(micro_batch: MicroBatch, logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            old = self._of_sampled(micro_batch, logits_CV, rows)
            kept = self.config.objective.kept_tokens
            return (*old, student_support(logits_CV, kept, self.groups.vocabulary)) if wanted else old

        micro_batches = self._cut(batch.samples, self._shares(batch), "student", share=True)
        with self.precision.of(self.config.fp8.student):
            old, ids = self._score(micro_batches, of_logits)
            if self.reference is None:
                return StudentScores(old, ids)
            with self.reference.swapped_in(self.weights):
                return StudentScores(old, ids, self._score(micro_batches, self._of_sampled)[0])

    def score_teacher(self, batch: Batch, student: StudentScores) -> TeacherScores:
        """Forward only, under the teacher's weights and contexts: log-probs at the support."""
        if not self.config.objective.has_teacher:
            return TeacherScores({})
        _, has_target = self.targets.have_targets(batch.samples)
        if self._floor is None:
            self._floor = self._precision_floor(batch)
        shares = [[i for i in share if has_target[i]] for share in self._shares(batch)]
        if not any(shares):
            self._spared.pop("teacher", None)
            return TeacherScores({})
        with self.precision.of(self.config.fp8.teacher, at_once=True):
            return self._taught(self._cut(batch.samples, shares, "teacher", share=True), student)

    def _taught(self, micro_batches: Sequence[MicroBatch], student: StudentScores) -> TeacherScores:
        if self.config.objective.support == "vocabulary":
            states = self._teacher_states(micro_batches)
            return TeacherScores({}, self._entropies(micro_batches, states), states)
        if self.config.teacher.kind == "trust_region":
            return self._support_scores(micro_batches, student, self._teacher_states(micro_batches))
        with self.teacher.swapped_in(self.weights):
            return self._support_scores(micro_batches, student, None)

    def _precision_floor(self, batch: Batch) -> dict[str, float]:
        """KL per token of the student's weights from themselves, in the student's and in the teacher's precision.

        On the first micro-batch of each data rank: the same tokens, without a teacher context. A metric; {} without
        FP8. Above ``fp8.floor_limit`` ConfigError, on every rank.
        """
        fp8, vocabulary = self.config.fp8, self.groups.vocabulary
        if not fp8.kinds:
            return {}
        kept = min(self.config.objective.top_k, self.hf_config["vocab_size"] - 1)
        micro_batches = self._cut(batch.samples, self._shares(batch), "student")[: self._count_multiple]

        def of_student(micro_batch: MicroBatch, logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            ids_CK = student_support(logits_CV, kept, vocabulary)
            return support_log_probs(logits_CV, ids_CK, vocabulary, with_tail=True), ids_CK

        def of_teacher(micro_batch: MicroBatch, logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            ids_NK = micro_batch.join(ids, self.targets.none(kept, dtype=torch.int64))
            return (support_log_probs(logits_CV, ids_NK[rows], vocabulary, with_tail=True),)

        with self.precision.of(fp8.student):
            student, ids = self._score(micro_batches, of_student)
        with self.precision.of(fp8.teacher, at_once=True):
            teacher, _ = self._score(micro_batches, of_teacher)
        kl = [torch.where(a.exp() > 0, a.exp() * (a - teacher[i]), 0.0).sum() for i, a in student.items()]
        found = torch.zeros(2, device=self.device, dtype=torch.float64)
        if self.groups.is_last_stage:
            found[0], found[1] = sum(map(float, kl)), sum(map(len, student.values()))
            dist.all_reduce(found, group=self.groups.data)
        kl_sum, tokens = self._from_last_stage(found.tolist())
        floor = kl_sum / max(tokens, 1.0)
        if fp8.floor_limit is not None and not floor <= fp8.floor_limit:
            raise ConfigError(
                f"student and teacher of the same weights are {floor:.2e} nats a token apart by precision alone, above"
                f" fp8.floor_limit {fp8.floor_limit:g}; raise the limit, set fp8.high_precision_layers, or give"
                " both the same precision"
            )
        return {"precision/floor": floor}

    def _support_scores(
        self, micro_batches: Sequence[MicroBatch], student: StudentScores, initial: TeacherStates | None
    ) -> TeacherScores:
        """Under the weights in the model; a trust-region teacher's logits are mixed with those of ``initial``."""
        top_k = self.config.objective.support == "top_k"

        def of_logits(micro_batch: MicroBatch, logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            if initial is not None:
                initial_CV = self._head(initial.head_VH).logits(self._hidden(micro_batch, initial)[rows])
                logits_CV = mixed_logits(initial_CV, logits_CV, self.config.teacher.mixture)
            ids_NK = self.targets.support_ids(micro_batch, student) if top_k else micro_batch.response_ids_N[:, None]
            log_probs_CK1 = support_log_probs(logits_CV, ids_NK[rows], self.groups.vocabulary, with_tail=top_k)
            if not self.config.objective.weighs_by_confidence:
                return (log_probs_CK1,)
            return log_probs_CK1, entropy(logits_CV, self.groups.vocabulary)

        return TeacherScores(*self._score(micro_batches, of_logits))

    def _teacher_states(self, micro_batches: Sequence[MicroBatch]) -> TeacherStates:
        """What the teacher's weights make of the micro-batches, before the head, and the head."""
        with self.teacher.swapped_in(self.weights):
            found = score(self.model, micro_batches, self._by_sample)
            # A copy: what the parameter holds here may move with the next optimizer step.
            head_VH = self.model.head().detach().clone() if self.groups.is_last_stage else None
        return TeacherStates(_merge(found), head_VH)

    def _entropies(self, micro_batches: Sequence[MicroBatch], states: TeacherStates) -> dict[int, Tensor]:
        """Of the teacher, fp32 ``[R]``, where tokens are weighted by them and the last stage has the states."""
        if not self.config.objective.weighs_by_confidence or states.head_VH is None:
            return {}
        head = self._head(states.head_VH)
        found = [
            scored(self._hidden(m, states), head, lambda logits_CV, _: (entropy(logits_CV, self.groups.vocabulary),))
            for m in micro_batches
        ]
        return _merge(self._by_sample(m, entropy_N) for m, (entropy_N,) in zip(micro_batches, found, strict=True))

    def _by_sample(self, micro_batch: MicroBatch, values_N: Tensor) -> dict[int, Tensor]:
        """``[N, ...]`` -> whole responses, ``[R, ...]``, by sample."""
        return micro_batch.split(of_all_ranks(micro_batch, values_N, self.groups.context))

    def _hidden(self, micro_batch: MicroBatch, states: TeacherStates) -> Tensor:
        return micro_batch.join(states.hidden, self.targets.none(self.hf_config["hidden_size"]))

    def train(self, batch: Batch, student: StudentScores, teacher: TeacherScores) -> dict[str, float]:
        """One optimizer step per mini-batch; metrics are means over them, ``/max`` the largest. Advances ``step``.

        A number that is not finite raises NonFiniteError on all ranks, before the optimizer step that it would enter;
        a spike of the gradient norm raises SpikeError there, or has the step skipped (``spikes.policy``).
        """
        finite.check_scores(batch, student, teacher, self.groups)
        self.history = self.history.with_reward(sum(s.reward for s in batch.samples) / len(batch.samples))
        self._damping = guard.factor(self.history, self.config.guard)
        rate = self._damping * optim.learning_rate(self.config.optim, self.step, self.config.steps)
        optim.set_rates(self.optimizer, rate, self.config.optim.weight_decay)
        found = [self._optimizer_step(batch, chosen, student, teacher) for chosen in self._mini_batches(batch)]
        self.weights.gather()  # whoever reads the weights from here on finds the new ones
        self.step += 1
        self._stepped = not all(metrics.get(_SKIPPED) for metrics in found)
        columns = {key: [metrics[key] for metrics in found] for key in found[0]}
        floor, self._floor = self._floor or {}, {}
        totals = {key: max(c) if key.endswith("/max") else sum(c) / len(c) for key, c in columns.items()}
        if _SKIPPED in totals:
            totals[_SKIPPED] = sum(columns[_SKIPPED])
        return {**totals, **floor, "optim/lr": rate, "optim/guard": self._damping}

    def update_teacher(self) -> None:
        """Once per generation batch, unless all of its steps were skipped; the teacher may have followed each optimizer
        step instead."""
        if self._stepped and self.config.teacher.update_every == "generation_batch":
            self.teacher.update(self.weights.masters(), self._damping)

    def evaluated(self, accuracy: float) -> None:
        """The held-out accuracy of the current version, for the collapse guard."""
        self.history = self.history.with_accuracy(accuracy)

    def performance(self, batch: Batch, seconds: dict[str, float]) -> dict[str, float]:
        """What the passes over a batch cost, in the ``seconds`` of the step's phases."""
        return performance(batch, self.config, self.hf_config, self.groups.world_size, seconds, self._spared)

    def log_probs(self, ids: Sequence[int]) -> list[float]:
        """Natural log-probs of ``ids[1:]``, each given those before it, under the current weights; on every rank.

        In model.dtype whatever the passes' precision is, unless the caller's ``precision`` is another.
        """
        sequences = [[(0, ids[:1], ids[1:])], *[[]] * (self._count_multiple - 1)]
        probe = [batching.pack(held, self.device, self.row) for held in sequences]
        found, _ = self._score(probe, self._of_sampled, temperature=1.0)
        return self._from_last_stage(found[0].tolist() if found else None)

    def _score(
        self,
        micro_batches: Sequence[MicroBatch],
        of_logits: Callable[[MicroBatch, Tensor, slice], tuple[Tensor, ...]],
        temperature: float | None = None,
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Forward only: the one or two tensors that ``of_logits(micro_batch, logits_CV, rows)`` gives, by sample.

        {} for a second that it does not give, and before the last stage.
        """

        def on_hidden(micro_batch: MicroBatch, hidden_NH: Tensor) -> list[dict[int, Tensor]]:
            head = self._head() if temperature is None else replace(self._head(), temperature=temperature)
            found = scored(hidden_NH, head, lambda logits_CV, rows: of_logits(micro_batch, logits_CV, rows))
            return [self._by_sample(micro_batch, x_N) for x_N in found]

        found = score(self.model, micro_batches, on_hidden)
        return _merge(first for first, *_ in found), _merge(rest[0] for _, *rest in found if rest)

    def _of_sampled(self, micro_batch: MicroBatch, logits_CV: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Log-probs of the response tokens."""
        return (sampled_log_probs(logits_CV, micro_batch.response_ids_N[rows], self.groups.vocabulary),)

    def _passes(
        self, batch: Batch, chosen: Sequence[int], student: StudentScores, teacher: TeacherScores
    ) -> tuple[list[MicroBatch], OnHidden]:
        """This rank's micro-batches of a mini-batch, and what makes losses of their hidden states."""
        samples, objective_config = batch.samples, self.config.objective
        numbers = self.targets.numbers(samples, chosen)

        def on_hidden(micro_batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            targets = self.targets.of(micro_batch, samples, numbers, student, teacher)
            teacher_head = self._head(teacher.states.head_VH if teacher.states else None)
            head = optim.into_buffer(self._head())
            loss, metrics = objective.loss_of_hidden(hidden_NH, head, targets, objective_config, teacher_head)
            if self.config.layout.overlap_grad_reduce:
                optim.count_as_added(head, loss)
            tokens, padding = (loss.new_tensor(float(n)) for n in (len(micro_batch.ids_T), micro_batch.my_padding))
            return loss, {**metrics, TOTAL: loss.detach(), _ROW_TOKENS: tokens, _PADDING: padding}

        return self._cut(samples, self._dealer.shares(samples, chosen), "student"), on_hidden

    def _accumulate(self, micro_batches: Sequence[MicroBatch], on_hidden: OnHidden) -> list[dict[str, Tensor]]:
        """The gradient of these micro-batches and no others, summed over all ranks; their reports on the last stage."""
        for ddp in self.wrapped:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.precision.of(self.config.fp8.student):
            return forward_backward(self.wrapped, micro_batches, on_hidden)

    def _optimizer_step(
        self, batch: Batch, chosen: Sequence[int], student: StudentScores, teacher: TeacherScores
    ) -> dict[str, float]:
        micro_batches, on_hidden = self._passes(batch, chosen, student, teacher)
        reports = self._accumulate(micro_batches, on_hidden)
        losses, grad_norm = [report[TOTAL] for report in reports], optim.gradient_norm(self.optimizer)
        largest = finite.check_step(batch, chosen, micro_batches, losses, grad_norm, self.groups)
        judged = finite.judge_norm(self.norms, largest, self.config.spikes, batch, chosen)
        self.norms = judged.history
        if judged.action == "accept":
            optim.step(self.optimizer, grad_norm)
            if self.config.teacher.update_every == "optimizer_step":
                self.teacher.update(self.weights.masters(), self._damping)
        skipped = {_SKIPPED: float(judged.action == "skip")} if self.config.spikes.policy == "skip" else {}
        return {**self._reduce(reports), "optim/grad_norm": grad_norm, **skipped}

    def _head(self, weight_VH: Tensor | None = None) -> Head:
        """The model's own head, or another in its place: states of other weights need the head of these.

        Both sides are compared as the distribution that was sampled from, so logits are tempered.
        """
        return Head(
            self.model.head() if weight_VH is None else weight_VH,
            self.config.rollout.temperature,
            self.groups.vocabulary,
            self.config.layout.head_chunk_tokens,
            self.hf_config["vocab_size"],
        )

    def _mini_batches(self, batch: Batch) -> list[list[int]]:
        count = min(self.config.optim.mini_batches, len(batch.samples))
        return batching.deal(len(batch.samples), count, self.config.seed, batch.step)

    def _shares(self, batch: Batch) -> list[list[int]]:
        """Every data rank's samples, dealt as in the training passes: scores are then found where they are needed."""
        dealt = [self._dealer.shares(batch.samples, chosen) for chosen in self._mini_batches(batch)]
        return [[i for shares in dealt for i in shares[rank]] for rank in range(self.groups.data_size)]

    def _cut(
        self, samples: Sequence[Sample], shares: Sequence[Sequence[int]], view: View, share: bool = False
    ) -> list[MicroBatch]:
        """This rank's micro-batches; ``share``: of a scoring pass, where siblings may share beginnings."""
        least = LEAST_TOKENS if share and view in self._shared_views else None
        budget = self.config.layout.tokens_per_micro_batch
        cuts = batching.cuts_of(samples, shares, view, budget, self._count_multiple, least)
        if share:
            self._spared[view] = cuts.spared
        return batching.packed(samples, cuts, view, self.groups.data_rank, self.device, self.row)

    def _reduce(self, reports: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Sums and maxima over micro-batches and data ranks; then per-token means, on every rank."""
        reduced: dict[str, float] | None = None
        if self.groups.is_last_stage:
            report = objective.combined(reports)
            sums = sorted(key for key in report if not key.endswith("/max"))
            total = torch.stack([report[key] for key in sums])
            dist.all_reduce(total, group=self.groups.data_context)
            by_key = dict(zip(sums, total.tolist(), strict=True))
            padding = by_key.pop(_PADDING) / by_key.pop(_ROW_TOKENS)
            tokens = max(by_key.get("loss/tokens", 0.0), 1.0)
            reduced = {k: v if k in (TOTAL, "loss/tokens") else v / tokens for k, v in by_key.items()}
            reduced["optim/padding_share"] = padding
            maxima = sorted(report.keys() - set(sums))
            if maxima:
                largest = torch.stack([report[key] for key in maxima])
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.data_context)
                reduced |= dict(zip(maxima, largest.tolist(), strict=True))
        return self._from_last_stage(reduced)

    def _from_last_stage(self, value: Any) -> Any:
        """The value that the last stage has, on every rank of the pipeline group."""
        if self.groups.pipeline_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.groups.last_stage_rank, group=self.groups.pipeline)
        return box[0]


def _merge(parts: Any) -> dict[int, Tensor]:
    merged: dict[int, Tensor] = {}
    for part in parts:
        merged |= part
    return merged
