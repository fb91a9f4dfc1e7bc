"""Conversations and prompts: the one table of message fields, and a prompt with all that stands beside it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from datamodules.formats.reading import (
    Cells,
    as_number,
    guess,
    is_empty,
    parse_json,
    repeats,
    texts_in,
    unpack,
    without_nulls,
)
from datamodules.tokens.encoding import Dialogue, Message, Tools

FIELDS = {  # our name -> the names that data sets give it; nothing else may stand in a message but METADATA
    "role": ("role", "from"),
    "content": ("content", "value", "text"),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking", "thoughts"),
    "tool_calls": ("tool_calls", "tool_call", "function_call"),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
    "loss_weight": ("loss_weight", "weight", "train", "training", "trainable", "loss_mask", "loss"),
}
FIELD_OF = {name: ours for ours, names in FIELDS.items() for name in names}
METADATA = frozenset(  # fields that say nothing a model could learn: they are not read, and named so
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
        "header",
        "redacted",
        "state",
        "toxic",
        "markdown",
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
PROMPTS = ("prompt", "instruction", "messages", "input", "context")  # columns that may hold the prompt, in this order
BESIDE = ("input", "context", "documents", "options")  # columns whose text is written below a text prompt
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SWITCH = ("on", "off", "true", "false", "yes", "no")  # whether an answer holds reasoning, as Nemotron's column tells
TEXT_OR_MESSAGES = "text or a list of messages"


@dataclass(frozen=True)
class Conversation:
    """The messages of a cell."""

    turns: list[Message]
    unlearned: frozenset[int] = frozenset()  # numbers of the turns that a weight of 0 excludes from the loss
    unread: frozenset[str] = frozenset()  # names of the metadata beside them


@dataclass(frozen=True)
class Asked:
    """A prompt as a model is to read it."""

    prompt: Dialogue
    tools: Tools | None = None
    instruction: str | None = None  # of a text prompt in Alpaca's form: the instruction alone
    given: str = ""  # the texts below the prompt
    unlearned: frozenset[int] = frozenset()  # numbers of its messages that a weight of 0 excludes from the loss

    @property
    def ends_in_answer(self) -> bool:
        """Whether the last of its messages is the assistant's."""
        return not isinstance(self.prompt, str) and self.prompt[-1:] != [] and self.prompt[-1]["role"] == "assistant"


def read_prompt(cells: Cells, names: tuple[str, ...] = PROMPTS) -> Asked | None:
    """Read the prompt in one of our columns ``names``; None where none of them holds one.

    Texts of ``BESIDE`` are written below a text prompt, each behind an empty line. System message, history and tools
    come with :func:`add_context`.
    """
    name = next((name for name in names if cells.holds(name)), None)
    if name is None:
        return None
    value = cells.take(name)
    if looks_like_messages(value):
        conversation = read_turns(cells, value, cells.name(name))
        return Asked(conversation.turns, unlearned=conversation.unlearned)
    if not isinstance(value, str):
        raise cells.wrong_type(name, value, TEXT_OR_MESSAGES)
    parts = [text for text in (_text_beside(cells, other, value) for other in BESIDE if other != name) if text]
    instruction = value if name == "instruction" else None
    return Asked("\n\n".join([value, *parts]), None, instruction, "\n\n".join(parts))


def add_context(cells: Cells, asked: Asked, chat: bool) -> Asked:
    """Put the row's system message and earlier turns in front of a prompt, and its tools beside it.

    Args:
        cells: the row.
        asked: its prompt.
        chat: a text prompt becomes a user message where the row has any of them.

    Raises:
        ValueError: with the row's origin, for text below messages, a second system message, and any of them beside a
            text prompt without ``chat``.
    """
    prompt = asked.prompt
    if not isinstance(prompt, str):
        for name in BESIDE:
            if (
                cells.holds(name)
                and cells.name(name) not in cells.used
                and not repeats(cells.values[cells.name(name)], list(prompt))
            ):
                raise ValueError(
                    f"{cells.origin}: column {cells.name(name)!r} stands beside messages, which have no place for it; "
                    f"write it into the user's message, or leave it out with --data.columns '{{{name}: \"\"}}'"
                )
    names = [cells.name(name) for name in ("system", "history", "tools") if cells.holds(name)]
    system, earlier, tools = cells.take_text("system"), _read_history(cells), _read_tools(cells)
    if isinstance(prompt, str):
        if not (system or earlier.turns or tools):
            return asked
        if not chat:
            raise ValueError(
                f"{cells.origin}: column {' and '.join(map(repr, names))} cannot be written into a plain text prompt; "
                "set data.chat: true (or --data.chat true) to render prompts as chats, or leave it out with "
                f"--data.columns '{{{cells.roles[names[0]]}: \"\"}}'"
            )
        prompt = [Message(role="user", content=prompt)]
    own = prompt[:1] if prompt and prompt[0]["role"] in ("system", "developer") else []
    if own and system and own[0]["content"].strip() not in ("", system.strip()):
        raise ValueError(
            f"{cells.origin}: column {names[0]!r} and the system message of the row's own messages differ; keep one of "
            "them, or leave the column out with --data.columns '{system: \"\"}'"
        )
    front = own if own and own[0]["content"].strip() else [Message(role="system", content=system)] if system else own
    before = len(front) + len(earlier.turns)
    unlearned = {len(front) + number for number in earlier.unlearned}
    unlearned |= {before + number - len(own) for number in asked.unlearned if number >= len(own)}
    return Asked([*front, *earlier.turns, *prompt[len(own) :]], tools, unlearned=frozenset(unlearned))


def read_turns(cells: Cells, value: Any, name: str) -> Conversation:
    """Read the messages in a cell, or in the part of a cell, called ``name``, and note which of their fields are not
    read.
    """
    conversation = read_messages(value, f"{cells.origin}: {name}")
    for field in sorted(conversation.unread):
        cells.unread[f"{name}.{field}"] = "beside what messages say"
    return conversation


def read_messages(value: Any, where: str) -> Conversation:
    """Read a list of messages, a single one, or the JSON text of either.

    Names of fields are those of ``FIELDS``. Content is text, or a list of typed parts with their text under ``text``,
    ``value`` or the type's name: ``text``, ``reasoning`` (or ``thinking``), ``tool_call`` (JSON). A ``function_call``
    is JSON too. A key that holds null is not there, as in tables every message has the keys of all others.

    Raises:
        ValueError: one sentence that begins with ``where`` (a column of a row), for unknown fields and roles, weights
            other than 0 and 1, a weight of 1 on a turn that is not the assistant's, and content that is no text.
    """
    value = unpack(value, where)
    turns: list[Message] = []
    unlearned, unread = set(), set()
    given = value if isinstance(value, list) else [value]
    if given and all(map(_is_pair, given)):  # Capybara
        given = [
            {"role": role, "content": pair[name]}
            for pair in given
            for name, role in (("input", "user"), ("output", "assistant"))
            if pair[name] is not None
        ]
    for index, message in enumerate(given):
        place = f"{where}, message {index},"
        if not isinstance(message, Mapping):
            raise _no_text(place)
        fields, metadata = _split_fields(message, place)
        unread |= metadata
        turns.append(_make_message(fields, place))
        if _is_unlearned(fields.get("loss_weight"), turns[-1], place):
            unlearned.add(index)
    return Conversation(turns, frozenset(unlearned), frozenset(unread))


def looks_like_messages(value: Any) -> bool:
    """Tell whether a cell is a list of messages, or a single one, with role and content; also as JSON text."""
    value = guess(value)
    given = value if isinstance(value, list) else [value]
    return (
        bool(given)
        and all(isinstance(message, Mapping) and any(name in message for name in FIELDS["role"]) for message in given)
        or (isinstance(value, list) and bool(given) and all(map(_is_pair, given)))
    )


def _is_pair(turn: Any) -> bool:
    """Tell whether a question and its answer stand in one object."""
    return isinstance(turn, Mapping) and set(turn) == {"input", "output"}


def read_reasoning(cells: Cells, answer: Dialogue | Message) -> str:
    """Read what the assistant thinks before its answer; "" if the answer already holds it, or if the column is an
    on/off switch.

    Raises ValueError with the row's origin where the answer's message has other thoughts.
    """
    if not cells.holds("reasoning"):
        return ""
    if str(cells.values[cells.name("reasoning")]).strip().lower() in SWITCH:
        return ""
    reasoning = cells.take_text("reasoning")
    if repeats(reasoning, answer):
        return ""
    last = answer[-1:] if isinstance(answer, list) else [answer]
    if any(isinstance(turn, Mapping) and "reasoning_content" in turn for turn in last):
        raise ValueError(
            f"{cells.origin}: column {cells.name('reasoning')!r} and the reasoning of the answer's message differ; "
            "keep one of them, or leave the column out with --data.columns '{reasoning: \"\"}'"
        )
    return reasoning


def with_calls(cells: Cells, answer: Any, place: str) -> Any:
    """Make a message of an answer that calls tools; any other answer stays as it is.

    The calls stand in the column ``tool_calls``, or are the answer itself, see :func:`read_calls`.
    """
    if (message := read_calls(cells, answer, place)) is not None:
        return [message]
    if not cells.holds("tool_calls") or not (answer is None or isinstance(answer, str)) or looks_like_messages(answer):
        return answer
    if is_empty(calls := cells.unpack("tool_calls")):
        return answer
    cells.take("tool_calls")
    return [{"role": "assistant", "content": answer, "tool_calls": calls}]


def read_calls(cells: Cells, answer: Any, place: str) -> dict[str, Any] | None:
    """Make a message of an answer beside ``tools`` that is an object with ``name`` and ``arguments``, or a list of
    such (xLAM's), also as text; None for any other answer.

    Raises ValueError that begins with ``place`` for an empty list.
    """
    held = guess(answer)
    given = held if isinstance(held, list) else [held]
    given = [call.get("function", call) if isinstance(call, Mapping) else call for call in given]
    if not cells.holds("tools") or not all(
        isinstance(call, Mapping) and "name" in call and ("arguments" in call or "parameters" in call) for call in given
    ):
        return None
    if not given:
        raise ValueError(
            f"{place} is an empty list beside tools, so no tool is called and nothing is said; write what the "
            "assistant says instead"
        )
    return {"role": "assistant", "content": None, "tool_calls": unpack(answer, place)}


def read_options(cells: Cells) -> list[tuple[str, str, str]]:
    """Read the options of a row, which do not count as used: for each the line to write, its letter and its text.

    ``["red", "blue"]`` and ``{"A": "red", "B": "blue"}`` are written ``A) red`` and ``B) blue``; ``["A) red"]`` as it
    is.
    """
    if not cells.holds("options"):
        return []
    given = cells.unpack("options")
    if isinstance(given, Mapping) and set(given) == {"text", "label"}:  # ARC's and CommonsenseQA's
        labels, texts = given["label"], given["text"]
        paired = isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)
        named = paired and all(isinstance(label, str | int) for label in labels)
        given = dict(zip(labels, texts, strict=True)) if named else None
    if isinstance(given, list) and all(isinstance(text, str | int | float) for text in given):
        texts = [str(text) for text in given]
        lettered = all(text.lstrip("(")[:1] == letter for text, letter in zip(texts, LETTERS, strict=False))
        if lettered and all(text.lstrip("(")[1:2] in tuple(").:") for text in texts):
            return [(text, letter, text.lstrip("(")[2:].strip()) for text, letter in zip(texts, LETTERS, strict=False)]
        given = dict(zip(LETTERS, texts, strict=False)) if len(texts) <= len(LETTERS) else None
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(
            f"{cells.origin}: column {cells.name('options')!r} must hold a list of texts or an object of letters and "
            "texts"
        )
    return [(f"{letter}) {text}", str(letter), text) for letter, text in given.items() if not is_empty(text)]


def _no_text(where: str) -> ValueError:
    return ValueError(f"{where} must have a role and a content (or from and value), both text")


def _split_fields(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """Find the fields by our names, and the metadata. Raises ValueError for unknown or contradicting fields."""
    fields: dict[str, Any] = {}
    others: dict[str, Any] = {}  # what is no field of ours
    said: dict[str, str] = {}  # our name -> the message's
    for name, part in message.items():
        ours = FIELD_OF.get(name)
        if part is None:
            continue
        if ours is None:
            others[str(name)] = part
        elif ours not in fields or is_empty(fields[ours]):
            fields[ours], said[ours] = part, name
        elif part != fields[ours] and not is_empty(part):
            both = " and ".join(sorted((said[ours], name), key=FIELDS[ours].index))
            raise ValueError(f"{where} says {both}, which mean the same and differ; keep one of them")
    metadata = {name for name in others if name.lower() in METADATA}
    unknown = [name for name, part in others.items() if name not in metadata and not is_empty(part)]
    if "replies" in others:
        raise ValueError(
            f"{where} is one of a conversation tree; set data.train to OasstTrees, which reads its threads"
        )
    if unknown:
        known = ", ".join(name for names in FIELDS.values() for name in names)
        raise ValueError(
            f"{where} holds {', '.join(map(repr, unknown))}, which nothing here reads; remove it, or rename it to one "
            f"of {known}"
        )
    return fields, metadata


def _make_message(fields: Mapping[str, Any], where: str) -> Message:
    role, content, reasoning = fields.get("role"), fields.get("content"), fields.get("reasoning_content", "")
    if not isinstance(role, str):
        raise _no_text(where)
    if role not in ROLES and role not in CALLS:
        raise ValueError(f"{where} has the role {role!r}; known are {', '.join(dict.fromkeys([*ROLES, *CALLS]))}")
    parts = _split_content(content, role in CALLS, where)
    made = unpack(fields.get("tool_calls", []), where)
    calls = [_read_call(call, where) for call in [*(made if isinstance(made, list) else [made]), *parts["tool_call"]]]
    if not isinstance(reasoning, str) or (content is None and not calls):
        raise _no_text(where)
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


def _split_content(content: Any, is_call: bool, where: str) -> dict[str, list[Any]]:
    """Split a message's content into texts, reasonings and parsed tool calls."""
    parts: dict[str, list[Any]] = {"text": [], "reasoning": [], "tool_call": []}
    if is_call:
        made = parse_json(content, where) if isinstance(content, str) else without_nulls(content)
        parts["tool_call"] = made if isinstance(made, list) else [made]
    elif isinstance(content, str):
        parts["text"].append(content)
    elif isinstance(content, list):
        for part in content:
            given = part if isinstance(part, Mapping) else {}
            kind = given.get("type") if isinstance(given.get("type"), str) else ""
            text = next((given[name] for name in ("text", "value", kind) if isinstance(given.get(name), str)), None)
            if kind not in PARTS or text is None:
                raise ValueError(f"{where} has a content part that is not text: {str(part)[:60]!r}")
            parts[PARTS[kind]].append(parse_json(text, where) if kind == "tool_call" else text)
    elif content is not None:
        raise _no_text(where)
    return parts


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Make ``{"type": "function", "function": {"name", "arguments"}}``, with an object of arguments."""
    call = unpack(call, where)
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
    known = ("id", "type", "index", "function", "name", *names[:1])
    if strange := [key for key in {**outer, **function} if key not in known]:
        raise ValueError(f"{where} has a tool call with {', '.join(map(repr, strange))}, which nothing here reads")
    marked = {"id": outer["id"]} if isinstance(outer.get("id"), str) else {}
    return {**marked, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _read_history(cells: Cells) -> Conversation:
    """Read earlier turns: pairs of a question and its answer, or messages."""
    given = cells.take_unpacked("history")
    if given is None:
        return Conversation([])
    name = cells.name("history")
    if looks_like_messages(given):
        return read_turns(cells, given, name)
    if not isinstance(given, list) or not all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in given
    ):
        raise ValueError(
            f"{cells.origin}: column {name!r} must be a list of pairs of a question and its answer, both text, or of "
            "messages"
        )
    roles = ("user", "assistant")
    turns = [Message(role=role, content=text) for pair in given for role, text in zip(roles, pair, strict=True)]
    return Conversation(turns)


def _read_tools(cells: Cells) -> Tools | None:
    """Read JSON schemas from a list or its JSON text, each as ``{"type": "function", "function": ...}``; None without
    any. Keys that hold null are left out.
    """
    value = cells.take("tools")
    if value is None:
        return None
    where = f"{cells.origin}: column {cells.name('tools')!r}"
    value = parse_json(value, where) if isinstance(value, str) else value
    if is_empty(value):
        return None
    given = (
        [parse_json(tool, where) if isinstance(tool, str) else tool for tool in value] if type(value) is list else []
    )
    if not given or not all(isinstance(tool, dict) for tool in given):
        raise ValueError(f"{where} must hold a list of tools, each an object, or the JSON text of such a list")
    tools = [_with_schema(without_nulls(tool), where) for tool in given]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _with_schema(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """Parse the parameters of a tool, which some tables hold as JSON text."""
    made = dict(tool)
    if "parameters" in tool:
        made["parameters"] = unpack(tool["parameters"], where)
    if isinstance(tool.get("function"), dict):
        made["function"] = _with_schema(tool["function"], where)
    return made


def _text_beside(cells: Cells, name: str, prompt: str) -> str:
    """Read the text of a column below the prompt; "" without one, or where the prompt holds it."""
    if name == "options":
        cells.take(name)
        options = read_options(cells)
        written = all(re.search(rf"\b{letter}\W{{1,3}}{re.escape(text)}", prompt) for _, letter, text in options)
        return "" if written else "\n".join(line for line, _, _ in options)
    given = cells.take(name)
    if given is not None and (name == "documents" or isinstance(guess(given), Mapping)):
        given = unpack(given, cells.place(name))
    if given is None or repeats(given, prompt):
        return ""
    parts = given if isinstance(given, list) else _documents_in_lists(given)
    texts = [part if isinstance(part, str) else _text_of_document(part) for part in parts]
    if any(text is None for text in texts):
        others = "or a list of texts or of objects with title and text"
        raise ValueError(f"{cells.wrong_type(name, given, 'text')}, {others}")
    return "\n\n".join(str(text) for text in texts)


def _documents_in_lists(given: Any) -> list[Any]:
    """Turn HotpotQA's ``{"title": [...], "sentences": [[...], ...]}`` into a list of objects; another value stays one
    document.
    """
    if not isinstance(given, Mapping) or not all(isinstance(column, list) for column in given.values()):
        return [given]
    if len({len(column) for column in given.values()}) > 1:
        return [given]
    return [dict(zip(given, parts, strict=True)) for parts in zip(*given.values(), strict=True)]


def _text_of_document(part: Any) -> str | None:
    """Join title and text of a document; None for a value that is no document."""
    known = {"title", "text", "content", "contents", "sentences", "id", "doc_id"}
    if not isinstance(part, Mapping) or not set(part) <= known:
        return None
    lines = [part.get(name) for name in ("title", "text", "content", "contents")]
    lines.append("".join(texts_in(part.get("sentences"))))
    return "\n".join(line for line in lines if isinstance(line, str) and line) or None
