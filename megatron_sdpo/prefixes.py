"""Which prompts begin alike, so that a scoring pass reads the common beginning once.

Attempts at one question have nearly the same teacher context: question and solution, then perhaps their own feedback.
Sharing has one level: a sample shares one beginning with some others, or none. A tree of beginnings would save the
question once more where a group splits into those who read one solution and those who read another; beside the
solutions that is little, and an attention with two lengths of keys is what every backend has.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sdpo.flops import Tokens

LEAST_TOKENS = 8
"""A shorter beginning is read by each: pieces cost time too. On a CPU eight readers of 8 tokens save a sixth of a short
pass, of 4 tokens 7 %, of 2 they lose; fewer readers save less."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning that some prompts share; ``first``, the least of their positions, tells it from others."""

    first: int
    tokens: int


Prefixes = Mapping[int, Prefix]
"""Of each sample that shares the beginning of its prompt, by its position."""


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two have in common before they differ. Example: ``(1, 2, 3)`` and ``(1, 2)`` give 2."""
    low, high = 0, min(len(a), len(b))  # the first ``low`` are known to be equal
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared(prompts: Mapping[int, Sequence[int]], least: int) -> dict[int, Prefix]:
    """The division of the prompts that saves most tokens, when all that share one beginning are packed together.

    By position; who shares nothing is left out. A prefix may be a whole prompt, and has at least ``least`` tokens.
    Example: (1, 2, 3), (1, 2, 4), (5,) at the positions 4, 7, 9 give, with least 1, ``Prefix(4, 2)`` for 4 and 7.
    """
    # In the order of their tokens prompts that begin alike stand together: what a run of that order has in common is
    # the least that neighbours in it have, and where they have no more than that it falls into smaller runs.
    order = sorted(prompts, key=lambda i: (prompts[i], i))
    alike = [common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    found: dict[int, tuple[int, int]] = {}
    for begin, end in _sharing_runs(alike, least):
        found |= dict.fromkeys(order[begin:end], (begin, end))
    first = {run: min(i for i in found if found[i] == run) for run in set(found.values())}
    return {i: Prefix(first[run], min(alike[run[0] : run[1] - 1])) for i, run in found.items()}


_Part = tuple[int, int, int]
"""(begin, end, around): a run, in the smallest sharing one around it, which shares ``around`` tokens, 0 if there is
none."""


def _sharing_runs(alike: Sequence[int], least: int) -> list[tuple[int, int]]:
    """The runs that should share what all in them have in common, outer ones before those in them.

    ``alike`` are the tokens that neighbours have in common. Everyone is spared what the smallest sharing run around it
    shares, and each such run reads that once.
    """

    def divided(part: _Part) -> tuple[int, list[_Part], list[_Part]]:
        """What all of it have in common, and the parts it falls into: as it is, and if it shares."""
        begin, end, around = part
        tokens = min(alike[begin : end - 1])
        edges = [begin, *(k + 1 for k in range(begin, end - 1) if alike[k] == tokens), end]
        apart, inside = ([(a, b, n) for a, b in itertools.pairwise(edges)] for n in (around, tokens))
        return tokens, apart, inside if tokens >= least else []

    whole = (0, len(alike) + 1, 0)
    best: dict[_Part, tuple[int, bool]] = {}  # what a part saves, and whether it shares
    open_ = [whole]  # not by recursion: prompts may be each the beginning of the next
    while open_:
        part = open_[-1]
        if part[1] - part[0] < 2:
            best[part] = part[2], False
        if part in best:
            open_.pop()
            continue
        tokens, apart, inside = divided(part)
        if unknown := [p for p in (*apart, *inside) if p not in best]:
            open_ += unknown
            continue
        as_it_is, sharing = sum(best[p][0] for p in apart), sum(best[p][0] for p in inside) - tokens
        best[part] = (sharing, True) if inside and sharing > as_it_is else (as_it_is, False)
    runs, open_ = [], [whole]
    while open_:
        part = open_.pop()
        if part[1] - part[0] < 2:
            continue
        _, apart, inside = divided(part)
        if best[part][1]:
            runs.append(part[:2])
        open_ += inside if best[part][1] else apart
    return runs


def shared_by_siblings(prompts: Mapping[int, Sequence[int]], questions: Sequence[int], least: int) -> dict[int, Prefix]:
    """``shared`` of each question's prompts by themselves; ``questions`` by position."""
    by_question: dict[int, dict[int, Sequence[int]]] = {}
    for i, prompt in prompts.items():
        by_question.setdefault(questions[i], {})[i] = prompt
    return {i: prefix for own in by_question.values() for i, prefix in shared(own, least).items()}


def together(positions: Iterable[int], prefixes: Prefixes) -> list[tuple[Prefix | None, list[int]]]:
    """Neighbours that share a beginning, and each other sample by itself, in the order given.

    Whoever has no neighbour to share with has none to share: ``None`` goes with a sample alone.
    """
    runs = itertools.groupby(positions, key=lambda i: prefixes.get(i, i))
    grouped = [(key, list(members)) for key, members in runs]
    return [(key if isinstance(key, Prefix) and len(m) > 1 else None, m) for key, m in grouped]


def spared(cuts: Iterable[Sequence[int]], prefixes: Prefixes) -> Tokens:
    """What a pass over these micro-batches does not compute because beginnings are shared."""
    tokens = pairs = 0
    for positions in cuts:
        for prefix, members in together(positions, prefixes):
            n = prefix.tokens if prefix is not None else 0
            tokens += (len(members) - 1) * n
            pairs += (len(members) - 1) * (n * (n + 1) // 2)
    return Tokens(tokens, pairs, 0)
