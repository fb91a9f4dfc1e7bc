"""From a raw row to what is read and what is learned: the formats of instruction data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.formats.columns import Columns, alpaca_prompt, dialogue_of, find_shape, renamed, text_of
from datamodules.formats.turns import messages, tools, unlearned
from datamodules.sources.source import Row
from datamodules.tokens.chat import Dialogue, LossOn, Message, Tools, encode_example
from datamodules.tokens.encoding import Tokens, encode_document
from modules.types import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT

Record = Mapping[str, Any]


@dataclass(frozen=True)
class InstructionExample:
    """What to read and what to learn: both text, or both messages (then ``prompt`` may be empty)."""

    prompt: Dialogue
    completion: Dialogue
    origin: str
    source: str
    alpaca_prompt: str | None = None  # of an instruction: what it reads as where it is no chat
    whole: bool = False  # plain text: the completion is a document, learned from its start
    tools: Tools | None = None
    unlearned: frozenset[int] = frozenset()  # numbers of the messages of ``completion`` that are not learned

    @property
    def is_instruction(self) -> bool:
        """Alpaca: a user message wherever the tokenizer has a chat template."""
        return self.alpaca_prompt is not None


def instruction_example(row: Row, columns: Columns, format: str | None = None) -> InstructionExample:
    """The example of one row, in one of the formats of ``READERS``.

    ``messages`` and ``sharegpt`` hold whole conversations, perhaps with columns ``tools`` (a list or its JSON text) and
    ``system``; ``prompt_completion`` text or messages for both; ``alpaca`` an ``instruction`` with or without
    ``input``, its ``output`` or ``response``, and perhaps ``system`` and ``history`` (pairs of earlier questions and
    answers); of ``self_instruct`` the first of ``instances`` counts.

    Args:
        columns: our column name -> the data's; mapped columns go before found ones.
        format: name of the format; None = the first whose columns are all there.

    Raises:
        ValueError: with the row's origin, when columns are missing or hold the wrong type.
    """
    check_format(format)
    record, origin = renamed(row, columns), row.origin
    if format is None and ({"chosen", "rejected"} <= set(record) or isinstance(record.get("label"), bool)):
        found = "chosen, rejected" if "chosen" in record else "label"
        raise ValueError(
            f"{origin}: the row is a preference ({found}); set data to PreferenceDataModule, or name its format with "
            "data.format"
        )
    names = {shape: name for name, (shapes, _) in READERS.items() if format in (None, name) for shape in shapes}
    shape = find_shape(record, tuple(names), columns, origin)
    return READERS[names[shape]][1](record, shape, row)


def check_format(format: str | None) -> None:
    """ValueError for a format that does not exist."""
    if format is not None and format not in READERS:
        raise ValueError(
            f"format {format!r} is not known; set data.format to one of {', '.join(READERS)}, or leave it out to go by "
            "the columns"
        )


def encode_instruction(
    tokenizer: PreTrainedTokenizerBase,
    example: InstructionExample,
    chat: bool | None = None,
    system: str | None = None,
    loss_on: LossOn = "assistant",
) -> Tokens:
    """Tokens of an example. Raises ValueError with its origin for rows that cannot be learned from.

    Args:
        chat: render text prompts with the chat template. None: instructions alone, if there is a template; else they
            get Alpaca's own prompt.
        system: system message in front of every chat that has none.
        loss_on: what is learned, as in :func:`datamodules.tokens.chat.encode_example`; documents are always learned
            whole.
    """
    if example.whole:
        return encode_document(tokenizer, str(example.completion), example.origin)
    if chat is None:
        chat = example.is_instruction and tokenizer.chat_template is not None
    prompt = example.prompt if chat or example.alpaca_prompt is None else example.alpaca_prompt
    return encode_example(
        tokenizer, prompt, example.completion, example.origin, chat, system, loss_on, example.tools, example.unlearned
    )


def _conversation(record: Record, shape: tuple[str, ...], row: Row) -> InstructionExample:
    (name,), where = shape, f"{row.origin}: {shape[0]}"
    if not isinstance(record[name], list):
        raise ValueError(
            f"{row.origin}: column {name!r} holds a {type(record[name]).__name__}, a list of messages was expected"
        )
    turns = messages(record[name], where)
    marked = unlearned(record[name], turns, where)
    start = _system(record, row.origin) if turns and turns[0]["role"] != "system" else []
    return InstructionExample(start, turns, row.origin, row.source, tools=_tools(record, row.origin), unlearned=marked)


def _prompt_completion(record: Record, shape: tuple[str, ...], row: Row) -> InstructionExample:
    several = record[shape[1]]  # references or aliases of an answer: the first is learned
    if isinstance(several, list) and several and all(isinstance(text, str) for text in several):
        record = {**record, shape[1]: several[0]}
    prompt, completion = (dialogue_of(record, name, row.origin) for name in shape)
    if isinstance(prompt, str) or isinstance(completion, str):
        return InstructionExample(
            prompt,
            completion,
            row.origin,
            row.source,
            tools=None if isinstance(prompt, str) else _tools(record, row.origin),
        )
    marked = unlearned(record[shape[1]], completion, f"{row.origin}: {shape[1]}")
    return InstructionExample(
        prompt, completion, row.origin, row.source, tools=_tools(record, row.origin), unlearned=marked
    )


def _alpaca(record: Record, shape: tuple[str, ...], row: Row) -> InstructionExample:
    prompt, completion = alpaca_prompt(record, row.origin), text_of(record, shape[1], row.origin)
    if not record["instruction"].strip():
        raise ValueError(f"{row.origin}: the instruction is empty")
    earlier = _system(record, row.origin) + _history(record, row.origin)
    if earlier:
        turns = [Message(role="user", content=prompt), Message(role="assistant", content=completion)]
        return InstructionExample([], earlier + turns, row.origin, row.source)
    given = record.get("input") or ""
    original = ALPACA_PROMPT_WITH_INPUT if given else ALPACA_PROMPT
    return InstructionExample(
        prompt, completion, row.origin, row.source, original.format(instruction=record["instruction"], input=given)
    )


def _self_instruct(record: Record, shape: tuple[str, ...], row: Row) -> InstructionExample:
    instances = record["instances"]
    if (
        not isinstance(instances, list)
        or not instances
        or not isinstance(instances[0], dict)
        or "output" not in instances[0]
    ):
        raise ValueError(
            f"{row.origin}: column 'instances' must be a list of objects with input and output, at least one"
        )
    first = {name: instances[0].get(name) for name in ("input", "output")}
    return _alpaca({"instruction": record["instruction"], **first}, ("instruction", "output"), row)


def _document(record: Record, shape: tuple[str, ...], row: Row) -> InstructionExample:
    return InstructionExample("", text_of(record, "text", row.origin), row.origin, row.source, whole=True)


def _system(record: Record, origin: str) -> list[Message]:
    """The message of a column ``system``; none where it is missing, null or empty."""
    text = text_of(record, "system", origin) if record.get("system") is not None else ""
    return [Message(role="system", content=text)] if text.strip() else []


def _history(record: Record, origin: str) -> list[Message]:
    """The turns of a column ``history``."""
    pairs = record.get("history")
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs
    ):
        raise ValueError(f"{origin}: column 'history' must be a list of pairs of a question and its answer, both text")
    return [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _tools(record: Record, origin: str) -> Tools | None:
    return tools(record.get("tools"), f"{origin}: column 'tools'")


READERS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Record, tuple[str, ...], Row], InstructionExample]]] = {
    "messages": ((("messages",),), _conversation),
    "sharegpt": ((("conversations",),), _conversation),
    "prompt_completion": (
        (("prompt", "completion"), ("question", "completion"), ("question", "answer")),
        _prompt_completion,
    ),
    "alpaca": ((("instruction", "output"), ("instruction", "response")), _alpaca),
    "self_instruct": ((("instruction", "instances"),), _self_instruct),
    "text": (
        (("text",),),
        _document,
    ),  # last, for other formats may have their rendered text, answer and all, in such a column
}
KNOWN = tuple(
    sorted(
        {
            "input",
            "system",
            "history",
            "tools",
            *(name for shapes, _ in READERS.values() for shape in shapes for name in shape),
        }
    )
)
