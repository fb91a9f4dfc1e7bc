"""What is asked, with all that stands beside it: system message, earlier turns, tools, input, documents, options."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.formats.messages import Conversation, looks_like_messages, read_messages, read_tools
from datamodules.formats.reading import Cells
from datamodules.formats.values import is_empty, repeats, unpack
from datamodules.tokens.chat import Dialogue, Message, Tools

PROMPTS = ("prompt", "instruction", "messages", "input", "context")  # what may hold it, in this order
BESIDE = ("input", "context", "documents", "options")  # text that is written below it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Asked:
    """A prompt as it is to be read."""

    prompt: Dialogue  # with all context
    tools: Tools | None = None
    instruction: str | None = None  # of a text prompt in Alpaca's form: the instruction alone
    given: str = ""  # and what it is about


def read_prompt(cells: Cells, chat: bool, names: tuple[str, ...] = PROMPTS) -> Asked | None:
    """The prompt of a row with its context; None where no column of ``names`` holds one.

    Args:
        cells: the row.
        chat: text prompts become user messages, so that they may have a system message, a history and tools.
        names: our columns that may hold the prompt, in this order.

    Raises:
        ValueError: with the row's origin, for context that cannot be rendered.
    """
    found = read_bare_prompt(cells, names)
    if found is None:
        return None
    asked = surrounded(cells, found.prompt, chat)
    return found if isinstance(asked.prompt, str) else asked


def read_bare_prompt(cells: Cells, names: tuple[str, ...]) -> Asked | None:
    """The prompt in one of our columns ``names``, without system message, history and tools.

    Texts of ``BESIDE`` are written below a text prompt, each behind an empty line.
    """
    name = next((name for name in names if cells.holds(name)), None)
    if name is None:
        return None
    value, theirs = cells.take(name), cells.name(name)
    if looks_like_messages(value):
        conversation = read_messages(value, f"{cells.origin}: {theirs}")
        note_unread(cells, conversation, theirs)
        return Asked(conversation.turns)
    if not isinstance(value, str):
        raise ValueError(
            f"{cells.origin}: column {theirs!r} holds a {type(value).__name__}, text or a list of messages was expected"
        )
    parts = [text for text in (_beside(cells, other, value) for other in BESIDE if other != name) if text]
    prompt = "\n\n".join([value, *parts])
    return Asked(prompt, None, value, "\n\n".join(parts)) if name == "instruction" else Asked(prompt)


def surrounded(cells: Cells, prompt: Dialogue, chat: bool) -> Asked:
    """The prompt behind the system message and the earlier turns of the row, and its tools.

    Raises ValueError for text below messages, for a second system message, and, without ``chat``, for a text prompt
    that has any of them.
    """
    if not isinstance(prompt, str):
        for name in BESIDE:
            if (
                cells.holds(name)
                and cells.name(name) not in cells.used
                and not repeats(cells.values[cells.name(name)], list(prompt))
            ):
                raise ValueError(
                    f"{cells.origin}: column {cells.name(name)!r} stands beside messages, which have no place for it; write "
                    f"it into the user's message, or leave it out with --data.columns '{{{name}: \"\"}}'"
                )
    names = [cells.name(name) for name in ("system", "history", "tools") if cells.holds(name)]
    system, history, tools = cells.take_text("system"), _history(cells), _tools(cells)
    if isinstance(prompt, str) and not (system or history or tools):
        return Asked(prompt)
    if isinstance(prompt, str) and not chat:
        raise ValueError(
            f"{cells.origin}: column {' and '.join(map(repr, names))} cannot be written into a plain text prompt; set "
            f"data.chat: true (or --data.chat true) to render prompts as chats, or leave it out with --data.columns "
            f"'{{{cells.roles[names[0]]}: \"\"}}'"
        )
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    own = turns[:1] if turns and turns[0]["role"] in ("system", "developer") else []
    if own and system and own[0]["content"].strip() not in ("", system.strip()):
        raise ValueError(
            f"{cells.origin}: column {names[0]!r} and the system message of the row's own messages differ; keep one of "
            "them, or leave the column out with --data.columns '{system: \"\"}'"
        )
    front = own if own and own[0]["content"].strip() else [Message(role="system", content=system)] if system else own
    return Asked([*front, *history, *turns[len(own) :]], tools)


def note_unread(cells: Cells, conversation: Conversation, column: str) -> None:
    """Names what of its messages is not read."""
    for name in sorted(conversation.unread):
        cells.unread[f"{column}.{name}"] = "beside what messages say"


def _history(cells: Cells) -> list[Message]:
    """Earlier turns: pairs of a question and its answer, or messages."""
    given = unpack(cells.take("history"))
    if given is None:
        return []
    if looks_like_messages(given):
        return read_messages(given, f"{cells.origin}: {cells.name('history')}").turns
    if not isinstance(given, list) or not all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in given
    ):
        raise ValueError(
            f"{cells.origin}: column {cells.name('history')!r} must be a list of pairs of a question and its answer, both "
            "text, or of messages"
        )
    return [
        Message(role=role, content=text)
        for pair in given
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _tools(cells: Cells) -> Tools | None:
    given = cells.take("tools")
    return None if given is None else read_tools(given, f"{cells.origin}: column {cells.name('tools')!r}")


def _beside(cells: Cells, name: str, prompt: str) -> str:
    """The text of a column that belongs below the prompt, "" where there is none or the prompt holds it already."""
    if name == "options":
        options = read_options(cells)
        written = all(re.search(rf"\b{letter}\W{{1,3}}{re.escape(text)}", prompt) for _, letter, text in options)
        return "" if written else "\n".join(line for line, _, _ in options)
    given = unpack(cells.take(name)) if name == "documents" else cells.take(name)
    if given is None or repeats(given, prompt):
        return ""
    parts = given if isinstance(given, list) else [given]
    texts = [part if isinstance(part, str) else _document(part) for part in parts]
    if any(text is None for text in texts):
        raise ValueError(
            f"{cells.origin}: column {cells.name(name)!r} holds a {type(given).__name__}, text was expected, or a list of "
            "texts or of objects with title and text"
        )
    return "\n\n".join(str(text) for text in texts)


def _document(part: Any) -> str | None:
    """Title and text of a document; None where it is something else."""
    if not isinstance(part, Mapping) or not set(part) <= {"title", "text", "content", "contents", "id", "doc_id"}:
        return None
    lines = [part.get(name) for name in ("title", "text", "content", "contents")]
    return "\n".join(line for line in lines if isinstance(line, str)) or None


def read_options(cells: Cells) -> list[tuple[str, str, str]]:
    """Of each option the line that is written, its letter and its text.

    ``["red", "blue"]`` and ``{"A": "red", "B": "blue"}`` are written ``A) red`` and ``B) blue``; ``["A) red"]`` as it is.
    """
    given = unpack(cells.take("options"))
    if given is None:
        return []
    if isinstance(given, Mapping) and set(given) == {"text", "label"}:  # ARC's and CommonsenseQA's
        given = dict(zip(given["label"], given["text"], strict=True))
    if isinstance(given, list) and all(isinstance(text, str | int | float) for text in given):
        texts = [str(text) for text in given]
        lettered = all(text.lstrip("(")[:1] == letter for text, letter in zip(texts, LETTERS, strict=False))
        if lettered and all(text.lstrip("(")[1:2] in tuple(").:") for text in texts):
            return [(text, letter, text.lstrip("(")[2:].strip()) for text, letter in zip(texts, LETTERS, strict=False)]
        given = dict(zip(LETTERS, texts, strict=False)) if len(texts) <= len(LETTERS) else None
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(
            f"{cells.origin}: column {cells.name('options')!r} must hold a list of texts or an object of letters and texts"
        )
    return [(f"{letter}) {text}", str(letter), text) for letter, text in given.items() if not is_empty(text)]
