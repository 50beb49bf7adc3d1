"""The only place where text becomes token ids, and token ids text.

Reads a Hugging Face tokenizer directory with the ``tokenizers`` library and renders its chat template
in a jinja2 sandbox, with what ``transformers`` offers to templates. Neither torch nor transformers is
imported: the coordinator stays small and starts at once.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from megatron_sdpo.config import ConfigError
from megatron_sdpo.types import Message

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning of their own, of which one that no message has marks a place in them."""
_TURN = chr(_PRIVATE_USE[0])
_NOW = datetime(2024, 7, 26)
"""What a template that asks for the time is told, always: a prompt is a function of its messages, so a run that is
resumed, or goes on over midnight, keeps its prompts. Llama 3's templates name this day where there is no clock."""


class Chat:
    """A tokenizer and its chat template.

    ``enable_thinking`` is handed to the template; templates without a thinking mode ignore it. A
    directory that is missing or not complete raises ConfigError.
    """

    eos_id: int
    """The token that ends an assistant turn."""
    pad_id: int
    """The padding token; ``eos_id`` when the tokenizer names none."""
    vocab_size: int
    """One more than the largest token id."""

    def __init__(self, tokenizer_dir: str | Path, enable_thinking: bool = False):
        folder = Path(tokenizer_dir)
        if not folder.is_dir():
            raise ConfigError(f"the tokenizer directory {folder} does not exist; set model.path to a checkpoint")
        settings = _read_json(folder / "tokenizer_config.json")
        self._folder = folder
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json", settings)
        self._variables = {
            **_special_tokens(folder, settings),
            "enable_thinking": enable_thinking,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        self._template = _compile(_template_text(folder, settings), folder)
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token") if "pad_token" in self._variables else self.eos_id
        self._spelled_special = _spelled_special(self._tokenizer, self._between_turns())
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to and including the header of the assistant's turn.

        Messages that the template refuses raise ConfigError with the template's own words.
        """
        return self._render([m.role for m in messages], [m.content for m in messages])

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The token ids of ``render(messages)``. Only the template makes special tokens, and those that part turns.

        A message may hold what a model or a verifier wrote. Where it spells such a token (``<|im_end|>``)
        the text is cut after the first character of that spelling, and the parts are encoded each by itself.
        """
        roles, contents = [m.role for m in messages], [m.content for m in messages]
        if self._spelled_special is None or not any(map(self._spelled_special.search, contents)):
            return self.encode(self._render(roles, contents))
        given = set("".join(contents))
        cut = next(c for c in map(chr, _PRIVATE_USE) if c not in given)
        marked = [self._spelled_special.sub(lambda spelled: spelled[1] + cut, content) for content in contents]
        return tuple(id for part in self._render(roles, marked).split(cut) for id in self.encode(part))

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a text, nothing added at its ends."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def count(self, text: str) -> int:
        """How many tokens ``encode`` makes of a text."""
        return len(self.encode(text))

    def spans(self, text: str) -> tuple[tuple[int, int], ...]:
        """Where each token of ``encode(text)`` lies in the text: half-open character ranges, one a token."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def text(self, response_ids: Sequence[int]) -> str:
        """The text of token ids without special tokens. Spaces are left as they are: a verifier may run it."""
        return self._tokenizer.decode(list(response_ids), skip_special_tokens=True)

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._template.render(messages=turns, **self._variables)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {self._folder} refuses these messages: {error}") from error

    def _between_turns(self) -> str:
        """What the template writes around messages, "" when it refuses these. The header of the answer, in which
        thinking may be opened, is not among it."""
        try:
            told = self._render(["user", "assistant", "user"], [_TURN] * 3)
        except ConfigError:
            return ""
        return told.rpartition(_TURN)[0].replace(_TURN, "\n")

    def _special_id(self, name: str) -> int:
        token = self._variables.get(name)
        if not isinstance(token, str):
            raise ConfigError(f"{self._folder}/tokenizer_config.json names no {name}; add one")
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise ConfigError(f"{self._folder}/tokenizer_config.json has {name} {token!r}, which tokenizer.json lacks")
        return id


def _spelled_special(tokenizer: Tokenizer, between_turns: str) -> re.Pattern[str] | None:
    """Matches the first character of each special token's text, overlapping ones too.

    Some tokenizers do not call the tokens special that say whose turn it is: DeepSeek-R1's distilled models.
    """
    added = [t for t in tokenizer.get_added_tokens_decoder().values() if len(t.content) > 1]
    spelled = [t.content for t in added if t.special or t.content in between_turns]
    return re.compile(f"(?={'|'.join(map(re.escape, spelled))})(.)", re.DOTALL) if spelled else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; the directory must hold a tokenizer") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return data


def _read_tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        data = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; a fast tokenizer is needed") from error
    try:
        tokenizer = Tokenizer.from_str(data)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path} is not a tokenizer: {error}") from error
    # A file saved with these on would cut or fill every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_declared_tokens(tokenizer, settings.get("added_tokens_decoder", {}), path)
    return tokenizer


def _add_declared_tokens(tokenizer: Tokenizer, declared: dict[str, dict[str, Any]], path: Path) -> None:
    """Tokens that only tokenizer_config.json knows, at the ids it gives them."""
    for id, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(token["content"]) is None:
            flags = {
                k: v for k, v in token.items() if k in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        found = tokenizer.token_to_id(token["content"])
        if found != int(id):
            raise ConfigError(f"{path} has token {token['content']!r} at {found}, tokenizer_config.json says {id}")


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """``{"eos_token": "<|im_end|>", ...}``: texts of the named special tokens, for the template."""
    older = folder / "special_tokens_map.json"
    named = {**(_read_json(older) if older.is_file() else {}), **settings}
    tokens: dict[str, str] = {}
    for name, token in named.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _template_text(folder: Path, settings: dict[str, Any]) -> str:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"{folder} has no chat template; add chat_template.jinja, or chat_template to tokenizer_config.json"
        )
    return template


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for trainers; here it only renders."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str, folder: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _NOW.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {folder} has an error on line {error.lineno}: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML, which chat templates do not want
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
