"""One setting names a run's folder, what a fit prints at its end works, and a stopped run can be resumed."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from few_rows import few_rows
from programs import Program, run_program
from safetensors.torch import load_file

from modules import GRPOModule, SFTModule
from modules.__main__ import main
from modules.cli.run_folder import RunFolder, find_last_checkpoint
from modules.trainer.stopping import requeue_if_told

ROOT = Path(__file__).parents[2]
SFT = ["--config", few_rows("sft"), "--out=runs/sft", "--trainer.accelerator=cpu"]
FEW = ["--data.train.num_examples=24", "--data.val.num_examples=4", "--data.batch_size=4", "--trainer.max_epochs=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)).split(".out.")[0] for path in Path(folder).rglob("*") if path.is_file()}


def test_out_holds_all_of_a_run_and_a_second_run_leaves_it_alone(capsys, caplog, recwarn):
    main(["fit", *SFT, *FEW, "--out", "mine/first"])
    said = capsys.readouterr().out
    found = files("mine/first")
    assert {"config.yaml", "events", "checkpoints/last.ckpt", "export/config.json", "data_report.json"} <= found
    assert [path.name for path in Path().iterdir()] == ["mine"]
    before = {path: path.stat().st_mtime_ns for path in Path("mine/first").rglob("*")}
    main(["fit", *SFT, *FEW, "--out", "mine/first", "--seed_everything=1"])
    assert "out: mine/first holds a run; this one goes to mine/first-2" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path("mine/first").rglob("*")} == before
    assert files("mine/first-2") == found - {name for name in found if name.startswith("checkpoints/epoch")} | {
        name for name in files("mine/first-2") if name.startswith("checkpoints/epoch")
    }
    config = yaml.safe_load(Path("mine/first-2/config.yaml").read_text())
    assert (config["out"], config["seed_everything"]) == ("mine/first-2", 1)

    assert re.search(r"^step 1 of 12: loss [\d.]+, \d+ s left$", said, flags=re.MULTILINE)  # no terminal, so no bar
    assert re.search(r"^validation at step 6: val/\S+ [\d.]+.*, val/loss [\d.]+", said, flags=re.MULTILINE)
    ending = said.splitlines()[-3:]
    assert re.match(
        r"step 12: val/mean_token_accuracy [\d.]+, val/loss [\d.]+, .*; model: mine/first/export$", ending[0]
    )
    ask, curves = (line.partition(": ")[2] for line in ending[1:])
    assert ask.endswith("-m modules chat --policy mine/first/export --form text")
    assert curves.endswith("-m tensorboard.main --logdir mine/first")
    python, *words = shlex.split(ask)
    answered = run_program(*words, folder=Path(), input="39+54=\n")
    assert answered.returncode == 0, answered.stderr
    assert os.path.samefile(shutil.which(python) or "", sys.executable)
    assert len(answered.stdout.splitlines()) >= 1

    main(["validate", *SFT, *FEW[1:2], "--ckpt_path", "mine/first-2", "--out", "mine/first"])
    assert "weights: mine/first-2/checkpoints/last.ckpt, step 12" in caplog.text
    assert not [found for found in recwarn if "training rows" in str(found.message)]  # on which nothing goes on
    assert "validate/events" in files("mine/first-2")
    assert {path: path.stat().st_mtime_ns for path in Path("mine/first").rglob("*")} == before


def test_the_last_line_tells_of_which_step_its_numbers_are(capsys):
    """A step has 4 rows and an epoch 6 steps. The fit validates at step 4, ends at step 6, and has nothing left to do."""
    once = [*SFT, *FEW[:-1], "--trainer.val_check_interval=4", "--trainer.max_epochs=1"]
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 6}}
    once += [f"--trainer.callbacks={json.dumps([checkpoint, {'class_path': 'Export'}])}"]
    main(["fit", *once])
    assert re.search(
        r"^step 6; validation at step 4: val/\S+ [\d.]+, .*; model: ", capsys.readouterr().out, re.MULTILINE
    )
    main(["fit", *once, "--ckpt_path=runs/sft"])
    said = capsys.readouterr().out
    assert "the run was complete at step 6; raise trainer.max_epochs to train on; model: runs/sft/export" in said
    assert re.search(r"^ask it: .* --form text$", said, re.MULTILINE)


def test_a_fast_dev_run_and_a_refused_run_leave_nothing(capsys):
    main(["fit", *SFT, *FEW, "--trainer.fast_dev_run=1"])
    assert list(Path().iterdir()) == []
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW, "--trainer.precision=bf16-true"])
    assert files(".") == set()
    Path("runs").rmdir()
    Path("runs").write_text("a file")
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW])
    assert (
        "error: out: the folder 'runs/sft' cannot be written: Not a directory; name another" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW, "--out=mine", "--trainer.callbacks=Export", "--trainer.callbacks.folder=runs/export"])
    assert "error: Export: runs/export cannot be written" in capsys.readouterr().err
    saver = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath"]
    for folder, said in (("runs", "is a file; name a folder"), ("runs/x", "cannot be written ({}: Not a directory)")):
        with pytest.raises(SystemExit):
            main(["fit", *SFT, *FEW, "--out=mine", *saver, folder])
        told, here = capsys.readouterr(), Path("runs").absolute()
        assert f"error: ModelCheckpoint: {here.parent / folder} {said.format(here)}" in told.err
        assert "step 1" not in told.out  # before the first step


REFUSES = """
import shutil
from lightning.pytorch import Callback

class Refuses(Callback):
    def __init__(self, breaks: bool):
        self.breaks = breaks

    def on_train_start(self, trainer, pl_module):
        if self.breaks:
            shutil.rmtree(trainer.default_root_dir)
        trainer.logger.experiment.add_text("note", "x" * 300_000)  # which takes TensorBoard a while to write
        raise ValueError("these rows cannot be learned")
"""


@pytest.mark.parametrize("breaks", [False, True])
def test_a_refusal_keeps_its_sentence_whatever_becomes_of_the_logs(tmp_path, breaks):
    """TensorBoard writes what it still holds before the folder goes, and may not be able to."""
    (tmp_path / "refusing.py").write_text(REFUSES)
    callback = f"--trainer.callbacks={{class_path: refusing.Refuses, init_args: {{breaks: {breaks}}}}}"
    end = run_program("-m", "modules", "fit", *SFT, *FEW, callback, folder=tmp_path)
    said = [line for line in end.stderr.splitlines() if line.startswith("error") or not breaks and "Errno" in line]
    assert (end.returncode, said) == (1, ["error: these rows cannot be learned"]), end.stderr
    assert "Traceback" not in end.stderr and not Path("runs/sft").exists()


def test_two_runs_at_once_never_share_a_folder():
    other = RunFolder(Path("runs/x"))
    mine = RunFolder(Path("runs/x"))
    assert (other.path, mine.path) == (Path("runs/x"), Path("runs/x-2"))
    with pytest.raises(ValueError, match="out: 'runs/x' is in use by another run"):
        RunFolder(Path("runs/x"), resumes=True)
    assert other._lock is not None
    other._lock.close()  # as the end of a process does that was killed
    assert Path("runs/x/.lock").exists()
    again = RunFolder(Path("runs/x"))
    assert again.path == Path("runs/x")
    again.close()
    mine.close()
    Path("runs/x/config.yaml").touch()
    assert RunFolder(Path("runs/x")).path == Path("runs/x-2")


def test_a_logger_by_one_word(capsys):
    main(["fit", *SFT, *FEW, "--logger=csv", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1"])
    first = Path("runs/sft/metrics.csv").read_text()
    assert "train/loss" in first
    steps = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--ckpt_path=runs/sft"]
    main(["fit", *SFT, *FEW, "--logger=csv", *steps])
    assert Path("runs/sft/metrics-1.csv").read_text() == first != Path("runs/sft/metrics.csv").read_text()
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW, "--logger=wandb"])
    assert "logger: wandb needs its package; install it with: pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signum", "method", "kind", "small"),
    [
        (signal.SIGINT, "sft", SFTModule, [*FEW, "--trainer.accumulate_grad_batches=2"]),
        (
            signal.SIGTERM,
            "grpo",
            GRPOModule,
            [
                "--out=runs/grpo",
                "--data.val=null",
                "--data.prompts_per_phase=2",
                "--model.num_generations=2",
                "--model.reward=RegexFormat",
                "--model.reward.pattern=.*[0-4].*",
                "--data.updates_per_phase=2",
                "--trainer.max_epochs=3",
                "--trainer.callbacks=null",
            ],
        ),
    ],
)
def test_a_run_that_is_told_to_stop_goes_on_bit_for_bit(monkeypatch, capsys, signum, method, kind, small):
    arguments = ["fit", "--config", few_rows(method), *small, "--trainer.logger=null"]
    main([*arguments, "--out=whole"])
    step, asked = kind.training_step, []

    def until_asked(self, batch, batch_idx):
        if self.global_step == 3 and not asked:
            asked.append(self.global_step)
            os.kill(os.getpid(), signum)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(kind, "training_step", until_asked)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out=stopped"])
    assert stop.value.code == 128 + signum
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("go on: "))
    assert torch.load("stopped/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not Path("stopped/export").exists()
    words = shlex.split(command)
    main(words[words.index("modules") + 1 :])
    whole, stopped = (load_file(f"{folder}/export/model.safetensors") for folder in ("whole", "stopped"))
    assert all(whole[name].equal(stopped[name]) for name in whole)
    assert not Path("stopped-2").exists()


def test_predict_says_whose_weights_it_uses(caplog):
    grpo = [
        "--config",
        few_rows("grpo"),
        "--trainer.callbacks=PredictionWriter",
        "--trainer.logger=null",
    ]
    small = [
        "--data.prompts_per_phase=2",
        "--model.num_generations=2",
        "--data.train.num_examples=4",
        "--data.val=null",
    ]
    main(["fit", *grpo[:3], *small, "--trainer.logger=null", "--trainer.callbacks=null", "--trainer.max_epochs=1"])
    main(["predict", *grpo, *small])
    assert (
        "weights: 'tiny-addition', as model.policy names them, without training by this run; those that the run in "
        "runs/tiny-grpo trained: --ckpt_path runs/tiny-grpo" in caplog.text
    )
    rows = [json.loads(line) for line in Path("runs/tiny-grpo/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    main(["predict", *grpo, *small, "--ckpt_path=runs/tiny-grpo"])
    assert "weights: runs/tiny-grpo/checkpoints/last.ckpt, step 1" in caplog.text


STOPPER = """
import os, signal
from lightning.pytorch import Callback

class Announce(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1 and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_job_of_slurm_is_requeued_and_goes_on(tmp_path):
    (tmp_path / "announces.py").write_text(STOPPER)
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "417", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    command = ["-m", "modules", "fit", *SFT, *FEW, "--data.val=null", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command += ["--data.batch_size=2", "--trainer.callbacks+=announces.Announce"]

    def live(**more: str) -> list[CompletedProcess[str]]:
        with socket.socket() as free, ExitStack() as stack:
            free.bind(("127.0.0.1", 0))
            here = {**os.environ, **job, **more, "MASTER_PORT": str(free.getsockname()[1])}
            free.close()
            ranks = [
                Program(*command, folder=tmp_path, environment={**here, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
                for rank in "01"
            ]
            for rank in ranks:
                stack.enter_context(rank)
            end = time.monotonic() + 120
            while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < end:
                if ranks[0].process.exitcode == 1:
                    break  # the other one waits for it in vain
                time.sleep(0.1)
            return [CompletedProcess(command, rank.process.exitcode, *rank.said()) for rank in ranks]

    first, other = live()
    assert (first.returncode, other.returncode) == (128 + signal.SIGUSR1, 0), first.stderr + other.stderr
    assert (tmp_path / "asked").read_text() == "requeue 417\n"
    assert torch.load("runs/sft/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    again, other = live(SLURM_RESTART_COUNT="1")
    assert (again.returncode, other.returncode) == (0, 0), again.stderr + other.stderr
    assert "the run goes on from runs/sft/checkpoints/last.ckpt" in again.stderr
    assert torch.load("runs/sft/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert sorted(path.name for path in Path("runs").iterdir()) == ["sft"]
    job["SLURM_JOB_ID"] = "418"  # another job takes no part in the run of this one
    refused, _ = live(SLURM_RESTART_COUNT="1")
    assert refused.returncode == 1 and "out: 'runs/sft' holds a run" in refused.stderr


def test_ctrl_c_in_a_terminal_prints_a_command_that_resumes(tmp_path):
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "modules", "fit", *SFT, "--data.train.num_examples=64", "--trainer.max_epochs=500"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown, typed = b"", False
    with suppress(OSError):  # the other side is closed
        while part := os.read(ours, 65536):
            shown += part
            if not typed and re.search(rb"Epoch [3-9]/", shown):
                os.write(ours, b"\x03")
                typed = True
    os.close(ours)
    assert run.wait(60) == 128 + signal.SIGINT, shown[-2000:]
    (command,) = re.findall(rb"go on: (.*)\r\n", shown)
    words = shlex.split(command.decode())
    assert words[words.index("modules") + 1 :] == ["fit", "--config", "runs/sft/config.yaml", "--ckpt_path", "runs/sft"]


def test_the_newest_checkpoint_is_the_last_one(tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    for age, name in ((30, "last"), (20, "epoch=7"), (10, "epoch=8")):  # a stop wrote last.ckpt, and the run went on
        (folder / f"{name}.ckpt").touch()
        os.utime(folder / f"{name}.ckpt", (time.time() - age,) * 2)
    assert find_last_checkpoint(tmp_path / "run") == folder / "epoch=8.ckpt"
    torch.save({"callbacks": {"ModelCheckpoint": {"last_model_path": "last.ckpt"}}}, folder / "epoch=9.ckpt")
    assert find_last_checkpoint(tmp_path / "run") == folder / "last.ckpt"  # killed before it was renewed
    (folder / "epoch=9.ckpt").unlink()
    os.utime(folder / "last.ckpt", (time.time(),) * 2)
    os.utime(folder / "epoch=8.ckpt", (os.stat(folder / "last.ckpt").st_mtime,) * 2)
    assert find_last_checkpoint(tmp_path / "run") == folder / "last.ckpt"


def test_last_without_a_checkpoint_is_refused_and_the_export_kept(capsys):
    main(["fit", *SFT, *FEW])
    kept = Path("runs/sft/export/model.safetensors").read_bytes()
    shutil.rmtree("runs/sft/checkpoints")
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW, "--ckpt_path=last", "--model.optimizer.lr=0.1"])
    assert "error: ckpt_path: the run in 'runs/sft' has written no checkpoint" in capsys.readouterr().err
    assert Path("runs/sft/export/model.safetensors").read_bytes() == kept


def test_a_run_that_had_taken_its_last_step_exports_when_it_is_resumed(capsys):
    steps = [*SFT, *FEW, "--trainer.max_epochs=-1", "--trainer.max_steps=4"]
    main(["fit", *steps])
    whole = load_file("runs/sft/export/model.safetensors")
    shutil.rmtree("runs/sft/export")
    main(["fit", *steps, "--ckpt_path=runs/sft"])
    again = load_file("runs/sft/export/model.safetensors")
    assert all(whole[name].equal(again[name]) for name in whole)
    capsys.readouterr()
    main(["fit", *SFT, *FEW, "--out=none", "--trainer.max_epochs=0"])
    assert "no model exported: no step was taken" in capsys.readouterr().out and not Path("none/export").exists()


def test_a_requeued_job_goes_on_whatever_checkpoint_its_command_names(monkeypatch, capsys, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setattr(sys, "argv", ["modules", "fit", "as", "before"])
    main(["fit", *SFT, *FEW, "--out=old"])
    main(["fit", *SFT, *FEW, "--out=new", "--ckpt_path=old", "--trainer.max_epochs=3"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with caplog.at_level("INFO"):
        main(["fit", *SFT, *FEW, "--out=new", "--ckpt_path=old", "--trainer.max_epochs=4"])
    assert "the run goes on from new/checkpoints/last.ckpt" in caplog.text
    with pytest.raises(SystemExit):
        main(["fit", *SFT, *FEW, "--out=null", "--trainer.default_root_dir=other"])
    assert "without --out nothing tells where its run lies" in capsys.readouterr().err


def test_the_folder_of_a_run_may_be_the_current_one():
    main(["fit", *SFT, *FEW, "--out=."])
    main(["fit", *SFT, *FEW, "--out=.", "--trainer.max_epochs=1"])
    assert Path(f"{Path.cwd()}-2/export").is_dir()


def test_a_job_that_ends_before_its_first_step_is_requeued(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"JOB_ID": "3", "NTASKS": "1", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        requeue_if_told()
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert end.value.code == 128 + signal.SIGUSR1 and (tmp_path / "asked").read_text() == "requeue 3\n"
