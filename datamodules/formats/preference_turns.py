"""Conversations in the spellings of preference data, and which part of them is the prompt and which the answers."""

import re
from collections.abc import Sequence
from typing import Any

from datamodules.formats.turns import messages as messages_and_tools
from datamodules.tokens.chat import Dialogue, Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of Anthropic's transcripts


def messages(value: Any, where: str) -> list[Message]:
    """As :func:`datamodules.formats.turns.messages`, of text alone."""
    return messages_and_tools(value, where, plain=True)


def split_answers(
    answers: dict[str, Any], prompt: Dialogue | None, origin: str, template: bool
) -> tuple[Dialogue, list[str]]:
    """The prompt and the text of each answer.

    Args:
        answers: name of an answer, for errors -> text, a message, or a conversation that ends with the answer.
        prompt: what the conversations repeat, if they do; None = the turns that all of them share.
        template: transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages instead of text.

    Raises:
        ValueError: with ``origin``, where an answer is not one assistant turn behind the prompt, or empty.
    """
    for name, value in answers.items():
        if not isinstance(value, str | dict | list) or isinstance(value, str) != isinstance(
            next(iter(answers.values())), str
        ):
            raise ValueError(
                f"{origin}: {name} is a {type(value).__name__}; the answers must all be text or all be messages"
            )
    if all(isinstance(value, str) for value in answers.values()):
        prompt, texts = (
            (prompt, list(answers.values())) if prompt is not None else _transcripts(answers, origin, template)
        )
    else:
        sides = {name: messages(value, f"{origin}: {name}") for name, value in answers.items()}
        prompt = _shared(list(sides.values())) if prompt is None else _as_repeated(prompt, next(iter(sides.values())))
        texts = [_answer(side, prompt, name, origin)["content"] for name, side in sides.items()]
    for name, text in zip(answers, texts, strict=True):
        if not text.strip():
            raise ValueError(f"{origin}: {name} is empty")
    return prompt, texts


def _shared(sides: Sequence[list[Message]]) -> list[Message]:
    """The turns that all sides begin with, the last turn of each left over."""
    shared = 0
    while shared < min(len(side) for side in sides) - 1 and all(side[shared] == sides[0][shared] for side in sides):
        shared += 1
    return sides[0][:shared]


def _as_repeated(prompt: Dialogue, side: list[Message]) -> list[Message]:
    """The prompt as messages; with the system message that a conversation puts in front of it."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    with_system = side[:1] + turns
    return with_system if len(side) > 1 and side[:-1] == with_system and side[0]["role"] == "system" else turns


def _answer(side: list[Message], prompt: list[Message], name: str, origin: str) -> Message:
    behind = side[len(prompt) :] if side[: len(prompt)] == prompt else side
    if len(behind) != 1 or behind[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in behind)
        raise ValueError(
            f"{origin}: {name} must be one assistant turn behind the prompt, and it is: {roles or 'nothing'}"
        )
    return behind[0]


def _transcripts(answers: dict[str, str], origin: str, template: bool) -> tuple[Dialogue, list[str]]:
    """Splits at the marks with their empty line only, since turns may hold the bare words."""
    sides = {}
    for name, text in answers.items():
        start, *pieces = re.split(f"({HUMAN}|{ASSISTANT})", text)
        if start.strip() or not pieces:
            raise ValueError(
                f"{origin}: there is no prompt, and {name} is not a transcript that starts with {HUMAN!r}; "
                "name the column of the prompt with columns, such as --data.columns '{prompt: question}'"
            )
        roles = ["user" if mark == HUMAN else "assistant" for mark in pieces[::2]]
        sides[name] = [Message(role=role, content=body) for role, body in zip(roles, pieces[1::2], strict=True)]
    shared = _shared(list(sides.values()))
    texts = [_answer(side, shared, name, origin)["content"] for name, side in sides.items()]
    if template:
        return [Message(role=turn["role"], content=turn["content"].strip()) for turn in shared], [
            text.strip() for text in texts
        ]
    return "".join(
        (HUMAN if turn["role"] == "user" else ASSISTANT) + turn["content"] for turn in shared
    ) + ASSISTANT, texts
