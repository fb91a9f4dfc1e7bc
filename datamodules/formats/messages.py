"""Conversations in the spellings of public data sets, as messages for a chat template: one table of message fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from datamodules.formats.values import as_number, is_empty, parse_json, unpack, without_nulls
from datamodules.tokens.chat import Message, Tools

FIELDS = {  # our name -> the names that data sets give it; nothing else may stand in a message but METADATA
    "role": ("role", "from"),
    "content": ("content", "value", "text"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking", "thoughts"),
    "tool_calls": ("tool_calls", "tool_call", "function_call"),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
    "loss_weight": ("loss_weight", "weight", "train", "training", "trainable", "loss_mask", "loss"),
}
METADATA = frozenset(  # says nothing that a model could learn: not read, and named so
    [
        "id",
        "message_id",
        "msg_id",
        "uid",
        "uuid",
        "parent_id",
        "parent",
        "turn_id",
        "turn_identifier",
        "turn",
        "index",
        "idx",
        "timestamp",
        "ts",
        "time",
        "date",
        "created",
        "created_at",
        "create_time",
        "updated_at",
        "language",
        "lang",
        "country",
        "hashed_ip",
        "model",
        "model_name",
        "finish_reason",
        "stop_reason",
        "source",
        "token_count",
        "num_tokens",
    ]
)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of turns whose value is a call
PARTS = {"text": "text", "reasoning": "reasoning", "thinking": "reasoning", "tool_call": "tool_call"}


@dataclass(frozen=True)
class Conversation:
    """The messages of a cell."""

    turns: list[Message]
    unlearned: frozenset[int]  # numbers of the turns that a weight of 0 excludes from the loss
    unread: frozenset[str]  # metadata that stood beside them


def read_messages(value: Any, where: str) -> Conversation:
    """A list of messages, a single one, or the JSON text of either.

    Names of fields are those of ``FIELDS``. Content is text, or a list of typed parts with their text under ``text``,
    ``value`` or the type's name: ``text``, ``reasoning`` (or ``thinking``), ``tool_call`` (JSON). A ``function_call`` is
    JSON too. A key that holds null is not there, as in tables every message has the keys of all others.

    Raises:
        ValueError: one sentence that begins with ``where`` (a column of a row), for unknown fields and roles, weights
            other than 0 and 1, a weight of 1 on a turn that is not the assistant's, and content that is no text.
    """
    value = unpack(value)
    given = value if isinstance(value, list) else [value]
    turns: list[Message] = []
    unlearned, unread = set(), set()
    for index, message in enumerate(given):
        place = f"{where}, message {index},"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place} must have a role and a content (or from and value), both text")
        fields, metadata = _sorted_out(message, place)
        unread |= metadata
        turns.append(_turn(fields, place))
        if _is_unlearned(fields.get("loss_weight"), turns[-1], place):
            unlearned.add(index)
    return Conversation(turns, frozenset(unlearned), frozenset(unread))


def looks_like_messages(value: Any) -> bool:
    """Whether a cell is a list of messages, or a single one, with role and content; also as JSON text."""
    value = unpack(value)
    given = value if isinstance(value, list) else [value]
    return bool(given) and all(
        isinstance(message, Mapping) and any(name in message for name in FIELDS["role"]) for message in given
    )


def read_tools(value: Any, where: str) -> Tools | None:
    """JSON schemas from a list or its JSON text, each as ``{"type": "function", "function": ...}``; None when there is
    none. Keys that hold null are left out."""
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else None
    if is_empty(value):
        return None
    given = (
        [parse_json(tool, where) if isinstance(tool, str) else tool for tool in value] if type(value) is list else []
    )
    if not given or not all(isinstance(tool, dict) for tool in given):
        raise ValueError(f"{where} must hold a list of tools, each an object, or the JSON text of such a list")
    tools = [without_nulls(tool) for tool in given]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _sorted_out(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """The fields by our names and the metadata. Raises ValueError for unknown fields and for one said twice."""
    given = {str(key): part for key, part in message.items() if part is not None}
    fields: dict[str, Any] = {}
    for ours, names in FIELDS.items():
        found = [name for name in names if name in given]
        values = [given.pop(name) for name in found]
        said = [part for part in values if not is_empty(part)] or values[:1]
        if any(part != said[0] for part in said[1:]):
            raise ValueError(f"{where} says {' and '.join(found)}, which mean the same and differ; keep one of them")
        fields |= {ours: said[0]} if said else {}
    metadata = {name for name in given if name.lower() in METADATA}
    unknown = [name for name, part in given.items() if name not in metadata and not is_empty(part)]
    if "replies" in given:
        raise ValueError(
            f"{where} is one of a conversation tree; set data.train to OasstTrees, which reads its threads"
        )
    if unknown:
        known = ", ".join(name for names in FIELDS.values() for name in names)
        raise ValueError(
            f"{where} holds {', '.join(map(repr, unknown))}, which nothing here reads; remove it, or rename it to one of "
            f"{known}"
        )
    return fields, metadata


def _turn(fields: Mapping[str, Any], where: str) -> Message:
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise ValueError(f"{where} must have a role and a content (or from and value), both text")
    if role not in ROLES and role not in CALLS:
        raise ValueError(f"{where} has the role {role!r}; known are {', '.join(dict.fromkeys([*ROLES, *CALLS]))}")
    parts = _parts(content, role in CALLS, where)
    made = unpack(fields.get("tool_calls", []))
    calls = [_call(call, where) for call in [*(made if isinstance(made, list) else [made]), *parts["tool_call"]]]
    reasoning = fields.get("reasoning_content", "")
    if not isinstance(reasoning, str) or (content is None and not calls):
        raise ValueError(f"{where} must have a role and a content (or from and value), both text")
    others = {
        "reasoning_content": reasoning or "".join(parts["reasoning"]),
        "tool_calls": calls,
        **{name: fields.get(name) for name in ("tool_call_id", "name")},
    }
    turn: Any = {"role": ROLES.get(role, "assistant"), "content": "".join(parts["text"])}
    return cast(Message, turn | {name: part for name, part in others.items() if part})


def _is_unlearned(weight: Any, turn: Message, where: str) -> bool:
    number = None if weight is None else as_number(weight)
    if weight is not None and number not in (0, 1):
        raise ValueError(f"{where} has loss_weight {weight!r}; known are 0 (not learned) and 1 (learned)")
    if number == 1 and turn["role"] != "assistant":
        raise ValueError(f"{where} has loss_weight 1 and is the {turn['role']}'s; only assistant turns are learned")
    return number == 0


def _parts(content: Any, is_call: bool, where: str) -> dict[str, list[Any]]:
    """The texts, the reasonings and the parsed tool calls of a message's content."""
    parts: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    if is_call:
        made = parse_json(content, where) if isinstance(content, str) else without_nulls(content)
        parts["tool_call"] = made if isinstance(made, list) else [made]
    elif isinstance(content, str):
        parts["text"].append(content)
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            names = ("text", "value", kind) if isinstance(part, Mapping) else ()
            text = next((part[name] for name in names if isinstance(part.get(name), str)), None)
            if kind not in PARTS or text is None:
                raise ValueError(f"{where} has a content part that is not text: {str(part)[:60]!r}")
            parts[PARTS[kind]].append(parse_json(text, where) if kind == "tool_call" else text)
    elif content is not None:
        raise ValueError(f"{where} must have a role and a content (or from and value), both text")
    return parts


def _call(call: Any, where: str) -> dict[str, Any]:
    """``{"type": "function", "function": {"name", "arguments"}}``, the arguments an object as templates expect."""
    call = unpack(call)
    outer = {key: part for key, part in call.items() if part is not None} if isinstance(call, Mapping) else {}
    given = outer.pop("function", outer)
    function = {key: part for key, part in given.items() if part is not None} if isinstance(given, Mapping) else {}
    names = [name for name in ("arguments", "parameters", "args", "input") if name in function]
    arguments = function[names[0]] if names else {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, where) if arguments.strip() else {}
    else:
        arguments = without_nulls(arguments)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise ValueError(f"{where} has a tool call without a name and arguments: {str(call)[:60]!r}")
    strange = [
        key for key in {**outer, **function} if key not in ("id", "type", "index", "function", "name", *names[:1])
    ]
    if strange:
        raise ValueError(f"{where} has a tool call with {', '.join(map(repr, strange))}, which nothing here reads")
    marked = {"id": outer["id"]} if isinstance(outer.get("id"), str) else {}
    return {**marked, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
