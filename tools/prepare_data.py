"""Turn a local copy of a public data set into task files (``train.json``, ``test.json``). Nothing is downloaded.

::

    python tools/prepare_data.py sciknoweval   SOURCE data/sciknoweval     # for task.name=sciknoweval
    python tools/prepare_data.py toolalpaca    SOURCE data/tooluse         # for task.name=tooluse
    python tools/prepare_data.py livecodebench SOURCE data/livecodebench   # for task.name=livecodebench

SOURCE is what was downloaded: a file, or a folder in which all JSON, JSON-lines, parquet and arrow files are read.

========================  =============================================================================================
sciknoweval               ``hicai-zju/SciKnowEval``: multiple choice of level L3, a folder for each domain; test is
                          drawn by ``--seed``, ``--test-share`` of each domain
toolalpaca                ToolAlpaca's ``train_data.json`` (recorded dialogues) and ``eval_simulated.json`` (its test)
livecodebench             ``livecodebench/code_generation_lite``: one ``problems.jsonl`` for both splits, of all dates
                          (prepare_livecodebench.py takes those between two days)
========================  =============================================================================================

Rows that are not of the kind wanted are left out and counted by reason; a row that cannot be used ends the program with
its file and line. To add a data set, write a function from a source row to task rows, which raises ``LeftOut`` with a
reason for what is not wanted, and enter it into ``DATA_SETS``.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import prepare_livecodebench

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.rows import RowError, read_rows

Row = dict[str, Any]
Split = Literal["train", "test"]
READABLE = (".json", ".jsonl", ".parquet", ".arrow")


class LeftOut(Exception):
    """Something that is not of the kind wanted; the text is the reason, counted."""


@dataclass(frozen=True)
class Made:
    """A task row and the folder below the target in which it belongs ("": the target itself), or a reason for none."""

    row: Row = field(default_factory=dict)
    folder: str = ""
    left_out: str = ""


@dataclass(frozen=True)
class DataSet:
    """How one data set is read, divided and checked."""

    convert: Callable[[Row], Iterable[Made]]
    split_of: Callable[[Path], Split | None] | None
    """The split that a source file is, None when it is not read; no function: test is drawn."""
    task: Callable[[Path, str], tuple[str, Row]]
    """Name and options of the task that reads what was written, for a target and a folder in it."""


# --- SciKnowEval ---

DOMAINS = {
    "Chemistry": "chemistry",
    "Physics": "physics",
    "Biology": "biology",
    "Material": "materials",
    "Materials": "materials",
}
CHOICES = {"mcq-4-choices": "four", "mcq-2-choices": "two"}
LEVEL = "L3"
CHOICE_SYSTEM = """
Given a question and {count} options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option ({letters}), and nothing else. \
Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def sciknoweval_rows(row: Row) -> Iterator[Made]:
    """The task row of a question, where it is multiple choice and asks for reasoning."""
    kind, details = row.get("type"), row.get("details") or {}
    if kind not in CHOICES:
        raise LeftOut(f"type {kind}")
    if details.get("level") != LEVEL:
        raise LeftOut(f"level {details.get('level')}")
    domain = DOMAINS.get(row["domain"])
    if domain is None:
        raise RowError(f"the domain is {row['domain']!r}, not one of {', '.join(DOMAINS)}")
    letters, texts = row["choices"]["label"], row["choices"]["text"]
    options = "\n".join(f"{letter}: {text}" for letter, text in zip(letters, texts, strict=True))
    made = {
        "kind": "mcq",
        "dataset": "sciknoweval",
        "prompt": f"{row['question']}\n\n{options}\nPlease reason step by step.",
        "system": CHOICE_SYSTEM.format(count=CHOICES[kind], letters=_listed(letters)),
        "answer": row["answerKey"],
        "category": details.get("task") or domain,
    }
    yield Made(made, domain)


def _listed(letters: Sequence[str]) -> str:
    """``A, B, C, or D``; ``A or B``"""
    comma = "," if len(letters) > 2 else ""
    return f"{', '.join(letters[:-1])}{comma} or {letters[-1]}"


# --- ToolAlpaca ---

TOOL_PROMPT = (
    "Your task is to answer the user's question using available tools. \nYou have access to the following tools:\n"
    "Name: {name}\nDescription: {description}\nDocumentation:\n{documentation}\n"
    "Use the following format:\nThought: you should always think about what to do\n"
    "Action: the action to take, should be one of the tool names.\n"
    "Action Input: the input to the action, must be in JSON format. All of the action input must be realistic and from"
    " the user.\n\nBegin!\nQuestion: {question}"
)
ASKS_BACK = "getDetails"
"""What recorded dialogues call to ask the user; the prompt does not document it."""


def toolalpaca_rows(api: Row) -> Iterator[Made]:
    """A task row for each request to an API: evaluation files give the right calls, training files whole dialogues."""
    if not api.get("NLDocumentation"):
        raise LeftOut("an API without documentation")
    if "Golden_Answers" in api:
        asked = list(zip(api["Instructions"], api["Golden_Answers"], strict=True))
    else:
        asked = [(_request(dialogue), _recorded_calls(dialogue)) for dialogue in api.get("Instances", [])]
    for question, calls in asked:
        if not calls:
            yield Made(left_out="a request without calls")
        elif "Golden_Answers" not in api and any(call["Action"] == ASKS_BACK for call in calls):
            yield Made(left_out=f"a dialogue that asks back ({ASKS_BACK})")
        elif not all(_is_object(call["Action_Input"]) for call in calls):
            yield Made(left_out="a call whose input is no JSON object")
        else:
            yield Made(_tool_row(api, question, calls))


def _tool_row(api: Row, question: str, calls: Sequence[Row]) -> Row:
    prompt = TOOL_PROMPT.format(
        name=api["Name"],
        description=api["Description"],
        documentation=api["NLDocumentation"],
        question=question,
    )
    answer = json.dumps([{key: call[key] for key in ("Action", "Action_Input")} for call in calls], ensure_ascii=False)
    return {"kind": "tooluse", "dataset": "tooluse", "prompt": prompt, "system": None, "answer": answer}


def _request(dialogue: Row) -> str:
    """What the user wants, without the hint that the simulated user was given."""
    return dialogue.get("input", "").rsplit("\nHint: ", 1)[0]


def _recorded_calls(dialogue: Row) -> list[Row]:
    """Each step is ``[[action, input, log], observation]``."""
    return [{"Action": step[0][0], "Action_Input": step[0][1]} for step in dialogue.get("intermediate_steps") or []]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, TypeError):
        return False


def toolalpaca_split(path: Path) -> Split | None:
    """By the names that the data set gives its files."""
    if path.name.startswith("train"):
        return "train"
    return "test" if path.name.startswith("eval_simulated") else None


# --- all of them ---

DATA_SETS = {
    "sciknoweval": DataSet(
        sciknoweval_rows, None, lambda target, folder: ("sciknoweval", {"data": str(target), "domain": folder})
    ),
    "toolalpaca": DataSet(
        toolalpaca_rows, toolalpaca_split, lambda target, folder: ("tooluse", {"data": str(target / folder)})
    ),
}


PROGRAMS = "livecodebench"
"""Its rows have tests that are packed, and no splits."""


def prepare(name: str, source: Path, target: Path, test_share: float, seed: int) -> list[str]:
    """Write the task files; returns what was done, a line each. ConfigError says what cannot be used."""
    if name == PROGRAMS:
        return [prepare_livecodebench.prepared(_sources(source), target)]
    data_set = DATA_SETS[name]
    made, left_out = _collected(data_set, _sources(source), source)
    if not made:
        reasons = "".join(f"; {count} times {reason}" for reason, count in left_out.items())
        raise ConfigError(f"{source} has no rows of {name} that can be used{reasons}")
    words = []
    for folder, rows in sorted(made.items()):
        if data_set.split_of is None:
            _draw_test(rows, test_share, random.Random(seed))
        for split in ("train", "test"):
            chosen = [row for drawn, row in rows if drawn == split]
            if chosen:
                _write(target / folder / f"{split}.json", chosen)
                words.append(f"{target / folder / f'{split}.json'}: {len(chosen)} rows")
        task_name, options = data_set.task(target, folder)
        load_task(task_name, **options)  # what was written can be read
    return [*words, *(f"left out, {reason}: {count}" for reason, count in sorted(left_out.items()))]


def _sources(source: Path) -> list[Path]:
    found = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in READABLE)
    if not found:
        raise ConfigError(f"{source} is no data file, nor a folder with *{', *'.join(READABLE)}")
    return found


def _collected(
    data_set: DataSet, paths: Sequence[Path], source: Path
) -> tuple[dict[str, list[tuple[str, Row]]], Counter[str]]:
    """(split, row) by folder, numbered in the order of the files, no prompt twice; and reasons for what is left out."""
    made: dict[str, list[tuple[str, Row]]] = {}
    left_out: Counter[str] = Counter()
    prompts: set[tuple[str, str]] = set()
    for path in paths:
        split = "train" if data_set.split_of is None else data_set.split_of(path)
        if split is None:
            left_out[f"the file {path.relative_to(source) if path != source else path.name}"] += 1
            continue
        for new in _converted(data_set, path, left_out):
            if (new.folder, new.row["prompt"]) in prompts:
                left_out["a prompt that was there before"] += 1
                continue
            prompts.add((new.folder, new.row["prompt"]))
            rows = made.setdefault(new.folder, [])
            rows.append((split, {"idx": len(rows), **new.row}))
    return made, left_out


def _converted(data_set: DataSet, path: Path, left_out: Counter[str]) -> Iterator[Made]:
    rows = read_rows([path])
    for place in range(len(rows)):
        try:
            for new in data_set.convert(rows[place]):
                if new.left_out:
                    left_out[new.left_out] += 1
                else:
                    yield new
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except (RowError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{rows.where(place)}: not a row of this data set: {error!r}") from error


def _draw_test(rows: list[tuple[str, Row]], share: float, draw: random.Random) -> None:
    """Make ``share`` of the rows, at least one, the test."""
    for place in draw.sample(range(len(rows)), max(1, round(share * len(rows)))):
        rows[place] = ("test", rows[place][1])


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ConfigError(f"{path} exists already; remove it or give another target")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(formatter_class=raw, description=__doc__)
    parser.add_argument("name", choices=(*DATA_SETS, PROGRAMS))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--test-share", type=float, default=0.1, help="where test is drawn; default 0.1")
    parser.add_argument("--seed", type=int, default=42, help="which rows are drawn; default 42")
    parsed = parser.parse_args(arguments)
    try:
        if not 0.0 < parsed.test_share < 1.0:
            raise ConfigError(f"--test-share is {parsed.test_share:g}; it must lie between 0 and 1")
        print("\n".join(prepare(parsed.name, parsed.source, parsed.target, parsed.test_share, parsed.seed)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
