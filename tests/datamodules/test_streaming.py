"""Streamed rows: each is read once a pass for any ranks and workers, packed in order, and resumed exactly."""

import json
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from programs import run_ranks

from datamodules import InstructionDataModule
from datamodules.loaders.stream_loader import Pieces, Place
from datamodules.streaming import StreamingDataModule
from modules import SFTModule

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def short_passes(monkeypatch) -> None:
    """Shorten the 5 seconds that ``datasets`` waits behind every pass over Parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write three files of seven rows; some rows have a column that others lack."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in range(3):
        rows = [
            {"prompt": f"{file}{row}=", "completion": f"{'x' * (row + 1)}{file}"} | ({"extra": 1} if row == 2 else {})
            for row in range(7)
        ]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def stream(path: Path | str, **settings) -> StreamingDataModule:
    settings = {"steps_per_epoch": 4, "batch_size": 2, "shuffle_buffer": 5, "max_length": 32, "chat": False} | settings
    return StreamingDataModule(SFTModule("tiny").tokenizer, str(path), **settings)


def rows_of(data: StreamingDataModule, share: int, shares: int, number: int) -> list[str]:
    return [
        json.loads(row.columns["text"])["prompt"]
        for _, _, row in islice(Pieces(data, 0, 1).numbered(share, shares), number)
    ]


@pytest.mark.parametrize("shares", [1, 3, 4])  # whole files for three, every fourth row for four
def test_a_pass_reads_every_row_once_over_all_shares(folder, shares):
    data = stream(folder)
    sizes = {1: [21], 3: [7, 7, 7], 4: [6, 5, 5, 5]}[shares]
    first = Counter(prompt for share, size in enumerate(sizes) for prompt in rows_of(data, share, shares, size))
    assert first == Counter(f"{file}{row}=" for file in range(3) for row in range(7))


def test_passes_differ_in_order_and_not_in_content(folder):
    twice = rows_of(stream(folder), 0, 1, 42)
    assert sorted(twice[:21]) == sorted(twice[21:]) and twice[:21] != twice[21:]
    assert twice == rows_of(stream(folder), 0, 1, 42)
    assert twice != rows_of(stream(folder, seed=1), 0, 1, 42)


def test_a_place_is_where_one_goes_on(tmp_path):
    """Texts are split and packed. Every prefix with its continuation gives the same rows as a single reading."""
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": chr(97 + number) * (4 + 9 * (number % 4))}) + "\n" for number in range(9))
    )
    data = stream(path, packing=True, max_length=12)
    reader = Pieces(data, 0, 1)

    def read(place, number):
        return [([row.ids for row in rows], behind) for rows, behind in islice(reader.batches(place, 0, 1), number)]

    whole = read(Place(), 12)
    assert all(len(ids) <= 12 for rows, _ in whole for ids in rows)
    for number in range(1, 12):
        assert read(whole[number - 1][1], 12 - number) == whole[number:]
    end = data.tokenizer.eos_token_id
    texts = [json.loads(row.columns["text"])["text"] for _, _, row in islice(reader.numbered(0, 1), 8)]
    expected = Counter(token for text in texts for token in [*data.tokenizer(text).input_ids, end])
    found = Counter(token for rows, _ in whole for ids in rows for token in ids)
    assert not {
        token: number for token, number in expected.items() if found[token] < number
    }  # nothing of the first texts is lost


class Seen(Callback):
    """Keeps the rows that were trained on."""

    def __init__(self) -> None:
        self.batches: list[tuple[list, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append((batch["input_ids"].tolist(), float(batch["denominator"])))


def fit(
    data: StreamingDataModule, folder: Path, resume: Path | None = None, accumulate: int = 2
) -> tuple[list, torch.Tensor]:
    seed_everything(0)
    module, seen = SFTModule("tiny", optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)), Seen()
    keeper = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer = Trainer(**QUIET, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[seen, keeper])
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return seen.batches, torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


@pytest.mark.parametrize(("workers", "packing"), [(0, False), (2, True)])
def test_resuming_is_bitwise_inside_an_epoch_and_between(folder, tmp_path, workers, packing):
    def data():
        return stream(folder, num_workers=workers, packing=packing, max_length=16)

    batches, weights = fit(data(), tmp_path / "whole")
    assert len(batches) == 16  # 2 epochs x 4 steps x 2 micro-batches
    for step in (1, 4, 6):
        (saved,) = (tmp_path / "whole").glob(f"step={step}.ckpt")
        rest, same = fit(data(), tmp_path / f"from{step}", saved)
        assert rest == batches[2 * step :]
        assert torch.equal(same, weights)


def test_the_denominator_counts_the_whole_step(folder, tmp_path):
    data = stream(folder)
    batches, _ = fit(data, tmp_path)
    ends = data.tokenizer.eos_token_id
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first[1] == second[1]
        # a prompt is three bytes, a completion x..x and a digit and the end
        supervised = sum(len([token for token in ids[: ids.index(ends) + 1]]) - 3 for ids in first[0] + second[0])
        assert first[1] == supervised


def test_bad_and_long_rows_are_counted(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "bad", "completion": ""},
        {"prompt": "long" * 20, "completion": "y"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = stream(path, on_bad_row="drop", shuffle_buffer=1, batch_size=1)
    fit(data, tmp_path / "run")
    assert (
        data.bad["train"] == data.dropped["train"] == 15
    )  # 16 micro-batches of the one good row, which comes first in a pass
    with pytest.raises(ValueError, match=r"mixed.jsonl:2: the completion is empty"):
        fit(stream(path, shuffle_buffer=1), tmp_path / "run2")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "there are no files that end in"), ("", "files of several kinds"), ("odd.jsonl", "looked for")],
)
def test_what_cannot_be_streamed_ends_in_a_sentence(tmp_path, name, message):
    (tmp_path / "odd.jsonl").write_text('{"strange": "1"}\n')
    (tmp_path / "table.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path / name).setup("fit")


def test_more_workers_than_rows_is_refused(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(ValueError, match="fewer rows than the 2 ranks and workers"):
        rows_of(stream(tmp_path / "one.jsonl"), 1, 2, 1)


def test_files_say_what_they_say_elsewhere(tmp_path):
    """Numbers, dates and NA inside text stay text, as in a file that is read whole."""
    (tmp_path / "t.csv").write_text("prompt,completion\n1+1=,2\n1+2=,NA\n")
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "a", "completion": "2020-01-01"}\n\n{"prompt": "b", "completion": "x", "input": null}\n'
    )
    for name in ("t.csv", "d.jsonl"):
        data = stream(tmp_path / name, shuffle_buffer=1, batch_size=1)
        whole = InstructionDataModule(data.tokenizer, str(tmp_path / name), chat=False)
        whole.setup("fit")
        rows = [rows[0].ids for rows, _ in islice(Pieces(data, 0, 1).batches(Place(), 0, 1), 2)]
        assert rows == [row.ids for row in whole.train_rows]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    texts = [
        rows[0].ids
        for rows, _ in islice(
            Pieces(stream(tmp_path / "lines.txt", shuffle_buffer=1, batch_size=1), 0, 1).batches(Place(), 0, 1), 2
        )
    ]
    assert [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts] == ["one", "two"]


def test_a_stream_of_nothing_ends(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "abc", "completion": "x" * 100}) + "\n")
    with pytest.raises(ValueError, match="none of the rows of share 0 is left: 0 bad, 2 too long"):
        next(Pieces(stream(path), 0, 1).batches(Place(), 0, 1))


@pytest.mark.parametrize(("name", "changes"), [("workers", {"num_workers": 2}), ("accumulate", {"accumulate": 3})])
def test_resuming_otherwise_is_refused(folder, tmp_path, name, changes):
    fit(stream(folder), tmp_path / "run")
    accumulate = changes.pop("accumulate", 2)
    with pytest.raises(
        ValueError,
        match=f"2 accumulate and this run has 1 ranks, {changes.get('num_workers', 0)} workers, {accumulate} accumulate",
    ):
        fit(stream(folder, **changes), tmp_path / "again", tmp_path / "run" / "step=2.ckpt", accumulate)


def warnings_of(data: StreamingDataModule, state: dict) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
        data.load_state_dict(state)
    return [str(warning.message) for warning in caught if "training rows" in str(warning.message)]


def test_other_files_are_told(folder, tmp_path):
    fit(stream(folder), tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "step=2.ckpt", weights_only=True)["StreamingDataModule"]
    assert warnings_of(stream(folder), saved) == []
    moved = folder.rename(tmp_path / "moved")
    assert warnings_of(stream(moved), saved) == []
    with (moved / "1.jsonl").open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    (said,) = warnings_of(stream(moved), saved)
    assert said.startswith("the training rows are not those that the checkpoint was trained on; the run goes on")
    assert warnings_of(stream(moved), {"ranks": saved["ranks"]}) == []  # of an earlier version


RANKS = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.streaming import StreamingDataModule
from modules import SFTModule


class Seen(Callback):
    batches = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append([batch["input_ids"].tolist(), float(batch["denominator"]), int(batch["loss_mask"].sum())])


def fit(folder, checkpoint=None):
    seed_everything(0)
    module, Seen.batches = SFTModule("tiny"), []
    data = StreamingDataModule(module.tokenizer, "rows", steps_per_epoch=3, batch_size=2, shuffle_buffer=5, chat=False)
    keeper = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}", enable_version_counter=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, callbacks=[Seen(), keeper], logger=False,
                      enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    Path(f"{folder}.rank{trainer.global_rank}.json").write_text(json.dumps(Seen.batches))


if __name__ == "__main__":
    fit("whole")
    fit("resumed", "whole/step=4.ckpt")
"""


def test_two_ranks_read_different_rows_and_resume(folder):
    (folder.parent / "ranks.py").write_text(RANKS)
    run_ranks("ranks.py", folder=folder.parent)
    whole, resumed = (
        [json.loads((folder.parent / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("whole", "resumed")
    )
    rows = [[tuple(ids) for batch, _, _ in rank for ids in batch] for rank in whole]
    assert len(rows[0]) == len(rows[1]) == 12 and not set(rows[0][:7]) & set(rows[1][:7])  # within a pass
    for (_, first, mine), (_, second, others) in zip(*whole, strict=True):
        assert first == second == mine + others
    assert resumed == [rank[4:] for rank in whole]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_left_out_are_told(tmp_path, caplog, workers):
    deep, half = "[" * 200 + "]" * 200, '{"prompt": "\\ud83d", "completion": "a"}'
    good = ['{"prompt": "1+1=", "completion": "2"}', '{"prompt": "1+2=", "completion": "3"}']
    lines = [*good, deep, half, '{"prompt": "long", "completion": "' + "x" * 99 + '"}']
    (tmp_path / "rows.NDJSON").write_text("\n".join(lines))
    data = stream(tmp_path / "rows.NDJSON", on_bad_row="drop", steps_per_epoch=1, shuffle_buffer=1, num_workers=workers)
    with caplog.at_level("INFO"):
        Trainer(**QUIET, max_steps=3, max_epochs=3).fit(SFTModule("tiny"), datamodule=data)
    told = [text for text in caplog.messages if "bad" in text]
    assert told[-1].endswith("= 6 used + 2 too long + 4 bad"), told  # three epochs of a batch of two
    if not workers:  # else the worker's own log says it
        assert "nested more than 100 deep" in told[0]
    for line, message in ((deep, "nested more than 100 deep"), (half, "half of a character")):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            stream(tmp_path / "bad.jsonl").setup("fit")


def test_folders_tables_and_configs_are_read_as_elsewhere(tmp_path, hub_clone):
    for name in ("train-0.tsv", "test-0.tsv"):
        (tmp_path / name).write_text(f'prompt\tcompletion\n"{name}"=\t2\n')
    data = stream(tmp_path, batch_size=1)
    _, _, row = next(Pieces(data, 0, 1).numbered(0, 1))
    assert row.columns == {"prompt": '"train-0.tsv"=', "completion": "2"}
    _, _, row = next(Pieces(stream("org/sums:socratic"), 0, 1).numbered(0, 1))
    assert row.columns == {"question": "socratic train", "answer": "2"}
    with pytest.raises(ValueError, match=r"org/sums:nosuch: .*nosuch.* not found"):
        stream("org/sums:nosuch").setup("fit")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_first_bad_row_is_named_by_file_and_row(tmp_path, caplog, kind):
    """Whatever the order of the stream, and with empty lines between."""
    for file, completions in (("a", ["1", "2", "3"]), ("b", ["4", "", "6"])):
        rows = [{"prompt": f"{file}{index}=", "completion": text} for index, text in enumerate(completions)]
        path = tmp_path / f"{file}.{kind}"
        if kind == "jsonl":
            path.write_text(
                "\n".join(json.dumps(row) for row in rows[:1]) + "\n\n" + "\n".join(map(json.dumps, rows[1:]))
            )
        elif kind == "csv":
            path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    place = "b.jsonl:3" if kind == "jsonl" else f"b.{kind}#1"
    data = stream(tmp_path, on_bad_row="drop", batch_size=1, steps_per_epoch=8, max_length=99)
    with caplog.at_level("INFO"):
        fit(data, tmp_path / "run")
    assert f"train: bad rows are left out, the first: {tmp_path}/{place}: the completion is empty" in caplog.text
    with pytest.raises(ValueError, match=f"{place}: the completion is empty"):
        fit(stream(tmp_path, batch_size=1, max_length=99), tmp_path / "run2")
