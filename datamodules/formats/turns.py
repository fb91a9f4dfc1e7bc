"""Conversations in the spellings of public data sets, as messages for a chat template."""

import json
from collections.abc import Mapping
from typing import Any, cast

from datamodules.tokens.chat import Message, Tools

FROM = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ROLES = ("user", "assistant", "system", "developer", "tool")
TOOL_TURNS = {"function_call": "assistant", "observation": "tool", "tool": "tool"}  # ShareGPT's


def messages(value: Any, where: str, plain: bool = False) -> list[Message]:
    """A list of messages or a single one, with ``role`` and ``content`` or ``from`` and ``value``.

    Content is text, or a list of typed parts with their text under ``text`` or ``value``: ``text``, ``reasoning``,
    ``tool_call`` (JSON). The
    value of a ``function_call`` is JSON too: a call or a list of calls. ``tool_calls``, ``reasoning_content``,
    ``tool_call_id`` and ``name`` are kept.

    Args:
        value: of a column.
        where: what errors begin with.
        plain: no tools and no reasoning, for data that are text alone.

    Raises:
        ValueError: one sentence that begins with ``where``.
    """
    given = value if isinstance(value, list) else [value]
    return [_message(message, f"{where}, message {index},", plain) for index, message in enumerate(given)]


def unlearned(value: Any, turns: list[Message], where: str) -> frozenset[int]:
    """The numbers of the ``turns`` made of ``value`` whose ``loss_weight`` is 0.

    Raises ValueError for weights other than 0 and 1, and for 1 on a turn that is not the assistant's.
    """
    given = value if isinstance(value, list) else [value]
    weights = [message.get("loss_weight") for message in given]
    for index, (weight, turn) in enumerate(zip(weights, turns, strict=True)):
        if isinstance(weight, bool) or weight not in (None, 0, 1):
            raise ValueError(
                f"{where}, message {index}, has loss_weight {weight!r}; known are 0 (not learned) and 1 (learned)"
            )
        if weight == 1 and turn["role"] != "assistant":
            raise ValueError(
                f"{where}, message {index}, has loss_weight 1 and is the {turn['role']}'s; only assistant turns are "
                "learned"
            )
    return frozenset(index for index, weight in enumerate(weights) if weight == 0)


def tools(value: Any, where: str) -> Tools | None:
    """JSON schemas from a list or its JSON text, each as ``{"type": "function", "function": ...}``; None when there is
    none.
    """
    if value is None or value != value or value in ("", []):  # NaN stands where a table's cell is empty
        return None
    given = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise ValueError(f"{where} must hold a list of tools, each an object, or the JSON text of such a list")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in given] or None


def _message(message: Any, where: str, plain: bool) -> Message:
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    role, content = (given.get(key) for key in (("from", "value") if "from" in given else ("role", "content")))
    known = FROM if plain else FROM | TOOL_TURNS
    if "from" in given and role not in known:
        raise ValueError(f"{where} is from {role!r}; known are {', '.join(known)}")
    parts = _parts(content, role == "function_call", plain, where)
    made = given.get("tool_calls", [])
    calls = (
        []
        if plain
        else [_call(call, where) for call in [*(made if isinstance(made, list) else [made]), *parts["tool_call"]]]
    )
    reasoning = "" if plain else given.get("reasoning_content", "".join(parts["reasoning"]))
    if not isinstance(role, str) or not isinstance(reasoning, str) or (content is None and not calls):
        raise ValueError(f"{where} must have a role and a content (or from and value), both text")
    role = (FROM | TOOL_TURNS).get(role, role)
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    extras = (
        {}
        if plain
        else {
            "reasoning_content": reasoning,
            "tool_calls": calls,
            **{key: given.get(key) for key in ("tool_call_id", "name")},
        }
    )
    fields: Any = {"role": role, "content": "".join(parts["text"])} | {
        key: value for key, value in extras.items() if value
    }
    return cast(Message, fields)


def _parts(content: Any, is_call: bool, plain: bool, where: str) -> dict[str, list[Any]]:
    """The texts, the reasonings and the parsed tool calls of a message's content."""
    parts: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    if is_call and isinstance(content, str):
        made = _parsed(content, where)
        parts["tool_call"] = made if isinstance(made, list) else [made]
    elif isinstance(content, str):
        parts["text"].append(content)
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            text = (
                next((part[key] for key in ("text", "value") if isinstance(part.get(key), str)), None)
                if isinstance(part, dict)
                else None
            )
            if kind not in (("text",) if plain else parts) or text is None:
                raise ValueError(f"{where} has a content part that is not text: {str(part)[:60]!r}")
            parts[str(kind)].append(_parsed(text, where) if kind == "tool_call" else text)
    elif content is not None:
        raise ValueError(f"{where} must have a role and a content (or from and value), both text")
    return parts


def _call(call: Any, where: str) -> dict[str, Any]:
    """``{"type": "function", "function": {"name", "arguments"}}``, the arguments an object as templates expect."""
    function: Any = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where)
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(arguments, Mapping | None)
    ):
        raise ValueError(f"{where} has a tool call without a name and arguments: {str(call)[:60]!r}")
    outer = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} holds text where JSON was expected ({error.msg}): {text[:60]!r}") from error
