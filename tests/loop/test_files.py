"""Checkpoints are whole or not there: a full disk, damage, a folder without write access."""

import errno
import json
import os
import random
import re
import resource
import shutil
import tempfile
from pathlib import Path

import full_disk
import numpy
import pytest
import torch
from fixed_runs import CHECKPOINTS, fit, same
from lightning.pytorch import Callback, Trainer
from programs import run_program

from callbacks.writers.output_files import append_lines, open_whole_lines, write_whole
from datamodules import InstructionDataModule, NumberTexts
from modules import SFTModule
from modules.trainer.saving import WholeCheckpoints, add_name, is_whole, keep_checkpoints_whole


def test_a_flipped_bit_or_zeros_anywhere_are_refused_or_harmless(tmp_path):
    file = tmp_path / "last.ckpt"
    weights = {"weight": torch.rand(40_000), "few": torch.rand(3), "step": 7}
    WholeCheckpoints().save_checkpoint(weights, file)
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for trial in range(300):
        damaged = bytearray(whole)
        place = draw.randrange(len(whole))
        if trial % 3:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            damaged[place : place + 4096] = bytes(len(damaged[place : place + 4096]))
        file.write_bytes(damaged)
        if is_whole(file):
            assert same(WholeCheckpoints().load_checkpoint(file), weights), place
        else:
            with pytest.raises(ValueError, match="is damaged"):
                WholeCheckpoints().load_checkpoint(file)
            refused += 1
    assert refused > 290


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, capsys):
    fit("sft", tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    damaged = bytearray((folder / "last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "last.ckpt").write_bytes(damaged)
    with pytest.raises(SystemExit):
        fit("sft", tmp_path / "again", "--ckpt_path", str(folder / "last.ckpt"))
    error = capsys.readouterr().err
    assert (
        f"'{folder / 'last.ckpt'}' is damaged" in error
        and f"the newest whole one beside it is '{folder}/step5.ckpt'" in error
    )
    with pytest.raises(SystemExit):
        fit("sft", tmp_path / "address", "--ckpt_path=http://127.0.0.1:1/last.ckpt")
    assert "is an address; download the file and name it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_old_checkpoints_are_whole(name):
    assert is_whole(CHECKPOINTS / f"{name}.ckpt")


def test_a_disk_that_fills_up_leaves_the_older_files_and_no_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no temporary folder"))
    step, limits = SFTModule.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self, batch, batch_idx):
        if self.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file can grow beyond it
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", filling)
    try:
        with pytest.raises(SystemExit) as stop:
            fit("sft", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "step3.ckpt cannot be written: File too large; earlier files are as they were" in error
    files = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert files == ["last.ckpt", "step1.ckpt", "step2.ckpt"]
    assert all(is_whole(tmp_path / "run/checkpoints" / name) for name in files)


def test_a_rest_of_a_killed_save_goes_with_the_next_one(tmp_path):
    (tmp_path / ".step3.ckpt.partial").write_bytes(b"half")
    WholeCheckpoints().save_checkpoint({"step": 4}, tmp_path / "step4.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step4.ckpt"]


def test_last_is_a_second_name_of_the_newest_file_which_is_written_once(tmp_path, monkeypatch):
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda checkpoint, out: (written.append(out.name), save(checkpoint, out)))
    newest = {"dirpath": "checkpoints", "every_n_train_steps": 1, "save_last": "link", "enable_version_counter": False}
    saver = {"class_path": "ModelCheckpoint", "init_args": {**newest, "filename": "{step}"}}
    (tmp_path / "newest.yaml").write_text(json.dumps({"trainer": {"callbacks": [saver]}}))
    fit("sft", tmp_path / "run", "--config", str(tmp_path / "newest.yaml"))
    folder = tmp_path / "run/checkpoints"
    assert len(written) == 6  # one a step
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=6.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "step=6.ckpt") and not (folder / "last.ckpt").is_symlink()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (folder / "step=6.ckpt").unlink()
    for place in ("run", "copy"):
        assert torch.load(tmp_path / place / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_a_name_goes_to_the_newer_file_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new, last = (tmp_path / name for name in ("old.ckpt", "new.ckpt", "last.ckpt"))
    old.write_text("old")
    new.write_text("new")
    os.utime(old, ns=(1, 1))
    add_name(new, last)
    add_name(new, last)  # again
    add_name(old, last)
    assert last.read_text() == "new"
    os.utime(old, ns=(2**61, 2**61))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse(errno.EIO))
        patch.setattr(shutil, "copyfile", refuse(errno.EIO))
        with pytest.raises(OSError, match=r"last.ckpt cannot be written: Input/output error"):
            add_name(old, last)
    assert last.read_text() == "new"
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse(errno.EPERM))  # a file system without hard links
        add_name(old, last)
    assert last.read_text() == "old" and not last.samefile(old)
    assert {path.name for path in tmp_path.iterdir()} == {"old.ckpt", "new.ckpt", "last.ckpt"}


def refuse(number):
    def refused(*names):
        raise OSError(number, os.strerror(number))

    return refused


def test_an_own_way_to_write_checkpoints_is_kept(tmp_path):
    class Own(WholeCheckpoints):
        pass

    trainer, plain = (Trainer(accelerator="cpu", logger=False, plugins=own) for own in ([Own()], []))
    for each in (trainer, plain):
        keep_checkpoints_whole(each)
    assert type(trainer.strategy.checkpoint_io) is Own and type(plain.strategy.checkpoint_io) is WholeCheckpoints


def write_rows(path):
    with open_whole_lines(path) as file:
        append_lines(file, ["x" * 1000] * 40)


@pytest.mark.parametrize("write", [write_rows, lambda path: write_whole(path, "x" * 40_000)], ids=["rows", "whole"])
def test_a_writer_names_its_file_when_the_disk_is_full(tmp_path, write):
    write_whole(tmp_path / "rows.jsonl", '"old"\n')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rows.jsonl cannot be written: File too large; earlier files are as they"):
            write(tmp_path / "rows.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    open_whole_lines(tmp_path / "rows.jsonl").close()  # removes half a line
    assert {line[:4] for line in (tmp_path / "rows.jsonl").read_text().splitlines()} <= {'"old', '"xxx'}
    assert (tmp_path / "rows.jsonl").read_text().startswith('"old"\n')
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


FULL = {  # what is written -> the file that the run names, and those that it leaves
    "checkpoint": (r"\S+/checkpoints/epoch=1-step=8.ckpt", {"epoch=0-step=4.ckpt"}),
    "export": ("run/export", {"model.safetensors", "config.json", ".written-by-export"}),
    "csv": ("a file of the run", {"metrics.csv"}),
    "tensorboard": ("a file of the run", {"config.yaml"}),
    "audit": ("run/audit.json", set()),
    "reference": (r"\S+/reference/\w+.safetensors", set()),
    "predictions": ("run/predictions.jsonl", set()),
    "labels": ("run/.preferences.jsonl.rank0", {".preferences.jsonl.rank0"}),  # from which the next run goes on
    "judge": (r"cache/\w+.json", set()),
}


def test_every_writer_names_its_file_on_a_full_disk_and_leaves_the_older_ones(tmp_path):
    done = run_program(full_disk.__file__, str(tmp_path), folder=tmp_path)
    if done.returncode == 77:
        pytest.skip("this kernel lets no process mount a disk of its own")
    assert done.returncode == 0, done.stderr[-3000:]
    found = {case["name"]: case for case in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == FULL.keys()
    for name, (file, left) in FULL.items():
        case = found[name]
        (error,) = (line for line in case["said"] if line.startswith("error"))
        reason = "cannot be (read or )?written: .*No space left on device.*; earlier files are as they were"
        assert case["status"] == 1 and re.fullmatch(f"error: {file} {reason}", error), error
        assert not any("Traceback" in line for line in case["said"]), name
        files = {Path(each).name for each in case["files"]}
        assert left <= files and case["broken"] == [], name
        assert {each for each in files if each.startswith(".")} <= left, name


class Keeps(Callback):
    def state_dict(self):
        return {"best": numpy.float64(1.0)}


def test_a_checkpoint_that_no_resume_would_load_is_refused_when_it_is_first_written(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, callbacks=[Keeps()], **quiet)
    module = SFTModule("tiny")
    with pytest.raises(ValueError, match="could never be loaded again: .* that of Keeps has numpy.float64"):
        trainer.fit(module, InstructionDataModule(module.tokenizer, NumberTexts(20), batch_size=4, chat=False))
    assert not list(tmp_path.rglob("*.ckpt"))
