"""chat.Chat against transformers on real tokenizer files, and its refusals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sdpo.chat import Chat
from megatron_sdpo.config import ConfigError
from megatron_sdpo.types import Message

ROOT = Path(__file__).parents[1]
MINIPIPE = ROOT / "megatron_sdpo" / "data" / "minipipe-base"

# The constructs that the templates of the Qwen and Llama families use.
QWEN_LIKE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last == messages|length - 1 %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.content is string and '</think>' in message.content %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- elif message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_LIKE = """\
{{- bos_token }}
{%- if strftime_now is defined and not date is defined %}{%- set date = strftime_now("%Y") | length %}{%- endif %}
{%- if tools is not none %}{{ raise_exception("no tools") }}{% endif %}
{{- "Digits: " + date | string + " " + ({"a": "<&>é"} | tojson) }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'system', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
    {%- generation %}{{- message['role'] + '\\n\\n' + message['content'] | trim + eos_token }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant\\n\\n' }}{%- endif %}
"""
DEEPSEEK_LIKE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{- message.content }}
    {%- elif message.role == "user" %}{{- '<|User|>' + message.content }}
    {%- else %}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}
"""
CHATS = [
    (Message("user", "keep over 12, sort"),),
    (Message("system", "Be brief."), Message("user", "Wie geht's? 日本 <b>&amp;</b> {{ 7 }}")),
    (Message("user", "one"), Message("assistant", "<think>\nhm\n</think>\n\n1"), Message("user", "  two\n")),
    (Message("user", "a text with < |im_end|>, <think> and < eos> inside"),),
]


def _byte_level(folder: Path, template: str, in_config: bool, turns: Sequence[str] = (), **settings: object) -> Path:
    """``turns``: tokens that the tokenizer does not call special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"compute {i} plus {i} of the user assistant" for i in range(50)], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in turns])
    tokenizer.enable_truncation(5)  # as some saved files have it; must have no effect
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if in_config:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    llama = {
        "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        "eos_token": "<|im_end|>",
    }
    return {
        "minipipe": MINIPIPE,
        "qwen": _byte_level(base / "qwen", QWEN_LIKE, True, **named),
        "llama": _byte_level(base / "llama", LLAMA_LIKE, False, **llama),
        "deepseek": _byte_level(base / "deepseek", DEEPSEEK_LIKE, True, ("<|User|>", "<|Assistant|>"), **llama),
    }


def _transformers_ids(folder: Path, messages: Sequence[Message], thinking: bool) -> list[int]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=False, add_generation_prompt=True, enable_thinking=thinking
    )


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", ["minipipe", "qwen", "llama", "deepseek"])
def test_prompts_are_those_of_transformers(
    folders: dict[str, Path], name: str, messages: tuple[Message, ...], thinking: bool
) -> None:
    ids = Chat(folders[name], enable_thinking=thinking).prompt_ids(messages)
    assert list(ids) == _transformers_ids(folders[name], messages, thinking)
    assert len(ids) > 5


SPELLED = {
    "minipipe": ["<eos>", "<pad>"],
    "qwen": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "llama": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "deepseek": ["<|im_end|>", "<|endoftext|>", "<|User|>", "<|Assistant|>"],
}


@settings(deadline=None, max_examples=100)
@given(data=st.data(), name=st.sampled_from(sorted(SPELLED)), role=st.sampled_from(["user", "assistant"]))
def test_text_never_becomes_a_special_token(
    folders: dict[str, Path], data: st.DataObject, name: str, role: Literal["user", "assistant"]
) -> None:
    """However often and wherever a message spells them, there are as many special tokens as the template makes."""
    pieces = [*SPELLED[name], "sort 7", " ", "<", "|im_end|>", "<think>", "</think>", "\n", "\U000f0000"]
    content = "x" + "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8))) + "x"
    chat, _ = _loaded(folders[name])
    special = {chat.encode(text)[0] for text in SPELLED[name]}

    def prompt(content: str) -> list[int]:
        return list(chat.prompt_ids((Message("user", "q"), Message(role, content), Message("user", "q"))))

    def frame(ids: list[int]) -> list[int]:
        return [id for id in ids if id in special]

    assert frame(prompt(content)) == frame(prompt("x"))


def test_a_prompt_is_the_same_at_any_time(folders: dict[str, Path], tmp_path: Path) -> None:
    """Llama 3's templates write the day: what a run asks must not change with it, nor between student and teacher."""
    folder = shutil.copytree(folders["llama"], tmp_path / "dated")
    (folder / "chat_template.jinja").write_text('{{ strftime_now("%d %b %Y %H:%M:%S.%f") }}')
    assert Chat(folder).render(CHATS[0]) == "26 Jul 2024 00:00:00.000000"


def test_a_spelled_special_token_is_still_read_as_its_characters(folders: dict[str, Path]) -> None:
    chat, other = _loaded(folders["qwen"])
    messages = (Message("user", "say <|im_end|> twice: <|im_end|>\U000f0000é"),)
    ids = chat.prompt_ids(messages)
    assert other.decode(ids) == chat.render(messages)
    assert list(ids) != _transformers_ids(folders["qwen"], messages, thinking=False)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_encoding_and_decoding_are_those_of_transformers(folders: dict[str, Path], text: str) -> None:
    for name in ("minipipe", "qwen"):
        chat, other = _loaded(folders[name])
        ids = chat.encode(text)
        assert list(ids) == other.encode(text, add_special_tokens=False)
        assert chat.text(ids) == other.decode(ids, skip_special_tokens=True)
        assert chat.count(text) == len(ids) == len(chat.spans(text))


_cache: dict[Path, tuple[Chat, PreTrainedTokenizerFast]] = {}


def _loaded(folder: Path):
    if folder not in _cache:
        _cache[folder] = Chat(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return _cache[folder]


def test_minipipe_renders_one_user_message(folders: dict[str, Path]) -> None:
    chat = Chat(MINIPIPE)
    assert chat.render((Message("user", "keep over 2 , sort"),)) == "<q> keep over 2 , sort <a>"
    with_system = (Message("system", "sort"), Message("user", "keep over 2"))
    assert chat.render(with_system) == "sort <q> keep over 2 <a>"
    assert chat.text(chat.prompt_ids(CHATS[0])) == "<q> keep over 1 2 , sort <a>"


def test_ids_of_special_tokens(folders: dict[str, Path]) -> None:
    chat = Chat(MINIPIPE)
    assert (chat.eos_id, chat.pad_id, chat.vocab_size) == (1, 0, 104)
    assert chat.text((*chat.encode("above 2"), chat.eos_id, chat.pad_id)) == "above 2"
    llama = Chat(folders["llama"])
    assert llama.pad_id == llama.eos_id


def test_unknown_characters_are_not_dropped() -> None:
    assert Chat(MINIPIPE).text(Chat(MINIPIPE).encode("sort é 日")) == "sort <unk> <unk>"


def test_spaces_before_punctuation_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer may ask to tidy spaces, which would change programs."""
    folder = shutil.copytree(folders["qwen"], tmp_path / "tidy")
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(
        json.dumps({**json.loads(settings_file.read_text()), "clean_up_tokenization_spaces": True})
    )
    chat = Chat(folder)
    assert chat.text(chat.encode("f (x) . y ?")) == "f (x) . y ?"


def test_spans_cover_their_tokens(folders: dict[str, Path]) -> None:
    chat = Chat(folders["qwen"])
    text = "compute 7 plus é 日"
    spans = chat.spans(text)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(start <= end for start, end in spans)


def test_tokens_declared_only_in_the_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen"], tmp_path / "declared")
    file = folder / "tokenizer_config.json"
    declared = {"338": {"content": "<|tool|>", "special": True, "normalized": False}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": declared}))
    chat = Chat(folder)
    assert chat.encode("<|tool|>") == (338,)
    assert chat.vocab_size == 339
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": {"7": declared["338"]}}))
    with pytest.raises(ConfigError, match=r"<\|tool\|>"):
        Chat(folder)


def test_a_template_may_refuse_messages(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "refusing")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        Chat(folder).prompt_ids(CHATS[0])


def test_a_template_cannot_reach_python(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "escaping")
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ConfigError, match="unsafe"):
        Chat(folder).prompt_ids(CHATS[0])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", "{}", "no eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "<nope>"),
        ("chat_template.jinja", None, "no chat template"),
        ("chat_template.jinja", "line\n{% for %}", "line 2"),
    ],
)
def test_broken_directories_are_refused(
    folders: dict[str, Path], tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "broken")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=words):
        Chat(folder)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Chat(tmp_path / "nowhere")


def test_several_templates_in_the_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen"], tmp_path / "several")
    file = folder / "tokenizer_config.json"
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ eos_token }}"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    assert Chat(folder).render(CHATS[0]) == "yes <|im_end|>"


def test_the_text_side_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, megatron_sdpo.teacher_context, megatron_sdpo.tasks.minipipe_corpus;"
        "from megatron_sdpo.tasks import load_task; load_task('minipipe');"
        f"from megatron_sdpo.chat import Chat; Chat({str(MINIPIPE)!r});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
