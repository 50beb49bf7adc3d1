"""load_task, and questions from JSON lines."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.jsonl import read_questions
from megatron_sdpo.tasks.minipipe import MiniPipe
from megatron_sdpo.types import Message, Question, Verdict

OWN_TASK = """
from megatron_sdpo.types import Message, Question, Verdict

class Echo:
    def __init__(self, word: str, times: int = 1):
        self.text = " ".join([word] * times)

    def train_questions(self):
        return [Question("a", (Message("user", self.text),))]

    def eval_questions(self):
        return self.train_questions()

    def verify(self, question, response):
        return Verdict(float(response == self.text))

class NoTask:
    def train_questions(self):
        return []

class Anything(Echo):
    def __init__(self, **options):
        super().__init__(options["word"])

not_a_class = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"own_tasks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_TASK)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_by_name_with_options_as_json_gives_them() -> None:
    task = load_task("minipipe", ranks=[0], hint=False, train_size=5)
    assert isinstance(task, MiniPipe)
    assert task.ranks == (0,)
    assert len(task.train_questions()) == 5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("minipip", {}, r"unknown task 'minipip'; did you mean minipipe\? There are .*minipipe"),
        ("own.module", {}, "package.module:Class"),
        ("no_such_module_here:Task", {}, "importing no_such_module_here failed"),
        ("minipipe", {"hints": True}, "no option 'hints'; did you mean hint.*machine_seed, ranks"),
        ("minipipe", {"hint": "yes"}, "option 'hint' is 'yes'"),
        ("minipipe", {"machine_seed": 1.5}, "option 'machine_seed'"),
        ("minipipe", {"ranks": 1}, "option 'ranks'"),
        ("minipipe", {"ranks": [7]}, "ranks"),
        ("minipipe", {"machine": 3}, "no option 'machine'"),
        ("builtins:map", {}, "options of its class cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(name: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_task(name, **options)
    assert "\n" not in str(caught.value)


def test_a_task_of_ones_own(own_module: str) -> None:
    task = load_task(f"{own_module}:Echo", word="hi", times=2)
    assert task.verify(task.train_questions()[0], "hi hi") == Verdict(1.0)
    assert load_task(f"{own_module}:Anything", word="x").verify(Question("", ()), "x") == Verdict(1.0)


@pytest.mark.parametrize(
    ("suffix", "options", "words"),
    [
        (":Echo", {}, "needs the option 'word'"),
        (":Echo", {"word": "x", "times": "y"}, "option 'times'"),
        (":Nothing", {}, "has no class Nothing"),
        (":not_a_class", {}, "has no class not_a_class"),
        (":NoTask", {}, "no method eval_questions and no verify"),
        ("_broken:Echo", {}, "importing .*_broken failed: division by zero"),
    ],
)
def test_mistakes_in_a_task_of_ones_own(own_module: str, suffix: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_task(own_module + suffix, **options)


def _written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_forms_of_a_question(tmp_path: Path) -> None:
    path = _written(
        tmp_path,
        '{"id": "a", "prompt": "2+2?", "payload": {"answer": [4]}}\n'
        '{"id": "b", "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "x\\u2028y"}]}',
    )
    assert read_questions(path) == (
        Question("a", (Message("user", "2+2?"),), {"answer": [4]}),
        Question("b", (Message("system", "Brief."), Message("user", "x\u2028y"))),
    )


GOOD = '{"id": "a", "prompt": "x"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "empty"),
        ("{", "not a question"),
        ("[]", "not a question"),
        ("[" * 5000, "not a question"),
        ('{"prompt": "x"}', "id"),
        ('{"id": 3, "prompt": "x"}', "id"),
        ('{"id": "", "prompt": "x"}', "id is empty"),
        ('{"id": "b"}', "either prompt or messages"),
        ('{"id": "b", "prompt": "x", "messages": []}', "either prompt or messages"),
        ('{"id": "b", "messages": []}', "last message"),
        ('{"id": "b", "prompt": "  "}', "last message"),
        ('{"id": "b", "messages": [{"role": "assistant", "content": "x"}]}', "last message"),
        ('{"id": "b", "messages": [{"role": "robot", "content": "x"}]}', "robot"),
        ('{"id": "b", "promt": "x", "prompt": "x"}', "promt"),
        ('{"id": "b", "prompt": "x", "payload": 3}', "payload"),
        (GOOD, "already used on line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = _written(tmp_path, f"{GOOD}\n{line}\n{GOOD.replace('a', 'z')}\n")
    with pytest.raises(ConfigError, match=rf"questions\.jsonl, line 2: .*{words}"):
        read_questions(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        read_questions(_written(tmp_path, GOOD.encode() + b'\n{"id": "b", "prompt": "\xff"}\n'))


@pytest.mark.parametrize("text", ["", "\n", " \n\n"])
def test_a_file_without_questions_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        read_questions(_written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_questions(tmp_path / "nowhere.jsonl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_questions_or_a_clear_refusal(tmp_path: Path, data: bytes) -> None:
    try:
        assert read_questions(_written(tmp_path, data))
    except ConfigError as error:
        assert str(tmp_path) in str(error)


@dataclass
class _Positional:
    limit: int | None = None


def test_none_fits_an_optional_option() -> None:
    with pytest.raises(ConfigError, match="no method"):  # past its options, it is no task
        load_task(f"{__name__}:_Positional", limit=None)


README = Path(__file__).parent.parent / "README.md"


def readme_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """A module that the README shows, as a user would write it; its name."""
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if b.startswith(f"# {name}")
    )
    assert block.count("\n") <= 30
    module = f"{name}_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_the_task_that_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(f"{readme_module(tmp_path, monkeypatch, 'sums')}:Sums", largest=20)
    question = task.train_questions()[21]
    assert (len(task.train_questions()), question.id) == (400, "1+1")
    assert task.verify(question, " 2\n") == Verdict(1.0)
    assert task.verify(question, "3") == Verdict(0.0, "'3' is not the sum; the last digit must be 2")
    assert task.eval_questions()[0].id == "20+0"
    with pytest.raises(ConfigError, match="option 'largest'"):
        load_task(f"sums_{tmp_path.name}:Sums", largest="many")


def test_the_task_of_files_that_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = '{"idx": 0, "prompt": "Of Japan?", "answer": "Tokyo", "system": null, "category": "Asia"}'
    (tmp_path / "test.jsonl").write_text(row)
    task = load_task(f"{readme_module(tmp_path, monkeypatch, 'capitals')}:Capitals", data=str(tmp_path))
    (question,) = task.eval_questions()
    assert question.payload["category"] == "Asia"
    assert task.verify(question, "Tokyo") == Verdict(1.0)
    assert task.verify(question, "Kyoto") == Verdict(0.0, "That is not its capital.")
