"""The shapes of instruction data: from a raw row to what is read and what is learned."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.formats.conversation import (
    TEXT_OR_MESSAGES,
    Asked,
    add_context,
    looks_like_messages,
    read_messages,
    read_prompt,
    read_reasoning,
    read_turns,
    with_calls,
)
from datamodules.formats.prompt_shapes import as_letter
from datamodules.formats.reading import Cells, Reading, take_references, texts_in, unpack
from datamodules.sources.source import Row
from datamodules.tokens.encoding import Dialogue, LossOn, Message, Tokens, Tools, encode_document, encode_example
from modules.types import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, KNOWLEDGE_CATEGORIES

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
    """A prompt to read and a completion to learn, both text or both messages (then ``prompt`` may be empty)."""

    prompt: Dialogue
    completion: Dialogue
    origin: str
    source: str
    alpaca_prompt: str | None = None  # Alpaca's own prompt for an instruction, used where it is no chat
    whole: bool = False  # plain text: the completion is a document, learned from its start
    tools: Tools | None = None
    knowledge: str | None = None  # whether a model knows the answer, one of KNOWLEDGE_CATEGORIES
    unlearned: frozenset[int] = frozenset()  # numbers of the messages of ``completion`` that are not learned

    @property
    def is_instruction(self) -> bool:
        """Alpaca: a user message wherever the tokenizer has a chat template."""
        return self.alpaca_prompt is not None


def instruction_example(
    row: Row, reading: Reading, format: str | None = None, chat: bool | None = None, known: bool = False
) -> InstructionExample:
    """Read the example of one row, in one of ``FORMATS``, with its context (``datamodules/formats/conversation.py``).

    Args:
        row: as its source gives it.
        reading: of its data set.
        format: name of the format; None = the first whose columns are all there, those mapped by hand before others.
        chat: text prompts become user messages; None = only instructions do.
        known: read the column ``knowledge``.

    Raises:
        ValueError: with the row's origin, when columns are missing, hold the wrong type, or would be left unused though
            they change what is read.
    """
    check_format(format)
    cells = Cells(row, reading)
    shapes = [shape for name, shapes in FORMATS.items() if format in (None, name) for shape in shapes]
    # columns that hold something go before empty ones, because a table gives every row the columns of all others
    shape = cells.find_shape(shapes, cells.holds) or cells.find_shape(shapes, cells.has)
    if shape is None:
        raise cells.not_found(", ".join(dict.fromkeys(" + ".join(shape) for shape in shapes)))
    if shape == ("messages",) and (answers := _find_answer_column(cells)):
        shape = ("messages", answers)
        example = _read_question(cells, "messages", answers, chat)
    elif shape == ("messages",):
        example = _read_conversation(cells)
    elif shape == ("text",):
        example = InstructionExample(
            "", _read_document(cells, format == "text" or "text" in reading.by_hand), row.origin, row.source, whole=True
        )
    else:
        example = _read_question(cells, shape[0], shape[1], chat)
    if known and cells.holds("knowledge"):
        example = replace(example, knowledge=_read_knowledge(cells))
    reading.close(cells, " + ".join(shape), chosen=format is not None)
    return example


def _read_knowledge(cells: Cells) -> str:
    knowledge = cells.take_text("knowledge")
    if knowledge not in KNOWLEDGE_CATEGORIES:
        raise ValueError(
            f"{cells.origin}: column {cells.name('knowledge')!r} holds {knowledge!r}, expected one of "
            f"{', '.join(KNOWLEDGE_CATEGORIES)}"
        )
    return knowledge


def check_format(format: str | None) -> None:
    """Refuse, with a ValueError, a format that does not exist."""
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
    """Encode an example. Raises ValueError with its origin for rows that cannot be learned from.

    Args:
        tokenizer: of the model that learns.
        example: as :func:`instruction_example` reads it with the same ``chat``.
        chat: render text prompts with the chat template. None: instructions alone, if there is a template; else they
            get Alpaca's own prompt.
        system: system message in front of every chat that has none.
        loss_on: what is learned, as in :func:`datamodules.tokens.encoding.encode_example`; documents are always learned
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


def _find_answer_column(cells: Cells) -> str | None:
    """Find our name of the column that answers a conversation with a question at its end; None without one."""
    answers = next((name for name in ("completion", "answer") if cells.holds(name)), None)
    turns = cells.unpack("messages") if answers else None
    if not isinstance(turns, list) or not looks_like_messages(turns):
        return None
    asks = read_messages(turns, f"{cells.origin}: {cells.name('messages')}").turns[-1]["role"] != "assistant"
    return answers if asks else None


def _read_conversation(cells: Cells) -> InstructionExample:
    name = cells.name("messages")
    value = cells.take_unpacked("messages")
    if value is None and isinstance(value := cells.unpack("messages"), list | str):
        raise ValueError(f"{cells.origin}: column {name!r} is empty")
    if not isinstance(value, list) and not looks_like_messages(value):
        raise cells.wrong_type("messages", value, "a list of messages")
    conversation = read_turns(cells, value, name)
    asked = add_context(cells, Asked(conversation.turns, unlearned=conversation.unlearned), chat=True)
    assert not isinstance(asked.prompt, str)
    if asked.ends_in_answer and (reasoning := read_reasoning(cells, asked.prompt[-1])):
        asked.prompt[-1]["reasoning_content"] = reasoning
    return InstructionExample(
        [], asked.prompt, cells.origin, cells.row.source, tools=asked.tools, unlearned=asked.unlearned
    )


def _read_document(cells: Cells, chosen: bool) -> str:
    """Read a text. Unless the user has ``chosen`` this column, a text that leaves out the row's question is refused."""
    names = set(cells.row.columns)
    if "role" in names or {"replies", "parent_id", "message_id"} & names:
        raise ValueError(
            f"{cells.origin}: the row is one message of a conversation ({', '.join(cells.row.columns)}), no document; "
            "set data.train to OasstTrees, which reads the threads of trees"
        )
    text = cells.accept_empty("text")
    asks = next((name for name in ("prompt", "instruction") if cells.holds(name)), None)
    if (
        isinstance(text, str)
        and asks
        and not chosen
        and not all(asked.strip() in text for asked in texts_in(cells.values[cells.name(asks)]))
    ):
        name = cells.name(asks)
        raise ValueError(
            f"{cells.origin}: column {name!r} is not in the text, so it would not be learned; if the text answers it, "
            f"say so with --data.columns '{{completion: {cells.name('text')}}}', or leave it out with --data.columns "
            f"'{{{asks}: "
            '""}\''
        )
    if not isinstance(text, str):
        raise cells.wrong_type("text", text, "text")
    return text


def _read_question(cells: Cells, asks: str, answers: str, chat: bool | None) -> InstructionExample:
    """Read a prompt and its completion, each text or messages, from two of our columns."""
    turns: Any = first_instance(cells) if answers == "instances" else _read_completion(cells, answers)
    asked = add_context(cells, _read_asked(cells, asks), asks == "instruction" if chat is None else chat)
    unlearned: frozenset[int] = frozenset()
    if not isinstance(turns, str):
        conversation = read_turns(cells, turns, cells.name(answers))
        turns, unlearned = conversation.turns, conversation.unlearned
    if asked.ends_in_answer and (isinstance(turns, str) or [turn["role"] for turn in turns[:1]] == ["assistant"]):
        raise ValueError(
            f"{cells.origin}: the prompt ends in an assistant turn and {cells.name(answers)!r} is another one; move "
            "the beginning of the answer into the completion"
        )
    reasoning = read_reasoning(cells, turns)
    beside = "reasoning" if reasoning else "tool_calls" if "tool_calls" in cells.roles.values() else None
    if beside is not None and isinstance(asked.prompt, str):
        if not chat:
            raise ValueError(
                f"{cells.origin}: column {cells.name(beside)!r} cannot be written into a plain text answer; set "
                "data.chat: true (or --data.chat true) to render prompts as chats, or leave it out with --data.columns "
                f"'{{{beside}: \"\"}}'"
            )
        asked = Asked([Message(role="user", content=asked.prompt)], asked.tools)
    if reasoning:
        turns = [Message(role="assistant", content=turns)] if isinstance(turns, str) else turns
        turns[-1]["reasoning_content"] = reasoning
    of_texts = not any(looks_like_messages(cells.values[cells.name(name)]) for name in (asks, answers))
    if cells.holds("history") and of_texts and not isinstance(asked.prompt, str):
        said = [Message(role="assistant", content=turns)] if isinstance(turns, str) else turns
        turns = [*asked.prompt, *said]  # answers in a history are learned too
        return InstructionExample(
            [], turns, cells.origin, cells.row.source, tools=asked.tools, unlearned=asked.unlearned
        )
    alpaca = None
    if asked.instruction is not None and isinstance(turns, str):
        original = ALPACA_PROMPT_WITH_INPUT if asked.given else ALPACA_PROMPT
        alpaca = original.format(instruction=asked.instruction, input=asked.given)
    return InstructionExample(
        asked.prompt, turns, cells.origin, cells.row.source, alpaca, tools=asked.tools, unlearned=unlearned
    )


def _read_asked(cells: Cells, name: str) -> Asked:
    """Read the prompt, which may be empty where it is no instruction."""
    if (asked := read_prompt(cells, (name,))) is not None:
        return asked
    held = cells.accept_empty(name)
    if name == "instruction" and isinstance(held, str):
        raise ValueError(f"{cells.origin}: the instruction is empty")
    if not isinstance(held, str) and held != []:
        raise cells.wrong_type(name, held, TEXT_OR_MESSAGES)
    return Asked(held)


def _read_completion(cells: Cells, name: str) -> Any:
    """Read text or messages; of several references the first."""
    value, held = take_references(cells.take(name), cells.place(name)), cells.values[cells.name(name)]
    value = as_letter(cells, value) if cells.holds("options") else value
    value = with_calls(cells, value, cells.place(name))
    if value is None and isinstance(held, str):
        raise ValueError(f"{cells.origin}: the completion is empty (column {cells.name(name)!r})")
    if isinstance(value, str) or looks_like_messages(value):
        return unpack(value, cells.place(name)) if looks_like_messages(value) else value
    if value and isinstance(value, list) and all(isinstance(text, str) for text in value):
        if len(value) > 1:
            cells.reading.note(f"`{cells.name(name)}`: the first of several references is learned")
        return value[0]
    raise cells.wrong_type(name, held, TEXT_OR_MESSAGES)


def first_instance(cells: Cells) -> str:
    """Read the output of the first instance; its input becomes the row's."""
    instances = cells.take_unpacked("instances") or []
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
                f"{cells.origin}: {name!r} of the first instance holds a {type(first[name]).__name__}, text was "
                "expected"
            )
    if first.get("input"):
        cells.add("input", "instances.input", first["input"])
    return str(first["output"])
