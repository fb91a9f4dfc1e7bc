"""From a raw row to what is read and what is learned: the formats of instruction data."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.formats.conversation import (
    Asked,
    looks_like_messages,
    note_unread,
    read_messages,
    read_prompt,
    surrounded,
)
from datamodules.formats.reading import Cells, Reading, unpack
from datamodules.sources.source import Row
from datamodules.tokens.chat import Dialogue, LossOn, Message, Tools, encode_example
from datamodules.tokens.encoding import Tokens, encode_document
from modules.types import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT

FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {  # name -> our columns; the first whose columns are all there
    "messages": (("messages",),),
    "sharegpt": (("messages",),),
    "prompt_completion": (("prompt", "completion"), ("prompt", "answer")),
    "alpaca": (("instruction", "completion"), ("instruction", "answer")),
    "self_instruct": (("instruction", "instances"),),
    "input_output": (("input", "completion"), ("input", "answer"), ("context", "completion"), ("context", "answer")),
    "text": (("text",),),  # last, for other formats may have their rendered text, answer and all, in such a column
}


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


def instruction_example(
    row: Row, reading: Reading, format: str | None = None, chat: bool | None = None
) -> InstructionExample:
    """The example of one row, in one of ``FORMATS``, with its context (``datamodules/formats/context.py``).

    Args:
        row: as its source gives it.
        reading: of its data set.
        format: name of the format; None = the first whose columns are all there, those mapped by hand before others.
        chat: text prompts become user messages; None = instructions alone.

    Raises:
        ValueError: with the row's origin, when columns are missing, hold the wrong type, or would be left unused though
            they change what is read.
    """
    check_format(format)
    cells = reading.open(row)
    shape = _find_shape(cells, format)
    if shape == ("messages",):
        example = _conversation(cells)
    elif shape == ("text",):
        _check_is_no_message(cells)
        example = InstructionExample("", _text(cells, "text"), row.origin, row.source, whole=True)
    else:
        example = _asked(cells, shape, chat)
    reading.close(cells, " + ".join(shape), chosen=format is not None)
    return example


def check_format(format: str | None) -> None:
    """ValueError for a format that does not exist."""
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"format {format!r} is not known; set data.format to one of {', '.join(FORMATS)}, or leave it out to go by "
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
        tokenizer: of the model that learns.
        example: as :func:`instruction_example` reads it with the same ``chat``.
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


def _find_shape(cells: Cells, format: str | None) -> tuple[str, ...]:
    by_hand = set(cells.reading.by_hand)
    shapes = [shape for name, shapes in FORMATS.items() if format in (None, name) for shape in shapes]
    shapes.sort(key=lambda shape: -len(by_hand & set(shape)))  # mapped by hand before found
    for holds in (cells.holds, cells.has):  # a table gives every row the columns of all others
        for shape in shapes:
            if all(map(holds, shape)):
                return shape
    if format is None and cells.has("chosen"):
        raise ValueError(
            f"{cells.origin}: the row is a preference ({', '.join(cells.row.columns)}); set data to PreferenceDataModule"
        )
    raise cells.not_found(", ".join(dict.fromkeys(" + ".join(shape) for shape in shapes)))


def _conversation(cells: Cells) -> InstructionExample:
    name = cells.name("messages")
    value = unpack(cells.take("messages"))
    if value is None and isinstance(value := unpack(cells.values[name]), list | str):
        raise ValueError(f"{cells.origin}: column {name!r} is empty")
    if not isinstance(value, list) and not looks_like_messages(value):
        raise ValueError(
            f"{cells.origin}: column {name!r} holds a {type(value).__name__}, a list of messages was expected"
        )
    conversation = read_messages(value, f"{cells.origin}: {name}")
    note_unread(cells, conversation, name)
    asked = surrounded(cells, conversation.turns, chat=True)
    marked = {id(conversation.turns[number]) for number in conversation.unlearned}
    assert not isinstance(asked.prompt, str)
    unlearned = frozenset(number for number, turn in enumerate(asked.prompt) if id(turn) in marked)
    return InstructionExample([], asked.prompt, cells.origin, cells.row.source, tools=asked.tools, unlearned=unlearned)


def _asked(cells: Cells, shape: tuple[str, ...], chat: bool | None) -> InstructionExample:
    """A prompt and its completion, each text or messages."""
    completion = _completion(cells, shape[1])
    is_instruction = shape[0] == "instruction"
    asked = _prompt(cells, shape[0], is_instruction if chat is None else chat)
    turns: Any = completion
    unlearned: frozenset[int] = frozenset()
    if looks_like_messages(completion) or isinstance(completion, list):
        where = cells.name(shape[1])
        conversation = read_messages(completion, f"{cells.origin}: {where}")
        note_unread(cells, conversation, where)
        turns, unlearned = conversation.turns, conversation.unlearned
    answers = isinstance(turns, str) or (turns and turns[0]["role"] == "assistant")
    if answers and not isinstance(asked.prompt, str) and asked.prompt and asked.prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{cells.origin}: the prompt ends in an assistant turn and {cells.name(shape[1])!r} is another one; move the "
            "beginning of the answer into the completion"
        )
    is_text = isinstance(cells.values[cells.name(shape[0])], str) and isinstance(turns, str)
    if cells.holds("history") and is_text and not isinstance(asked.prompt, str):
        turns = [*asked.prompt, Message(role="assistant", content=turns)]  # answers in a history are learned too
        return InstructionExample([], turns, cells.origin, cells.row.source, tools=asked.tools)
    alpaca = None
    if asked.instruction is not None and isinstance(turns, str):
        original = ALPACA_PROMPT_WITH_INPUT if asked.given else ALPACA_PROMPT
        alpaca = original.format(instruction=asked.instruction, input=asked.given)
    return InstructionExample(
        asked.prompt, turns, cells.origin, cells.row.source, alpaca, tools=asked.tools, unlearned=unlearned
    )


def _prompt(cells: Cells, name: str, chat: bool) -> Asked:
    asked = read_prompt(cells, chat, (name,))
    if asked is not None:
        return asked
    held = cells.values[cells.name(name)]
    if name == "instruction" and isinstance(held, str):
        raise ValueError(f"{cells.origin}: the instruction is empty")
    if not isinstance(held, str | list):
        raise ValueError(
            f"{cells.origin}: column {cells.name(name)!r} holds a {type(held).__name__}, text or a list of messages was "
            "expected"
        )
    cells.used[cells.name(name)], cells.roles[cells.name(name)] = held, name
    return surrounded(cells, held, chat)


def _completion(cells: Cells, name: str) -> Any:
    """Text or messages; of several references the first."""
    if name == "instances":
        return first_instance(cells)
    value, theirs = cells.take(name), cells.name(name)
    if value is None:
        held = cells.values[theirs]
        kind = type(held).__name__
        if isinstance(held, str):
            raise ValueError(f"{cells.origin}: the completion is empty (column {theirs!r})")
        raise ValueError(f"{cells.origin}: column {theirs!r} holds a {kind}, text or a list of messages was expected")
    if looks_like_messages(value):
        return unpack(value)
    several = unpack(value) if not isinstance(value, str) else value
    if isinstance(several, list) and all(isinstance(text, str) for text in several):
        if len(several) > 1:
            cells.reading.note(f"`{theirs}`: the first of several references is learned")
        return several[0]
    if not isinstance(value, str):
        raise ValueError(
            f"{cells.origin}: column {theirs!r} holds a {type(value).__name__}, text or a list of messages was expected"
        )
    return value


def first_instance(cells: Cells) -> str:
    """The output of the first instance; its input becomes the row's."""
    instances = unpack(cells.take("instances")) or []
    first = instances[0] if isinstance(instances, list) and instances else None
    if not isinstance(first, dict) or "output" not in first:
        raise ValueError(
            f"{cells.origin}: column 'instances' must be a list of objects with input and output, at least one"
        )
    if len(instances) > 1:
        cells.reading.note("`instances`: the first of several is learned")
    for name in ("input", "output"):
        if not isinstance(first.get(name) or "", str) or (name == "output" and not isinstance(first[name], str)):
            raise ValueError(
                f"{cells.origin}: {name!r} of the first instance holds a {type(first[name]).__name__}, text was expected"
            )
    if first.get("input"):
        cells.add("input", "instances.input", first["input"])
    return str(first["output"])


def _text(cells: Cells, name: str) -> str:
    held = cells.values[cells.name(name)]
    if not isinstance(held, str):
        raise ValueError(
            f"{cells.origin}: column {cells.name(name)!r} holds a {type(held).__name__}, text was expected"
        )
    return cells.take_text(name) or held


def _check_is_no_message(cells: Cells) -> None:
    """ValueError for a message of a conversation tree, whose text alone is no document."""
    names = set(cells.row.columns)
    if "role" in names or {"replies", "parent_id", "message_id"} & names:
        raise ValueError(
            f"{cells.origin}: the row is one message of a conversation ({', '.join(cells.row.columns)}), no document; set "
            "data.train to OasstTrees, which reads the threads of trees"
        )
