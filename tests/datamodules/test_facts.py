"""FactsDataModule: few-shot prompts of one relation that never show the fact they ask for; invented facts."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.formats.reading import Reading
from datamodules.predict.facts import FactsDataModule, read_fact
from datamodules.sources import FactDocuments, Facts, Row
from modules.networks.tiny import tiny_tokenizer
from modules.types import PromptBatch

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def batches(data: FactsDataModule) -> list[PromptBatch]:
    data.setup("predict")
    return list(data.predict_dataloader())


ROWS = [
    *(
        {"question": f"Where is p{n}?", "answer": [f"There{n}", f"t{n}"], "relation": "place", "id": n}
        for n in range(7)
    ),
    *({"question": f"Who made w{n}?", "answer": f"Maker{n}", "relation": "maker", "id": n} for n in range(6)),
]


def test_prompts_and_what_the_writer_needs(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "facts.jsonl", ROWS)
    data = FactsDataModule(tiny_tokenizer(), file, batch_size=5, num_prompts=3, num_shots=4)
    found = batches(data)
    assert [len(batch["uid"]) for batch in found] == [15, 15, 9]
    first = {key: value[0] for key, value in found[0].items()}
    assert (first["uid"], first["answer"]) == (f"{file}:1#0", "There0")
    assert first["info"].pop("data") == found[-1]["info"][-1]["data"]
    assert first["info"] == {"fact": f"{file}:1", "answers": ["There0", "t0"], "columns": ROWS[0], "row": 0}
    *shots, asked = first["prompt"].split("\n\n")
    assert asked == "Q: Where is p0?\nA:"  # the space goes with the answer
    assert len(shots) == 4 and all(shot in [f"Q: Where is p{n}?\nA: There{n}" for n in range(1, 7)] for shot in shots)
    assert data.tokenizer.decode(first["prompt_ids"]) == first["prompt"]


def test_examples_have_the_relation_and_never_the_question(tmp_path: Path) -> None:
    twice = [*ROWS, {**ROWS[0], "answer": "Elsewhere"}]  # the same question again, with another answer
    for batch in batches(
        FactsDataModule(tiny_tokenizer(), write_rows(tmp_path / "facts.jsonl", twice), num_prompts=20)
    ):
        for prompt, info in zip(batch["prompt"], batch["info"], strict=True):
            *shots, asked = prompt.split("\n\n")
            questions = [shot.split("\n")[0] for shot in shots]
            assert len(questions) == 4 and asked.split("\n")[0] not in questions
            assert all(question[:5] == asked[:5] for question in questions)  # "Q: Wh" + "ere" or "o m"
            assert not any(answer in prompt for answer in info["answers"] if info["row"] not in (0, 13))


def test_prompts_are_a_function_of_seed_and_uid(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "facts.jsonl", ROWS)
    texts = {}
    for seed, size in ((0, 16), (0, 2), (1, 16)):
        found = batches(FactsDataModule(tiny_tokenizer(), file, batch_size=size, seed=seed))
        texts[seed, size] = dict(
            zip(*([cell for batch in found for cell in batch[name]] for name in ("uid", "prompt")), strict=True)
        )
    assert texts[0, 16] == texts[0, 2] != texts[1, 16]
    assert (
        len({prompt for uid, prompt in texts[0, 16].items() if uid.startswith(f"{file}:1#")}) > 5
    )  # ten draws of 4 out of 6, in order


def test_rows_without_a_relation_are_one_and_zero_shots_are_none(tmp_path: Path) -> None:
    plain = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    file = write_rows(tmp_path / "facts.jsonl", plain)
    mixed = batches(FactsDataModule(tiny_tokenizer(), file, num_prompts=5))[0]["prompt"]
    assert any("Who" in prompt and "Where" in prompt for prompt in mixed)
    (bare,) = batches(
        FactsDataModule(tiny_tokenizer(), file, num_prompts=1, num_shots=0, template="{question}={answer}\n")
    )
    assert bare["prompt"][0] == "Where is p0?="


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": "q ", "answer": "a"}, ("q", ["a"], None)),
        ({"prompt": "q", "completion": " a", "relation": 17}, ("q", ["a"], "17")),
        ({"instruction": "q", "input": "x", "output": "a"}, ("q\n\nx", ["a"], None)),
        ({"prompt": [ASK], "answer": "a"}, ("q", ["a"], None)),
        ({"completion": "c", "question": "q", "answer": ["a", "b"]}, ("q", ["a", "b"], None)),
    ],
)
def test_shapes(columns: dict[str, Any], expected: Any) -> None:
    fact = read_fact(Row(columns, "file:1", "file"), Reading("facts"))
    assert (fact.question, fact.answers, fact.relation) == expected


def test_what_is_mapped_goes_first() -> None:
    row = Row({"question": "no", "prompt": "q", "possible": ["a"], "answer": "no", "prop": "r"}, "file:1", "file")
    fact = read_fact(row, Reading("facts", {"prompt": "prompt", "answer": "possible", "relation": "prop"}))
    assert (fact.question, fact.answers, fact.relation, fact.row.columns) == ("q", ["a"], "r", row.columns)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"text": "q", "answer": "a"},
            r"found the columns text, answer; looked for a question \(prompt, question, instruction, ...\) with its",
        ),
        ({"question": "q", "reply": "a"}, "found the columns question, reply; looked for a question"),
        ({"question": " ", "answer": "a"}, "found the columns question, answer; looked for a question"),
        ({"prompt": [ASK, SAY, ASK], "answer": "a"}, "the prompt is a conversation, and one question was expected"),
        ({"prompt": "q", "answer": "a", "system": "s"}, "column 'system' cannot be written into a plain text prompt"),
        ({"prompt": "q", "answer": "a", "tools": [{"name": "f"}]}, "column 'tools' cannot be written into a plain"),
        (
            {"question": "q", "answer": []},
            "column 'answer' must hold the answer, one line of text, or a list of such answers",
        ),
        ({"question": "q", "answer": ["a", "b\nc"]}, "column 'answer' must hold the answer, one line"),
        ({"question": "q", "answer": None}, "column 'answer' must hold the answer, one line"),
    ],
)
def test_refused_rows(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^file:1: .*{sentence}"):
        read_fact(Row(columns, "file:1", "file"), Reading("facts"))


def test_too_few_facts_of_a_relation(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "facts.jsonl", [*ROWS, {"question": "q", "answer": "a", "relation": "lone"}])
    with pytest.raises(
        ValueError,
        match=r"facts.jsonl:14: relation 'lone' has 0 other questions and a prompt needs 4: lower data.num_shots",
    ):
        FactsDataModule(tiny_tokenizer(), file).setup("predict")


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"num_prompts": 0},
        {"num_shots": -1},
        {"template": "{question}: {answer}"},
        {"template": "{answer}\n{question}"},
        {"template": "{answer}\n"},
        {"template": "{question} {answer}\n{question}"},
        {"columns": {"text": "x"}},
    ],
)
def test_refused_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match="must be at least 1, num_shots|template must hold|columns maps text .a document, learned whole., which FactsDataModule",
    ):
        FactsDataModule(tiny_tokenizer(), "facts.jsonl", **settings)


def test_invented_facts_are_numbered() -> None:
    rows = [row.columns for row in Facts(4000).rows()]
    assert [row.columns for row in Facts(100, first=300).rows()] == rows[300:400]
    assert Facts(1, first=400).rows()[0].origin == "facts#400"
    assert len({row["question"] for row in rows}) == 4000
    assert rows[0] == {
        "question": "boss baba",
        "answer": rows[0]["answer"],
        "relation": "boss",
        "prompt": "boss baba=",
        "completion": rows[0]["answer"],
    }
    assert {len(row["answer"]) for row in rows} == {4} and len(
        {row["answer"] for row in rows}
    ) > 3000  # 10000 x (1 - exp(-0.4)) = 3297 expected
    assert {row["relation"] for row in rows[:4]} == {"boss", "food", "home", "wish"} and len(
        {row["question"][5:] for row in rows[:4]}
    ) == 1
    assert len({row["question"] for row in (Facts(4, first=39996).rows()[i].columns for i in range(4))}) == 4


def test_documents_tell_each_fact_once_a_pass() -> None:
    told = [row.columns["text"] for row in FactDocuments(40, passes=3, first=20).rows()]
    facts = {
        row.columns["prompt"] + row.columns["completion"]: row.columns["relation"] for row in Facts(40, first=20).rows()
    }
    assert len(told) == 3 * 8
    for number in range(3):
        lines = [line for text in told[8 * number : 8 * number + 8] for line in text.splitlines()]
        assert sorted(lines) == sorted(facts)
    assert all(len({facts[line] for line in text.splitlines()}) == 1 for text in told)
    assert told[:8] != told[8:16]
    assert FactDocuments(40, 3, 20).rows() == FactDocuments(40, 3, 20).rows() != FactDocuments(40, 3, 20, seed=1).rows()


def test_facts_out_of_range() -> None:
    for settings in ((0, 0), (1, -1), (40000, 1)):
        with pytest.raises(
            ValueError, match="num_facts must be at least 1, first at least 0 and both together at most 40000"
        ):
            Facts(*settings)
    for wrong in ((30, 1, 0), (40, 0, 0), (40, 1, 2)):
        with pytest.raises(ValueError, match="num_facts must be a multiple of 20, first of 4, and passes at least 1"):
            FactDocuments(*wrong)
