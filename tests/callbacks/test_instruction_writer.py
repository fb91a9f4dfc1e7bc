"""Growing seed tasks end to end: a real server writes tasks, killed runs continue, and SFT reads the result."""

import json
import random
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from programs import Program

from callbacks.writers.instruction_writer import InstructionWriter
from datamodules.instruction import InstructionDataModule
from datamodules.predict.seed_tasks import SeedTasksDataModule
from modules import SFTModule
from modules.__main__ import main
from modules.networks.tiny import tiny_tokenizer
from modules.predict.self_instruct import SelfInstructModule
from modules.rewards.chat.clients import HttpChat, LocalChat

ROOT = Path(__file__).parents[2]
SEEDS = [{"instruction": f"seed task number {n}", "instances": [{"input": "", "output": f"o{n}"}]} for n in range(9)]


def author(question: str) -> str:
    """Write three tasks that depend on the question, one about a picture, and one that is cut off."""
    draw = random.Random(zlib.crc32(question.encode()))
    items = [" ".join(f"w{draw.randrange(500)}" for _ in range(6)) for _ in range(3)] + [
        "Describe this picture in words."
    ]
    whole = [
        f"{n}. Instruction: {text}\n{n}. Input:\nin {n}\n{n}. Output:\nout ü {n}\n###\n"
        for n, text in enumerate(items, 4)
    ]
    return "###\n" + "".join(whole) + "8. Instruction: and so"


def seeds(folder: Path, rows: list[dict[str, Any]] = SEEDS) -> Path:
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "seeds.jsonl"


def grow(
    file: Path,
    client: Any,
    num: int = 20,
    options: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] = SEEDS,
    **settings: Any,
) -> None:
    module = SelfInstructModule(client, num, **{"requests_per_round": 2, **settings})
    data = SeedTasksDataModule(str(seeds(file.parent, rows) if file.parent.is_dir() else file))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **(options or {})}
    Trainer(accelerator="cpu", devices=1, callbacks=[InstructionWriter(str(file))], **options).predict(module, data)


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    report = json.loads(file.with_name(f"{file.name}.report.json").read_text())
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]], report


def test_tasks_a_report_and_nothing_else(tmp_path: Path, chat_server: Any, caplog: Any) -> None:
    server = chat_server(author)
    file = tmp_path / "out.jsonl"
    grow(file, HttpChat(server.url, "m", prices=(1000.0, 0.0)))
    rows, report = read(file)
    # 3 of the 5 tasks of each answer are kept, 6 a round, until there are 20: 4 rounds of 2 requests with 100 prompt
    # tokens, 1000 a million
    assert len(rows) == 24 and len(server.requests) == 8
    assert list(rows[0]) == ["instruction", "input", "output", "most_similar", "similarity"]
    assert (rows[0]["input"], rows[0]["output"]) == ("in 4", "out ü 4")
    expected = {
        "instructions": 24,
        "tasks": 40,
        "requests": 8,
        "rejected/blacklist": 8,
        "rejected/unfinished": 8,
        "client/requests": 8,
        "client/cost": 0.8,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected)
    assert sum(value for name, value in report.items() if name.startswith("rejected/")) == 16
    assert "instructions: round 2: 12 of 20" in caplog.text
    assert (
        f"instructions: {file}: 24 kept of 40 tasks from 8 requests, 8 unfinished, 8 blacklist, cost 0.80"
        in caplog.text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.report.json", "seeds.jsonl"]
    data = InstructionDataModule(tiny_tokenizer(), str(file))
    data.setup("fit")
    assert len(data.train_rows) == 24


def test_a_run_that_stopped_goes_on_and_asks_nothing_twice(tmp_path: Path, chat_server: Any, caplog: Any) -> None:
    calm, file = tmp_path / "calm.jsonl", tmp_path / "out.jsonl"
    grow(calm, HttpChat(chat_server(author).url, "m"))
    server = chat_server(author)
    server.plan = [200] * 5 + [400]  # two rounds, then a refusal within the third
    with pytest.raises(ValueError, match="refused the request with status 400: no"):
        grow(file, HttpChat(server.url, "m", concurrency=1))
    assert not file.exists()
    with (tmp_path / ".out.jsonl.rounds").open("ab") as half:
        half.write(b'{"requests": 2, "acc')  # as after a power cut
    grow(file, HttpChat(server.url, "m"), requests_per_round=4)  # 2 x 2 + 4 requests
    assert "instructions: resuming with the 12 that an earlier run kept" in caplog.text
    assert len(server.requests) == 6 + 4
    assert file.read_bytes() == calm.read_bytes()
    assert read(file)[1] == read(calm)[1]  # of the broken round nothing is known
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_seeds_or_settings_are_refused(tmp_path: Path, chat_server: Any) -> None:
    server, file = chat_server(author, plan=[200, 200, 400]), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="refused"):
        grow(file, HttpChat(server.url, "m", concurrency=1))
    sentence = r"\.out\.jsonl\.rounds was started with other seeds or settings; delete it, or use those seeds"
    for model, settings in (
        ("other", {}),
        ("m", {"seed": 1}),
        ("m", {"num_in_context": 2}),
        ("m", {"max_similarity": 0.5}),
        ("m", {"rows": SEEDS[1:]}),
    ):
        with pytest.raises(ValueError, match=sentence):
            grow(file, HttpChat(server.url, model), **settings)
    assert len(server.requests) == 3


def test_too_few_are_written_and_another_start_goes_on(tmp_path: Path, chat_server: Any, caplog: Any) -> None:
    file, server = tmp_path / "out.jsonl", chat_server(lambda question: author("always the same"))
    grow(file, HttpChat(server.url, "m"), patience=3)
    said = "3 kept of 30 tasks from 6 requests, 6 unfinished, 6 blacklist, 15 duplicate; 17 are missing, the last 4 requests gave no new task; start"
    assert f"instructions: {file}: {said} again to continue from here" in caplog.text
    assert len(read(file)[0]) == 3
    server.rule = author
    grow(file, HttpChat(server.url, "m"), patience=3)
    rows, report = read(file)
    assert (len(rows), report["requests"]) == (21, 6 + 6)
    assert not (tmp_path / ".out.jsonl.rounds").exists()


def test_a_local_model_that_writes_nothing_usable_ends_in_one_sentence(tmp_path: Path, chat_server: Any) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    with pytest.raises(
        ValueError,
        match=r"InstructionWriter: 0 kept of 0 tasks from 2 requests, 2 failed, so .*out\.jsonl is not written; use a model",
    ):
        grow(
            file, LocalChat("tiny", max_completion_length=4), patience=1
        )  # the request is longer than the tiny model's positions
    with pytest.raises(
        ValueError, match=r"0 kept of 4 tasks from 4 requests, 4 unfinished, so .*out\.jsonl is not written"
    ):
        grow(file, HttpChat(chat_server(lambda question: "hm").url, "m"), patience=4)
    assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "seeds.jsonl"]


def test_refusals(tmp_path: Path, chat_server: Any) -> None:
    client = HttpChat(chat_server(author).url, "m")
    grow(tmp_path / "out.jsonl", client, options={"fast_dev_run": True})
    assert [path.name for path in tmp_path.iterdir()] == ["seeds.jsonl"]
    with pytest.raises(ValueError, match="is a folder; name a file, such as"):
        InstructionWriter(str(tmp_path)).setup(
            Trainer(logger=False, accelerator="cpu"), SelfInstructModule(client, 1), "predict"
        )
    with pytest.raises(
        ValueError, match="InstructionWriter: SFTModule generates no tasks; set model to SelfInstructModule"
    ):
        InstructionWriter(str(tmp_path / "x")).setup(
            Trainer(logger=False, accelerator="cpu"), SFTModule("tiny"), "predict"
        )


def test_the_shipped_config_killed_and_started_again(
    tmp_path: Path, chat_server: Any, monkeypatch: Any, caplog: Any
) -> None:
    seeds(tmp_path)
    server = chat_server(author, plan=[200] * 4 + [600.0])  # the third round of two hangs
    more = [
        "--trainer.enable_progress_bar=false",
        "--data.train=seeds.jsonl",
        "--model.num_instructions=30",
        "--model.requests_per_round=2",
        f"--model.client.base_url={server.url}",
    ]
    arguments = ["predict", "--config", str(ROOT / "configs/self_instruct.yaml"), *more]
    with Program("-m", "modules", *arguments, folder=tmp_path) as program:
        end = time.monotonic() + 90
        while len(server.requests) < 6 and program.process.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        program.process.kill()
    file = tmp_path / "runs/self_instruct/instructions.jsonl"
    assert len(server.requests) == 6 and not file.exists()
    monkeypatch.chdir(tmp_path)
    main(arguments)
    assert "instructions: resuming with the 12 that an earlier run kept" in caplog.text
    resumed = file.read_bytes()
    assert len(server.requests) == 6 + 6  # 30 = 12 + 3 rounds of 6
    main(arguments)  # nothing is left to go on with: from the beginning
    assert file.read_bytes() == resumed
    assert len(server.requests) == 12 + 10
