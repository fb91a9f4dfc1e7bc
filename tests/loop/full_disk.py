"""Runs ``python -m modules`` on a small disk that fills up, once for each kind of file that a run writes.

    python full_disk.py FOLDER

prints a line of JSON for each: what was written, the exit status, the lines that were said, the files that are left,
and those of them that cannot be read. The disk is a tmpfs that this process alone sees; the exit status is 77 where the
kernel does not allow that.
"""

import contextlib
import ctypes
import io
import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from lightning.pytorch import Callback, Trainer
from safetensors import SafetensorError
from safetensors.torch import load_file

from modules.__main__ import main
from modules.trainer.saving import is_whole

NEW_MOUNTS, NEW_USER, PRIVATE = 0x20000, 0x10000000, 0x44000
PAIRS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(16)]
TASKS = [{"prompt": f"{n}+1=", "completions": [f"{n + 1}", f"{n}"]} for n in range(64)]
FIT = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"]
SFT = [
    *FIT,
    "--model=SFTModule",
    "--model.policy=tiny",
    "--data=InstructionDataModule",
    "--data.train=../sums.jsonl",
    "--data.batch_size=8",
]
DPO = [
    *FIT,
    "--model=DPOModule",
    "--model.policy=tiny",
    "--data=PreferenceDataModule",
    "--data.train=../pairs.jsonl",
    "--data.batch_size=8",
]
LABEL = ["predict", "--trainer.accelerator=cpu", "--model=LabelModule", "--model.judge=PairwiseJudge"]
LABEL += ["--data=CandidatesDataModule", "--data.train=../tasks.jsonl", "--data.batch_size=8"]
PREDICT = [
    "predict",
    "--trainer.accelerator=cpu",
    "--model=GRPOModule",
    "--model.policy=tiny",
    "--model.reward=ExactMatch",
]
PREDICT += [
    "--data=VerifiableDataModule",
    "--data.train=../sums.jsonl",
    "--data.val_batch_size=8",
    "--trainer.logger=false",
]
PREDICT += ["--model.sampling.max_completion_length=8", "--trainer.callbacks+=PredictionWriter"]


class Fill(Callback):
    """Takes all of the disk, but for some bytes, when a batch begins; batch 0 is the start of a fit."""

    def __init__(self, batch: int, leave: int = 0) -> None:
        self.left, self.leave = batch, leave

    def fill(self, trainer: Trainer, *rest: Any) -> None:
        self.left -= 1
        if self.left == -1:
            with open("ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate("ballast", os.path.getsize("ballast") - self.leave)

    on_fit_start = on_predict_start = on_train_batch_start = on_predict_batch_start = fill


class Judge(BaseHTTPRequestHandler):
    """Finds every first answer better."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "[[A]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def cases(judge: str) -> Iterator[tuple[str, list[str]]]:
    """Name what is written, and the arguments of the run. ``Fill`` is in the script's own module."""
    at = "--trainer.callbacks+={{class_path: full_disk.Fill, init_args: {{batch: {}, leave: {}}}}}".format
    chat = ["--model.judge.client=HttpChat", f"--model.judge.client.base_url={judge}", "--model.judge.client.model=m"]
    plain, none = ["--trainer.enable_checkpointing=false"], "--trainer.callbacks=null"
    yield "checkpoint", [*SFT, "--trainer.callbacks+=ModelCheckpoint", at(5, 4096)]
    yield (
        "export",
        [*SFT, *plain, "--trainer.callbacks+={class_path: Export, init_args: {every_n_epochs: 1}}", at(5, 9000)],
    )
    yield "csv", [*SFT, *plain, "--trainer.max_epochs=40", "--logger=csv", none, at(5, 0)]
    yield "tensorboard", [*SFT, *plain, "--trainer.max_epochs=40", none, at(5, 0)]
    audit = "--trainer.callbacks+={class_path: PreferenceAudit, init_args: {path: run/audit.json}}"
    yield "audit", [*DPO, *plain, audit, "--trainer.logger=false", at(5, 0)]
    yield "reference", [*DPO, *plain, "--trainer.logger=false", at(0, 0)]
    yield "predictions", [*PREDICT, at(3, 0)]
    yield "labels", [*LABEL, *chat, "--trainer.callbacks+=PreferenceWriter", "--trainer.logger=false", at(3, 0)]
    yield "judge", [*LABEL, *chat, "--model.judge.client.cache=cache", "--trainer.logger=false", at(3, 0)]


def is_readable(path: Path) -> bool:
    """Return whether a file is as whole as its name says."""
    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except (ValueError, SafetensorError):
        return False
    return path.suffix != ".ckpt" or is_whole(path)


def run(arguments: list[str]) -> tuple[int, str]:
    """Run the command line, and return its exit status and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (NEW_USER if os.geteuid() else 0)) or libc.mount(b"none", b"/", None, PRIVATE, None):
        sys.exit(77)
    folder = Path(sys.argv[1]).absolute()
    sys.path.insert(0, str(Path(__file__).parent))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASKS))
    sums = [{"prompt": row["prompt"], "completion": row["chosen"], "answer": row["chosen"]} for row in PAIRS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums * 2))
    server = HTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    for name, arguments in cases(f"http://127.0.0.1:{server.server_port}/v1"):
        disk = folder / name
        disk.mkdir()
        if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=32m"):
            sys.exit(77)
        os.chdir(disk)
        status, said = run([*arguments, "--out=run"])
        files = sorted(path for path in Path().rglob("*") if path.is_file() and path.name != "ballast")
        print(
            json.dumps(
                {
                    "name": name,
                    "status": status,
                    "said": said.splitlines(),
                    "files": [str(path) for path in files],
                    "broken": [str(path) for path in files if not is_readable(path)],
                }
            ),
            flush=True,
        )
    server.shutdown()
