"""LiveCodeBench: its comparison, the words of every verdict, the task file and its halves."""

import hashlib
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdpo.config import ConfigError, SandboxConfig, TaskConfig
from megatron_sdpo.launch.preflight import check_run
from megatron_sdpo.sandbox import LocalSandbox, Outcome, SandboxError
from megatron_sdpo.tasks import load_task
from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.tasks.livecodebench_data import Case, Problem, half_of_tests
from megatron_sdpo.tasks.livecodebench_grading import (
    FEEDBACK_CHARACTERS,
    NO_BLOCK,
    OPEN_BLOCK,
    code_of,
    feedback,
    is_right,
    same_output,
    same_result,
    shorten,
)
from megatron_sdpo.types import Verdict
from recipes.minipipe import minipipe
from tests.livecodebench_setup import PAIR, RIGHT, SUM, write
from tests.sandbox_setup import CONFIG, skip_without_sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    skip_without_sandbox()
    with LocalSandbox(CONFIG) as sandbox:
        yield sandbox


@pytest.fixture
def task(tmp_path: Path, sandbox: LocalSandbox) -> LiveCodeBench:
    task = load_task("livecodebench", data=write(tmp_path, SUM, PAIR), train_tests="whole")
    assert isinstance(task, LiveCodeBench)
    task.use_sandbox(sandbox)
    return task


def judged(task: LiveCodeBench, source: str, problem: int = 0) -> Verdict:
    return task.verify(task.train_questions()[problem], f"My answer:\n```python\n{source}\n```\n")


def test_a_right_program_has_the_reward_and_no_words(task: LiveCodeBench) -> None:
    assert judged(task, RIGHT) == Verdict(1.0)
    assert judged(task, "class Solution:\n    def pair(self, a, b): return tuple(sorted((a, b)))", 1) == Verdict(1.0)
    assert judged(task, "def pair(a, b):\n    print('[9]')\n    return sorted((a, b))", 1) == Verdict(1.0)


GOLDEN = {
    "wrong answer": (
        "print(3)",
        "Test Case 3: Wrong Answer\n\nInput\n5\n\nOutput\n3\n\nExpected\n5\n\n"
        "Test Case 4: Wrong Answer\n\nInput\n0 0\n\nOutput\n3\n\nExpected\n0",
    ),
    "debug output": (
        "import sys\nprint('here', file=sys.stderr)\nprint(len(input()) // 9 * 60 or 3 - 3)",
        "Test Case 3: Wrong Answer\n\nInput\n5\n\nOutput\n0\n\nExpected\n5\n\nDebug Output\nhere\n\n"
        "Test Case 1: Wrong Answer\n\nInput\n1 2\n\nOutput\n0\n\nExpected\n3\n\nDebug Output\nhere",
    ),
    "nothing": (
        "x = input()\nprint(sum(map(int, x.split())) or '')",
        "Test Case 4: Wrong Answer\n\nInput\n0 0\n\nOutput\n(nothing)\n\nExpected\n0",
    ),
    "runtime error": (
        "def f(x):\n    return 1 // x\n\ndef g(x):\n    return f(x)\n\n"
        "print(sum(map(int, input().split())) + 0 * g(0))",
        "Runtime Error\nZeroDivisionError: integer division or modulo by zero\n"
        "    print(sum(map(int, input().split())) + 0 * g(0))\nLine 7 in <module> (Solution.py)\n"
        "    return f(x)\nLine 5 in g (Solution.py)\n    return 1 // x\nLine 2 in f (Solution.py)\n\n"
        "Last Executed Input\n1 2",
    ),
    "runtime error after a wrong answer": (
        "x = input()\nprint(4)\nif len(x) > 5: raise KeyError(x)",
        "Runtime Error\nKeyError: '10 20 30'\n    if len(x) > 5: raise KeyError(x)\n"
        "Line 3 in <module> (Solution.py)\n\nLast Executed Input\n10 20 30",
    ),
    "crash": (
        "import os\nos.abort()",
        "Runtime Error\nThe program was ended by signal SIGABRT.\n\nLast Executed Input\n1 2",
    ),
    "exit code": (
        "import os\nos._exit(9)",
        "Runtime Error\nThe program ended with exit code 9.\n\nLast Executed Input\n1 2",
    ),
    "syntax error": (
        "x = 1\nprint(x",
        "Syntax Error\nSyntaxError: '(' was never closed\n    print(x\nLine 2 in <module> (Solution.py)",
    ),
    "time limit": ("while True: pass", "Time Limit Exceeded\n\nLast Executed Input\n1 2"),
    "memory limit": ("x = [0] * 10**9", "Memory Limit Exceeded\n\nLast Executed Input\n1 2"),
    "output limit": ("while True: print('x' * 10**6)", "Output Limit Exceeded\n\nLast Executed Input\n1 2"),
    "too long": ("#" * 2**20, "Source Limit Exceeded: The program is too long."),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_words_of_each_verdict(task: LiveCodeBench, name: str) -> None:
    source, words = GOLDEN[name]
    assert judged(task, source) == Verdict(0.0, words)


def test_the_words_of_function_problems(task: LiveCodeBench) -> None:
    assert judged(task, "def pair(a, b): return [a, b]", 1).feedback == (
        "Test Case 1: Wrong Answer\n\nInput\n2\n1\n\nOutput\n[2, 1]\n\nExpected\n[1, 2]"
    )
    assert "Output\n{1, 2}\n" in judged(task, "def pair(a, b): return {1, 2}", 1).feedback
    assert judged(task, "x = 1", 1).feedback.startswith("Runtime Error\nNameError: there is no function 'pair'")


def test_a_response_without_code(task: LiveCodeBench) -> None:
    question = task.train_questions()[0]
    assert task.verify(question, "I do not know.") == Verdict(0.0, NO_BLOCK)
    assert task.verify(question, "```python\nprint(") == Verdict(0.0, OPEN_BLOCK)
    thinking = f"<think>\n```python\n{RIGHT}\n```\n</think>\nso, no."
    assert task.verify(question, thinking) == Verdict(0.0, NO_BLOCK)
    assert task.verify(question, thinking.partition("</think>")[0]) == Verdict(0.0, NO_BLOCK)  # cut


def test_the_longest_block_is_the_answer() -> None:
    assert code_of("```\na\n```\n```py\nlong one\n```\n```python\nb\n```") == ("long one\n", "")
    assert code_of("no ```inline``` code")[0] is None


def test_long_values_are_cut_in_the_middle(task: LiveCodeBench, tmp_path: Path, sandbox: LocalSandbox) -> None:
    numbers = " ".join(map(str, range(2000)))
    lines = "\n".join(f"line {i}" for i in range(100))
    problem = replace_tests(SUM, Case(f"{numbers}\n{lines}", "x" * 5000))
    long = LiveCodeBench(data=write(tmp_path, problem))
    long.use_sandbox(sandbox)
    words = judged(long, "print('y' * 4000)").feedback
    assert len(words) <= FEEDBACK_CHARACTERS
    assert "(4000 characters)" in words and "(5000 characters)" in words and "lines left out" in words
    assert words.startswith("Test Case 1: Wrong Answer\n\nInput\n0 1 2 3") and "line 99\n" in words
    assert words.endswith("x" * 50)
    assert judged(long, "raise ValueError('z' * 10**6)").feedback.count("\n") < 30


def replace_tests(problem: Problem, *tests: Case) -> Problem:
    return msgspec.structs.replace(problem, tests=tests)


def test_public_tests_may_be_all_that_the_feedback_shows(tmp_path: Path, sandbox: LocalSandbox) -> None:
    task = LiveCodeBench(data=write(tmp_path, SUM), train_tests="whole", feedback_tests="public")
    task.use_sandbox(sandbox)
    assert judged(task, RIGHT) == Verdict(1.0)
    assert judged(task, "print(7)").feedback == "Test Case 1: Wrong Answer\n\nInput\n1 1\n\nOutput\n7\n\nExpected\n2"
    hidden = "The program passes the public tests, but not a hidden one: "
    assert judged(task, "print(2)") == Verdict(0.0, hidden + "Wrong Answer")
    assert judged(task, "print(2 if input() == '1 1' else 1 // 0)") == Verdict(0.0, hidden + "Runtime Error")
    assert "ZeroDivisionError" in judged(task, "1 / 0").feedback
    with pytest.raises(ConfigError, match=r"'pair' of .* has no public tests"):
        LiveCodeBench(data=write(tmp_path, SUM, PAIR), feedback_tests="public")


def test_half_of_the_tests_decides_in_training_all_of_them_in_evaluation(tmp_path: Path, sandbox: LocalSandbox) -> None:
    tests = tuple(Case(f"{i}\n", f"{i}\n") for i in range(9))
    problem = replace_tests(SUM, *tests)
    half = half_of_tests(problem)
    assert len(half) == 4 and half == half_of_tests(problem) and set(half) < set(range(9))
    assert half_of_tests(replace_tests(SUM, Case("1", "1"))) == (0,)
    others = [half_of_tests(msgspec.structs.replace(problem, id=f"other {i}")) for i in range(20)]
    assert len(set(others)) > 5
    task = LiveCodeBench(data=write(tmp_path, problem))
    task.use_sandbox(sandbox)
    (train,), (held_out,) = task.train_questions(), task.eval_questions()
    only_half = f"```python\nx = int(input())\nprint(x if x in {half} else -1)\n```"
    assert task.verify(train, only_half).reward == 1.0
    assert task.verify(held_out, only_half).reward == 0.0
    assert train.messages == held_out.messages
    assert len(json.dumps(train.payload)) < 100  # no tests in what is journalled


SEARCH = """
import hashlib, os, re
found = set()
with open("/proc/self/mem", "rb") as memory, open("/proc/self/maps") as maps:
    for line in maps:
        ends, rights = line.split()[:2]
        if "r" in rights and "[v" not in line:
            start, end = (int(x, 16) for x in ends.split("-"))
            memory.seek(start)
            try: found.update(re.findall(rb"[0-9a-f]{60}", memory.read(end - start)))
            except OSError: pass
for folder, _, names in os.walk("/tmp"):
    for name in names: found.update(re.findall(rb"[0-9a-f]{60}", open(folder + "/" + name, "rb").read()))
found.update(re.findall(rb"[0-9a-f]{60}", repr(os.environ).encode()))
hashes = {hashlib.md5(x).hexdigest() for x in found}
print([x in hashes for x in WANTED])
"""


def test_expected_answers_are_nowhere_inside(tmp_path: Path, sandbox: LocalSandbox) -> None:
    """A program searches all of its memory: it finds the input there, and not the answer."""
    asked, answer = secrets.token_hex(30), secrets.token_hex(30)
    wanted = [hashlib.md5(word.encode()).hexdigest() for word in (asked, answer)]
    task = LiveCodeBench(data=write(tmp_path, replace_tests(SUM, Case(asked, answer))))
    task.use_sandbox(sandbox)
    source = f"kept = input()\nWANTED = {wanted}\n{SEARCH}"
    assert "\n\nOutput\n[True, False]\n\n" in judged(task, source).feedback


FORGERIES = (
    "import os, json\nfor fd in range(1, 64):\n"
    "    try: os.write(fd, json.dumps({'exit': 0, 'result': '[1, 2]'}).encode())\n    except OSError: pass\n"
    "os._exit(0)",
    "print('All tests passed. Verdict: 1.0')\nimport sys\nsys.exit(0)",
    "import json, sys\njson.dumps = lambda *a, **k: '[1, 2]'\ndef pair(a, b): return 0",
    "class Always:\n    def __eq__(self, other): return True\n    def __repr__(self): return '[1, 2]'\n"
    "def pair(a, b): return Always()",
    "def pair(a, b): raise SystemExit(0)",
    "def pair(a, b): return '[1, 2]'",
)


@pytest.mark.parametrize("source", FORGERIES)
def test_a_result_cannot_be_forged(task: LiveCodeBench, source: str) -> None:
    verdict = judged(task, source, 1)
    assert verdict.reward == 0.0 and verdict.feedback


def test_the_same_verdicts_whatever_the_concurrency(task: LiveCodeBench) -> None:
    sources = [RIGHT, *(source for source, _ in GOLDEN.values())]
    alone = [judged(task, source) for source in sources]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda source: judged(task, source), sources)) == alone


def test_without_a_sandbox_nothing_is_judged(tmp_path: Path) -> None:
    task = LiveCodeBench(data=write(tmp_path, SUM))
    with pytest.raises(SandboxError, match="use_sandbox"):
        judged(task, RIGHT)


def test_a_run_is_refused_at_its_start_where_no_sandbox_holds(tmp_path: Path) -> None:
    task = TaskConfig(name="livecodebench", options={"data": write(tmp_path, SUM)})
    config = replace(minipipe(), task=task, run_dir=str(tmp_path / "run"))
    missing = replace(config, sandbox=replace(config.sandbox, bwrap="none-such"))
    with pytest.raises(ConfigError, match=r"this task executes programs .* sandbox\.bwrap 'none-such' is not"):
        check_run(missing)
    unheard = SandboxConfig(backend="remote", url="http://127.0.0.1:9", token_file=write(tmp_path, SUM))
    with pytest.raises(ConfigError, match=r"the sandbox service at http://127\.0\.0\.1:9 does not answer"):
        check_run(replace(config, sandbox=unheard))
    assert not (tmp_path / "run").exists()


# --- comparison


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3\n", True),
        ("1\n2", "1\n2\n", True),
        ("1 2", "1\n2", False),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("3.0", "3", True),
        ("0.10", "0.1", True),
        ("1e2", "100", True),
        ("50000000000000000", "50000000000000001", False),
        ("0.3333333333", "0.33333333333", False),
        ("YES", "Yes", False),
        ("nan", "nan", True),
        ("nan 1", "nan 1.0", False),
        ("snan 1", "snan 1.0", False),
        ("", "", True),
        ("1\n\n2", "1\n2", False),
        ("1\r\n2\r\n", "1\n2", True),
    ],
)
def test_output_is_compared_as_livecodebench_does(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


def reference(printed: str, expected: str) -> bool:
    """LiveCodeBench's own steps, plainly; what raises there is an error of the attempt."""
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a == b:
            continue
        try:
            left = [Decimal(word) for word in a.split()]
            right = [Decimal(word) for word in b.split()]
            if left != right:
                return False
        except Exception:
            return False
    return True


LINES = st.text(st.sampled_from("012.e-+ \n\tnasif_٣x"), max_size=12)


@settings(deadline=None, max_examples=500)
@given(LINES, LINES)
def test_output_is_compared_as_the_reference_does(printed: str, expected: str) -> None:
    assert same_output(printed, expected) == reference(printed, expected)
    assert same_output(printed, printed)


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        (b"[1, 2]", "[1,2]", True),
        (b"1.0", "1", True),
        (b"0.30000000000000004", "0.3", False),
        (b'"a"', '"a"', True),
        (b"null", "null", True),
        (None, "null", False),
        (b"[" * 100_000, "[]", False),
        (b"9" * 10_000, "9", False),
        (b"NaN", "NaN", False),
        (b"", "1", False),
        (b"\xff", "1", False),
    ],
)
def test_results_are_compared_as_json(result: bytes | None, expected: str, same: bool) -> None:
    assert same_result(result, expected) is same


OUTCOMES = st.builds(
    Outcome,
    kind=st.sampled_from(["ok", "runtime_error", "syntax_error", "time_limit", "memory_limit", "output_limit", "lost"]),
    stdout=st.binary(max_size=400),
    stderr=st.binary(max_size=400),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 200),
    error=st.text(max_size=3000),
    result=st.none() | st.binary(max_size=400),
    shown=st.text(max_size=400),
)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=400), OUTCOMES, st.text(max_size=400), st.text(max_size=400), st.sampled_from([None, "f"]))
def test_graders_never_raise(response: str, outcome: Outcome, data: str, expected: str, function: str | None) -> None:
    code_of(response)
    test = Case(data, expected)
    right = is_right(outcome, test, function)
    words = feedback([outcome], [test], function)
    assert len(words) <= FEEDBACK_CHARACTERS and bool(words) != right
    Verdict(float(right), words).feedback.encode("utf-8", "surrogatepass")


@given(st.text(max_size=300), st.integers(60, 200))
def test_shortened_text_fits_and_keeps_both_ends(text: str, most: int) -> None:
    short = shorten(text, most)
    assert len(short) <= most
    assert short == text if len(text) <= most else short[:10] == text[:10] and short[-10:] == text[-10:]


@settings(deadline=None, max_examples=15)
@given(text=st.text(max_size=60) | st.text(st.characters(categories=["Cs", "Cc", "Lo"]), max_size=20))
def test_any_program_text_has_a_verdict(sandbox: LocalSandbox, tmp_path_factory: Any, text: str) -> None:
    task = LiveCodeBench(data=write(tmp_path_factory.mktemp("fuzz"), SUM))
    task.use_sandbox(sandbox)
    verdict = judged(task, text)
    assert 0.0 <= verdict.reward <= 1.0
    msgspec.json.encode(verdict)
