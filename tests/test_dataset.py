"""Questions from files of every kind: lazily, strictly, with damaged rows named and counted."""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sdpo.config import ConfigError
from megatron_sdpo.rollout.prompts import PromptStream
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.dataset import DatasetTask, PromptRow, fields_of
from megatron_sdpo.tasks.rows import RowError, find_rows
from megatron_sdpo.types import Message, Question, Verdict
from tests.task_data import written


@dataclass(kw_only=True)
class Capitals(DatasetTask):
    """The example of dataset.py's docstring."""

    def question(self, id: str, row: dict[str, Any]) -> Question:
        fields = fields_of(row, PromptRow)
        return Question(id, self.messages(fields), {"answer": fields.answer})

    def verify(self, question: Question, response: str) -> Verdict:
        right = question.payload["answer"]
        return Verdict(1.0) if response.strip() == right else Verdict(0.0, "That is not its capital.")


NAME = f"{__name__}:Capitals"


def row(idx: int, **fields: Any) -> dict[str, Any]:
    return {
        "idx": idx,
        "prompt": f"The capital of land {idx} \u2028 ü?",
        "answer": f"town {idx}",
        "system": "Brief.",
        **fields,
    }


ROWS = [row(i) for i in range(7)]
EXPECTED = [
    Question(f"train/{r['idx']}", (Message("system", "Brief."), Message("user", r["prompt"])), {"answer": r["answer"]})
    for r in ROWS
]


def as_lines(folder: Path) -> None:
    written(folder / "train.json", ROWS)


def as_jsonl(folder: Path) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))  # no newline at the end


def as_list(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(ROWS, indent=1))


def as_parquet(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(ROWS), folder / "train.parquet", row_group_size=2)


def as_parts(folder: Path) -> None:
    """As the Hugging Face hub has them."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (folder / "data").mkdir()
    for part, rows in enumerate((ROWS[:4], ROWS[4:])):
        path = folder / "data" / f"train-{part:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)


def as_saved(folder: Path) -> None:
    """As ``datasets.DatasetDict.save_to_disk`` writes them."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.ipc

    (folder / "train").mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for part, rows in enumerate((ROWS[:3], ROWS[3:])):
        table = arrow.Table.from_pylist(rows)
        path = str(folder / "train" / f"data-{part:05d}-of-00002.arrow")
        with arrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def as_verl(folder: Path) -> None:
    def verl(r: dict[str, Any]) -> dict[str, Any]:
        turns = [{"role": "system", "content": r["system"]}, {"role": "user", "content": r["prompt"]}]
        return {"idx": r["idx"], "prompt": turns, "reward_model": {"style": "rule", "ground_truth": r["answer"]}}

    written(folder / "train.jsonl", [verl(r) for r in ROWS])


@pytest.mark.parametrize("write", [as_lines, as_jsonl, as_list, as_parquet, as_parts, as_saved, as_verl])
def test_every_kind_of_file_gives_the_same_questions(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    questions = load_task(NAME, data=str(tmp_path)).train_questions()
    assert len(questions) == len(EXPECTED)
    assert list(questions) == EXPECTED
    assert questions[1:3] == tuple(EXPECTED[1:3])
    assert questions[-1] == EXPECTED[-1]
    with pytest.raises(IndexError):
        questions[len(EXPECTED)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: questions[i % 7], range(700))) == EXPECTED * 100


def test_a_stream_resumes_where_it_was(tmp_path: Path) -> None:
    as_lines(tmp_path)
    first = PromptStream(load_task(NAME, data=str(tmp_path)).train_questions(), 3, seed=5)
    drawn = [[q.id for q in first.at(step)] for step in range(9)]
    assert first.cursor_after(8) == 27
    again = PromptStream(load_task(NAME, data=str(tmp_path)).train_questions(), 3, seed=5)
    assert [[q.id for q in again.at(step)] for step in range(6, 9)] == drawn[6:]
    flat = [id for step in drawn for id in step]
    assert [sorted(flat[i : i + 7]) for i in (0, 7, 14)] == [sorted(q.id for q in EXPECTED)] * 3
    assert flat[:7] != flat[7:14]


def test_lines_are_read_from_disk_not_held(tmp_path: Path) -> None:
    """200 MB of questions, of which a process holds little."""
    with (tmp_path / "train.jsonl").open("w") as file:
        for idx in range(2000):
            file.write(json.dumps(row(idx, prompt=f"{idx} " + "x" * 100_000)) + "\n")
    program = (
        "import resource, sys\n"
        "from megatron_sdpo.tasks import load_task\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"questions = load_task({NAME!r}, data=sys.argv[1]).train_questions()\n"
        "assert [questions[i].id for i in (1999, 0, 7)] == ['train/1999', 'train/0', 'train/7']\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40  # MB


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    as_lines(tmp_path)
    questions = load_task(NAME, data=str(tmp_path)).train_questions()
    (tmp_path / "train.json").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train\.json, line 3 has changed since it was checked"):
        questions[2]


@pytest.mark.parametrize(
    ("system", "messages"),
    [
        (None, (Message("system", "Brief."), Message("user", ROWS[0]["prompt"]))),
        ("Long.", (Message("system", "Long."), Message("user", ROWS[0]["prompt"]))),
        ("", (Message("user", ROWS[0]["prompt"]),)),
    ],
)
def test_the_system_prompt_can_be_replaced(tmp_path: Path, system: str | None, messages: tuple[Message, ...]) -> None:
    as_lines(tmp_path)
    assert load_task(NAME, data=str(tmp_path), system=system).train_questions()[0].messages == messages


BAD = [
    "",
    "{",
    "[1]",
    json.dumps(row(3)),
    json.dumps(row(9, answer=None)),
    json.dumps(row(10, prompt=" ")),
    '{"idx": 1}',
]
WORDS = ["is empty", "not JSON", "not an object", "already given at", "answer", "prompt is empty", "prompt"]


@pytest.mark.parametrize(("line", "words"), list(zip(BAD, WORDS, strict=True)))
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    lines = [json.dumps(row(3)), line, json.dumps(row(4))]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"test\.jsonl, line 2: .*{words}.*\(1 of 3 rows are malformed"):
        load_task(NAME, data=str(tmp_path))


def test_malformed_rows_are_counted_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*map(json.dumps, ROWS[:3]), *BAD[:2], *map(json.dumps, ROWS[3:])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"2 of 9 rows are malformed.*max_malformed_share, now 0.2"):
        load_task(NAME, data=str(tmp_path), max_malformed_share=0.2)
    with caplog.at_level(logging.WARNING):
        questions = load_task(NAME, data=str(tmp_path), max_malformed_share=0.25).train_questions()
    assert list(questions) == EXPECTED
    assert "train.jsonl, line 4: the line is empty" in caplog.messages[0]
    assert "train.jsonl, line 5: not JSON" in caplog.messages[1]
    assert caplog.messages[2] == "2 of 9 rows are malformed and left out"
    with pytest.raises(ConfigError, match=r"max_malformed_share is 1; set it to 0 or more, below 1"):
        load_task(NAME, data=str(tmp_path), max_malformed_share=1.0)


def test_rows_of_tables_are_named_too(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [*ROWS[:2], row(9, prompt="")]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"test\.parquet, row 3: the prompt is empty"):
        load_task(NAME, data=str(tmp_path))
    (tmp_path / "test.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ConfigError, match=r"test\.parquet cannot be read as a table"):
        load_task(NAME, data=str(tmp_path))


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    as_lines(tmp_path)
    written(tmp_path / "test.json", [row(20), {**row(21), "prompt": ROWS[2]["prompt"]}])
    with pytest.raises(ConfigError, match=r"1 of 2 held-out questions of .* are also trained on"):
        load_task(NAME, data=str(tmp_path))
    assert len(load_task(NAME, data=str(tmp_path), allow_overlap=True).eval_questions()) == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither train nor test questions; put train.json"),
        ({"train.json": ""}, "neither train nor test"),
        ({"train.json": "[{]"}, "begins as a JSON list and is none"),
        ({"train.json": "[]", "train.jsonl": ""}, "has train.json and train.jsonl for train; remove one"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_task(NAME, data=str(tmp_path))
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        load_task(NAME, data=str(tmp_path / "nowhere"))


def test_without_pyarrow_tables_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ConfigError, match=r"needs pyarrow, which is not installed; install megatron-sdpo\[tasks\]"):
        find_rows(tmp_path, "train")


def test_an_odd_conversation_is_refused() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(RowError, match="one user message"):
        fields_of({"prompt": turns, "reward_model": {"ground_truth": "x"}}, PromptRow)
