"""The slowest rank is named, by its own work and not by how long it waits for others."""

import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdpo.launch.stragglers import PHASES, Slowest, slowest
from megatron_sdpo.tracking import read_metrics
from tests.dist_stragglers import RANKS, SLOW_S, STEPS, USUAL_S
from tests.launch import run_ranks


def test_a_rank_is_compared_with_the_median_of_its_likes() -> None:
    work = [[1.0, 0.0, 2.0], [1.0, 0.0, 5.0], [1.5, 0.0, 2.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    assert slowest(work, [0, 0, 0, 1, 1]) == Slowest(1, 2.75 / 3.25, (-0.25, 0.0, 3.0))
    assert slowest(work, [0] * 5).rank == 3  # whatever the layout says


def test_a_stage_of_one_rank_is_compared_with_all() -> None:
    assert slowest([[1.0], [1.5]], [0, 1]) == Slowest(1, 0.5, (0.5,))


@given(
    work=st.lists(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=2), min_size=2, max_size=9),
    stage_of_rank=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
def test_the_slowest_is_that_of_plain_medians(work: list[list[float]], stage_of_rank: list[int]) -> None:
    stages = stage_of_rank[: len(work)]
    beyond = []
    for rank, own in enumerate(work):
        likes = [r for r, stage in enumerate(stages) if stage == stages[rank] and r != rank]
        likes = likes or [r for r in range(len(work)) if r != rank]
        beyond.append([own[p] - statistics.median(work[r][p] for r in likes) for p in range(2)])
    found = slowest(work, stages)
    assert found.seconds == pytest.approx(beyond[found.rank])
    assert sum(found.seconds) == pytest.approx(max(map(sum, beyond)))


def test_real_ranks_find_the_one_that_burns_more(tmp_path: Path) -> None:
    said = run_ranks("dist_stragglers.py", RANKS, [str(tmp_path)], timeout=200)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(STEPS + 1)) and "perf/slowest_rank" not in rows[0]
    for row in rows[2:]:
        seconds = [row[f"perf/slowest_seconds/{name}"] or 0.0 for name in PHASES]
        assert row["perf/slowest_rank"] == 1.0
        assert seconds[2] == pytest.approx(SLOW_S - USUAL_S, abs=0.1)
        assert abs(seconds[0]) < 0.1 and seconds[1] == 0.0
        assert row["perf/slowest_share"] == pytest.approx(sum(seconds) / (2 * USUAL_S), rel=0.3)
        assert (row["time/train"] or 0.0) > SLOW_S - 0.05  # also on the first rank, which wrote it
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert re.fullmatch(
        r"warning: step 4: rank 1 is slow, 3 steps in a row: \d+% more own work than its likes, mostly in train"
        r" \(0\.\d\d s more\)",
        warning,
    ), warning
