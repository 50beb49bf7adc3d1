"""Timeline and profile: from parts by hand, a coordinator, and a real run of two ranks."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_sdpo import cli
from megatron_sdpo.chat import Chat
from megatron_sdpo.launch.observation import DrawnSampler, TrainerObservation, drawn
from megatron_sdpo.launch.run_dir import RunDir
from megatron_sdpo.rollout.client import EngineClient
from megatron_sdpo.rollout.control import EngineControl
from megatron_sdpo.rollout.journal import Journal
from megatron_sdpo.rollout.sampler import Asked
from megatron_sdpo.tasks import load_task
from megatron_sdpo.timeline import Timeline, write_timeline
from megatron_sdpo.types import EngineAddress
from recipes.minipipe import BASE_MODEL, minipipe
from tests.fake_engine import FakeEngine
from tests.test_coordinator import CHAT, TASK, respond
from tests.test_half_runs import STEPS, group, train

Span = tuple[str, str, str, float, float, int]
"""Process, thread, name, beginning, end (microseconds), depth."""


def read(run_dir: Path) -> dict[str, Any]:
    content = json.loads((run_dir / "timeline.json").read_text())
    assert set(content) >= {"traceEvents", "displayTimeUnit"}
    return content


def spans(content: dict[str, Any]) -> list[Span]:
    """What the viewers would draw; fails where events do not nest, go back in time or are on an unnamed track."""
    names = {"process_name": {}, "thread_name": {}}
    for event in content["traceEvents"]:
        if event["ph"] == "M" and event["name"] in names:
            names[event["name"]][event["pid"], event["tid"]] = event["args"]["name"]
    found: list[Span] = []
    stacks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in content["traceEvents"]:
        if event["ph"] not in ("B", "E"):
            continue
        where = event["pid"], event["tid"]
        stack = stacks.setdefault(where, [])
        if event["ph"] == "B":
            stack.append(event)
        else:
            begun = stack.pop()
            assert event["ts"] >= begun["ts"] >= 0
            place = names["process_name"][where], names["thread_name"][where]
            found.append((*place, begun["name"], begun["ts"], event["ts"], len(stack)))
    assert not any(stacks.values()), "something never ends"
    return found


def test_parts_of_processes_become_one_file(tmp_path: Path) -> None:
    first, second = (Timeline(tmp_path / "timeline", f"trainer-{rank}") for rank in (2, 10))
    with first.span(("trainer rank 2", "phases"), "outer", step=3), second.span(("trainer rank 10", "phases"), "b"):
        with first.span(("trainer rank 2", "phases"), "inner"):
            pass
    first.count(("engines", "requests"), "in hand", 4)
    first.close()
    second.close()
    assert write_timeline(tmp_path) == tmp_path / "timeline.json"
    content = read(tmp_path)
    outer, b, inner = (next(s for s in spans(content) if s[2] == name) for name in ("outer", "b", "inner"))
    assert outer[3] <= b[3] <= inner[3] <= inner[4] <= b[4] <= outer[4]  # of two files: one clock
    assert (outer[5], inner[5]) == (0, 1)
    events = content["traceEvents"]
    assert [e["args"] for e in events if e.get("name") == "outer"] == [{"step": 3}]
    assert [(e["ph"], e["args"]) for e in events if e["ph"] == "C"] == [("C", {"in hand": 4})]
    order = {e["args"]["name"]: e["pid"] for e in events if e.get("name") == "process_name"}
    assert order["engines"] < order["trainer rank 2"] < order["trainer rank 10"]


def test_a_killed_process_leaves_what_it_did(tmp_path: Path) -> None:
    track = ("trainer rank 0", "phases")
    killed = Timeline(tmp_path / "timeline", "trainer-0")
    killed.begin(track, "step")
    killed.begin(track, "train")
    killed.close()
    (part,) = (tmp_path / "timeline").iterdir()
    whole = part.read_text()
    part.write_text(whole + whole.splitlines()[-1][:20])  # cut off while it was written
    resumed = Timeline(tmp_path / "timeline", "trainer-0")
    with resumed.span(track, "again"):
        pass
    (tmp_path / "timeline" / "empty.jsonl").touch()
    write_timeline(tmp_path)  # while the second still runs
    found = sorted(spans(read(tmp_path)), key=lambda span: (span[3], span[5]))
    assert [(name, depth) for _, _, name, _, _, depth in found] == [("step", 0), ("train", 1), ("again", 0)]
    assert found[1][4] <= found[2][3]
    resumed.close()


def test_no_parts_no_timeline(tmp_path: Path) -> None:
    assert write_timeline(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_lanes_are_shared_in_turn_by_threads(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline", "x")
    together = threading.Barrier(3)

    def work() -> None:
        for _ in range(20):
            with timeline.lane("x", "lane") as lane, timeline.span(lane, "work"):
                together.wait(10)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_timeline(tmp_path)
    drawn_on = Counter((thread, name) for _, thread, name, _, _, depth in spans(read(tmp_path)) if depth == 0)
    assert sum(drawn_on.values()) == 60 and {thread for thread, _ in drawn_on} == {f"lane {i}" for i in range(3)}


def test_groups_and_requests_of_a_coordinator(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline", "coordinator")
    questions = TASK.train_questions()[:3]

    async def run() -> None:
        async with FakeEngine(respond) as engine, EngineClient([engine.address], "token", timeout_s=30) as client:
            sampler = DrawnSampler(timeline, client, CHAT, TASK, 24, verify_workers=2)

            async def batch(step: int) -> int:
                asked = [Asked(step, slot, q, attempts=2, temperature=1.0) for slot, q in enumerate(questions)]
                groups, seconds = await sampler.groups(asked)
                assert [group.slot for group in groups] == [0, 1, 2] and seconds["time/generate"] > 0
                return len(groups)

            handlers = drawn({"batch": batch}, timeline)
            assert [await handlers["batch"](step) for step in (0, 1)] == [3, 3]

    asyncio.run(run())
    timeline.close()
    write_timeline(tmp_path)
    content = read(tmp_path)
    found = spans(content)
    requests = [s for s in sorted(found, key=lambda s: s[3]) if s[1] == "requests"]
    assert [s[2] for s in requests] == ["wait", "batch", "wait", "batch", "wait"]
    groups = [s for s in found if s[5] == 0 and s[1].startswith("group")]
    assert sorted(s[2] for s in groups) == [f"train {step}/{slot}" for step in (0, 1) for slot in range(3)]
    for place, (begin, end) in [((s[0], s[1]), (s[3], s[4])) for s in groups]:
        inside = [s for s in found if (s[0], s[1]) == place and s[5] == 1 and begin <= s[3] and s[4] <= end]
        assert [s[2] for s in sorted(inside, key=lambda s: s[4])] == ["generate", "verify"]
        assert inside[0][4] <= inside[1][3]
    in_hand = [e["args"]["attempts in hand"] for e in content["traceEvents"] if e["ph"] == "C"]
    assert max(in_hand) == 6 and in_hand[-1] == 0


# ------------------------------------------------------------------------------------------ a run of two ranks


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two batches from a journal, in a pipeline of two; everything asked for, the profile of the second batch."""
    folder = tmp_path_factory.mktemp("observed")
    tokens, journal = Chat(BASE_MODEL), Journal(folder / "other" / "attempts")
    questions = load_task("minipipe", **minipipe().task.options).train_questions()
    for step in range(STEPS):
        for slot in (0, 1):
            journal.append(group(step, slot, questions[2 * step + slot], tokens))
    flags = (
        "debug.timeline=true",
        "debug.profile_steps=[1]",
        "debug.profile_ranks=[0,1]",
        "debug.profile_details=true",
    )
    run_dir = folder / "run"
    more = ("--layout=pp2", "teacher.kind=frozen", "layout.tokens_per_micro_batch=64", *flags)
    done = train(f"--from-journal={folder / 'other'}", f"--run-dir={run_dir}", *more)
    assert done.returncode == 0, done.stderr
    yield run_dir


@pytest.mark.timeout(300)
def test_the_timeline_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = spans(read(run_dir))
    phases = ["wait", "score_student", "score_teacher", "train", "sync"]
    assert {s[0] for s in found} == {"trainer rank 0", "trainer rank 1"}
    for rank in (0, 1):
        own = sorted((s for s in found if s[0] == f"trainer rank {rank}"), key=lambda s: (s[3], s[5]))
        steps = [s for s in own if s[2] == "step"]
        assert len(steps) == STEPS and all(a[4] <= b[3] for a, b in pairwise(steps))
        for _, _, _, begin, end, depth in steps:
            inside = [s for s in own if begin <= s[3] and s[4] <= end and s[5] == depth + 1]
            assert [s[2] for s in inside] == phases
            passes = {s[2]: [p[2] for p in own if p[5] == depth + 2 and s[3] <= p[3] <= p[4] <= s[4]] for s in inside}
            assert set(passes["score_student"]) == set(passes["score_teacher"]) == {"forward"}
            counted = Counter(passes["train"])
            assert counted["forward"] == counted["backward"] > 1 and set(counted) == {"forward", "backward"}
            assert not passes["wait"] and not passes["sync"]
    (run_dir / "timeline.json").unlink()
    cli.main(["report", str(run_dir)])
    assert spans(read(run_dir)) == found and "report.html" in capsys.readouterr().out


def test_the_profile_of_a_run(run_dir: Path) -> None:
    names = {f"step-1-rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json", "txt")}
    assert {path.name for path in (run_dir / "profile").iterdir()} == names
    for rank in (0, 1):
        events = json.loads((run_dir / "profile" / f"step-1-rank-{rank}.json").read_text())["traceEvents"]
        spent = Counter(event["name"] for event in events if event.get("ph") == "X")
        for phase in ("score_student", "score_teacher", "train", "sync"):
            assert spent[phase] >= 1, phase
        assert spent["wait"] == spent["step"] == 0
        assert spent["aten::mm"] > 0 and any("backward" in name.lower() for name in spent)
        train_at = next(event for event in events if event.get("ph") == "X" and event["name"] == "train")
        inside = [e for e in events if e.get("name") == "aten::mm" and e["ts"] >= train_at["ts"]]
        assert inside and any(e["args"].get("Input Dims") for e in inside)  # debug.profile_details
        table = (run_dir / "profile" / f"step-1-rank-{rank}.txt").read_text()
        assert "Self CPU" in table and "aten::" in table


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    observation = TrainerObservation(minipipe(), RunDir(tmp_path), rank=0)
    assert observation.followers == [] and list(tmp_path.iterdir()) == []
    address = EngineAddress("engine-0", "http://127.0.0.1:1", 1)
    assert type(observation.control(address, "token", 1.0)) is EngineControl
