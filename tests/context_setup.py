"""Groups of attempts, and chats that let their renderings be read, for the tests of teacher contexts."""

import json
import shutil
from pathlib import Path

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import TeacherContextConfig
from megatron_sdpo.tasks.minipipe import ATTEMPT_TEMPLATE, FEEDBACK_TEMPLATE, SOLUTION_TEMPLATE, TEACHER_TEMPLATE
from megatron_sdpo.teacher_context import build_contexts
from megatron_sdpo.types import Attempt, Group, Message, Question, Verdict

MINIPIPE_CHAT = Path(__file__).parents[1] / "megatron_sdpo" / "data" / "minipipe-base"
CHAT = Chat(MINIPIPE_CHAT)
MINIPIPE = TeacherContextConfig(
    template=TEACHER_TEMPLATE,
    solution_template=SOLUTION_TEMPLATE,
    attempt_template=ATTEMPT_TEMPLATE,
    feedback_template=FEEDBACK_TEMPLATE,
)
QUESTION = Question("q", (Message("system", "count"), Message("user", "keep over 2 , sort")))

CHATML = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<eos>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' }}"""


class ReadableChat(Chat):
    """The real chat, with the texts that were rendered kept for reading: words outside MiniPipe have no ids."""

    def __init__(self, folder: Path = MINIPIPE_CHAT):
        super().__init__(folder)
        self.rendered: list[str] = []

    def prompt_ids(self, messages):
        self.rendered.append(self.render(messages))
        return super().prompt_ids(messages)


def write_chatml(folder: Path) -> Path:
    """A tokenizer directory whose turns have a header each, as the large models' have."""
    folder.mkdir()
    shutil.copy(MINIPIPE_CHAT / "tokenizer.json", folder)
    settings = json.loads((MINIPIPE_CHAT / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def group(*outcomes: tuple[str, float, str], question: Question = QUESTION, step: int = 4, slot: int = 0) -> Group:
    """One attempt for each (text, reward, feedback)."""
    attempts = tuple(Attempt((5,), (7, 1), (0.0, 0.0), text, "stop", 0) for text, _, _ in outcomes)
    return Group(step, slot, question, attempts, tuple(Verdict(reward, feedback) for _, reward, feedback in outcomes))


def read(attempts: Group, config: TeacherContextConfig, seed: int = 0) -> tuple[list[str | None], dict[str, float]]:
    """The contexts as text, None for each attempt without one, and the counts."""
    contexts, counts = build_contexts(attempts, config, CHAT, seed)
    return [c.prompt_ids and CHAT.text(c.prompt_ids) for c in contexts], counts
