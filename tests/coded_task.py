"""LiveCodeBench for a model that cannot write: every response ends in one program, which is executed and judged."""

from megatron_sdpo.tasks.livecodebench import LiveCodeBench
from megatron_sdpo.types import Question, Verdict

PROGRAM = "input()\nprint('not a number')"


class Coded(LiveCodeBench):
    def verify(self, question: Question, response: str) -> Verdict:
        return super().verify(question, f"{response.replace('`', '')}\n```python\n{PROGRAM}\n```\n")
