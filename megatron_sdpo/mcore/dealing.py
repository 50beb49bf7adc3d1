"""Which samples each data rank passes, and in which of its passes siblings share the beginning of their prompts."""

from collections.abc import Sequence

from megatron_sdpo import batching
from megatron_sdpo.batching import View
from megatron_sdpo.config import Config
from megatron_sdpo.types import Sample


def shared_views(config: Config, transformer_engine: bool) -> tuple[View, ...]:
    """The views that are scored and share beginnings (``layout.share_prefixes``); ``transformer_engine``: what the
    model is made of."""
    layout, objective = config.layout, config.objective
    asked = layout.share_prefixes
    if asked == "auto":
        asked = "off" if transformer_engine or layout.context_parallel > 1 else "teacher"
    teacher: tuple[View, ...] = ("teacher",) if asked != "off" and objective.has_teacher else ()
    return (*teacher, "student") if asked == "scoring" and objective.kind != "next_token" else teacher


def shares(samples: Sequence[Sample], chosen: Sequence[int], data_size: int, siblings: bool) -> list[list[int]]:
    """The ``chosen`` positions by data rank, evenly (``batching.assign``); ``siblings`` are dealt to one rank if they
    can be, the same in each mini-batch."""
    costs = _costs(samples)
    homes = batching.homes_of(costs, [sample.group for sample in samples], data_size) if siblings else None
    return batching.assign(costs, chosen, data_size, homes)


def _costs(samples: Sequence[Sample]) -> list[int]:
    """Tokens that all passes read of each sample: score and train as student (4 forwards' worth), score as teacher.

    Beginnings that siblings share count for each of them: who shares with whom follows from how they are dealt.
    """
    costs = []
    for sample in samples:
        student = len(sample.prompt_ids) + len(sample.response_ids)
        teacher = len(sample.teacher_prompt_ids) + len(sample.response_ids) if sample.teacher_prompt_ids else 0
        costs.append(4 * student + teacher)
    return costs
