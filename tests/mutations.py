"""Responses that are nearly right: mutated from right ones, the same for a seed."""

import random
from collections.abc import Iterator, Sequence

PIECES = [
    *("<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\boxed", "\\frac{", "\\text{", "\\left(", "\\sqrt"),
    *(
        "Action:",
        "Action Input:",
        "Action Input: {",
        "Thought:",
        "```json",
        "```",
        '{"a": ',
        "[",
        "]",
        "{",
        "}",
        '"',
        "\\",
    ),
    *(
        "\\u0000",
        "\\ud800",
        "\ud800",
        "\x00",
        "\u2028",
        "\u202e",
        "e\u0301",
        "\ufb01",
        "\uff10",
        "\U0001d7d9",
        "\U0010ffff",
        "\r\n",
        "\t",
    ),
    *(
        "null",
        "true",
        "NaN",
        "Infinity",
        "-0.0",
        "1e999",
        "1e-999",
        "9" * 40,
        "^{9^9}",
        "!",
        "%",
        "$",
        "_",
        "&",
        "|",
        "\\\\",
    ),
    *("A", "B", " ", "\n", "0", ":", ",", "=", "<", ">", "'", "*"),
]
"""What graders look for, and what parsers stumble over."""


def mutated(responses: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """``count`` mutations of one to six edits each, a few of them enormous."""
    draw = random.Random(seed)
    for number in range(count):
        text = draw.choice(responses)
        for _ in range(draw.randint(1, 6)):
            text = _edited(text, draw)
        if number % 500 == 499:
            text = text * 200
        yield text


def _edited(text: str, draw: random.Random) -> str:
    start, end = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
    end = min(end, start + 40)
    match draw.randrange(6):
        case 0:
            return text[:start] + draw.choice(PIECES) + text[start:]
        case 1:
            return text[:start] + text[end:]
        case 2:
            return text[:start] + draw.choice(PIECES) + text[end:]
        case 3:
            return text[:end] + text[start:]
        case 4:
            return text[:start] + draw.choice(PIECES) * draw.randint(2, 60) + text[start:]
        case _:
            return text[:start] + text[start:end].swapcase() + text[end:]
