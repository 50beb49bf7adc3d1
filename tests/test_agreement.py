"""Ranks that do not have the same configuration, code or versions refuse to start, and say what differs."""

import shutil
import socket
from pathlib import Path

import pytest

from megatron_sdpo.config import apply_overrides
from megatron_sdpo.launch.agreement import Facts, disagreement, facts
from megatron_sdpo.launch.run_dir import RunDir
from recipes.minipipe import minipipe
from tests.launch import ROOT, run_ranks

ADVICE = "; give all ranks one configuration, one copy of the code and the same versions"
USUAL: Facts = {"optim.lr": "1e-05", "loop.py": "3f2a", "torch": "2.13.0"}


def told(*held: Facts) -> str:
    sentence = disagreement([(f"node{rank}", facts) for rank, facts in enumerate(held)])
    assert sentence.endswith(ADVICE)
    return sentence.removesuffix(ADVICE)


def test_the_sentence_names_the_odd_ranks_and_what_differs() -> None:
    assert told(USUAL, {**USUAL, "optim.lr": "1e-06"}, USUAL) == (
        "1 of 3 trainer ranks do not have what the others have: rank 1 on node1 has optim.lr 1e-06 where others have"
        " 1e-05"
    )
    odd = {"optim.lr": "1e-05", "loop.py": "77aa", "torch": "2.12.0", "more.py": "1"}
    assert told(odd, USUAL, USUAL, {"optim.lr": "1e-05", "torch": "2.13.0"}) == (
        "2 of 4 trainer ranks do not have what the others have: rank 0 on node0 has another content of the file"
        " loop.py, an unknown file more.py, torch 2.12.0 where others have 2.13.0; rank 3 on node3 has no file loop.py"
    )


def test_of_two_halves_the_first_rank_is_right() -> None:
    other = {**USUAL, "seed": "1"}
    assert "2 of 4 trainer ranks" in told(USUAL, other, other, USUAL)
    assert "rank 1 on node1 has seed 1 where others have none; rank 2" in told(USUAL, other, other, USUAL)


def test_many_differences_are_counted() -> None:
    ranks = told(*[USUAL] * 20, *[{**USUAL, "seed": str(i)} for i in range(10)])
    assert ranks.count("rank 2") == 8 and ranks.endswith("; 2 more ranks differ too")
    keys = told(USUAL, USUAL, USUAL | {f"key{i}": "1" for i in range(11)})
    assert keys.count("where others have none") == 8 and keys.endswith(" and 3 more differences")


def test_facts_are_configuration_code_and_versions(tmp_path: Path) -> None:
    for name, text in {"a.py": "1", "deep/b.py": "2", "c.txt": "3"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = facts(minipipe(), tmp_path)
    assert {name for name in found if name.endswith(".py")} == {"a.py", "deep/b.py"}
    assert found["objective.kind"] == '"sdpo"' and {"torch", "megatron-core", "python"} <= found.keys()
    (tmp_path / "deep/b.py").write_text("3")
    changed = facts(minipipe(), tmp_path)
    assert [name for name in found if found[name] != changed[name]] == ["deep/b.py"]


@pytest.mark.parametrize(
    "odd",
    [
        ("configuration", "code"),
        pytest.param(("configuration",), marks=pytest.mark.slow),
        pytest.param(("code",), marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_two_ranks_that_disagree_end_with_one_sentence(tmp_path: Path, odd: tuple[str, ...]) -> None:
    """The trainer as it is started, up to where it would build the model."""
    runs, rates = (tmp_path / "first", tmp_path / "second"), (0.25, 0.5 if "configuration" in odd else 0.25)
    for path, rate in zip(runs, rates, strict=True):
        overrides = ["layout.world_size=2", "layout.tensor_parallel=2", "run_dir=shared", f"optim.lr={rate}"]
        RunDir(path).prepare(apply_overrides(minipipe(), overrides))
    folder = tmp_path / "copy" if "code" in odd else ROOT
    if "code" in odd:
        shutil.copytree(ROOT / "megatron_sdpo", folder / "megatron_sdpo", ignore=shutil.ignore_patterns("__pycache__"))
        with (folder / "megatron_sdpo" / "objective.py").open("a") as file:
            file.write("# another loss\n")
    with pytest.raises(AssertionError, match="exited with 1") as ended:
        run_ranks("dist_agreement.py", 2, [*map(str, runs), str(folder)], timeout=200)
    said = [RunDir(path).failure_of("trainer") for path in runs]
    assert said[0] is not None and said[0] == said[1], ended.value
    what = {
        "code": "another content of the file objective.py",
        "configuration": "optim.lr 0.5 where others have 0.25",
    }
    differences = ", ".join(words for kind, words in what.items() if kind in odd)
    assert said[0] == (
        f"1 of 2 trainer ranks do not have what the others have: rank 1 on {socket.gethostname()} has {differences}"
        + ADVICE
    )
