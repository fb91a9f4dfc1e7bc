"""Measures how time and memory grow with completions, their length, rows and vocabulary, on small models.

Run: python tests/benchmarks/bench_scaling.py [--most 256] [--axes completions vocabulary]      or: make bench-scaling

Each point is a process. Memory is the largest resident size of the measured phase beyond that before the fit, in MB
(10^6 bytes). An exponent is the slope of log(cost) over log(size): 1 = proportional, 0 = constant. It fails, with
status 1, if the memory of a phase grows with vocabulary x tokens, or if the resident size grows over 100 phases.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

VOCABULARY = 2048  # where it is not what grows
COMPLETIONS, LENGTH = 64, 64  # likewise
AXES: dict[str, list[int]] = {
    "completions": [64, 128, 256, 512, 1024],
    "length": [64, 128, 256, 512],
    "rows": [1_000, 10_000, 100_000, 1_000_000],
    "vocabulary": [1_024, 8_192, 32_768, 131_072],
}
LOGITS = 0.1  # share of vocabulary x tokens x 4 bytes by which a phase may grow
FLAT = 0.03  # share by which the resident size may grow from the 20th to the 100th phase

Point = dict[str, Any]


def resident(name: str) -> float:
    """Return VmRSS or VmHWM of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1.024e-3


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def make_model(folder: Path, vocabulary: int) -> str:
    """Write a Llama of two layers that seldom ends a completion, since its vocabulary is larger than its tokenizer's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modules.networks.tiny import tiny_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def meter() -> Any:
    """Make a callback that notes time, resident size and its peak at the end of each epoch and step."""
    from lightning.pytorch import Callback

    class Meter(Callback):
        def __init__(self) -> None:
            self.phases: list[tuple[float, float, float]] = []
            self.steps: list[float] = []

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.start, self.before = time.perf_counter(), resident("VmRSS")
            forget_peak()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.steps.append(time.perf_counter())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.phases.append((time.perf_counter(), resident("VmRSS"), resident("VmHWM")))
            forget_peak()

    return Meter()


def make_trainer(**settings: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", devices=1, enable_model_summary=False, gradient_clip_val=1.0, **quiet, **settings)


def run_phases(folder: Path, completions: int, length: int, vocabulary: int, phases: int = 3) -> Point:
    """Train GRPO for some phases, with the micro-batches of the shipped configuration."""
    import yaml
    from bench_reward import score

    from datamodules import Addition, VerifiableDataModule
    from modules import GRPOModule
    from modules.rollout.sampling import Sampling

    shipped = yaml.safe_load((ROOT / "configs/grpo.yaml").read_text(encoding="utf-8"))
    whole = shipped["model"]["init_args"]["num_generations"] * shipped["data"]["init_args"]["prompts_per_phase"]
    accumulate = max(1, shipped["trainer"].get("accumulate_grad_batches", 1) * completions // whole)
    module = GRPOModule(
        make_model(folder / "model", vocabulary),
        score,
        num_generations=8,
        sampling=Sampling(max_completion_length=length),
    )
    prompts = completions // 8
    data = VerifiableDataModule(module.tokenizer, Addition(4 * prompts), prompts_per_phase=prompts, chat=False)
    found = meter()
    make_trainer(max_epochs=phases, accumulate_grad_batches=accumulate, callbacks=[found]).fit(module, data)
    times = [each[0] for each in found.phases]
    return {
        "seconds": statistics.median([after - before for before, after in pairwise(times)]),
        "memory": max(peak for _, _, peak in found.phases[1:]) - found.before,
        "resident": [size for _, size, _ in found.phases],
    }


def run_rows(folder: Path, rows: int) -> Point:
    """Stream a file of so many rows for 30 steps of SFT; its seconds are those before the first step."""
    from datamodules import StreamingDataModule
    from modules import SFTModule

    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        out.writelines(
            json.dumps({"prompt": f"{row} + {row % 97} =", "completion": f" {row + row % 97}"}) + "\n"
            for row in range(rows)
        )
    module = SFTModule("tiny")
    data = StreamingDataModule(module.tokenizer, str(file), steps_per_epoch=30, batch_size=16, chat=False)
    found, start = meter(), time.perf_counter()
    make_trainer(max_steps=30, callbacks=[found]).fit(module, data)
    steps = [after - before for before, after in pairwise(found.steps)]
    return {
        "seconds": found.steps[0] - start,
        "memory": max(peak for _, _, peak in found.phases) - found.before,
        "step": statistics.median(steps),
    }


def measure(asked: Point) -> Point:
    """Measure one point in this process."""
    import warnings

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        if "rows" in asked:
            return run_rows(Path(made), **asked)
        return run_phases(Path(made), **asked)


def measure_apart(**asked: Any) -> Point:
    """Measure one point in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: the point {asked} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def fit_exponent(sizes: list[int], costs: list[float]) -> float:
    """Return the slope of log(cost) over log(size), by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(max(cost, 1e-9)) for cost in costs]
    return statistics.linear_regression(x, y).slope


def measure_logits() -> float:
    """Return by what share of vocabulary x tokens x 4 bytes a phase grows with its tokens, where they are so many that
    not even a micro-batch's logits fit the part that is computed at once.
    """
    few, many = (
        measure_apart(completions=16, length=length, vocabulary=65_536, phases=2)["memory"]
        for length in (LENGTH, 4 * LENGTH)
    )
    print(f"vocabulary 65536 with 16 completions of {LENGTH} and of {4 * LENGTH}: {few:.0f} MB and {many:.0f} MB")
    return float(many - few) * 1e6 / (16 * 3 * LENGTH * 65_536 * 4)


def describe(axis: str, size: int) -> Point:
    """Return the point of an axis."""
    if axis == "rows":
        return {"rows": size}
    return {"completions": COMPLETIONS, "length": LENGTH, "vocabulary": VOCABULARY} | {axis: size}


def run(asked: argparse.Namespace) -> int:
    lines, failed = [], []
    for axis in asked.axes:
        sizes = [size for size in AXES[axis] if asked.most is None or size <= max(asked.most, AXES[axis][1])]
        found = []
        for size in sizes:
            found.append(measure_apart(**describe(axis, size)))
            step = f", {found[-1]['step'] * 1e3:.1f} ms a step" if "step" in found[-1] else ""
            print(f"{axis} {size}: {found[-1]['seconds']:.2f} s, {found[-1]['memory']:.0f} MB{step}", flush=True)
        exponents = {name: fit_exponent(sizes, [each[name] for each in found]) for name in ("seconds", "memory")}
        what = "time before the first step" if axis == "rows" else "time"
        lines.append(f"scaling: {axis} {what} n^{exponents['seconds']:.2f}, memory n^{exponents['memory']:.2f}")
        if axis == "vocabulary":
            share = measure_logits()
            lines.append(f"scaling: logits {share:.3f} of vocabulary x tokens x 4 bytes, at most {LOGITS}")
            failed += ["logits"] if share > LOGITS else []
    if asked.phases:
        size = {"completions": 16, "length": 16, "vocabulary": 512, "phases": asked.phases}
        sizes = measure_apart(**size)["resident"]
        early, late = statistics.median(sizes[asked.phases // 5 :][:10]), statistics.median(sizes[-10:])
        growth = (late - early) / early
        lines.append(f"scaling: resident {early:.0f} MB to {late:.0f} MB over {asked.phases} phases, {growth:+.3f}")
        failed += ["resident"] if growth > FLAT else []
    print("\n".join(lines))
    print(f"scaling: {'failed: ' + ', '.join(failed) if failed else 'ok'}")
    return int(bool(failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--most", type=int, help="the largest size of an axis, of which two points are always measured")
    parser.add_argument("--phases", type=int, default=100, help="over which the resident size must stay; 0 = not run")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point is not None:
        print(json.dumps(measure(given.point)))
    else:
        sys.exit(run(given))
