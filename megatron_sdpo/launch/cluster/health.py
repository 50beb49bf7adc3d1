"""Which nodes are not fit for the run: judged from what they found of themselves, and from what was measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sdpo.launch.cluster.facts import Facts
from megatron_sdpo.launch.cluster.site import Site


@dataclass(frozen=True, slots=True)
class Unfit:
    """Example: ``Unfit("n2", "has 7 GPUs, not 8")``"""

    node: str
    why: str

    def __str__(self) -> str:
        return f"node {self.node} {self.why}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bus bandwidth of all-reduces, 10^9 bytes a second. Example: ``Measured(inside=380.0, pairs={"n2": 41.0})``"""

    inside: float | None
    """Among the node's own ranks; None where it has only one."""
    pairs: dict[str, float]
    """With a neighbour."""


def judge_facts(found: Mapping[str, Facts], nodes: Sequence[str], canary: str, site: Site) -> list[Unfit]:
    """All that is wrong, in the order of the nodes."""
    unfit: list[Unfit] = []
    versions = {node: tuple(sorted(found[node].versions.items())) for node in nodes if node in found}
    usual = dict(Counter(versions.values()).most_common(1)[0][0]) if versions else {}
    for node in nodes:
        facts = found.get(node)
        if facts is None:
            unfit.append(Unfit(node, "has not shown itself: it does not run, or does not share the run directory"))
        elif facts.canary != canary:
            unfit.append(Unfit(node, "does not see what the first node wrote: the run directory is not shared"))
        elif facts.problem:
            unfit.append(Unfit(node, f"could not look at itself: {facts.problem}"))
        else:
            unfit += [Unfit(node, why) for why in (*_other_versions(facts, usual), *_bad_gpus(facts, site))]
    return unfit


def judge_measured(measured: Mapping[str, Measured], nodes: Sequence[str], site: Site) -> list[Unfit]:
    """Nodes below the site's thresholds. One is slow to the network if it is so with every neighbour."""
    unfit: list[Unfit] = []
    for node in nodes:
        numbers = measured.get(node)
        if numbers is None:
            unfit.append(Unfit(node, "has not measured its all-reduces in time"))
            continue
        if numbers.inside is not None and numbers.inside < site.min_node_gb_s:
            least = f"SDPO_MIN_NODE_GB_S {site.min_node_gb_s:g}"
            unfit.append(Unfit(node, f"all-reduces {numbers.inside:.3g} GB/s inside itself, below {least}"))
        best = max(numbers.pairs.values(), default=None)
        if best is not None and best < site.min_network_gb_s:
            least = f"SDPO_MIN_NETWORK_GB_S {site.min_network_gb_s:g}"
            unfit.append(Unfit(node, f"all-reduces {best:.3g} GB/s with its neighbours, below {least}"))
    return unfit


def _other_versions(facts: Facts, usual: Mapping[str, str]) -> list[str]:
    names = sorted(facts.versions.keys() | usual.keys())
    other = [name for name in names if facts.versions.get(name) != usual.get(name)]
    told = [f"{n} {facts.versions.get(n, 'not at all')} where others have {usual.get(n, 'none')}" for n in other]
    return [f"has {', '.join(told)}"] if told else []


def _bad_gpus(facts: Facts, site: Site) -> list[str]:
    if not site.gpus_per_node:
        return []
    bad = []
    if len(facts.gpus) != site.gpus_per_node:
        bad.append(f"has {len(facts.gpus)} GPUs, not SDPO_GPUS_PER_NODE {site.gpus_per_node}")
    for gpu in facts.gpus:
        if gpu.ecc_errors:
            bad.append(f"has {gpu.ecc_errors} uncorrected ECC errors on GPU {gpu.index}")
        if gpu.is_slowed:
            bad.append(f"slows GPU {gpu.index} down for heat or power")
        if gpu.max_sm_clock_mhz < site.min_sm_clock_mhz:
            least = f"SDPO_MIN_SM_CLOCK_MHZ {site.min_sm_clock_mhz}"
            bad.append(f"allows GPU {gpu.index} only {gpu.max_sm_clock_mhz} MHz, below {least}")
    if len({gpu.name for gpu in facts.gpus}) > 1:
        bad.append(f"has GPUs of several kinds: {', '.join(sorted({gpu.name for gpu in facts.gpus}))}")
    return bad
