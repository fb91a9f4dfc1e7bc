"""Kills real runs of SFT, GRPO and PPO 40 times, resumes each, and compares it with a run that nobody killed.

    python tests/benchmarks/kill.py [--folder /dev/shm]      or: make test-kill

30 runs get SIGKILL: ten inside a write of a checkpoint or an export, five inside ``collect``, 15 at any moment behind
the first checkpoint. Ten get SIGTERM at such a moment. Weights, optimizer state, export and logged numbers must be
equal bit for bit. The last line says how many were; the exit status is 1 unless all were. The runs are forked from one
process, so that imports are paid once.
"""

import argparse
import copy
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "loop")]

import fixed_runs
import torch
import yaml
from fixed_runs import same

import modules.trainer.saving
from callbacks.stages import export
from modules.__main__ import main
from modules.cli.run_folder import find_last_checkpoint
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import InProcessEngine

NAMES = ("sft", "grpo", "ppo")
Break = Callable[[], None]  # changes the program in the process that is to die


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inside_checkpoint(number: int, share: float) -> Break:
    """Die when a share of the bytes of the n-th checkpoint is written."""

    def change() -> None:
        save, calls = torch.save, iter(range(1, 1000))

        def torn(checkpoint: Any, file: Any) -> None:
            if next(calls) == number:
                whole = io.BytesIO()
                save(checkpoint, whole)
                file.write(whole.getvalue()[: int(share * whole.tell())])
                file.flush()
                die()
            save(checkpoint, file)

        modules.trainer.saving.torch.save = torn  # type: ignore[assignment]

    return change


def inside_export(number: int) -> Break:
    """Die at the n-th time that an export waits for the disk: after a file, after the folder, or after a rename."""

    def change() -> None:
        sync, calls = export.sync, iter(range(1, 1000))

        def dying(path: Path) -> None:
            sync(path)
            if next(calls) == number:
                die()

        export.sync = dying

    return change


def inside_collect(phase: int) -> Break:
    """Die while the completions of a phase are sampled."""

    def change() -> None:
        collect, generate = OnPolicyModule.collect, InProcessEngine.generate

        def collecting(self: Any, prompts: Any) -> Any:
            if self.current_epoch == phase:
                InProcessEngine.generate = lambda *args, **kwargs: (generate(*args, **kwargs), die())  # type: ignore
            return collect(self, prompts)

        OnPolicyModule.collect = collecting  # type: ignore[method-assign]

    return change


def start(folder: Path, arguments: list[str], change: Break | None = None) -> int:
    """Fork a process that fits in ``folder``, and return its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if change is not None:
            change()
        main(["fit", "--config", "config.yaml", *arguments])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Wait for a process, and return its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for_checkpoint(folder: Path, process: int) -> None:
    """Wait until the run has saved once, or ended."""
    while not (folder / "run/checkpoints/last.ckpt").exists():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)


def prepare(name: str, folder: Path) -> None:
    """Write rows and configuration of a run into a new folder."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(fixed_runs.configuration(name))
    checkpoint = config["trainer"]["callbacks"][0]
    del checkpoint["init_args"]["dirpath"], config["trainer"]["logger"]
    config["trainer"]["callbacks"] = [checkpoint, {"class_path": "Export", "init_args": {"every_n_epochs": 1}}]
    config |= {"out": "run", "logger": "csv"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fixed_runs.RUNS[name][0]))


def read_end(folder: Path) -> dict[str, Any]:
    """Read what a run leaves: its last checkpoint, its export, and what it logged, without wall times."""
    last = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    numbers: dict[tuple[int, str], set[str]] = {}  # of the broken run and the resumed one
    for path in (folder / "run").glob("metrics*.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "time" not in name and "second" not in name:
                        numbers.setdefault((int(row["step"]), name), set()).add(value)
    return {
        "weights": last["state_dict"],
        "optimizer": last["optimizer_states"],
        "export": (folder / "run/export/model.safetensors").read_bytes(),
        "numbers": numbers,
    }


def find_difference(whole: dict[str, Any], resumed: dict[str, Any], done: int) -> str | None:
    """Return what a run resumed after ``done`` steps has not as the whole one; None = nothing."""
    for part in ("weights", "optimizer", "export"):
        if not same(whole[part], resumed[part]):
            return part
    theirs, mine = whole["numbers"], resumed["numbers"]
    wrong = [(key, values) for key, values in mine.items() if values != theirs.get(key)]
    # Between a checkpoint and the log line of its step there is a moment.
    missing = [key for key in theirs if key not in mine and key[0] != done - 1]
    return f"logged numbers: {wrong[:2]}, missing {missing[:2]}" if wrong or missing else None


def plan(draw: random.Random) -> list[tuple[str, str, int, Break | None]]:
    """Plan the 40 runs: method, what happens, signal, and how to break; None = the signal comes at any moment."""
    runs: list[tuple[str, str, int, Break | None]] = []
    for place in range(6):
        number = draw.randrange(1, 13)
        runs.append(("", f"inside checkpoint {number}", 9, inside_checkpoint(number, (place + 0.5) / 6)))
    for number in draw.sample(range(1, 21), 4):
        runs.append(("", f"inside an export, wait {number}", 9, inside_export(number)))
    for place in range(5):
        runs.append((("grpo", "ppo")[place % 2], f"inside collect {place % 3}", 9, inside_collect(place % 3)))
    runs += [("", "at any moment", signum, None) for signum in [9] * 15 + [15] * 10]
    return [(name or NAMES[place % 3], *rest) for place, (name, *rest) in enumerate(runs)]  # type: ignore[misc]


def break_and_resume(name: str, signum: int, change: Break | None, folder: Path, moment: float) -> tuple[int, int]:
    """Break a run and go on with it; return the exit status of the broken run, and the steps it had saved."""
    prepare(name, folder)
    process = start(folder, [], change)
    if change is None:
        wait_for_checkpoint(folder, process)
        time.sleep(moment)
        os.kill(process, signum)
    status = wait(process)
    last = find_last_checkpoint(folder / "run")
    done = torch.load(last, weights_only=True)["global_step"] if last else 0
    if not done:
        shutil.rmtree(folder / "run", ignore_errors=True)
    resumed = wait(start(folder, ["--ckpt_path", "run"] if done else []))
    if resumed:
        raise RuntimeError(f"the resumed run ended with {resumed}: {(folder / 'log.txt').read_text()[-600:]}")
    return status, done


def main_of_benchmark() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--runs", type=int, default=40, help="only the first n of the plan")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, ends, seconds, good = random.Random(given.seed), {}, {}, 0
    runs = plan(draw)[: given.runs]
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        for name in NAMES:
            prepare(name, Path(temporary) / name)
            process = start(Path(temporary) / name, [])
            wait_for_checkpoint(Path(temporary) / name, process)
            begun = time.monotonic()
            if wait(process):
                sys.exit((Path(temporary) / name / "log.txt").read_text())
            seconds[name] = time.monotonic() - begun
            ends[name] = read_end(Path(temporary) / name)
        for number, (name, what, signum, change) in enumerate(runs):
            folder = Path(temporary) / f"run-{number}"
            try:
                status, done = break_and_resume(name, signum, change, folder, draw.uniform(0, 0.9) * seconds[name])
                problem = find_difference(ends[name], read_end(folder), done)
                left = [path.name for path in (folder / "run").rglob(".*") if path.name != ".written-by-export"]
                problem = problem or (f"left behind: {left}" if left else None)
                said = f"{name}: signal {signum} {what}, exit status {status}, resumed after {done} steps"
            except (RuntimeError, OSError, KeyError) as error:
                problem, said = str(error), f"{name}: signal {signum} {what}"
            good += problem is None
            print(f"{number + 1:2d} {said}: {problem or 'equal'}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"kill: {good} of {len(runs)} resumed, {len(runs) - good} lost")
    return int(good < len(runs))


if __name__ == "__main__":
    sys.exit(main_of_benchmark())
