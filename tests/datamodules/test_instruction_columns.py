"""Which formats of instruction data are found, how their rows are read, and which rows are refused."""

import json
import re
from typing import Any

import pytest

from datamodules.formats.instruction_shapes import FORMATS, encode_instruction, instruction_example
from datamodules.formats.reading import Reading
from datamodules.formats.table import check_mapping
from datamodules.sources import Row
from datamodules.tokens.encoding import LossOn, Tokens
from modules.networks.tiny import BOS, CHAT_TEMPLATE, END_OF_TURN, EOS, tiny_tokenizer
from modules.types import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT

USER, ASSISTANT, SYSTEM = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "system", "content": "be"},
)
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
ADD = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": ADD}
TOOL = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": TOOL}]
ALPACA = {"instruction": "x", "input": "", "output": "y"}


def row(**columns: Any) -> Row:
    return Row(columns, "data.jsonl:3", "data")


def learned(tokens: Tokens) -> str:
    return str(
        tiny_tokenizer().decode([token for token, keep in zip(tokens.ids, tokens.supervised, strict=True) if keep])
    )


def encoded(
    columns: dict[str, Any], chat: bool | None = None, system: str | None = None, loss_on: LossOn = "assistant"
) -> Tokens:
    return encode_instruction(
        tiny_tokenizer(), instruction_example(row(**columns), Reading("instruction")), chat, system, loss_on
    )


@pytest.mark.parametrize(
    ("columns", "mapping", "prompt", "completion"),
    [
        ({"messages": [USER, ASSISTANT], "prompt": "x", "completion": "y"}, {}, [], [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "q": "x", "a": "y"}, {"prompt": "q", "completion": "a"}, "x", "y"),
        ({"prompt": "x", "completion": "y", "id": 3}, {}, "x", "y"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {}, [USER], [ASSISTANT]),
        ({"prompt": [HUMAN], "completion": "y"}, {}, [USER], "y"),
        ({"question": "x", "completion": "y"}, {}, "x", "y"),
        ({"question": "x", "answer": "y"}, {"completion": "answer"}, "x", "y"),
        ({"instruction": "x", "input": "", "output": "y"}, {}, "x", "y"),
        ({"instruction": "x", "input": "more", "output": "y"}, {}, "x\n\nmore", "y"),
        ({"instruction": "x", "response": "y"}, {}, "x", "y"),
        ({"instruction": "x", "input": None, "output": "y"}, {}, "x", "y"),
        ({"instruction": "x", "output": "y", "text": "x y"}, {}, "x", "y"),  # the text holds the answer
        ({"instruction": "x", "output": "y", "system": "", "history": []}, {}, "x", "y"),
        ({"instruction": "x", "instances": [{"input": "", "output": "y"}, {"input": "", "output": "z"}]}, {}, "x", "y"),
        ({"instruction": "x", "instances": [{"input": "more", "output": "y"}]}, {}, "x\n\nmore", "y"),
        ({"text": "x"}, {}, "", "x"),
        ({"article": "x", "prompt": "a", "completion": "b"}, {"text": "article"}, "", "x"),
        ({"conversations": [HUMAN, GPT]}, {}, [], [USER, ASSISTANT]),
        ({"conversations": [HUMAN, GPT], "system": "be"}, {}, [], [SYSTEM, USER, ASSISTANT]),
        ({"conversations": [SYSTEM, USER, ASSISTANT], "system": "be"}, {}, [], [SYSTEM, USER, ASSISTANT]),
        ({"instruction": "x", "output": ["y", "z"]}, {}, "x", "y"),
        ({"problem": "x", "solution": "y"}, {}, "x", "y"),
        ({"inputs": "x", "targets": "y"}, {}, "x", "y"),
        ({"input": "x", "target": "y"}, {}, "x", "y"),
        ({"Query": "x", "Response": "y"}, {}, "x", "y"),
        ({"prompt": "x", "completion": "y", "answer": "z"}, {}, "x", "y"),
        ({"chat": {"turns": [HUMAN, GPT]}}, {"conversations": "chat.turns"}, [], [USER, ASSISTANT]),
    ],
)
def test_formats_are_found_by_their_columns(
    columns: dict[str, Any], mapping: dict[str, str], prompt: object, completion: object
) -> None:
    example = instruction_example(row(**columns), Reading("instruction", mapping))
    assert (example.prompt, example.completion, example.origin, example.source) == (
        prompt,
        completion,
        "data.jsonl:3",
        "data",
    )
    assert example.is_instruction == ("instruction" in columns)
    assert example.whole == ("text" in mapping or "text" in columns and "instruction" not in columns)
    assert example.tools is None and not example.unlearned


def test_an_instruction_that_the_prompt_holds_is_named_as_not_read() -> None:
    reading = Reading("instruction")
    columns = {"instruction": "Add 1.", "prompt": "Below is a task.\nAdd 1.\nResponse:", "output": "2"}
    assert instruction_example(row(**columns), reading).prompt == columns["prompt"]
    assert "`instruction`: not read" in reading.columns_line()


def test_a_format_by_name() -> None:
    columns = {"messages": [USER, ASSISTANT], "prompt": "x", "completion": "y", "text": "z", **ALPACA}
    found = {
        name: instruction_example(row(**columns), Reading("instruction"), name).completion
        for name in ("messages", "prompt_completion", "alpaca", "text")
    }
    assert found == {"messages": [USER, ASSISTANT], "prompt_completion": "y", "alpaca": "y", "text": "z"}
    names = "messages, sharegpt, prompt_completion, alpaca, self_instruct, input_output, text"
    with pytest.raises(
        ValueError, match=f"format 'alpacca' is not known; set data.format to one of {names}, or leave it out"
    ):
        instruction_example(row(**columns), Reading("instruction"), "alpacca")
    with pytest.raises(
        ValueError,
        match="data.jsonl:3: found the columns text; looked for instruction \\+ completion, instruction \\+ answer; map",
    ):
        instruction_example(row(text="x"), Reading("instruction"), "alpaca")
    assert list(FORMATS) == names.split(", ")


def test_every_column_that_is_read_can_be_mapped() -> None:
    check_mapping(
        dict.fromkeys(("system", "history", "tools", "input", "instances", "conversations", "response", "text"), "x"),
        "instruction",
    )
    with pytest.raises(
        ValueError, match=r"columns maps unknown names sistem \(did you mean system\?\); the names on the"
    ):
        check_mapping({"sistem": "x"}, "instruction")
    with pytest.raises(
        ValueError, match="columns maps margin .*, which InstructionDataModule does not read; Preference"
    ):
        check_mapping({"margin": "x"}, "instruction")
    with pytest.raises(ValueError, match="columns maps completion twice, as 'a' and 'b'; keep one of them"):
        check_mapping({"response": "a", "completion": "b"}, "instruction")


def test_alpaca_with_system_and_history_is_a_conversation() -> None:
    columns = {"instruction": "c", "input": "d", "output": "e", "system": "be", "history": [["a", "b"]]}
    example = instruction_example(row(**columns), Reading("instruction"))
    contents = [("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd"), ("assistant", "e")]
    assert example.completion == [{"role": role, "content": content} for role, content in contents]
    assert learned(encoded(columns)) == f"b{END_OF_TURN}e{END_OF_TURN}"
    assert learned(encoded(columns, loss_on="last")) == f"e{END_OF_TURN}"


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": json.dumps(ADD)},
        {"from": "function_call", "value": json.dumps([ADD])},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(ADD)}]},
    ],
)
def test_tool_calls_in_all_spellings(turn: dict[str, Any]) -> None:
    result = (
        {"from": "observation", "value": "2"}
        if "from" in turn
        else {"role": "tool", "content": [{"type": "text", "text": "2"}]}
    )
    for given in (TOOLS, [TOOL], json.dumps(TOOLS), json.dumps([TOOL])):
        example = instruction_example(
            row(conversations=[USER, turn, result, ASSISTANT], tools=given), Reading("instruction")
        )
        called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert example.completion == [USER, called, {"role": "tool", "content": "2"}, ASSISTANT]
        assert example.tools == TOOLS
    for nothing in (None, "", "[]", [], float("nan")):
        assert instruction_example(row(messages=[USER, ASSISTANT], tools=nothing), Reading("instruction")).tools is None


def test_typed_parts_and_weights() -> None:
    reasoned = {
        "role": "assistant",
        "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}, {"type": "text", "text": "b"}],
    }
    weighted: list[Any] = [
        {**USER, "loss_weight": 0.0},
        {**reasoned, "loss_weight": 0},
        USER,
        {**ASSISTANT, "loss_weight": 1.0},
    ]
    example = instruction_example(row(messages=weighted), Reading("instruction"))
    assert example.completion == [
        USER,
        {"role": "assistant", "content": "ab", "reasoning_content": "r"},
        USER,
        ASSISTANT,
    ]
    assert example.unlearned == {0, 1}
    with pytest.raises(ValueError, match="assistant message 1: the chat template changes its reasoning"):
        encoded({"messages": weighted})  # not learned, but read
    weighted[1] = {**ASSISTANT, "loss_weight": 0}
    assert learned(encoded({"messages": weighted})) == f"hello{END_OF_TURN}"
    completion = [{**ASSISTANT, "loss_weight": 0}, USER, {**ASSISTANT, "content": "bye"}]
    assert learned(encoded({"prompt": [USER], "completion": completion})) == f"bye{END_OF_TURN}"


def test_instructions_are_chats_or_alpacas_own_prompt() -> None:
    base, tokenizer = tiny_tokenizer(), tiny_tokenizer()
    base.chat_template = None
    plain, given = ({"instruction": "add {x}", "input": more, "output": "3"} for more in ("", "1 2"))
    prompts = (
        ALPACA_PROMPT.format(instruction="add {x}"),
        ALPACA_PROMPT_WITH_INPUT.format(instruction="add {x}", input="1 2"),
    )
    for columns, prompt in zip((plain, given), prompts, strict=True):
        example = instruction_example(row(**columns), Reading("instruction"))
        without = encode_instruction(base, example)
        assert base.decode(without.ids) == f"{prompt}3{EOS}" and prompt.endswith("### Response:")
        assert learned(without) == f"3{EOS}"
        assert encode_instruction(tokenizer, example, chat=False) == without
        chat = encode_instruction(tokenizer, example)
        assert "Below is" not in tokenizer.decode(chat.ids) and learned(chat) == f"3{END_OF_TURN}"
        assert encode_instruction(tokenizer, example, chat=True) == chat
    request = "Write a response that appropriately completes the request."
    assert (
        prompts[0]
        == f"Below is an instruction that describes a task. {request}\n\n### Instruction:\nadd {{x}}\n\n### Response:"
    )
    further = "Below is an instruction that describes a task, paired with an input that provides further context."
    assert prompts[1] == f"{further} {request}\n\n### Instruction:\nadd {{x}}\n\n### Input:\n1 2\n\n### Response:"


def test_text_stays_text_unless_chat_is_asked_for() -> None:
    columns = {"prompt": "x", "completion": "y"}
    assert tiny_tokenizer().decode(encoded(columns).ids) == f"xy{EOS}"
    assert encoded(columns, chat=True) == encoded(
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    )


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_documents_are_learned_whole(loss_on: LossOn) -> None:
    tokens = encoded({"text": "abc"}, system="be", loss_on=loss_on)
    assert learned(tokens) == f"bc{EOS}" and len(tokens.ids) == 4


WRONG = [(True, "bool"), (None, "NoneType"), ({}, "dict")]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"instruction": "x", "output": value}, f"column 'output' holds a {kind}, text or a list of messages was")
        for value, kind in WRONG
    ),
    *(
        ({"instruction": value, "output": "y"}, f"column 'instruction' holds a {kind}, text or a list of messages was")
        for value, kind in WRONG
    ),
    *(
        (
            {"prompt": "x", "completion": value},
            f"column 'completion' holds a {kind}, text or a list of messages was expected",
        )
        for value, kind in WRONG
    ),
    *(
        ({"prompt": value, "completion": "y"}, "column 'prompt' holds a list, text or a list of messages was expected")
        for value in ([[]], [{}, ""])
    ),
    *(({"text": value}, f"column 'text' holds a {kind}, text was expected") for value, kind in WRONG),
    *(
        ({"messages": value}, f"column 'messages' holds a {kind}, a list of messages was expected")
        for value, kind in WRONG
    ),
    ({**ALPACA, "input": True}, "column 'input' holds a bool, text was expected"),
    ({**ALPACA, "system": True}, "column 'system' holds a bool, text was expected"),
    ({**ALPACA, "history": [["a"]]}, "column 'history' must be a list of pairs"),
    ({**ALPACA, "history": "a"}, "column 'history' must be a list of pairs"),
    ({**ALPACA, "output": ["a", 5]}, "column 'output' holds a list, text or a list of messages was expected"),
    ({**ALPACA, "instruction": " "}, "the instruction is empty"),
    ({**ALPACA, "output": " "}, "the completion is empty (column 'output')"),
    ({**ALPACA, "output": "<|endoftext|>"}, "assistant message 1 is empty"),
    ({"prompt": "x", "completion": "<|endoftext|>"}, "the completion is empty"),
    ({"prompt": "x", "completion": [ASSISTANT]}, "the prompt is text and the completion a list of messages"),
    (
        {"instruction": "x", "instances": []},
        "column 'instances' must be a list of objects with input and output, at least one",
    ),
    ({"instruction": "x", "instances": [{"input": "a"}]}, "column 'instances' must be a list of objects"),
    (
        {"instruction": "x", "instances": [{"input": "", "output": False}]},
        "'output' of the first instance holds a bool, text was expected",
    ),
    ({"messages": []}, "column 'messages' is empty"),
    ({"messages": [USER]}, "no supervised token"),
    ({"messages": [{**USER, "loss_weight": 0}, {**ASSISTANT, "loss_weight": 0}]}, "no supervised token"),
    ({"messages": [ASSISTANT]}, "the conversation starts with an assistant turn"),
    ({"messages": [SYSTEM, ASSISTANT]}, "the conversation starts with an assistant turn"),
    ({"messages": [{**USER, "content": ""}, ASSISTANT]}, "user message 0 is empty"),
    ({"messages": [USER, {**ASSISTANT, "content": []}]}, "assistant message 1 is empty"),
    ({"messages": [USER, {**ASSISTANT, "content": 4}]}, "messages, message 1, must have a role and a content"),
    (
        {"messages": [USER, {"role": "bot", "content": "x"}]},
        "messages, message 1, has the role 'bot'; known are user, human, prompter, assistant",
    ),
    (
        {"conversations": [HUMAN, {"from": "bot", "value": "x"}]},
        "conversations, message 1, has the role 'bot'; known are user, human, prompter, assistant, gpt",
    ),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "add(1)"}]},
        "conversations, message 1, holds text where JSON was expected",
    ),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
        "conversations, message 1, has a tool call without a name and arguments",
    ),
    (
        {"messages": [USER, {**ASSISTANT, "tool_calls": 3}]},
        "messages, message 1, has a tool call without a name and arguments: '3'",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
        "messages, message 1, has a content part that is not text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}, ASSISTANT]},
        "messages, message 0, has a content part that is not text",
    ),
    (
        {"instruction": "be good", "question": "q", "response": "r"},
        "column 'instruction' (the same in Alpaca's form: a",
    ),
    (
        {"prompt": "x", "completion": "A", "options": {"text": ["a", "b"], "label": ["A"]}},
        "column 'options' must hold a list of texts or an object of letters and texts",
    ),
    (
        {"prompt": "x", "completion": "A", "options": {"text": ["a"], "label": [["A"]]}},
        "column 'options' must hold a list of texts",
    ),
    ({"messages": [USER, {**ASSISTANT, "loss_weight": 0.5}]}, "messages, message 1, has loss_weight 0.5; known are 0"),
    (
        {"messages": [{**USER, "loss_weight": 1}, ASSISTANT]},
        "messages, message 0, has loss_weight 1 and is the user's; only assistant turns",
    ),
    ({"messages": [USER, ASSISTANT], "tools": "add"}, "column 'tools' holds text where JSON was expected"),
    ({"messages": [USER, ASSISTANT], "tools": '{"a": 1}'}, "column 'tools' must hold a list of tools"),
    ({"messages": [USER, ASSISTANT], "tools": 3}, "column 'tools' must hold a list of tools"),
    (
        {"name": "x"},
        "found the columns name; looked for messages, prompt + completion, prompt + answer, instruction + completion",
    ),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED)
def test_rows_that_cannot_be_read_are_refused_in_one_sentence(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        encoded(columns)
    assert str(raised.value).startswith("data.jsonl:3: ") and "\n" not in str(raised.value)


def test_a_chat_template_with_its_own_bos_gets_no_second() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    tokens = encode_instruction(tokenizer, instruction_example(row(**ALPACA), Reading("instruction")))
    assert tokens.ids.count(tokenizer.convert_tokens_to_ids(BOS)) == 1


@pytest.mark.parametrize("extra", [{"label": False}, {"chosen": "a", "rejected": "b"}], ids=["labelled", "compared"])
def test_a_preference_is_not_taken_for_an_example(extra):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away"}]
    with pytest.raises(
        ValueError, match=r"x#0: column .* is not empty, and InstructionDataModule .*; set data to PreferenceDataModule"
    ):
        instruction_example(Row({"messages": turns, **extra}, "x#0", "x"), Reading("instruction"))
