"""Nothing that a row holds is ignored.

Each DataModule reads each column of context, as text and as messages, from each kind of file. Columns and fields that
were once dropped are among them.
"""

import csv
import json
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from datamodules import (
    CandidatesDataModule,
    FactsDataModule,
    Files,
    InstructionDataModule,
    MixtureDataModule,
    PreferenceDataModule,
    PreferencePrompts,
    PretrainingDataModule,
    SeedTasksDataModule,
    Stream,
    StreamingDataModule,
    VerifiableDataModule,
)
from datamodules.formats.table import COLUMNS, OURS
from datamodules.loaders.stream_loader import Pieces, Place
from datamodules.sources import Row
from datamodules.sources.held_out import hold_out
from modules.networks.tiny import tiny_tokenizer

TEMPLATE = (  # ChatML with tools, thoughts, calls and names
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n"
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(autouse=True)
def streams_close_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avoid a wait: ``datasets`` takes five seconds when a stream of a table is left before its end."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@cache
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow"]


def write(folder: Path, kind: str, *rows: dict[str, Any]) -> str:
    """Write the rows as a file of a kind. In CSV and TSV, lists and objects are JSON, and a missing value is empty."""
    path = folder / f"rows.{kind}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        texts = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
        cells = [names, *(["" if row.get(name) is None else str(row[name]) for name in names] for row in texts)]
        with path.open("w", newline="") as file:
            if kind == "csv":
                csv.writer(file).writerows(cells)
            else:  # which knows no quotes
                file.writelines("\t".join(row) + "\n" for row in cells)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([dict.fromkeys(names) | row for row in rows])
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
    return str(path)


def sft(path: str, **options: Any) -> list[str]:
    data = InstructionDataModule(tokenizer(), path, **options)
    data.setup("fit")
    return [str(data.tokenizer.decode(row.ids)) for row in data.train_rows]


def streamed(path: str, **options: Any) -> list[str]:
    data = StreamingDataModule(tokenizer(), path, steps_per_epoch=1, shuffle_buffer=1, **options)
    data.setup("fit")
    rows = len(Files(path).rows())
    return [
        str(data.tokenizer.decode(piece.ids)) for piece, _ in islice(Pieces(data, 0, 1).pieces(Place(), 0, 1), rows)
    ]


def mixed(path: str, **options: Any) -> list[str]:
    data = MixtureDataModule(tokenizer(), {"one": Stream(path)}, num_steps=1, packing=False, **options)
    data.setup("fit")
    return [str(data.tokenizer.decode(row.ids)) for row in data.train_rows]


def dpo(path: str, **options: Any) -> list[str]:
    data = PreferenceDataModule(tokenizer(), path, **options)
    data.setup("fit")
    return [str(data.tokenizer.decode(row.prompt + row.completions[0])) for row in data.train_rows]


def grpo(path: str, **options: Any) -> list[str]:
    data = VerifiableDataModule(tokenizer(), path, **options)
    data.setup("fit")
    return [prompt.text for prompt in data.train_prompts]


def judged(path: str, chat: bool = True) -> list[str]:
    data = CandidatesDataModule(path)
    data.setup("predict")
    for row in data.rows:
        assert row.columns["completions"] == row.completions and row.columns.get("tools", TOOLS) == TOOLS
    return [str(row.columns.get("tools", "")).replace("'", '"') + row.prompt for row in data.rows]


def prompts(path: str, chat: bool = True, **options: Any) -> list[str]:
    data = VerifiableDataModule(tokenizer(), PreferencePrompts(path, chat=chat, **options), chat=chat)
    data.setup("fit")
    return [prompt.text for prompt in data.train_prompts]


READ: dict[str, tuple[Callable[..., list[str]], dict[str, Any], dict[str, Any]]] = {  # text rows, rows of messages
    "instruction": (sft, {"prompt": "ask", "completion": "say"}, {"messages": [ASK, SAY]}),
    "split instruction": (sft, {"question": "ask", "answer": "say"}, {"prompt": [ASK], "completion": [SAY]}),
    "alpaca": (sft, {"instruction": "ask", "output": "say"}, {"conversations": [ASK, SAY]}),
    "mixture": (mixed, {"prompt": "ask", "completion": "say"}, {"messages": [ASK, SAY]}),
    "streaming": (streamed, {"prompt": "ask", "completion": "say"}, {"messages": [ASK, SAY]}),
    "pairs": (dpo, {"prompt": "ask", "chosen": "say", "rejected": "no"}, {"prompt": [ASK], "chosen": [SAY], "rejected": [ASK | {"role": "assistant"}]}),
    "implicit pairs": (dpo, {"question": "ask", "response_j": "say", "response_k": "no"}, {"chosen": [ASK, SAY], "rejected": [ASK, SAY | {"content": "no"}]}),
    "labels": (dpo, {"prompt": "ask", "completion": "say", "label": True}, {"messages": [ASK, SAY], "label": True}),
    "verdicts": (dpo, {"input": "ask", "output_1": "say", "output_2": "no", "label": 1}, {"prompt": [ASK], "output_1": "say", "output_2": "no", "label": 1}),
    "verifiable": (grpo, {"prompt": "ask", "answer": "say"}, {"prompt": [ASK], "answer": "say"}),
    "judge": (judged, {"prompt": "ask", "chosen": "say", "rejected": "no"}, {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY | {"content": "no"}]}),
    "preference prompts": (prompts, {"prompt": "ask", "chosen": "say", "rejected": "no"}, {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY | {"content": "no"}]}),
}  # fmt: skip
CONTEXT: dict[str, tuple[Any, str]] = {  # column -> value, what must be in the rendered text
    "system": ("be kind", "be kind"),
    "system_prompt": ("be kind", "be kind"),
    "System": ("be kind", "be kind"),
    "systemPrompt": ("be kind", "be kind"),
    "history": ([["before", "after"]], "after"),
    "chat_history": ([{"role": "user", "content": "before"}, {"role": "assistant", "content": "after"}], "after"),
    "tools": (TOOLS, '"look"'),
    "functions": ([TOOLS[0]["function"]], '"look"'),
}
BESIDE: dict[str, tuple[Any, str]] = {
    "context": ("a", "ask\n\na"),  # one letter, which stands in the prompt by chance
    "input": ("the text", "ask\n\nthe text"),
    "passage": ("the text", "ask\n\nthe text"),
    "documents": (
        [{"title": "Head", "text": "body"}, {"title": "Foot", "text": "toe"}],
        "ask\n\nHead\nbody\n\nFoot\ntoe",
    ),
    "contexts": (["one", "two"], "ask\n\none\n\ntwo"),
    "options": (["red", "blue"], "ask\n\nA) red\nB) blue"),
    "choices": ({"text": ["red", "blue"], "label": ["1", "2"]}, "ask\n\n1) red\n2) blue"),
}
REFUSED = {"images": ["cat.png"], "weight": 0.5, "chat_template_kwargs": {"enable_thinking": False}, "video": "a.mp4"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_context_is_rendered_by_everyone(tmp_path: Path, name: str, kind: str) -> None:
    """Each row has one column of context, so in tables every other row has that column empty."""
    read, text, messages = READ[name]
    for shape, columns in ((text, CONTEXT | BESIDE), (messages, CONTEXT)):
        columns = {column: given for column, given in columns.items() if column not in shape}
        rows = [
            {**shape, "number": number, column: value} for number, (column, (value, _)) in enumerate(columns.items())
        ]
        found = read(write(tmp_path, kind, *rows), chat=True)
        if read is prompts:  # equal ones once
            assert all(any(expected in rendered for rendered in found) for _, expected in columns.values())
            continue
        assert len(found) == len(columns)
        for rendered, (column, (_, expected)) in zip(found, columns.items(), strict=True):
            assert expected in rendered, (column, shape)
            assert rendered.count("ask") == 1, "the prompt is there once"
    for column, (value, _) in BESIDE.items():
        if kind == "jsonl" and column not in messages:
            with pytest.raises(ValueError, match=f"{column!r} stands beside messages, which have no place for it"):
                read(write(tmp_path, kind, {**messages, column: value}), chat=True)


@pytest.mark.parametrize("name", READ)
def test_what_cannot_be_rendered_is_refused_by_name(tmp_path: Path, name: str) -> None:
    read, *shapes = READ[name]
    for shape in shapes:
        for column, value in REFUSED.items():
            with pytest.raises(
                ValueError, match=f"column '{column}' .* is not empty.* leave it out with --data.columns"
            ):
                read(write(tmp_path, "jsonl", {**shape, column: value}), chat=True)
        empty = dict.fromkeys([*CONTEXT, *BESIDE, *REFUSED]) | {
            "weight": 1,
            "tools": "[]",
            "context": " ",
            "history": [],
        }
        read(
            write(tmp_path, "jsonl", {name: value for name, value in empty.items() if name not in shape} | shape),
            chat=True,
        )
    if read in (sft, dpo, grpo, mixed) and name not in ("alpaca", "verdicts"):
        for column in ("system", "history", "tools"):
            path = write(tmp_path, "jsonl", {**shapes[0], column: CONTEXT[column][0]})
            with pytest.raises(
                ValueError, match=f"column '{column}' cannot be written into a plain text prompt; set data.chat"
            ):
                read(path, chat=False)
            assert read(path, chat=False, columns={column: ""}) if read is not mixed else True  # the way out


def test_a_rows_own_system_message_wins(tmp_path: Path) -> None:
    for read, shape in ((sft, READ["instruction"][1]), (dpo, READ["pairs"][1]), (grpo, READ["verifiable"][1])):
        texts = read(write(tmp_path, "jsonl", {**shape, "system": "mine"}, shape), chat=True, system="yours")
        assert ["mine" in text for text in texts] == [True, False] and ["yours" in text for text in texts] == [
            False,
            True,
        ]
        (mapped,) = read(write(tmp_path, "jsonl", {**shape, "s": "mine"}), chat=True, columns={"system": "s"})
        assert "system\nmine" in mapped
    both = {"messages": [{"role": "system", "content": "other"}, ASK, SAY], "system": "mine"}
    with pytest.raises(ValueError, match="column 'system' and the system message of the row's own messages differ"):
        sft(write(tmp_path, "jsonl", both))
    (empty,) = sft(write(tmp_path, "jsonl", {"messages": [{"role": "system", "content": ""}, ASK, SAY]}))
    assert empty.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_plain_text_data_refuse_a_context(tmp_path: Path) -> None:
    for make, row in (
        (PretrainingDataModule, {"text": "a document", "system": "s"}),
        (PretrainingDataModule, {"text": "a document", "label": 3}),
        (FactsDataModule, {"question": "q", "answer": "a", "tools": TOOLS}),
        (SeedTasksDataModule, {"instruction": "q", "output": "a", "context": "c"}),
    ):
        path = write(tmp_path, "jsonl", row)
        data: Any = SeedTasksDataModule(path) if make is SeedTasksDataModule else make(tokenizer(), path)
        with pytest.raises(ValueError, match=f"column '{[*row][-1]}'"):
            data.setup("predict" if make is not PretrainingDataModule else "fit")


def test_a_message_of_a_tree_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one message of a conversation .*set data.train to OasstTrees"):
        sft(write(tmp_path, "jsonl", {"text": "What?", "role": "prompter", "replies": []}))
    with pytest.raises(ValueError, match="one of a conversation tree; set data.train to OasstTrees"):
        sft(write(tmp_path, "jsonl", {"messages": [ASK, {**SAY, "replies": []}]}))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_messages(tmp_path: Path, kind: str) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "find", "arguments": {"b": "x", "c": [1]}}}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    found = {"role": "assistant", "content": None, "tool_calls": [other], "reasoning_content": None}
    rows = [
        {"messages": [ASK, called], "tools": TOOLS},
        {"messages": [ASK, found], "tools": [{"name": "find", "strict": True}]},
    ]
    first, second = sft(write(tmp_path, kind, *rows))
    assert first.endswith('<think>hm</think><tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call><|im_end|>\n')
    assert second.endswith('\n<tool_call>{"name": "find", "arguments": {"b": "x", "c": [1]}}</tool_call><|im_end|>\n')
    assert json.loads(first.split("\n")[1].removesuffix("<|im_end|>")) == TOOLS
    assert '[{"type": "function", "function": {"name": "find", "strict": true}}]' in second
    pairs = [
        {"prompt": [ASK], "chosen": [called], "rejected": [SAY]},
        {"prompt": [ASK], "chosen": [found], "rejected": [SAY]},
    ]
    assert [text.partition("assistant\n")[2] for text in dpo(write(tmp_path, kind, *pairs))] == [
        text.partition("assistant\n")[2].removesuffix("\n") for text in (first, second)
    ]


CALLS = [{"name": "look", "arguments": {"a": 1}}]
WRITTEN = '<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call><|im_end|>'


@pytest.mark.parametrize("kind", KINDS)
def test_calls_beside_an_answer_and_in_its_place(tmp_path: Path, kind: str) -> None:
    called = {"type": "function", "function": CALLS[0]}
    rows: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "ask", "completion": "say", "tools": TOOLS, "tool_calls": [called]}, f"assistant\nsay{WRITTEN}\n"),
        ({"instruction": "ask", "output": "say", "function_call": CALLS[0]}, f"assistant\nsay{WRITTEN}\n"),
        ({"prompt": "ask", "completion": None, "tools": TOOLS, "tool_calls": CALLS}, f"assistant\n{WRITTEN}\n"),
        ({"query": "ask", "tools": json.dumps(TOOLS), "answers": json.dumps(CALLS)}, f"assistant\n{WRITTEN}\n"),
        ({"query": "ask", "tools": TOOLS, "answers": json.dumps(CALLS[0])}, f"assistant\n{WRITTEN}\n"),
        ({"prompt": "ask", "completion": "say", "tool_calls": "[]"}, "assistant\nsay<|im_end|>\n"),
        ({"prompt": "ask", "completion": json.dumps(CALLS)}, f"assistant\n{json.dumps(CALLS)}<|im_end|>\n"),  # no tools
    ]
    for row, written in rows:
        assert sft(write(tmp_path, kind, row), chat=True)[0].endswith(written)
    pair = {"prompt": "ask", "tools": TOOLS, "chosen": json.dumps(CALLS), "rejected": "no"}
    assert dpo(write(tmp_path, kind, pair), chat=True)[0].endswith(f"assistant\n{WRITTEN}")
    assert len(grpo(write(tmp_path, kind, {"prompt": "ask", "tool_calls": CALLS}))) == 1  # which rewards may read


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (sft, {"messages": [ASK, SAY]}, "column 'tool_calls' .* a row that is read as messages has no use for it"),
        (sft, {"prompt": [ASK], "completion": [SAY]}, "column 'tool_calls' .* has no use for it"),
        (
            dpo,
            {"prompt": "ask", "chosen": "say", "rejected": "no"},
            "'tool_calls' .* PreferenceDataModule does not read",
        ),
        (sft, {"query": "ask", "answers": "[]"}, "column 'answers' is an empty list beside tools"),
    ],
)
def test_calls_without_a_place_are_refused(
    tmp_path: Path, read: Callable[..., list[str]], row: dict[str, Any], message: str
) -> None:
    given = {"tools": TOOLS, "tool_calls": [{"name": "look", "arguments": {}}]} | row  # a name that the tools have too
    with pytest.raises(ValueError, match=f":1: .*{message}"):
        read(write(tmp_path, "jsonl", given), chat=True)
    plain = {"prompt": "ask", "completion": "say", "tool_calls": CALLS}
    with pytest.raises(ValueError, match="'tool_calls' cannot be written into a plain text answer; set data.chat"):
        sft(write(tmp_path, "jsonl", plain), chat=False)


@pytest.mark.parametrize("beside", [{}, {"reasoning": "hm"}, {"tool_calls": CALLS}])
def test_answers_in_a_history_are_learned_whatever_stands_beside_the_last(
    tmp_path: Path, beside: dict[str, Any]
) -> None:
    row = {"prompt": "ask", "completion": "say", "history": [["before", "after"]], **beside}
    data = InstructionDataModule(tokenizer(), write(tmp_path, "jsonl", row), chat=True)
    data.setup("fit")
    kept = [token for token, keep in zip(data.train_rows[0].ids, data.train_rows[0].supervised, strict=True) if keep]
    assert str(data.tokenizer.decode(kept)).startswith("after<|im_end|>")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thoughts"])
def test_thoughts_reach_the_template_or_are_refused(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, "jsonl", {"messages": [ASK, {**SAY, field: "hm"}]})
    assert "<think>hm</think>say" in sft(path)[0]
    pair = write(tmp_path, "parquet", {"prompt": [ASK, {**SAY, field: "hm"}, ASK], "chosen": "yes", "rejected": "no"})
    assert "<think>hm</think>say" in dpo(pair)[0]
    path = write(tmp_path, "jsonl", {"messages": [ASK, {**SAY, field: "hm"}]})
    for data in (
        InstructionDataModule(tiny_tokenizer(), path),
        PreferenceDataModule(tiny_tokenizer(), pair),
        VerifiableDataModule(tiny_tokenizer(), write(tmp_path, "csv", {"prompt": [ASK, {**SAY, field: "hm"}, ASK]})),
    ):
        with pytest.raises(ValueError, match="assistant message 1: the chat template changes its reasoning"):
            data.setup("fit")


@pytest.mark.parametrize("field", ["loss_weight", "weight", "train", "training", "trainable", "loss_mask", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_a_weight_of_zero_is_not_learned(tmp_path: Path, field: str, value: Any) -> None:
    path = write(
        tmp_path, "jsonl", {"messages": [ASK, {**SAY, field: value}, ASK, {**SAY, "content": "last", field: 1}]}
    )
    data = InstructionDataModule(tokenizer(), path)
    data.setup("fit")
    (row,) = data.train_rows
    kept = [token for token, keep in zip(row.ids, row.supervised, strict=True) if keep]
    assert data.tokenizer.decode(kept) == "last<|im_end|>"
    with pytest.raises(ValueError, match="message 1, has loss_weight 0 and is what is compared"):
        dpo(
            write(
                tmp_path, "jsonl", {"chosen": [ASK, {**SAY, field: value}], "rejected": [ASK, SAY | {"content": "no"}]}
            )
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("shape", [{"prompt": "ask", "completion": "say"}, {"messages": [ASK, SAY]}])
def test_a_weight_of_zero_in_a_history_is_not_learned(tmp_path: Path, shape: dict[str, Any], kind: str) -> None:
    history = [ASK, SAY | {"content": "not", "weight": 0, "id": 3}, ASK, SAY | {"content": "once", "weight": 1}]
    row = {**shape, "history": history, "system": "s"}
    data = InstructionDataModule(tokenizer(), write(tmp_path, kind, row), chat=True)
    data.setup("fit")
    kept = [token for token, keep in zip(data.train_rows[0].ids, data.train_rows[0].supervised, strict=True) if keep]
    assert data.tokenizer.decode(kept) == "once<|im_end|>say<|im_end|>"
    assert "`history.id`: not read" in data.reading.line()


def test_other_fields_are_named(tmp_path: Path) -> None:
    for turn in (ASK, SAY):
        rows = {"messages": [turn | {"mood": "good"} if turn is message else message for message in (ASK, SAY)]}
        with pytest.raises(
            ValueError, match="holds 'mood', which nothing here reads; remove it, or rename it to one of role"
        ):
            sft(write(tmp_path, "jsonl", rows))
    data = InstructionDataModule(
        tokenizer(), write(tmp_path, "jsonl", {"messages": [{**ASK, "id": 3}, {**SAY, "mood": None}]})
    )
    data.setup("fit")
    assert "`messages.id`: not read" in data.reading.line()
    assert "user Ann\n" in sft(write(tmp_path, "jsonl", {"messages": [{**ASK, "name": "Ann"}, SAY]}))[0]
    plain = InstructionDataModule(
        tiny_tokenizer(), write(tmp_path, "jsonl", {"messages": [{**ASK, "name": "Ann"}, SAY]})
    )
    with pytest.raises(
        ValueError, match="user message 0: the chat template changes its name; use a template that writes"
    ):
        plain.setup("fit")
    old = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": ""}}
    result = {"role": "function", "name": "look", "content": "4"}
    assert (
        '{"name": "look", "arguments": {}}' in sft(write(tmp_path, "jsonl", {"messages": [ASK, old, result, SAY]}))[0]
    )


def test_a_prompt_that_begins_the_answer_is_gone_on_with(tmp_path: Path) -> None:
    begun = [ASK, {"role": "assistant", "content": "Let me think:"}]
    assert grpo(write(tmp_path, "jsonl", {"prompt": begun}))[0].endswith("<|im_start|>assistant\nLet me think:")
    for read, row in (
        (sft, {"prompt": begun, "completion": "a"}),
        (dpo, {"prompt": begun, "chosen": "a", "rejected": "b"}),
    ):
        with pytest.raises(ValueError, match="the prompt ends in an assistant turn and"):
            read(write(tmp_path, "jsonl", row))


@pytest.mark.parametrize(
    ("values", "first", "ranks"),
    [
        ([0, 1], 0, [[0, 1], [1, 0]]),
        ([0, 1], 1, [[1, 0], [0, 1]]),
        (["True", "False"], 1, [[0, 1], [1, 0]]),
        ([0.25, 1], 1, [[1, 0], [0, 1]]),
        ([1, 2], None, [[0, 1], [1, 0]]),
        (["a", "model_b"], None, [[0, 1], [1, 0]]),
        ([-2, 1], -1, [[0, 1], [1, 0]]),
        ([-2, 1], 1, [[1, 0], [0, 1]]),
        ([0, 1], None, "holds only 0 and 1, so 0 may be the number of the first .* --data.first_is_better 0 or 1"),
        ([0.25, 1], None, "holds only numbers from 0 to 1"),
        ([True, False], None, "holds only 0 and 1"),
        ([-2, 1], None, "goes below 0 and may mean that the first .* --data.first_is_better -1 or 1"),
        ([1, 2], 0, "tells by 1 and 2, so data.first_is_better has no effect"),
    ],
)
@pytest.mark.parametrize("column", ["better_response_id", "labels", "label", "winner"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_the_whole_column_says_which_is_better(
    tmp_path: Path, values: list[Any], first: Any, ranks: Any, column: str, kind: str
) -> None:
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", column: value} for value in values]
    data = PreferenceDataModule(tokenizer(), write(tmp_path, kind, *rows), first_is_better=first)
    if isinstance(ranks, str):
        with pytest.raises(ValueError, match=f"column '{column}' {ranks}"):
            data.setup("fit")
        return
    data.setup("fit")
    assert [row.ranks for row in data.train_rows] == ranks
    assert f"`{column}`: " in data.reading.line() and "the first answer is better" in data.reading.line()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_labels_and_margins_as_text(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "p", "completion": "c", "kto_tag": value} for value in ("True", "0", 1, False)]
    data = PreferenceDataModule(tokenizer(), write(tmp_path, kind, *rows))
    data.setup("fit")
    assert [row.ranks for row in data.train_rows] == [[0], [1], [0], [1]]
    with pytest.raises(
        ValueError, match="column 'kto_tag' holds '?2'?, expected true .desirable. or false, or 1 and 0"
    ):
        dpo(write(tmp_path, kind, rows[2], {**rows[2], "kto_tag": 2}))
    data = PreferenceDataModule(
        tokenizer(), write(tmp_path, kind, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "0.5"})
    )
    data.setup("fit")
    assert data.train_rows[0].margin == 0.5


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"instruction": "i", "completions": [{"response": "a", "overall_score": 3, "model": "m"}, {"response": "b", "overall_score": 5.0}]}, "ba"),
        ({"prompt": "\n\nHuman: i\n\nAssistant: ", "answers": [{"answer": "a", "rank": 2.0, "model": "m"}, {"answer": "b", "rank": 1.0}]}, "ba"),
        ({"conversation_a": [ASK, SAY | {"content": "a"}], "conversation_b": [ASK, SAY | {"content": "b"}], "winner": "model_b"}, "ba"),
        ({"context": [ASK], "response1": "a", "response2": "b", "overall_preference": 2}, "ba"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [False, True]}, "ba"),
    ],
)  # fmt: skip
def test_shapes_of_the_field(tmp_path: Path, row: dict[str, Any], answers: str) -> None:
    data = PreferenceDataModule(tokenizer(), write(tmp_path, "jsonl", row))
    data.setup("fit")
    (found,) = data.train_rows
    best = sorted(zip(found.ranks, found.completions, strict=True))
    assert [str(data.tokenizer.decode(ids[:1])) for _, ids in best] == list(answers)
    assert "Human" not in data.tokenizer.decode(found.prompt)


def test_shapes_that_are_refused_name_their_columns(tmp_path: Path) -> None:
    safe = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    with pytest.raises(
        ValueError, match="columns 'better_response_id' and 'safer_response_id' may both be the preference"
    ):
        dpo(write(tmp_path, "jsonl", safe), first_is_better=0)
    with pytest.raises(ValueError, match="one answer with scores .correctness, helpfulness. is no comparison"):
        dpo(write(tmp_path, "jsonl", {"prompt": "p", "response": "r", "helpfulness": 3, "correctness": 1}))
    assert dpo(write(tmp_path, "jsonl", safe), first_is_better=0, columns={"preference": "safer_response_id"})


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"problem": "q", "final_answer": ["4"]}, "q", "4"),
        ({"query": "q", "solution": "#### 1,080"}, "q", "1080"),
        ({"inputs": "q", "targets": ["a"]}, "q", "a"),
        ({"input": "q", "target": 27.0}, "q", "27.0"),
        ({"question": "q", "label": "B", "answer": None, "options": {"A": "x", "B": "y"}}, "q\n\nA) x\nB) y", "B"),
        ({"question": "q", "correct": "A", "options": ["A)5", "B)6"]}, "q\n\nA)5\nB)6", "A"),
        ({"question": "q", "choices": ["x", "y"], "answer": 0}, "q\n\nA) x\nB) y", "A"),
        ({"Body": "b", "Question": "q", "Answer": 3}, "q\n\nb", "3"),
        ({"prompt": [ASK], "reward_model": {"ground_truth": "34", "style": "rule"}}, None, "34"),
        ({"prompt": "q", "answer": " "}, "q", None),
        ({"prompt": "q", "answer": "#### "}, "q", None),
        ({"prompt": "q", "solution": "#### Step 1\nadd\n#### Step 2\nso 4\nand"}, "q", "#### Step 1\nadd\n#### Step 2\nso 4\nand"),
    ],
)  # fmt: skip
def test_prompts_and_answers_without_a_mapping(
    tmp_path: Path, row: dict[str, Any], prompt: str | None, answer: Any
) -> None:
    data = VerifiableDataModule(tokenizer(), write(tmp_path, "jsonl", row), chat=False)
    data.setup("fit")
    (found,) = data.train_prompts
    assert found.example.answer == answer and (prompt is None or found.text == prompt)
    assert set(found.example.info) >= set(row) - {
        "answer",
        "prompt",
        "problem",
        "query",
        "inputs",
        "question",
        "Question",
        "input",
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_objects_of_other_columns_are_the_same_from_every_file(tmp_path: Path, kind: str) -> None:
    """A table gives every object the keys of all others."""
    messages = [ASK, SAY | {"name": "Ann"}, ASK]
    rows = [
        {"prompt": messages, "kwargs": [{"n": 1}, {}], "extra": {"a": {"b": 0}}, "tools": TOOLS},
        {"prompt": [ASK], "kwargs": [{"m": None}, {"m": 2}], "extra": {"c": [1, None]}, "tools": None},
    ]
    data = VerifiableDataModule(tokenizer(), write(tmp_path, kind, *rows))
    data.setup("fit")
    assert [prompt.example.info for prompt in data.train_prompts] == [
        {"kwargs": [{"n": 1}, {}], "extra": {"a": {"b": 0}}, "tools": TOOLS},
        {"kwargs": [{}, {"m": 2}], "extra": {"c": [1, None]}, "tools": None},
    ]
    given = [{"prompt": [{"role": "user", "content": str(n)} | ({"name": "Ann"} if n % 2 else {})]} for n in range(20)]
    found = hold_out(Files(write(tmp_path, kind, *given)).rows(), 0.5, 0, {})
    plain = hold_out([Row(columns, str(number), "") for number, columns in enumerate(given)], 0.5, 0, {})
    texts = [[row.columns["prompt"][0]["content"] for row in side.rows()] for side in (*found, *plain)]
    assert texts[:2] == texts[2:]


@pytest.mark.parametrize(
    ("read", "row", "ours"),
    [
        (sft, {"prompt": "ask", "completion": "say"}, "system"),
        (dpo, {"prompt": "ask", "chosen": "say", "rejected": "no", "margin": 1}, "scores"),
        (grpo, {"prompt": "ask", "reward": 1}, "answer"),
        (prompts, {"prompt": "ask", "chosen": "say", "rejected": "no"}, "options"),
    ],
)
def test_a_column_that_is_not_there_cannot_be_left_out(
    tmp_path: Path, read: Callable[..., list[str]], row: dict[str, Any], ours: str
) -> None:
    with pytest.raises(ValueError, match=f":1: no row has a column for {ours}, which data.columns leaves out; found"):
        read(write(tmp_path, "jsonl", row), chat=True, columns={ours: ""})
    there: dict[str, Any] = {"A": "x", "B": "y", "C": "z"} if ours == "options" else {ours: None}
    assert read(write(tmp_path, "jsonl", row, row | there), chat=True, columns={ours: ""})


def test_columns_to_leave_out_may_stand_in_either_file(tmp_path: Path) -> None:
    plain = write(tmp_path, "jsonl", {"prompt": "ask", "completion": "say"})
    told = write(tmp_path, "json", {"prompt": "ask", "completion": "say", "system": "s"})
    for train, val in ((plain, told), (told, plain)):
        data = InstructionDataModule(tokenizer(), train, val, columns={"system": ""})
        data.setup("fit")
        assert data.train_rows[0].ids == data.val_rows[0].ids


def test_an_answer_that_no_option_has_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["x", "y"], "answer": answer} for answer in ("B", "C", "x", "(A)", "z #### Z")]
    lettered = {"question": "q", "choices": {"A": "x", "b": "C", "D": ""}}
    good = [{**lettered, "answer": answer} for answer in ("A.", "B", "C", "because")]
    path = write(tmp_path, "jsonl", *rows, *good, {**lettered, "answer": "D"})
    data = VerifiableDataModule(tokenizer(), path, on_bad_row="drop")
    data.setup("fit")
    golds = [prompt.example.answer for prompt in data.train_prompts]
    assert golds == ["B", "x", "(A)", "A.", "B", "C", "because"] and data.bad["train"] == 3
    for reads in (grpo, sft):
        with pytest.raises(
            ValueError, match=":2: the answer is 'C', and the options are A, B; write the letter or the"
        ):
            reads(path)
    for turns in ([ASK], [ASK, SAY, ASK]):  # which have no place for options, whatever the answer is
        row = {"prompt": turns, "options": ["x", "y", "z"], "completion": "A"}
        for answer in ("A", "0"):
            with pytest.raises(ValueError, match="'options' stands beside messages"):
                sft(write(tmp_path, "json", row | {"completion": answer}))


def test_numbers_of_options_need_the_whole_column(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["x", "y", "z"], "answer": number} for number in (1, 2)]
    with pytest.raises(ValueError, match="whole numbers, and they may be the options' numbers from 0, from 1"):
        grpo(write(tmp_path, "jsonl", *rows))
    data = VerifiableDataModule(tokenizer(), write(tmp_path, "csv", *rows, {**rows[0], "answer": 3}))
    data.setup("fit")
    assert [prompt.example.answer for prompt in data.train_prompts] == ["A", "B", "C"]


def test_a_mapping_has_an_effect_or_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", {"messages": [ASK, SAY], "x": "y"}, {"messages": [ASK, SAY]})
    with pytest.raises(ValueError, match="columns maps answer to 'x', and nothing reads it in rows that are messages"):
        sft(path, columns={"answer": "x"})
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: no row has the column 'sys' \(for system\); found messages, x"
    ):
        sft(path, columns={"system": "sys"})
    assert "system\ny" in sft(path, columns={"system": "x"})[0]
    with pytest.raises(
        ValueError, match="columns maps margin .*, which VerifiableDataModule does not read; Preference"
    ):
        grpo(path, columns={"margin": "x"})
    data = VerifiableDataModule(
        tokenizer(), write(tmp_path, "jsonl", {"q": "a", "prompt": "b"}), columns={"prompt": "q"}, chat=False
    )
    data.setup("fit")
    assert data.train_prompts[0].text == "a" and "`prompt`: not read ('q' is mapped to prompt)" in data.reading.line()


def test_the_line_says_what_became_of_every_column_and_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"question": "q", "response": "r" * length, "source": "s", "id": 3, "text": "repeated" * 5}
        for length in (1, 2, 99)
    ]
    with caplog.at_level("INFO"):
        InstructionDataModule(
            tokenizer(),
            write(tmp_path, "jsonl", *rows, {**rows[0], "response": True}),
            max_length=20,
            on_bad_row="drop",
            chat=False,
        ).setup("fit")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("train: ")]
    assert line.startswith("train: prompt + completion; `question` -> prompt, `response` -> completion; ")
    assert "`text`: not read (the row is read as prompt + completion)" in line and "`source`, `id`: not read" in line
    assert "4 rows in = 2 used + 1 too long + 1 bad" in line and "the first bad row: " in line


def test_every_name_of_the_table_is_there_once() -> None:
    names = [name for column in COLUMNS for name in (column.name, *column.synonyms.split())]
    assert len(names) == len(set(names)) == len(OURS) and all(column.means for column in COLUMNS)


TWO, ONE = {"prompt": "p", "output_1": "a", "output_2": "b"}, {"prompt": "p", "completion": "a"}


@pytest.mark.parametrize(
    ("read", "rows", "message"),
    [
        (dpo, [TWO | {"winner": value} for value in (0, 1)], "column 'winner' holds only 0 and 1"),
        (dpo, [TWO | {"winner": value} for value in "xyxya"], "column 'winner' holds 'x' and 'y', no known name"),
        (
            dpo,
            [ONE | {"label": value} for value in ("up", "down", "true", "up", "down")],
            "'label' holds 'up' and 'down'",
        ),
        (sft, [{"question": "a", "query": "b", "answer": "c"}, {"question": "a", "answer": "c"}], "both be the prompt"),
        (grpo, [{"question": "a", "query": "b"}, {"question": "a"}], "may both be the prompt"),
        (streamed, [{"question": "a", "answer": "c"}, {"question": "a", "query": "b", "answer": "c"}], "both be the"),
        (prompts, [{"question": "a", "query": "b", "chosen": "c", "rejected": "d"}], "both be the prompt"),
    ],
)
def test_what_the_whole_data_set_leaves_open_is_refused_once(
    tmp_path: Path, read: Callable[..., list[str]], rows: list[dict[str, Any]], message: str
) -> None:
    """Rows that may be bad are dropped one by one; a column that can be read in two ways is no bad row."""
    with pytest.raises(ValueError, match=message) as raised:
        read(write(tmp_path, "jsonl", *rows), on_bad_row="drop")
    assert "none is left" not in str(raised.value)


def test_a_single_odd_word_is_a_bad_row(tmp_path: Path) -> None:
    data = PreferenceDataModule(
        tokenizer(), write(tmp_path, "jsonl", *[TWO | {"winner": value} for value in "abx"]), on_bad_row="drop"
    )
    data.setup("fit")
    assert data.bad["train"] == 1 and len(data.train_rows) == 2


@pytest.mark.parametrize("read", [sft, mixed])
def test_options_of_chats_are_not_used_for_documents_and_the_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, read: Callable[..., list[str]]
) -> None:
    path = write(tmp_path, "jsonl", {"text": "a document"})
    with caplog.at_level("INFO"):
        read(path)
        assert "not used" not in caplog.text
        read(path, system="be kind", chat=True)
    for option in ("data.system", "data.chat"):
        assert f"{option}: not used, for a document is no chat" in caplog.text
