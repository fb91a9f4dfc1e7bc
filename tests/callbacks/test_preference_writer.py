"""Labelling end to end: a real server judges, killed runs continue, and a preference DataModule reads the result."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from programs import Program

from callbacks.writers.preference_writer import PreferenceWriter
from datamodules.formats.preference_shapes import preference_example
from datamodules.formats.reading import Reading
from datamodules.predict.candidates import CandidatesDataModule
from datamodules.sources import Files
from modules import SFTModule
from modules.__main__ import main
from modules.predict.label import LabelModule, share_wins, summarise_labels
from modules.rewards.chat.clients import HttpChat, LocalChat
from modules.rewards.chat.judge import JudgedPair, PairwiseJudge

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS = [{"prompt": f"p{n}", "output_1": "a" * (n % 3 + 1), "output_2": "b" * 2, "label": 1 + n % 2} for n in range(7)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def label(file: Path, rows: Path, client: Any, batch_size: int = 2, **options: Any) -> None:
    data = CandidatesDataModule(str(rows), batch_size=batch_size)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    Trainer(accelerator="cpu", devices=1, callbacks=[PreferenceWriter(str(file))], **options).predict(
        LabelModule(PairwiseJudge(client)), data
    )


def test_rows_a_report_and_nothing_else(tmp_path: Path, chat_server: Any, rules: Any, caplog: Any) -> None:
    server = chat_server(rules["longer wins"])
    file, rows = tmp_path / "new" / "out.jsonl", write_rows(tmp_path / "in.jsonl", ROWS)
    label(file, rows, HttpChat(server.url, "m", prices=(1000.0, 0.0)))
    found = read_rows(file)
    # lengths 1 2 3 1 2 3 1 against 2: second, tie, first, second, tie, first, second
    assert [row["ranks"] for row in found] == [[1, 0], [0, 0], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]]
    assert found[0] == {
        "uid": f"{rows}:1",
        "prompt": "p0",
        "completions": ["a", "bb"],
        "ranks": [1, 0],
        "scores": [0.0, 1.0],
    }
    assert found[1]["scores"] == [0.5, 0.5]
    # given 1 2 1 2 1 2 1, the judge says 2 0 1 2 0 1 2: equal in the third and the fourth row; 14 requests of 100
    # prompt tokens, 1000 a million
    expected = {
        "comparisons": 7,
        "rows": 7,
        "ties": 2,
        "invalid": 0,
        "position_bias": 0.0,
        "consistency": 1.0,
        "given": 7,
    }
    expected |= {
        "agreement": 2 / 7,
        "requests": 14,
        "cached": 0,
        "failed": 0,
        "prompt_tokens": 1400,
        "completion_tokens": 140,
        "cost": 1.4,
    }
    assert json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text()) == pytest.approx(expected)
    said = "7 rows, 2 ties, 0 invalid left out, position bias +0.00, agreement 0.29 with 7 given labels, cost 1.40"
    assert f"labels: {file}: {said}" in caplog.text
    assert sorted(path.name for path in file.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]
    examples = [preference_example(row, Reading("preference")) for row in Files(str(file)).rows()]
    assert [example and example.ranks for example in examples] == [[1, 0], None, [0, 1], [1, 0], None, [0, 1], [1, 0]]


def test_invalid_rows_are_left_out_and_counted(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    server = chat_server(
        lambda question: "hm" if re.search(r"\[Request \w+\]\np1\n", question) else rules["longer wins"](question)
    )
    label(tmp_path / "out.jsonl", write_rows(tmp_path / "in.jsonl", ROWS[:3]), HttpChat(server.url, "m"))
    assert [row["prompt"] for row in read_rows(tmp_path / "out.jsonl")] == ["p0", "p2"]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert (report["rows"], report["invalid"], report["ties"], report["given"]) == (2, 1, 0, 2)


def test_more_than_two_candidates_are_all_compared(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    server = chat_server(rules["longer wins"])
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "completions": ["aa", "bbb", "cc", ""]}])
    label(tmp_path / "out.jsonl", rows, HttpChat(server.url, "m"))
    (row,) = read_rows(tmp_path / "out.jsonl")
    # wins: bbb 3 of 3; aa and cc one tie and one win, 1.5 of 3; the empty one none
    assert (row["scores"], row["ranks"]) == ([0.5, 1.0, 0.5, 0.0], [1, 0, 1, 3])
    assert len(server.requests) == 2 * 6  # C(4, 2) pairs in both orders
    assert share_wins(3, [JudgedPair(1.0), JudgedPair(None), JudgedPair(0.0)]) is None


def test_a_run_that_stopped_goes_on_and_asks_nothing_twice(
    tmp_path: Path, chat_server: Any, rules: Any, caplog: Any
) -> None:
    rows, file, calm = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / "calm.jsonl"
    label(calm, rows, HttpChat(chat_server(rules["longer wins"]).url, "m"))
    server = chat_server(rules["longer wins"])
    client = HttpChat(server.url, "m", concurrency=1)
    server.plan = [200] * 9 + [400]  # two batches of 2 rows x 2 orders, then a refusal within the third
    with pytest.raises(ValueError, match="refused the request with status 400: no"):
        label(file, rows, client)
    assert not file.exists()
    (part,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out"))
    with part.open("ab") as half:
        half.write(b'{"row": 4, "uid"')  # as after a power cut
    label(file, rows, HttpChat(server.url, "m"), batch_size=3)
    assert "resuming with the 4 rows" in caplog.text
    assert file.read_bytes() == calm.read_bytes()
    assert len(server.requests) == 10 + 6  # of the last three rows, both orders
    reports = [json.loads(path.with_name(f"{path.name}.report.json").read_text()) for path in (file, calm)]
    assert (
        reports[0] == reports[1]
    )  # of the failed batch nothing is known; the two before it and the rest count 14 requests
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_another_number_of_ranks_goes_on_too(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    rows, file, server = (
        write_rows(tmp_path / "in.jsonl", ROWS),
        tmp_path / "out.jsonl",
        chat_server(rules["longer wins"]),
    )
    server.plan = [200] * 8 + [400]
    with pytest.raises(ValueError, match="refused"):
        label(file, rows, HttpChat(server.url, "m", concurrency=1))
    part = tmp_path / ".out.jsonl.rank0"
    header, *lines = part.read_bytes().splitlines(keepends=True)
    part.unlink()
    (tmp_path / ".out.jsonl.rank1").write_bytes(header + b"".join(lines[3:]))  # the second batch alone, of rank one
    label(file, rows, HttpChat(server.url, "m"))
    assert [row["prompt"] for row in read_rows(file)] == [f"p{n}" for n in range(7)]
    assert len(server.requests) == 9 + 10


def test_invalid_rows_are_tried_again(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    rows, file, server = (
        write_rows(tmp_path / "in.jsonl", ROWS[:4]),
        tmp_path / "out.jsonl",
        chat_server(rules["longer wins"]),
    )
    server.plan = [500, 200, 200, 200, 400]  # the first row gets no answer, the third is refused
    with pytest.raises(ValueError, match="refused"):
        label(file, rows, HttpChat(server.url, "m", concurrency=1, retries=0))
    label(file, rows, HttpChat(server.url, "m"))
    assert [row["prompt"] for row in read_rows(file)] == ["p0", "p1", "p2", "p3"]
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["invalid"] == 0


def test_parts_of_another_judge_or_of_other_rows_are_refused(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    rows, file, server = (
        write_rows(tmp_path / "in.jsonl", ROWS),
        tmp_path / "out.jsonl",
        chat_server(rules["longer wins"]),
    )
    server.plan = [200] * 4 + [400]
    with pytest.raises(ValueError, match="refused"):
        label(file, rows, HttpChat(server.url, "m", concurrency=1))
    with pytest.raises(
        ValueError, match=r"\.out\.jsonl\.rank0 was started with another judge or other rows; delete it"
    ):
        label(file, rows, HttpChat(server.url, "another"))
    with pytest.raises(
        ValueError, match=r"\.out\.jsonl\.rank0 was started with another judge or other rows; delete it"
    ):
        label(file, write_rows(rows, ROWS[1:]), HttpChat(server.url, "m"))
    assert len(server.requests) == 5


def test_refusals_leave_the_old_file_alone(tmp_path: Path, chat_server: Any, rules: Any) -> None:
    rows, file = write_rows(tmp_path / "in.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    file.write_text("old")
    silent = HttpChat(chat_server(lambda question: "hm").url, "m")
    with pytest.raises(ValueError, match="none of 2 rows got a valid label, so .*out.jsonl is not written"):
        label(file, rows, silent)
    (tmp_path / ".out.jsonl.rank0").unlink()
    label(file, rows, silent, fast_dev_run=True)
    with pytest.raises(ValueError, match="is a folder; name a file, such as"):
        label(tmp_path, rows, silent)
    with pytest.raises(
        ValueError, match="PreferenceWriter cannot write the results of SFTModule; set model to LabelModule"
    ):
        PreferenceWriter(str(file)).setup(Trainer(logger=False, accelerator="cpu"), SFTModule("tiny"), "predict")
    assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_local_judge_labels(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="none of 1 rows got a valid label"):  # the tiny model is untrained
        label(tmp_path / "out.jsonl", rows, LocalChat("tiny", max_completion_length=4))


def vicuna(name: str) -> list[dict[str, Any]]:
    """Return questions, two answers each, and which answer got more points from the reviewer."""
    folder = DATA / "fastchat/vicuna_gpt4_review"
    texts = {
        path: {row["question_id"]: row for row in map(json.loads, (folder / path).open())}
        for path in ("question.jsonl", f"review/{name}")
    }
    first, second = name.removeprefix("review_").removesuffix(".jsonl").split("_", 1)
    answers = [
        {row["question_id"]: row["text"] for row in map(json.loads, (folder / f"answer/answer_{who}.jsonl").open())}
        for who in (first, second)
    ]
    rows = []
    for key, question in texts["question.jsonl"].items():
        one, two = texts[f"review/{name}"][key]["score"]
        given = 1 if one > two else 2 if two > one else 0
        rows.append(
            {"prompt": question["text"], "output_1": answers[0][key], "output_2": answers[1][key], "label": given}
        )
    return rows


def llmbar(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / "llmbar/LLMBar" / name / "dataset.json").read_text())


def pandalm(name: str) -> list[dict[str, Any]]:
    """Return the rows with two texts; the label is the majority of three, or None."""
    rows = []
    for row in json.loads((DATA / "pandalm" / name).read_text()):
        votes = [row.pop(f"annotator{index}") for index in (1, 2, 3)]
        if isinstance(row["response1"], str) and isinstance(row["response2"], str):
            rows.append({**row, "label": next((vote for vote in votes if votes.count(vote) > 1), None)})
    return rows


REAL: list[tuple[Callable[[str], list[dict[str, Any]]], str]] = [
    (vicuna, "review_gpt35_vicuna-13b.jsonl"),
    (vicuna, "review_llama-13b_vicuna-13b.jsonl"),
    (llmbar, "Natural"),
    (llmbar, "Adversarial/Neighbor"),
    (pandalm, "testset-v1.json"),
]


@pytest.mark.parametrize(("source", "name"), REAL, ids=[name for _, name in REAL])
def test_real_candidates(tmp_path: Path, chat_server: Any, rules: Any, source: Any, name: str) -> None:
    if not DATA.is_dir():
        pytest.skip("no real data beside the repository")
    rows = source(name)[:200]
    given = [row["label"] for row in rows]
    texts = [(row.get("output_1", row.get("response1")), row.get("output_2", row.get("response2"))) for row in rows]
    reports = {}
    for rule in ("longer wins", "always first"):
        file = tmp_path / f"{rule}.jsonl"
        label(file, write_rows(tmp_path / "in.jsonl", rows), HttpChat(chat_server(rules[rule]).url, "m"), batch_size=64)
        reports[rule] = json.loads(file.with_name(f"{file.name}.report.json").read_text())
        assert len(read_rows(file)) == len(rows)
    right = [
        (1 if len(a) > len(b) else 2 if len(b) > len(a) else 0) == want
        for (a, b), want in zip(texts, given, strict=True)
        if want is not None
    ]
    assert reports["longer wins"]["agreement"] == pytest.approx(sum(right) / len(right))
    assert reports["longer wins"]["consistency"] == 1.0 and reports["longer wins"]["position_bias"] == 0.0
    first = reports["always first"]
    assert (first["ties"], first["invalid"], first["position_bias"], first["consistency"]) == (len(rows), 0, 0.5, 0.0)
    assert first["agreement"] == pytest.approx(given.count(0) / len(right))


def config(folder: Path, url: str) -> list[str]:
    """Write a configuration to a file and return it as arguments."""
    client = {
        "class_path": "modules.rewards.chat.clients.HttpChat",
        "init_args": {"base_url": url, "model": "m", "concurrency": 1, "retries": 0},
    }
    judge = {"class_path": "modules.rewards.chat.judge.PairwiseJudge", "init_args": {"client": client}}
    writer = {
        "class_path": "callbacks.writers.preference_writer.PreferenceWriter",
        "init_args": {"path": str(folder / "out.jsonl")},
    }
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    settings = {
        "trainer": {**quiet, "callbacks": [writer]},
        "model": {"class_path": "modules.predict.label.LabelModule", "init_args": {"judge": judge}},
        "data": {
            "class_path": "datamodules.predict.candidates.CandidatesDataModule",
            "init_args": {"train": str(folder / "in.jsonl"), "batch_size": 1},
        },
    }
    (folder / "label.yaml").write_text(yaml.safe_dump(settings))
    return ["predict", "--config", str(folder / "label.yaml")]


def test_a_killed_process_goes_on(tmp_path: Path, chat_server: Any, rules: Any, caplog: Any) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    server = chat_server(rules["longer wins"], plan=[200] * 5 + [600.0])  # the sixth request hangs, in the third row
    arguments = config(tmp_path, server.url)
    with Program("-m", "modules", *arguments, folder=ROOT) as program:
        end = time.monotonic() + 60
        while len(server.requests) < 6 and program.process.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        program.process.kill()
    assert len(server.requests) == 6 and not (tmp_path / "out.jsonl").exists()
    main(arguments)
    assert "labels: resuming with the 2 rows" in caplog.text
    assert "7 rows, 2 ties, 0 invalid left out" in caplog.text
    resumed = (tmp_path / "out.jsonl").read_bytes()
    assert len(server.requests) == 6 + 10
    label(
        tmp_path / "out.jsonl", tmp_path / "in.jsonl", HttpChat(server.url, "m")
    )  # nothing is left to go on with: from the beginning
    assert len(server.requests) == 16 + 14
    assert (tmp_path / "out.jsonl").read_bytes() == resumed


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--data.train", "gone.jsonl"], "error: gone.jsonl: no such file or folder"),
        (
            ["--model.judge.client.base_url", "localhost/v1"],
            "error: HttpChat: base_url 'localhost/v1' must be a URL such as",
        ),
        (
            ["--model.judge.client.base_url", "http://127.0.0.1:9/v1"],
            "error: HttpChat: cannot reach http://127.0.0.1:9/v1/chat/completions",
        ),
        (["--model.judge.template", "{prompt}"], "error: PairwiseJudge: the template has the fields"),
        (
            ["--data", "VerifiableDataModule"],
            "VerifiableDataModule needs a tokenizer and LabelModule has none; set data to CandidatesDataModule",
        ),
    ],
)
def test_what_is_wrong_in_one_sentence(tmp_path: Path, capsys: Any, wrong: list[str], sentence: str) -> None:
    write_rows(tmp_path / "in.jsonl", [{**row, "answer": "x"} for row in ROWS])
    arguments = config(tmp_path, "http://127.0.0.1:9/v1")
    if wrong[0] == "--data":
        wrong = ["--data", "{class_path: VerifiableDataModule, init_args: {train: " + str(tmp_path / "in.jsonl") + "}}"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *wrong])
    assert stop.value.code == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "label.yaml"]


def test_nothing_to_fit(tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(SystemExit):
        main(["fit", *config(tmp_path, "http://127.0.0.1:9/v1")[1:]])
    assert "error: LabelModule has no training_step, so there is nothing to fit" in capsys.readouterr().err


def test_summary_of_nothing_given() -> None:
    records = [{"row": 0, "uid": "u", "given": None, "counts": {"comparisons": 1, "invalid": 1}, "label": None}]
    assert summarise_labels(records) == {"comparisons": 1, "rows": 0, "ties": 0, "invalid": 1}
