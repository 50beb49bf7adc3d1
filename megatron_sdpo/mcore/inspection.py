"""A learner that takes one step apart: what each micro-batch contributes, before the step is made as always."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sdpo import batching
from megatron_sdpo.batching import MicroBatch
from megatron_sdpo.config import Config
from megatron_sdpo.mcore import optimizer as optim
from megatron_sdpo.mcore.groups import ParallelGroups
from megatron_sdpo.mcore.learner import TOTAL, Learner, OnHidden
from megatron_sdpo.mcore.scores import StudentScores, TeacherScores
from megatron_sdpo.types import Batch


@dataclass(frozen=True, slots=True)
class Found:
    """Of the micro-batches that the data ranks pass at the same time, and that add up to one gradient.

    ``samples`` and ``losses`` by data rank; ``norm`` of their gradient alone, over all ranks.
    """

    mini_batch: int
    mini_batches: int
    micro_batch: int
    micro_batches: int
    samples: tuple[tuple[str, ...], ...]
    losses: tuple[float, ...]
    norm: float


class InspectedLearner(Learner):
    """Tells of each micro-batch of one batch; its numbers and weights are those of a plain learner, to the bit."""

    def __init__(
        self, config: Config, groups: ParallelGroups, step: int, tell: Callable[[Found], None], detect_anomaly: bool
    ) -> None:
        """``step`` is the batch to take apart; ``tell`` is called on every rank; ``detect_anomaly`` has autograd name
        the operation whose backward pass made a NaN (RuntimeError, on the rank where it did).
        """
        super().__init__(config, groups)
        self._inspected, self._tell, self._detect_anomaly = step, tell, detect_anomaly
        self._mini_batch = 0

    def _optimizer_step(
        self, batch: Batch, chosen: Sequence[int], student: StudentScores, teacher: TeacherScores
    ) -> dict[str, float]:
        if batch.step != self._inspected:
            return super()._optimizer_step(batch, chosen, student, teacher)
        self._mini_batch += 1
        with torch.autograd.set_detect_anomaly(self._detect_anomaly):
            micro_batches, on_hidden = self._passes(batch, chosen, student, teacher)
            for place, micro_batch in enumerate(micro_batches):
                ids = [batch.samples[i].id for i in micro_batch.samples]
                try:
                    loss, norm = self._alone(micro_batch, on_hidden)
                except RuntimeError as error:
                    raise RuntimeError(f"{error} (at samples {', '.join(ids)})") from error
                samples, losses = self._by_data_rank(tuple(ids), loss)
                counts = (self._mini_batch, len(self._mini_batches(batch)), place + 1, len(micro_batches))
                self._tell(Found(*counts, samples, losses, norm))
            return super()._optimizer_step(batch, chosen, student, teacher)

    def _alone(self, micro_batch: MicroBatch, on_hidden: OnHidden) -> tuple[float, float]:
        """Its loss, 0 before the last stage, and the norm of its gradient with those beside it on other data ranks."""
        filling = [batching.pack([], self.device, self.row) for _ in range(self._count_multiple - 1)]
        reports = self._accumulate([micro_batch, *filling], on_hidden)
        return sum(float(report[TOTAL]) for report in reports), optim.gradient_norm(self.optimizer)

    def _by_data_rank(self, ids: tuple[str, ...], loss: float) -> tuple[tuple[tuple[str, ...], ...], tuple[float, ...]]:
        groups = self.groups
        mine = (groups.data_rank, ids, loss if groups.is_last_stage and groups.tensor_rank == 0 else 0.0)
        everywhere: list[Any] = [None] * groups.world_size
        dist.all_gather_object(everywhere, mine, group=groups.world)
        ranks = range(groups.data_size)
        samples = {rank: found for rank, found, _ in everywhere}
        losses = [sum(part for rank, _, part in everywhere if rank == data_rank) for data_rank in ranks]
        return tuple(samples[rank] for rank in ranks), tuple(losses)
