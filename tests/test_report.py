"""The report of whole, partial and hostile run directories; several runs overlaid."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from megatron_sdpo import config as configuration
from megatron_sdpo.chat import Chat
from megatron_sdpo.config import Config, ConfigError, ModelConfig, OptimConfig, RolloutConfig, TaskConfig
from megatron_sdpo.report import write_comparison, write_report
from megatron_sdpo.report.contexts import NO_TARGET
from megatron_sdpo.report.page import TEXT_LIMIT
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.tracking import METRICS_FILE, Tracker
from megatron_sdpo.types import Attempt, Group, Message, Question, Verdict
from recipes import recipe
from recipes.minipipe import BASE_MODEL

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} \U0001f600"


def config_for(run_dir: Path, **changes: object) -> Config:
    config = Config(
        name="run",
        run_dir=str(run_dir),
        steps=8,
        model=ModelConfig(path="model"),
        task=TaskConfig(name="minipipe"),
        rollout=RolloutConfig(prompts_per_step=4, attempts_per_prompt=8),
    )
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


def group(step: int, slot: int, rewards: tuple[float, ...], text: str = "above 2 | total") -> Group:
    question = Question(f"train/{step}-{slot}", (Message("user", "keep over 2, sum"),))
    attempts = tuple(Attempt((5, 9), (3, 4, 1), (-0.1, -0.2, -0.3), f"{text} #{i}", "stop", step) for i in range(8))
    verdicts = tuple(Verdict(r, "" if r else "sh: over: not found") for r in rewards)
    return Group(step, slot, question, attempts, verdicts)


def make_run(run_dir: Path, text: str = "above 2 | total", **changes: object) -> Path:
    """A finished run of 8 steps, evaluated every 4, reward and accuracy rising linearly."""
    config = config_for(run_dir, **changes)
    (run_dir / "attempts").mkdir(parents=True)
    configuration.save(config, run_dir / "config.json")
    tracker = Tracker(config, run_dir, is_writer=True)
    tracker.log(0, {"eval/accuracy": 0.0, "time/evaluate": 0.5})
    for step in range(1, 9):
        metrics = {"verdict/reward": step / 8, "loss/divergence": 0.1 / step, "time/generate": 3.0, "time/train": 1.0}
        metrics |= {"time/step": 4.0} | ({"eval/accuracy": step / 10} if step % 4 == 0 else {})
        tracker.log(step, metrics)
        groups = [group(step - 1, slot, (1.0, 0.0) * 4 if slot == 2 else (0.0,) * 8, text) for slot in range(4)]
        lines = b"".join(msgspec.json.encode(g) + b"\n" for g in groups)
        (run_dir / "attempts" / f"step-{step - 1:06d}.jsonl").write_bytes(lines)
    tracker.close()
    return run_dir


class Page(HTMLParser):
    """The text of a page, its tags, and whatever it would load or link to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not (value or "").startswith("#"):
                self.references.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study", optim=OptimConfig(lr=2e-3))
    out = write_report(run_dir)
    assert out == run_dir / "report.html"
    page = read(out)
    for headline in (
        "steps 8 of 8",
        "generations 256",
        "first → last 0.000 → 0.800",
        "best held-out accuracy 0.800",
        "generations to 80% 256",
        "training reward, last step 1.000",
        "time in steps 32.0 s",
    ):
        assert headline in page.text
    assert "generations to 90%" not in page.text
    assert "Not all is here" not in page.text
    assert page.text.index("optim.lr") < page.text.index("settings at their defaults") < page.text.index("optim.beta1")
    assert "generate 24.0 3.00 3.00 74 %" in page.text
    assert page.text.count("4 of 8 attempts shown") == 6
    for batch in (0, 3, 7):
        assert f"Batch {batch} (trained version {batch + 1})" in page.text
        assert f"train/{batch}-2" in page.text  # the group where attempts differ is always among the shown
    assert "sh: over: not found" in page.text
    assert page.references == []
    assert "url(http" not in out.read_text() and "@import" not in out.read_text()


def test_the_curves_are_drawn_for_both_colour_schemes(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    html = write_report(run_dir).read_text()
    match = re.search(r"<svg.*?</svg>", html, re.DOTALL)
    assert match is not None
    ElementTree.fromstring(match.group())
    for title in ("Held-out accuracy", "Training reward", "Loss", "Seconds per step"):
        assert title in match.group()
    assert "nothing recorded yet" not in match.group()
    assert "var(--ink)" in match.group() and "var(--grid)" in match.group()
    assert "#0a0b0c" not in match.group() and "#000000" not in match.group()
    assert "prefers-color-scheme: dark" in html
    with Image.open(run_dir / "curve.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


def test_numbers_that_tell_whether_a_run_is_healthy(tmp_path: Path) -> None:
    """Drawn where they are recorded; and every number is explained."""
    run_dir = make_run(tmp_path / "study")
    assert "Is it healthy?" not in read(write_report(run_dir)).text
    rows = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    for row in rows[1:]:
        row |= {"loss/entropy": 1 / row["step"], "rollout/response_tokens": 8.0, "context/feedback": 0.5}
        row |= {"context/both": 0.0, "loss/divergence/max": 0.25, "rollout/cut_share": 0.0}
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(run_dir).read_text()
    curves, health = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert "Policy entropy" in health and "nats per token" in health and "Policy entropy" not in curves
    assert "What the teacher reads" in health and ">feedback<" in health and ">both<" not in health
    ElementTree.fromstring(health)
    text = Page(html).text
    assert "loss/entropy 1 0.125 0.125 1 nats of the policy at a token, mean" in text
    assert "loss/divergence/max 0.25 0.25 0.25 0.25 nats largest of all tokens: between student and teacher" in text


def test_a_long_run_has_no_more_bars_than_can_be_seen(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    short = write_report(run_dir).read_text()
    row = json.loads((run_dir / METRICS_FILE).read_text().splitlines()[1])
    rows = [{**row, "step": step, "generations": 32 * step} for step in range(1, 1201)]
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = write_report(run_dir).read_text()
    assert "step; a bar is the mean of 8" in long and "a bar is" not in short
    assert long.count("<path") < short.count("<path") + 2 * 150  # two phases
    assert ">30k<" in long  # generations


def test_what_the_teacher_read_is_shown_where_the_tokenizer_is(tmp_path: Path) -> None:
    """Failed attempts: a sibling's success; the success itself: no other, nor feedback."""
    run_dir = make_run(tmp_path / "away", text="keep over 2 , sum")
    page = read(write_report(run_dir))
    assert "left out: the tokenizer directory model does not exist" in page.text
    assert "before this attempt" not in page.text
    base = dataclasses.replace(recipe("minipipe"), run_dir=str(run_dir), steps=8)
    configuration.save(base, run_dir / "config.json")
    page = read(write_report(run_dir))
    assert page.text.count("what the teacher reads before this attempt") == page.text.count("weights of version")
    groups = [msgspec.json.decode(line, type=Group) for line in (run_dir / "attempts" / "step-000000.jsonl").open("rb")]
    told, _ = build_contexts(groups[2], base.teacher_context, tokens := Chat(BASE_MODEL))
    assert told[1].prompt_ids is not None and " ".join(tokens.text(told[1].prompt_ids).split()) in page.text
    assert NO_TARGET not in page.text  # of the successful attempts, too, another may demonstrate
    configuration.save(dataclasses.replace(recipe("minipipe-grpo"), steps=8), run_dir / "config.json")
    assert "the teacher read" not in read(write_report(run_dir)).text


def test_text_of_a_model_stays_text(tmp_path: Path) -> None:
    long = HOSTILE + "y" * TEXT_LIMIT
    run_dir = make_run(tmp_path / "study", text=long, name=HOSTILE, task=TaskConfig(name="t", options={"x": HOSTILE}))
    page = read(write_report(run_dir))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "49" not in re.findall(r"quoted\" (\S+)", page.text)
    assert "more characters" in page.text


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    configuration.save(config_for(tmp_path), tmp_path / "config.json")
    page = read(write_report(tmp_path))
    assert "no step is recorded yet" in page.text
    assert "no attempts are journalled yet" in page.text
    assert "svg" not in page.tags
    assert (tmp_path / "curve.png").exists()


def test_a_run_that_was_killed_in_the_middle(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    lines = (run_dir / METRICS_FILE).read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:4]]
    del rows[0]["eval/accuracy"]
    rows[2]["verdict/reward"] = None
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + lines[4][:30])
    for step in range(4, 8):
        (run_dir / "attempts" / f"step-{step:06d}.jsonl").unlink()
    with (run_dir / "attempts" / "step-000003.jsonl").open("ab") as journal:
        journal.write(msgspec.json.encode(group(3, 4, (0.0,) * 8))[:50])
    page = read(write_report(run_dir))
    assert "the run has not finished: 3 of 8 steps are recorded" in page.text
    assert "no held-out evaluation is recorded yet" in page.text
    assert "attempts/step-000003.jsonl line 5 is cut or damaged; it is left out" in page.text
    assert "Batch 3 (trained version 4)" in page.text
    assert "nothing recorded yet" in page.text  # the panel of the accuracy


def test_a_hole_in_the_rows_is_said(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    lines = (run_dir / METRICS_FILE).read_text().splitlines(keepends=True)
    (run_dir / METRICS_FILE).write_text("".join(lines[:3] + lines[5:]))
    assert "2 steps have no row of metrics, the first is step 3" in read(write_report(run_dir)).text


def test_a_run_whose_settings_are_lost(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    (run_dir / "config.json").unlink()
    page = read(write_report(run_dir))
    assert "config.json is missing" in page.text
    assert "settings at their defaults" not in page.text
    (run_dir / "config.json").write_text('{"stepz": 1}')
    text = read(write_report(run_dir)).text
    assert "the settings cannot be read" in text
    assert "unknown configuration key 'stepz'" in text


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not a run directory"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is not a run directory"):
        write_report(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_runs_overlaid(tmp_path: Path) -> None:
    a = make_run(tmp_path / "slow_$1")
    b = make_run(tmp_path / "fast", optim=OptimConfig(lr=2e-3))
    (b / METRICS_FILE).write_text("".join((b / METRICS_FILE).read_text().splitlines(keepends=True)[:6]))
    out = write_comparison([a, b], tmp_path / "page" / "both.html")
    page = read(out)
    assert out.with_suffix(".png").exists()
    assert page.references == []
    assert "optim.lr 1e-05 0.002" in page.text
    assert "rollout.prompts_per_step" not in page.text  # the same in both
    assert "slow_$1" in page.text and "fast" in page.text
    assert "fast: the run has not finished: 5 of 8 steps" in page.text
    assert "0.000 → 0.800 0.000 → 0.400" in page.text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "one" / "run"), make_run(tmp_path / "two" / "run")
    page = read(write_comparison([a, b], tmp_path / "both.html"))
    assert str(a) in page.text and str(b) in page.text
    assert "Settings that differ None." in page.text


def test_a_comparison_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "study")
    with pytest.raises(ConfigError, match="needs two runs or more"):
        write_comparison([run_dir], tmp_path / "both.html")
    with pytest.raises(ConfigError, match=r"name it .*both\.html instead"):
        write_comparison([run_dir, run_dir], tmp_path / "both.png")
    with pytest.raises(ConfigError, match="is not a run directory"):
        write_comparison([run_dir, tmp_path], tmp_path / "both.html")
