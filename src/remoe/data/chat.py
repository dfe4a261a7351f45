"""Conversations as text: chat templates in the form that transformers uses, and which part of the text is an answer."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remoe.data.files import write_whole
from remoe.data.tokenizer import Ids, Tokenizer
from remoe.errors import ConfigError, DataError, RemoeError, one_of

TEMPLATES = ("alpaca", "chat", "plain")
FILE = "chat_template.jinja"
"""Beside a saved tokenizer, where transformers looks for it too."""
ROLES = ("system", "user", "assistant")
EOD_MARK = "\ufdd0"
"""Stands for the end-of-document token in rendered text; Unicode keeps it out of real text."""

Messages = Sequence[Mapping[str, str]]


class Piece(NamedTuple):
    """A stretch of rendered text, and whether it is what the model has to say."""

    text: str
    is_answer: bool


class ChatTemplate:
    """A Jinja template of `messages`, `add_generation_prompt` and `eos_token`, as transformers' tokenizers hold one.

    A message has role, content, and from Alpaca rows perhaps an input.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._template = _environment().from_string(source)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with `add_generation_prompt` up to where the next answer begins."""
        from jinja2 import TemplateError

        values = {"add_generation_prompt": add_generation_prompt, "eos_token": EOD_MARK, "bos_token": ""}
        try:
            return self._template.render(messages=list(messages), **values)
        except TemplateError as error:
            raise DataError(f"data.template cannot be rendered: {error}") from None

    def pieces(self, messages: Messages) -> Iterator[Piece]:
        """The text cut at each answer's start and end. Raises DataError where the template rewrites earlier turns."""
        done = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:place], add_generation_prompt=True)
            through = self.render(messages[: place + 1])
            if not (before.startswith(done) and through.startswith(before)):
                raise DataError(
                    "data.template renders a turn in another way once others follow, must go on from what it rendered "
                    "before; leave out what depends on later messages"
                )
            yield Piece(before[len(done) :], False)
            answer, mark, rest = through[len(before) :].rpartition(EOD_MARK)
            yield Piece(answer + mark if mark else rest, True)
            done = before + answer + mark if mark else through


@functools.cache
def load_template(spec: str) -> ChatTemplate:
    """The template that `data.template` names: one of TEMPLATES, or a file. Raises ConfigError where it is neither."""
    if spec in TEMPLATES:
        return ChatTemplate(resources.files("remoe.data.templates").joinpath(f"{spec}.jinja").read_text("utf-8"))
    if not Path(spec).is_file():
        raise ConfigError(f"data.template is {spec!r}, {one_of(spec, TEMPLATES)}, or a file with a Jinja template")
    return _read_template(Path(spec), f"data.template {spec}", ConfigError)


def save_template(template: ChatTemplate, folder: Path) -> None:
    """Write a template beside a saved tokenizer."""
    write_whole(folder / FILE, template.source.encode("utf-8"))


def saved_template(folder: Path) -> ChatTemplate | None:
    """The template beside a saved tokenizer; None where there is none, DataError where it is damaged."""
    path = folder / FILE
    return _read_template(path, str(path), DataError) if path.is_file() else None


def messages_of(row: Any) -> list[dict[str, str]]:
    """The conversation in a row: `messages`, Alpaca's instruction, input and output, or prompt and response.

    Raises ValueError that says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if "messages" in row:
        return _checked(row["messages"])
    for asked, answered in (("instruction", "output"), ("prompt", "response")):
        if asked in row and answered in row:
            question = {"role": "user", "content": row[asked], "input": row.get("input") or ""}
            return _checked([question, {"role": "assistant", "content": row[answered]}])
    keys = ", ".join(map(repr, list(row)[:8])) or "none"
    raise ValueError(f"must have instruction and output, prompt and response, or messages; its keys are {keys}")


def encode(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of rendered text, in which EOD_MARK is the end-of-document id."""
    parts = tokenizer.encode_batch(text.split(EOD_MARK))
    ending = np.array([tokenizer.eod], dtype=np.int32)
    joined = [piece for part in parts for piece in (part, ending)]
    return np.concatenate(joined[:-1])


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages
) -> tuple[Ids, NDArray[np.bool_]]:  # fmt: skip
    """The ids of a conversation, and which of them are answers.

    Prompts and answers are tokenised apart, as they are when the model answers a prompt.
    """
    pieces = list(template.pieces(messages))
    ids = [encode(tokenizer, piece.text) for piece in pieces]
    answers = [np.full(len(part), piece.is_answer) for part, piece in zip(ids, pieces, strict=True)]
    return np.concatenate(ids), np.concatenate(answers)


def _read_template(path: Path, what: str, error_class: type[RemoeError]) -> ChatTemplate:
    from jinja2 import TemplateError

    try:
        return ChatTemplate(path.read_text(encoding="utf-8"))
    except (TemplateError, UnicodeDecodeError) as error:
        raise error_class(f"{what} is no Jinja template: {error}") from None


def _checked(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of objects with role and content")
    for message in messages:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content"), message.get("input", "")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("holds a turn that has no text for role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"has the role {message['role']!r}, {one_of(message['role'], ROLES)}")
        if EOD_MARK in message["content"] + message.get("input", ""):
            raise ValueError("holds U+FDD0, which stands for the end of a turn")
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError("must begin with a question and end with an answer (role assistant)")
    return messages


@functools.cache
def _environment() -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise DataError(f"data.template refuses a conversation: {message}")
