"""Measures what Lightning, callbacks and logging take of a step at the tiny model.

Run: python tests/benchmarks/bench_overhead.py [--rounds 3] [--profile]

``python -m modules fit --config configs/tiny/sft.yaml`` runs in turns with a bare loop over the same batches: loss,
backward, clipping, optimizer, scheduler. The bare loop runs with and without the numbers that are logged of each token
(entropy, accuracy), which are part of the overhead. The last line is the share of a step that the bare loop does not
need; the numbers are medians over the steps of all rounds. With one thread (``OMP_NUM_THREADS=1``) the seconds are the
processor's, so that a busy machine gives the same.
"""

import argparse
import copy
import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch import Callback, seed_everything
from torch.nn.utils import clip_grad_norm_

from modules import SFTModule
from modules.__main__ import main
from modules.schedulers import CosineDecay

ROOT = Path(__file__).parents[2]


def read_clock() -> float:
    """Return the seconds of the processor with one thread, else those of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class BatchKeeper(Callback):
    """Keeps a copy of each batch, and when each step ended."""

    batches: ClassVar[list[Any]] = []
    ends: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.ends.append(read_clock())


def fit(folder: Path, steps: int) -> list[float]:
    """Run the command line, and return the seconds of each step but the first."""
    BatchKeeper.batches.clear()
    BatchKeeper.ends.clear()
    keeper = json.dumps({"class_path": "bench_overhead.BatchKeeper"})
    options = [f"--trainer.callbacks+={keeper}", "--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(ROOT / "configs/tiny/sft.yaml"), "--out", str(folder), *options, "--data.val", "null"])
    return differences(BatchKeeper.ends)


def loop(batches: list[Any], details: bool) -> list[float]:
    """Train without Lightning, and return the seconds of each step but the first."""
    seed_everything(0, verbose=False)
    module = SFTModule("tiny")
    policy = module.policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = CosineDecay(optimizer, warmup=0.05, final=0.1)
    scheduler.plan(len(batches))
    ends = []
    for batch in batches:
        scores = policy.token_scores(batch["input_ids"], batch["loss_mask"], details=details)
        optimizer.zero_grad()
        (-scores.logprobs.sum() / batch["denominator"]).backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ends.append(read_clock())
    return differences(ends)


def differences(ends: list[float]) -> list[float]:
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def turns(folder: Path, rounds: int, steps: int) -> Iterator[tuple[list[float], list[float], list[float]]]:
    """Yield the seconds of the steps of the program, of the bare loop, and of the bare loop with the numbers."""
    for number in range(rounds):
        whole = fit(folder / str(number), steps)
        batches = copy.deepcopy(BatchKeeper.batches)
        yield whole, loop(batches, details=False), loop(batches, details=True)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--profile", action="store_true", help="also print where the time of a fit goes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        columns = [sum(part, []) for part in zip(*turns(Path(made), asked.rounds, asked.steps), strict=True)]
        if asked.profile:
            profile = cProfile.Profile()
            profile.runcall(fit, Path(made) / "profile", asked.steps)
            pstats.Stats(profile).sort_stats("tottime").print_stats(45).sort_stats("cumulative").print_stats(90)
    whole, bare, counted = (statistics.median(column) for column in columns)
    print(
        f"step of the tiny model, {torch.get_num_threads()} threads: {whole * 1e3:.2f} ms, bare {bare * 1e3:.2f} ms, "
        f"bare with the numbers of each token {counted * 1e3:.2f} ms"
    )
    print(f"overhead: {(whole - bare) / whole:.3f} of a step, of it numbers of tokens {(counted - bare) / whole:.3f}")


if __name__ == "__main__":
    from bench_overhead import run as run_imported  # so that the Trainer's callback is of the same module

    os.chdir(ROOT)
    run_imported()
