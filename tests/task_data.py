"""Small made-up rows in the formats of the public data sets, and where the real files are, if they are here."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

DATA_VARIABLE = "MEGATRON_SDPO_TASK_DATA"
_DEFAULT = Path(__file__).parent.parent.parent / "shared" / "data"

SYSTEM = "Answer with <reasoning>...</reasoning> and then <answer>...</answer>, which holds the letter alone."


def real_data(*parts: str) -> Path:
    """A file or folder of the public data sets; the test is skipped where they are not."""
    path = Path(os.environ.get(DATA_VARIABLE, _DEFAULT)).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the public data set is not here; set {DATA_VARIABLE} to a folder with {'/'.join(parts)}")
    return path


def choice_row(idx: int, answer: str = "B", options: int = 4) -> dict[str, Any]:
    """A multiple-choice row as SciKnowEval's are."""
    listed = "\n".join(f"{letter}: {idx + place} u" for place, letter in enumerate("ABCDEFGHIJ"[:options]))
    return {
        "idx": idx,
        "kind": "mcq",
        "dataset": "sciknoweval",
        "answer": answer,
        "elo": 1500,
        "prompt": f"What is the mass of isotope {idx}?\n\n{listed}\nPlease reason step by step.",
        "description": f"What is the mass of isotope {idx}?",
        "tests": "-",
        "embedding": [],
        "system": SYSTEM,
    }


TOOLS = """Name: Kennel
Description: Dogs, and who keeps them
Documentation:
findDogs: Find dogs by what they are like.
Parameters: {"breed": "Required. string. The breed.", "size": "string. One of: [small, large]. The size.", \
"limit": "integer. How many.", "tags": "Array[string]. Traits."}
Output: Successful response.
 - Format: application/json
 - Structure: Array[Object{name, breed}]
addOwner: Write down who keeps a dog.
Parameters: {"dog": "Required. integer. Its number.", "owner": "Required. Object. Who keeps it.", \
"share": "number. Of the costs.", "adult": "boolean. Of age."}
Output: Done.
listBreeds: List all breeds.
Parameters: {}
Output: Names.
"""


def tool_prompt(request: str) -> str:
    return (
        f"Your task is to answer the user's question using available tools. \nYou have access to the following tools:\n"
        f"{TOOLS}\nUse the following format:\nThought: what to do\nAction: one of the tool names.\n"
        f"Action Input: in JSON format.\n\nBegin!\nQuestion: {request}"
    )


def tool_row(idx: int, calls: Sequence[tuple[str, dict[str, Any]]], **fields: Any) -> dict[str, Any]:
    """A tool-use row as ToolAlpaca's are."""
    answer = [{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls]
    row = {"idx": idx, "kind": "tooluse", "dataset": "tooluse", "elo": 1500, "system": None, "tests": None}
    return {**row, "prompt": tool_prompt(f"Number {idx}, please."), "answer": json.dumps(answer), **fields}


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def as_response(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a model is asked to write them; an input that is a text is written as it is."""
    lines = ["Thought: this is what I need."]
    for name, arguments in calls:
        lines += [
            f"Action: {name}",
            f"Action Input: {arguments if isinstance(arguments, str) else json.dumps(arguments)}",
        ]
    return "\n".join(lines)
