"""Public instruction data from its files: how many rows are read, and what is learned of the first and the last."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from datamodules.formats.instruction_shapes import encode_instruction, instruction_example
from datamodules.formats.reading import Reading
from datamodules.sources import Files, Row
from datamodules.tokens.encoding import Tokens
from modules.networks.tiny import CHAT_TEMPLATE, END_OF_TURN, EOS, tiny_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TOOL_TEMPLATE = (  # ChatML with tools, thoughts and calls
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ "
    "m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Answers = Callable[[dict[str, Any]], list[str]]


def here(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the public files of {name.partition('/')[0]} are not here")
    return DATA / name


def raw(path: Path) -> list[dict[str, Any]]:
    """Read the records without our reader."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


def learned(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> list[str]:
    """Return the supervised parts of a row."""
    parts: list[list[int]] = [[]]
    for token, keep in zip(tokens.ids, tokens.supervised, strict=True):
        if keep:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [str(tokenizer.decode(part)) for part in parts if part]


def encode(tokenizer: PreTrainedTokenizerFast, row: Row, columns: dict[str, str]) -> Tokens:
    return encode_instruction(tokenizer, instruction_example(row, Reading("instruction", columns)))


def gpt(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


FILES: list[tuple[str, int, dict[str, str], Answers]] = [
    ("llama-factory/identity.json", 64, {}, lambda record: [record["output"]]),
    ("llama-factory/v1_sft_demo.jsonl", 140, {}, lambda record: [record["messages"][-1]["content"][0]["value"]]),
    ("fastchat/dummy_conversation.json", 350, {}, gpt),
    ("torchtune/chat_tiny.json", 1, {}, gpt),
    (
        "tata/test.json",
        120,
        {"prompt": "linearized_input", "completion": "table_text"},
        lambda record: record["table_text"][:1],
    ),
    ("torchtune/instruct_tiny.json", 2, {}, lambda record: [record["response"]]),
    (
        "torchtune/stack_exchange_paired_tiny.json",
        18,
        {"prompt": "question", "completion": "response_j"},
        lambda record: [record["response_j"]],
    ),
    ("nc-torchtune-alpaca/alpaca_tiny.json", 70, {}, lambda record: [record["output"]]),
    ("nc-llama-factory-alpaca/alpaca_en_demo.json", 280, {}, lambda record: [record["output"]]),
    ("nc-llama-factory-alpaca/alpaca_zh_demo.json", 280, {}, lambda record: [record["output"]]),
    ("nc-alpaca-farm/outputs_sft.json", 177, {}, lambda record: [record["output"]]),
    ("nc-alpaca-farm/outputs_rlhf.json", 177, {}, lambda record: [record["output"]]),
    ("nc-alpaca-farm/outputs_baseline.json", 177, {}, lambda record: [record["output"]]),
    ("nc-safety-tuned-llamas/training/safety_only_data_Instructions.json", 700, {}, lambda record: [record["output"]]),
    ("self-instruct/seed_tasks.jsonl", 124, {}, lambda record: [record["instances"][0]["output"]]),
    ("self-instruct/user_oriented_instructions.jsonl", 177, {}, lambda record: [record["instances"][0]["output"]]),
    (
        "self-instruct/predictions/text-davinci-003_predictions.jsonl",
        177,
        {"instruction": "instruction", "completion": "response"},
        lambda record: [record["response"]],
    ),
    ("gsm8k/train.jsonl", 7473, {"prompt": "question", "completion": "answer"}, lambda record: [record["answer"]]),
    (
        "gsm8k/test_socratic.jsonl",
        919,
        {"prompt": "question", "completion": "answer"},
        lambda record: [record["answer"]],
    ),
    ("tata/test.json", 120, {"prompt": "linearized_input", "completion": "title"}, lambda record: [record["title"]]),
    ("tata/test.json", 120, {"text": "linearized_input"}, lambda record: [record["linearized_input"]]),
]


@pytest.mark.parametrize(
    ("name", "count", "columns", "answers"), FILES, ids=[f"{name}-{'-'.join(columns)}" for name, _, columns, _ in FILES]
)
def test_rows_of_a_file(name: str, count: int, columns: dict[str, str], answers: Answers) -> None:
    path, tokenizer = here(name), tiny_tokenizer()
    rows, records = Files(str(path)).rows(), raw(path)
    assert len(rows) == len(records) == count
    for index in {*range(min(count, 40)), count - 1}:
        example, expected = instruction_example(rows[index], Reading("instruction", columns)), answers(records[index])
        if not all(answer.strip() for answer in expected):
            with pytest.raises(ValueError, match="is empty"):
                encode_instruction(tokenizer, example)
            continue
        tokens = encode_instruction(tokenizer, example)
        if example.whole:
            assert tokenizer.decode(tokens.ids) == expected[0] + EOS
            assert sum(tokens.supervised) == len(
                expected[0].encode()
            )  # a token per byte: all but the first, and the end
            continue
        is_chat = not isinstance(example.prompt, str) or example.is_instruction
        assert learned(tokenizer, tokens) == [answer + (END_OF_TURN if is_chat else EOS) for answer in expected]
        assert sum(tokens.supervised) == sum(
            len(answer.encode()) + 1 for answer in expected
        )  # a token per byte, one end each


def test_an_alpaca_prompt_does_not_hold_its_answer() -> None:
    path, base = here("nc-torchtune-alpaca/alpaca_tiny.json"), tiny_tokenizer()
    base.chat_template = None
    for row, record in zip(Files(str(path)).rows(), raw(path), strict=True):
        text = str(base.decode(encode(base, row, {}).ids))
        assert text.removesuffix(EOS) == record["text"].replace(
            "### Response:\n", "### Response:"
        )  # the file's own rendering, but for its line break


T0 = [
    ("wiki_qa_Topic_Prediction_Question_Only.jsonl", 6),
    ("commonsense_qa_answer_given_question_without_options.jsonl", 140),
    ("qasc_is_correct_2.jsonl", 140),
    ("glue_mrpc_generate_paraphrase.jsonl", 100),
    ("cnn_dailymail_3_0_0_tldr_summary.jsonl", 28),
    ("wiki_hop_original_generate_subject_and_object.jsonl", 14),
]


@pytest.mark.parametrize(("name", "count"), T0)
@pytest.mark.parametrize("pad_equals_eos", [False, True])
def test_completions_that_write_out_their_end_have_exactly_one(name: str, count: int, pad_equals_eos: bool) -> None:
    path, tokenizer = here(f"self-instruct/t0_train_50k/{name}"), tiny_tokenizer()
    if pad_equals_eos:
        tokenizer.pad_token = tokenizer.eos_token
    rows, records = Files(str(path)).rows(), raw(path)
    assert len(rows) == len(records) == count
    for index in (0, count - 1):
        tokens = encode(tokenizer, rows[index], {})
        assert records[index]["completion"].endswith("<|endoftext|>")
        answer = records[index]["completion"][: -len("<|endoftext|>")]
        assert learned(tokenizer, tokens) == [answer + EOS]
        assert tokens.ids.count(tokenizer.eos_token_id) == 1
        assert len(tokens.ids) == len(records[index]["prompt"].encode()) + len(answer.encode()) + 1


def test_completions_that_are_only_an_end_are_empty() -> None:
    rows = Files(str(here("self-instruct/t0_train_50k/trec_trec1.jsonl"))).rows()
    assert len(rows) == 140
    for row in rows:
        with pytest.raises(ValueError, match="the completion is empty") as raised:
            encode(tiny_tokenizer(), row, {})
        assert str(raised.value).startswith(row.origin)
    with pytest.raises(ValueError, match="holds no rows"):
        Files(str(here("self-instruct/t0_train_50k/trec_fine_grained_ABBR.jsonl"))).rows()


def tool_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def test_tool_calls_of_sharegpt() -> None:
    path, tokenizer = here("llama-factory/glaive_toolcall_en_demo.json"), tool_tokenizer()
    rows, records = Files(str(path)).rows(), raw(path)
    assert len(rows) == len(records) == 56
    assert (
        sum(instruction_example(row, Reading("instruction")).tools is None for row in rows)
        == sum(json.loads(record["tools"]) == [] for record in records)
        == 23
    )
    for row, record in zip(rows, records, strict=True):
        tokens = encode(tokenizer, row, {})
        turns = [turn for turn in record["conversations"] if turn["from"] in ("gpt", "function_call")]
        stretches = learned(tokenizer, tokens)
        assert len(stretches) == len(turns)
        for stretch, turn in zip(stretches, turns, strict=True):
            assert stretch.endswith(END_OF_TURN)
            body = stretch.removesuffix(END_OF_TURN)
            if turn["from"] == "gpt":
                assert body == turn["value"]
            else:
                assert json.loads(body.removeprefix("<tool_call>").removesuffix("</tool_call>")) == json.loads(
                    turn["value"]
                )
    plain = tiny_tokenizer()
    plain.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match="the row has tools and the chat template does not write them"):
        encode(plain, next(row for row in rows if row.columns["tools"] != "[]"), {})


def test_reasoning_with_tools_in_typed_parts() -> None:
    path, tokenizer = here("llama-factory/reason_tool_use_demo_50.jsonl"), tool_tokenizer()
    rows, records = Files(str(path)).rows(), raw(path)
    assert len(rows) == len(records) == 35
    for row, record in zip(rows, records, strict=True):
        stretches = learned(tokenizer, encode(tokenizer, row, {}))
        turns = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        assert len(stretches) == len(turns)
        for stretch, parts in zip(stretches, turns, strict=True):
            of = {
                kind: [part["value"] for part in parts if part["type"] == kind]
                for kind in ("reasoning", "text", "tool_call")
            }
            assert stretch.startswith("<think>" + "".join(of["reasoning"]) + "</think>" + "".join(of["text"]))
            assert stretch.count("<tool_call>") >= len(of["tool_call"]) and stretch.endswith(END_OF_TURN)
            for call in of["tool_call"]:
                assert json.dumps(json.loads(call)["name"]) in stretch
    with pytest.raises(ValueError, match="the row has tools|changes its reasoning"):
        encode(tiny_tokenizer(), rows[0], {})


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        (
            "nc-alpaca-farm/outputs_pairs.json",
            {},
            "found the columns instruction, input, output_1, output_2; looked for",
        ),
        (
            "llama-factory/dpo_en_demo.json",
            {},
            "column 'chosen' .* InstructionDataModule does not read it; set data to PreferenceDataModule",
        ),
        (
            "oasst/en_100_tree.jsonl",
            {},
            "found the columns message_tree_id, tree_state, prompt; looked for messages, prompt",
        ),
        ("xstest/xstest_prompts.csv", {}, "found the columns id, prompt, type, label, focus, note; looked for"),
    ],
)
def test_what_is_no_instruction_data_is_refused_by_name(name: str, columns: dict[str, str], message: str) -> None:
    row = Files(str(here(name))).rows()[0]
    with pytest.raises(ValueError, match=message) as raised:
        encode(tiny_tokenizer(), row, columns)
    assert str(raised.value).startswith(row.origin) and "\n" not in str(raised.value)
