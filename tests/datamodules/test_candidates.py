"""CandidatesDataModule: the formats it reads, labels in the data, rows shared over ranks, and rows it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.formats.reading import Reading
from datamodules.predict.candidates import CandidatesDataModule, read_candidates
from datamodules.sources import Row

DATA = Path(__file__).parents[2].parent / "shared" / "data"


ASKED = [{"role": role, "content": text} for role, text in (("user", "p"), ("assistant", "q"), ("user", "r"))]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(columns: dict[str, Any], mapping: dict[str, str] | None = None) -> tuple[str, list[str], int | None]:
    row = read_candidates(Row(columns, "file:1", "file"), Reading("preference", mapping))
    return row.prompt, row.completions, row.given


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "p", "completions": ["a", "b", "c"]}, ("p", ["a", "b", "c"], None)),
        ({"question": "p", "output_1": "a", "output_2": "", "preference": 2.0}, ("p", ["a", ""], 2)),
        ({"input": "x", "instruction": "p", "response1": "a", "response2": "b", "label": 1}, ("p\n\nx", ["a", "b"], 1)),
        ({"instruction": "p", "input": "", "output_1": "a", "output_2": "b", "label": None}, ("p", ["a", "b"], None)),
        ({"input": "p", "output_1": "a", "output_2": "b", "label": "2"}, ("p", ["a", "b"], 2)),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", ["a", "b"], 1)),
        ({"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}, ("p", ["a", "b", "c"], None)),
        ({"question": "p", "response_j": "a", "response_k": "b"}, ("p", ["a", "b"], 1)),
        ({"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}, ("p", ["a", "b"], 1)),
        (
            {"chosen": [*ASKED, said("a")], "rejected": [*ASKED, said("b")]},
            ("User: p\n\nAssistant: q\n\nUser: r", ["a", "b"], 1),
        ),
        ({"prompt": "p", "system": "s", "chosen": "a", "rejected": "b"}, ("System: s\n\nUser: p", ["a", "b"], 1)),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [False, True]}, ("p", ["a", "b"], 2)),
    ],
)
def test_shapes(columns: dict[str, Any], expected: Any) -> None:
    assert read(columns) == expected


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (1, 1),
        (2, 2),
        (0, 0),
        ("Tie", 0),
        ("1", 1),
        (1.4999, 1),
        (1.5, 0),
        (1.9883, 2),
        (float("nan"), None),
        (None, None),
    ],
)
def test_given_labels(value: Any, given: int | None) -> None:
    assert read({"prompt": "p", "completions": ["a", "b"], "label": value})[2] == given


def test_what_is_mapped_goes_before_what_is_found() -> None:
    row = {
        "prompt": "no",
        "task": "p",
        "output_1": "a",
        "output_2": "b",
        "label": 1,
        "human": 2,
        "completions": ["x", "y"],
    }
    mapping = {"question": "task", "label": "human", "output_1": "output_1"}
    assert read(row, mapping) == ("p", ["a", "b"], 2)
    assert read(row) == ("no", ["x", "y"], 1)
    with pytest.raises(ValueError, match="file:1: no column 'nowhere' .*; found prompt, task"):
        read(row, {"prompt": "nowhere"})
    with pytest.raises(
        ValueError, match=r"columns maps unknown names anwser \(did you mean answer\?\); the names on the left may be"
    ):
        CandidatesDataModule("x.jsonl", columns={"anwser": "a"})


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"text": "p", "output_1": "a", "output_2": "b"},
            "there is no prompt, and output_1 is not a transcript",
        ),
        (
            {"prompt": "p", "output_1": "a"},
            r"found the columns prompt, output_1; looked for a prompt .*, with one of: chosen",
        ),
        ({"prompt": "p", "completions": ["a"]}, "completions must be a list of at least two"),
        ({"prompt": "p", "completions": ["a", None]}, "completion 1 is a NoneType; the answers must all be text"),
        (
            {"prompt": "p", "completions": ["a", "b"], "answer": ["4", "5"]},
            "column 'answer' holds a list of 2 answers, a single answer was expected",
        ),
        ({"prompt": "p", "response1": True, "response2": "b"}, "response1 is a bool; the answers must all be text"),
        ({"prompt": " ", "response1": "a", "response2": "b"}, r"the prompt is empty \(column 'prompt'\)"),
        (
            {"prompt": "p", "response1": "a", "response2": "b", "label": "garbage"},
            "column 'label' holds 'garbage', expected 1, 2 or between",
        ),
        ({"prompt": "p", "response1": "a", "response2": "b", "label": 3}, "column 'label' holds 3, expected"),
        ({"prompt": "p", "response1": "a", "response2": "b", "label": True}, "column 'label' holds True, expected"),
    ],
)
def test_bad_rows_in_one_sentence(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^file:1: .*{sentence}"):
        read(columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"answer": "4"}, "4"),
        ({"answer": 4}, "4"),
        ({"answer": None}, None),
        ({}, None),
        ({"gold": "#### 1,080", "answer": "4"}, "1080"),
    ],
)
def test_the_right_answer_travels(tmp_path: Path, columns: dict[str, Any], expected: str | None) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], **columns}))
    data = CandidatesDataModule(str(tmp_path / "rows.jsonl"), columns={"answer": "gold"} if "gold" in columns else None)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["answer"] == [expected]


class World:
    """The part of a Trainer that tells the rank."""

    def __init__(self, rank: int, size: int) -> None:
        self.global_rank, self.world_size = rank, size


def test_ranks_share_the_rows_in_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"p{index}", "chosen": "a", "rejected": "b"}) + "\n" for index in range(5))
    )
    found = []
    for rank in range(2):
        data = CandidatesDataModule(str(file), batch_size=2)
        data.trainer = World(rank, 2)  # type: ignore[assignment]
        data.setup("predict")
        batches = list(data.predict_dataloader())
        found.append(
            [(uid, info["row"]) for batch in batches for uid, info in zip(batch["uid"], batch["info"], strict=True)]
        )
        assert len({info["data"] for batch in batches for info in batch["info"]}) == 1
    assert found == [[(f"{file}:{row + 1}", row) for row in rows] for rows in ([0, 2, 4], [1, 3])]
    data.trainer = World(0, 6)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="5 rows cannot be shared by 6 ranks"):
        data.predict_dataloader()


def test_other_rows_have_another_digest(tmp_path: Path) -> None:
    digests = set()
    for changed in ({}, {"rejected": "c"}, {"answer": "4"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", **changed}))
        data = CandidatesDataModule(str(tmp_path / "rows.jsonl"))
        data.setup("predict")
        digests |= {batch["info"][0]["data"] for batch in data.predict_dataloader()}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("file", "rows", "given"),
    [
        ("llmbar/LLMBar/Natural/dataset.json", 70, {1, 2}),
        ("nc-alpaca-eval/phi-2/alpaca_eval_gpt4/annotations.json", 210, {0, 1, 2, None}),
        ("nc-alpaca-eval/gemma-2b-it/weighted_alpaca_eval_gpt4_turbo/annotations.json", 42, {1, 2}),
    ],
)
def test_real_files(file: str, rows: int, given: set[int | None]) -> None:
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository")
    data = CandidatesDataModule(str(DATA / file))
    data.setup("predict")
    assert len(data.rows) == rows
    assert {row.given for row in data.rows} == given


def test_a_real_row_that_is_no_text() -> None:
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository")
    with pytest.raises(
        ValueError, match=r"pandalm/testset-v1.json#\d+: response[12] is a bool; the answers must all be text"
    ):
        CandidatesDataModule(str(DATA / "pandalm/testset-v1.json")).setup("predict")
