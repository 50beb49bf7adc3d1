"""What every token of a micro-batch is trained towards: from the batch, and from what the scoring passes found.

The scoring passes keep their findings by the sample's position in the batch; here they are laid out in the order of a
micro-batch's tokens. What is done with them is ``objective.loss``'s affair.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sdpo import credit, objective
from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.config import Config
from megatron_sdpo.mcore.scores import SampleNumbers, StudentScores, TeacherScores, TeacherStates
from megatron_sdpo.types import Sample


class Targets:
    """Makes ``objective.TokenTargets``; without state of its own."""

    def __init__(self, config: Config, hidden_size: int, device: torch.device) -> None:
        self.config, self.hidden_size, self.device = config, hidden_size, device

    def numbers(self, samples: Sequence[Sample], chosen: Sequence[int]) -> SampleNumbers:
        """Loss weights from counts over the whole mini-batch, advantages from the groups of the whole batch."""
        config = self.config.objective
        rewards, groups = [s.reward for s in samples], [s.group for s in samples]

        factors = credit.question_factors(rewards, groups, self.config.teacher_context.success_threshold, config)
        in_use, has_target = self.have_targets(samples)

        def weights(has_target: Sequence[bool]) -> list[float]:
            lengths = [len(samples[i].response_ids) for i in chosen]
            found = credit.token_weights(lengths, [has_target[i] for i in chosen], config)
            by_sample = dict(zip(chosen, found, strict=True))
            return [by_sample.get(i, 0.0) * factors[i] for i in range(len(samples))]

        return SampleNumbers(
            has_target=has_target,
            weights=weights(has_target),
            policy_weights=weights(in_use),
            advantages=credit.advantages(rewards, groups, config.advantage_std),
        )

    def have_targets(self, samples: Sequence[Sample]) -> tuple[list[bool], list[bool]]:
        """Which samples of a whole batch train at all, and which have the kind's target: a teacher's where it has one.

        Only the hybrid trains on samples that the second leaves out.
        """
        config = self.config.objective
        rewards, groups = [s.reward for s in samples], [s.group for s in samples]
        success = self.config.teacher_context.success_threshold
        stopped, untaught = credit.without_target(rewards, groups, success, config)
        in_use = [not stop for stop in stopped]
        if not config.has_teacher:
            return in_use, in_use
        return in_use, [
            s.teacher_prompt_ids is not None and not left_out for s, left_out in zip(samples, untaught, strict=True)
        ]

    def of(
        self,
        micro_batch: MicroBatch,
        samples: Sequence[Sample],
        numbers: SampleNumbers,
        student: StudentScores,
        teacher: TeacherScores,
    ) -> objective.TokenTargets:
        config = self.config.objective
        targets = objective.TokenTargets(
            response_ids_T=micro_batch.response_ids_N, weights_T=micro_batch.spread(numbers.weights).to(self.device)
        )
        if config.kind == "next_token":
            return targets
        engine = {i: torch.tensor(samples[i].engine_log_probs, device=self.device) for i in micro_batch.samples}
        targets = replace(
            targets,
            old_log_probs_T=micro_batch.join(student.old_log_probs, self.none()),
            engine_log_probs_T=micro_batch.join(engine, self.none()),
        )
        if config.compares_rewards:
            targets = replace(
                targets,
                policy_weights_T=micro_batch.spread(numbers.policy_weights).to(self.device),
                advantages_T=micro_batch.spread(numbers.advantages).to(self.device),
            )
        if config.kl_coefficient:
            reference_N = micro_batch.join(student.reference_log_probs, self.none())
            targets = replace(targets, reference_log_probs_T=reference_N)
        if not config.has_teacher:
            return targets
        return self._taught(targets, micro_batch, samples, numbers, student, teacher)

    def _taught(
        self,
        targets: objective.TokenTargets,
        micro_batch: MicroBatch,
        samples: Sequence[Sample],
        numbers: SampleNumbers,
        student: StudentScores,
        teacher: TeacherScores,
    ) -> objective.TokenTargets:
        """With what the teacher says of each token."""
        config = self.config.objective

        def rows(found: dict[int, Tensor], *columns: int) -> Tensor:
            return self._teacher_rows(micro_batch, samples, numbers, found, *columns)

        if config.support == "vocabulary":
            states = teacher.states or TeacherStates({}, None)
            targets = replace(targets, teacher_hidden_TH=rows(states.hidden, self.hidden_size))
        else:
            targets = replace(targets, teacher_log_probs_TK=rows(teacher.log_probs, config.teacher_columns))
        if config.support == "top_k":
            targets = replace(targets, support_ids_TK=self.support_ids(micro_batch, student))
        if config.weighs_by_confidence:
            factors_N = credit.confidence_factors(rows(teacher.entropies), config.teacher_confidence_beta)
            targets = replace(targets, weights_T=targets.weights_T * factors_N)
        if config.credit == "sequence":
            means_N = micro_batch.join(self._means(micro_batch, student, teacher), self.none())
            targets = replace(targets, teacher_advantages_T=means_N)
        return targets

    def _means(self, micro_batch: MicroBatch, student: StudentScores, teacher: TeacherScores) -> dict[int, Tensor]:
        """Of each response the mean advantage of its tokens, ``[R]``; zeros where the teacher says nothing."""
        means: dict[int, Tensor] = {}
        for i in micro_batch.samples:
            old_R = student.old_log_probs[i]
            if i in teacher.log_probs:
                bounds = self.config.objective.advantage_bounds
                tokens_R = credit.sampled_advantages(old_R, teacher.log_probs[i][:, 0], bounds)
                means[i] = credit.sequence_advantages(tokens_R, [len(tokens_R)])
            else:
                means[i] = torch.zeros_like(old_R)
        return means

    def support_ids(self, micro_batch: MicroBatch, student: StudentScores) -> Tensor:
        return micro_batch.join(student.support_ids, self.none(self.config.objective.kept_tokens, dtype=torch.int64))

    def _teacher_rows(
        self,
        micro_batch: MicroBatch,
        samples: Sequence[Sample],
        numbers: SampleNumbers,
        found: dict[int, Tensor],
        *columns: int,
    ) -> Tensor:
        """What the teacher found, ``[N, *columns]``; samples without a target have weight zero and get zeros."""
        rows, none = {}, self.none(*columns)
        for i in micro_batch.samples:
            if numbers.has_target[i] != (i in found):
                raise RuntimeError(f"sample {samples[i].id} and the teacher's scores do not belong together")
            rows[i] = found.get(i, none.new_zeros(len(samples[i].response_ids), *columns))
        return micro_batch.join(rows, none)

    def none(self, *columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a padding micro-batch has instead of rows."""
        return torch.empty(0, *columns, dtype=dtype, device=self.device)
