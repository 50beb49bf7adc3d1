"""Competitive programming as LiveCodeBench has it: a program is right when it passes every test.

As in the paper, training and evaluation ask the same problems: attempts in training are judged by half of each
problem's tests (``train_tests``), held-out attempts by all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sdpo.config import ConfigError
from megatron_sdpo.sandbox import Limits, Program, Sandbox, SandboxError
from megatron_sdpo.tasks.dataset import check_malformed_share
from megatron_sdpo.tasks.livecodebench_data import Case, Problem, half_of_tests, read_problems
from megatron_sdpo.tasks.livecodebench_grading import code_of, feedback, hidden_feedback, is_right
from megatron_sdpo.types import Message, Question, Verdict

PREAMBLE = (
    "You are a coding expert. You will be given a coding problem, and you need to write a correct Python program that"
    " matches the specification and passes all tests. You may start by outlining your thought process. In the end,"
    " provide the complete code in one block enclosed with ```python and ```."
)
BY_STDIN = "Read the input from standard input and write the answer to standard output."
BY_FUNCTION = "Use the following starter code to write the solution."


@dataclass(kw_only=True)
class LiveCodeBench:
    """The task (types.Task). Options and files that cannot work raise ConfigError.

    It executes programs, so it needs a sandbox before it judges: ``sandbox.lent`` gives it one.
    """

    data: str
    """The task file (livecodebench_data.py), or a folder with problems.jsonl."""
    train_tests: Literal["half", "whole"] = "half"
    """Tests that give the reward in training: a fixed random half of each problem's, or all."""
    feedback_tests: Literal["graded", "public"] = "graded"
    """Tests that the feedback may show: those that give the reward, as in the paper; or only the problem's public ones,
    which are then executed first and must pass too."""
    problems: tuple[str, ...] = ()
    """Ids of the problems to ask; none asks all."""
    max_malformed_share: float = 0.0
    """Share of the file's lines that may be malformed and are left out."""

    def __post_init__(self) -> None:
        check_malformed_share(self.max_malformed_share)
        found = {problem.id: problem for problem in read_problems(self.data, self.max_malformed_share)}
        if unknown := [id for id in self.problems if id not in found]:
            raise ConfigError(f"{self.data} has no problem {unknown[0]!r}; take it out of task.options.problems")
        self._problems = {id: found[id] for id in self.problems or found}
        without = [id for id, problem in self._problems.items() if not problem.public_tests]
        if self.feedback_tests == "public" and without:
            raise ConfigError(
                f"the problem {without[0]!r} of {self.data} has no public tests to give feedback by; set"
                " task.options.feedback_tests=graded"
            )
        self._train = tuple(_question(problem, self.train_tests) for problem in self._problems.values())
        self._eval = tuple(_question(problem, "whole") for problem in self._problems.values())
        self._sandbox: Sandbox | None = None

    def use_sandbox(self, sandbox: Sandbox) -> None:
        """Execute programs there from now on."""
        self._sandbox = sandbox

    def train_questions(self) -> Sequence[Question]:
        return self._train

    def eval_questions(self) -> Sequence[Question]:
        return self._eval

    def verify(self, question: Question, response: str) -> Verdict:
        """Execute the response's code on the question's tests; reward 1 when all pass. Raises SandboxError alone."""
        if self._sandbox is None:
            raise SandboxError("this task executes programs; give it a sandbox by use_sandbox first")
        problem = self._problems[question.payload["problem"]]
        code, complaint = code_of(response)
        if code is None:
            return Verdict(0.0, complaint)
        places = half_of_tests(problem) if question.payload["tests"] == "half" else range(len(problem.tests))
        public = problem.public_tests if self.feedback_tests == "public" else ()
        tests = [*public, *(problem.tests[place] for place in places)]
        return self._judged(self._sandbox, problem, code, tests, len(public))

    def _judged(self, sandbox: Sandbox, problem: Problem, code: str, tests: Sequence[Case], public: int) -> Verdict:
        inputs = tuple(test.input.encode("utf-8", "surrogatepass") for test in tests)
        limits = _limits(sandbox.config.limits, problem, tests)
        outcomes = sandbox.run_blocking(Program(code, inputs, problem.function, limits))
        right = [is_right(outcome, tests[i], problem.function) for i, outcome in enumerate(outcomes)]
        if all(right) and len(right) == len(tests):
            return Verdict(1.0)
        if public and all(right[:public]) and len(right) > public:
            return Verdict(0.0, hidden_feedback(outcomes[right.index(False)]))
        shown = outcomes[:public] if public else outcomes
        return Verdict(0.0, feedback(shown, tests, problem.function))


def _question(problem: Problem, tests: Literal["half", "whole"]) -> Question:
    form = f"{BY_FUNCTION}\n\n```python\n{problem.starter_code}\n```" if problem.function is not None else BY_STDIN
    text = f"{PREAMBLE}\n\n{problem.question.strip()}\n\n{form}"
    # the tests stay here: every attempt's group carries its question through the journal
    payload = {"problem": problem.id, "tests": tests}
    if problem.difficulty:
        payload["category"] = problem.difficulty
    return Question(f"{tests}/{problem.id}", (Message("user", text),), payload)


def _limits(limits: Limits, problem: Problem, tests: Sequence[Case]) -> Limits:
    """The sandbox's, with the problem's own; no right answer is much longer than the expected ones."""
    cpu = problem.time_limit_s or limits.cpu_s
    longest = max(len(test.output) for test in tests)
    return replace(
        limits,
        cpu_s=cpu,
        wall_s=max(limits.wall_s, limits.wall_s / limits.cpu_s * cpu),
        memory_bytes=problem.memory_bytes or limits.memory_bytes,
        output_bytes=max(limits.output_bytes, 4 * longest + 65536),
    )
