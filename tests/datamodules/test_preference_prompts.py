"""Prompts from preference data: rendered as reward models and DPO read them, equal ones once, ties included."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import PreferencePrompts, VerifiableDataModule
from datamodules.formats.preference_shapes import preference_example
from datamodules.formats.reading import Reading
from datamodules.sources import Files
from modules.networks.tiny import tiny_tokenizer

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
START = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "why?"},
]


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


SHAPES: list[
    tuple[dict[str, Any], Any, Any]
] = [  # a row; its prompt as text, and as messages where the tokenizer has a template
    ({"chosen": START + " so", "rejected": START + " no"}, START, TURNS),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", "p"),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, "p", "p"),  # a tie
    (
        {"instruction": "i", "input": "x", "output_1": "a", "output_2": "b", "preference": 0},
        "i\n\nx",
        [{"role": "user", "content": "i\n\nx"}],
    ),
    (
        {
            "chosen": [*TURNS, {"role": "assistant", "content": "so"}],
            "rejected": [*TURNS, {"role": "assistant", "content": "no"}],
        },
        TURNS,
        TURNS,
    ),
    ({"prompt": TURNS, "completion": "a", "label": False}, TURNS, TURNS),
    ({"messages": [*TURNS, {"role": "assistant", "content": "so"}], "label": True}, TURNS, TURNS),
]


@pytest.mark.parametrize(("columns", "text", "messages"), SHAPES)
def test_the_prompt_of_each_shape(tmp_path: Path, columns: dict[str, Any], text: Any, messages: Any) -> None:
    path = write(tmp_path / "pairs.jsonl", columns)
    for chat, expected in ((False, text), (True, messages)):
        (row,) = PreferencePrompts(path, chat=chat).rows()
        assert (row.columns, row.origin) == ({"prompt": expected, "answer": None}, f"{path}:1")


def test_equal_prompts_come_once_where_they_are_first(tmp_path: Path) -> None:
    rows = [{"question": name, "chosen": f"a{number}", "rejected": "b"} for number, name in enumerate("xyxzy")]
    path = write(tmp_path / "pairs.jsonl", *rows)
    found = PreferencePrompts(path, columns={"prompt": "question"}).rows()
    assert [(row.columns["prompt"], row.origin) for row in found] == [
        ("x", f"{path}:1"),
        ("y", f"{path}:2"),
        ("z", f"{path}:4"),
    ]


def test_bad_rows_are_refused_or_dropped_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {"prompt": "q", "chosen": "a", "rejected": ""}
    path = write(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, bad)
    with pytest.raises(
        ValueError, match=f"{path}:2: rejected is empty; mend the row, or set on_bad_row: drop of PreferencePrompts"
    ):
        PreferencePrompts(path).rows()
    with caplog.at_level("INFO"):
        assert [row.columns["prompt"] for row in PreferencePrompts(path, on_bad_row="drop").rows()] == ["p"]
    assert f"the first bad row: {path}:2: rejected is empty; 2 rows in = 1 used + 1 bad" in caplog.text
    with pytest.raises(
        ValueError, match=f"{path}:1: none of 1 rows from here on can be read; the first: {path}:1: rejected is empty"
    ):
        PreferencePrompts(write(tmp_path / "pairs.jsonl", bad), on_bad_row="drop").rows()
    alone = write(
        tmp_path / "pairs.jsonl", {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    )
    with pytest.raises(ValueError, match="the answers share no turn, so there is no prompt"):
        PreferencePrompts(alone).rows()
    with pytest.raises(ValueError, match="on_bad_row must be raise or drop, got 'skip'"):
        PreferencePrompts("x.jsonl", on_bad_row="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="columns maps unknown names nicer"):
        PreferencePrompts("x.jsonl", columns={"nicer": "chosen"})


def test_transcripts_of_hh_rlhf_become_prompts(tmp_path: Path) -> None:
    if not HH.is_file():
        pytest.skip("the public files of hh-rlhf are not here")
    records = [json.loads(line) for line in gzip.decompress(HH.read_bytes()).decode().split("\n") if line]
    starts = {record["chosen"][: record["chosen"].rindex("\n\nAssistant:") + 12] for record in records}
    texts = [row.columns["prompt"] for row in PreferencePrompts(str(HH), on_bad_row="drop").rows()]
    assert len(texts) == len(set(texts)) and set(texts) <= starts
    assert len(starts) - len(texts) <= 5  # five of the 1619 rows have an empty answer or other turns on each side
    path = write(tmp_path / "first.jsonl", *records[:100])
    data = VerifiableDataModule(
        tiny_tokenizer(), PreferencePrompts(path, chat=True, on_bad_row="drop"), max_prompt_length=4096
    )
    data.setup("fit")
    example = preference_example(Files(path).rows()[0], Reading("preference"), template=True)
    assert example is not None and data.train_prompts[0].example.prompt == example.prompt
    assert len(data.train_prompts) == 99  # row 86 has an empty answer
    assert data.train_prompts[0].text.startswith("<|im_start|>user\n") and data.train_prompts[0].text.endswith(
        "<|im_start|>assistant\n"
    )


def test_transcripts_become_messages_where_the_tokenizer_has_a_template(tmp_path):
    """PPO then samples after the same prompt that the reward model read."""
    file = tmp_path / "hh.jsonl"
    file.write_text(
        json.dumps({"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."})
        + "\n"
    )
    for template, text in (
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "<user>Hi?"),
        (None, "\n\nHuman: Hi?\n\nAssistant:"),
    ):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        data = VerifiableDataModule(tokenizer, PreferencePrompts(str(file)))
        data.setup("fit")
        assert data.train_prompts[0].text == text
