"""Which samples each data rank passes, and in which of its passes siblings share the beginning of their prompts."""

from collections import Counter
from collections.abc import Sequence

from megatron_sdpo import batching
from megatron_sdpo.batching import View
from megatron_sdpo.config import Config
from megatron_sdpo.prefixes import LEAST_TOKENS, shared_by_siblings
from megatron_sdpo.types import Sample


def shared_views(config: Config, gpu: int | None) -> tuple[View, ...]:
    """The views that are scored and share beginnings (``layout.share_prefixes``).

    ``gpu``: the major number of its compute capability, None on a CPU. Hopper's is 9: elsewhere the attention that this
    takes is not known to be there.
    """
    layout, objective = config.layout, config.objective
    asked = layout.share_prefixes
    if asked == "auto":
        asked = "teacher" if gpu in (None, 9) and layout.context_parallel == 1 else "off"
    teacher: tuple[View, ...] = ("teacher",) if asked != "off" and objective.has_teacher else ()
    return (*teacher, "student") if asked == "scoring" and objective.kind != "next_token" else teacher


class Dealer:
    """Which samples each data rank passes; those of the last batch are weighed once."""

    def __init__(self, data_size: int, views: Sequence[View]) -> None:
        """``views`` are those whose scoring passes share beginnings."""
        self._size = data_size
        self._views = views if data_size > 1 else ()
        self._samples: Sequence[Sample] = ()
        self._costs: list[int] = []
        self._homes: list[int] | None = None

    def shares(self, samples: Sequence[Sample], chosen: Sequence[int]) -> list[list[int]]:
        """The ``chosen`` positions in a batch's samples by data rank, evenly (``batching.assign``). Where beginnings
        are shared, siblings are dealt to one rank if they can be, the same in each mini-batch."""
        if samples is not self._samples:
            self._samples, self._costs = samples, costs_of(samples, self._views)
            questions = [sample.group for sample in samples]
            self._homes = batching.homes_of(self._costs, questions, self._size) if self._views else None
        return batching.assign(self._costs, chosen, self._size, self._homes)


def costs_of(samples: Sequence[Sample], views: Sequence[View]) -> list[int]:
    """Tokens that all passes read of each sample: score and train as student (4 forwards' worth), score as teacher.

    A beginning that siblings share in the scoring passes of ``views`` counts in equal parts for all of them, as if they
    were dealt to one rank.
    """
    costs = [3 * (len(s.prompt_ids) + len(s.response_ids)) for s in samples]
    for view in ("student", "teacher"):
        read = {
            i: batching.prompt_of(s, view)
            for i, s in enumerate(samples)
            if view == "student" or s.teacher_prompt_ids is not None
        }
        for i, prompt in read.items():
            costs[i] += len(prompt) + len(samples[i].response_ids)
        questions = [sample.group for sample in samples]
        chosen = shared_by_siblings(read, questions, LEAST_TOKENS) if view in views else {}
        readers = Counter(chosen.values())
        for i, prefix in chosen.items():
            costs[i] -= prefix.tokens - prefix.tokens // readers[prefix]
    return costs
