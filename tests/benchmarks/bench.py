"""Trains with this project and with TRL on the same work, in turns, and prints how they compare.

Run: python tests/benchmarks/bench.py [--works sft dpo grpo] [--rounds 2]      or: make bench, after make bench-env

Each turn is a process: ours is ``python -m modules fit`` with a shipped configuration, TRL's is ``with_trl.py``. A
step is timed from the end of the one before it, so the first is left out; what our DPO computes before its first step is
shared out to the steps. Memory is the largest resident size of the whole process. Both sides read the same rows in the
same order, and losses of the first step that differ end the run with status 1. Nothing here imports PyTorch, so that a
small process waits for the large ones.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TOLERANCE = 1e-3
NATIVE = 1.3  # bf16 products this many times as fast as fp32 are the processor's own
ESTIMATE = re.compile(r"estimate: about ([\d.]+) GB, ([\d.]+) s a (step|phase)")  # of our run, of a few seconds
LENGTHS = 0.25  # by how much the mean lengths of sampled completions may differ

Found = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One work that both sides do."""

    name: str
    method: str  # sft, reward, dpo, grpo or ppo
    config: str
    kind: str  # of rows: questions, pairs or sums
    batch: int  # rows, pairs or completions of an optimiser step
    steps: int
    lr: float
    model: str = "smollm2"
    max_length: int = 1024
    completion: int = 0  # tokens of a sampled completion, at most
    generations: int = 1
    updates: int = 1  # optimiser steps of a phase
    lora: bool = False
    chat: bool = True
    flops: float = 6.0  # per parameter and trained token
    reward: str = "score"  # of ``bench_reward``

    @property
    def samples(self) -> bool:
        return self.method in ("grpo", "ppo")

    @property
    def rows(self) -> int:
        return self.batch * self.updates * self.steps // self.generations


WORKS = [
    Work("sft", "sft", "sft", "questions", batch=8, steps=6, lr=2e-5),
    Work("sft-lora", "sft", "sft", "questions", batch=8, steps=6, lr=2e-4, lora=True, flops=4),
    Work("reward", "reward", "reward", "pairs", batch=4, steps=4, lr=1e-5, max_length=512),
    Work("dpo", "dpo", "dpo", "pairs", batch=4, steps=4, lr=1e-6, max_length=512, flops=8),
    Work(
        "grpo",
        *("grpo", "grpo", "questions"),
        batch=16,
        steps=3,
        lr=1e-6,
        completion=128,
        generations=8,
        reward="last_number",
    ),
    Work("grpo-dense", "grpo", "grpo", "questions", batch=16, steps=3, lr=1e-6, completion=128, generations=8),
    Work("ppo", "ppo", "ppo", "questions", batch=4, steps=3, lr=3e-6, completion=128, updates=4),
    Work("tiny-sft", "sft", "tiny/sft", "sums", batch=64, steps=60, lr=1e-3, model="tiny", chat=False),
    Work(
        "tiny-grpo",
        *("grpo", "tiny/grpo", "sums"),
        batch=256,
        steps=20,
        lr=3e-4,
        model="tiny-addition",
        completion=5,
        generations=8,
        chat=False,
    ),
]


class Bench:
    """The processes of one run, in its folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.folder = Path(asked.out).absolute() / time.strftime("%Y%m%d-%H%M%S")
        self.folder.mkdir(parents=True)
        self.asked = asked
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(asked.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        }

    def run(self, name: str, command: list[str]) -> tuple[float, float]:
        """Run a process in the project's folder; return its seconds and its largest resident size in GB (10^9)."""
        log, start = self.folder / f"{name}.log", time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            child = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
            raise SystemExit(f"error: {name} ended with status {child.returncode} ({log}):\n{tail}")
        return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9

    def prepare(self, works: list[Work]) -> None:
        """Write models and rows."""
        file = self.folder / "works.json"
        file.write_text(json.dumps([asdict(work) | {"rows": work.rows} for work in works]), encoding="utf-8")
        data = str(Path(self.asked.data).absolute())
        self.run("prepare", [sys.executable, str(HERE / "bench_prepare.py"), str(self.folder), data, str(file)])
        for work in works:
            if work.method == "reward":  # TRL starts from the head that ours draws by its seed
                self.run(f"{work.name}-start", [*self.ours(work, "start", "32-true"), "--model.optimizer.lr", "0"])

    def model(self, work: Work) -> str:
        return str(self.folder.parent / "models" / work.model)

    def ours(self, work: Work, name: str, precision: str) -> list[str]:
        """Return our command line: the shipped configuration, and what makes the work the same as TRL's."""
        clock = {"class_path": "step_clock.StepClock", "init_args": {"file": self.result(work, name)}}
        options = [
            *("--config", f"configs/{work.config}.yaml"),
            *(("--config", "configs/overlays/lora.yaml", "--model.optimizer.lr", str(work.lr)) if work.lora else ()),
            *("--out", str(self.folder / f"{work.name}-{name}")),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", precision),
            f"--trainer.callbacks+={json.dumps(clock)}",
            *("--model.policy", self.model(work)),
            *("--data.train", str(self.folder / f"{work.name}-ours.jsonl"), "--data.val", "null"),
            *(() if work.chat else ("--data.chat", "false")),
        ]
        if work.samples:
            shipped = yaml.safe_load((ROOT / f"configs/{work.config}.yaml").read_text(encoding="utf-8"))
            options += [
                *("--trainer.max_epochs", str(work.steps)),
                *("--trainer.accumulate_grad_batches", str(share_accumulation(shipped, work))),
                *("--model.reward", f"bench_reward.{work.reward}", "--model.num_generations", str(work.generations)),
                *("--model.sampling.max_completion_length", str(work.completion)),
                *("--data.prompts_per_phase", str(work.batch * work.updates // work.generations)),
                *("--data.updates_per_phase", str(work.updates)),
            ]
            if work.config == "tiny/grpo":
                options += ["--model.validation.accuracy", "null"]
        else:
            options += ["--trainer.max_epochs", "1", "--data.batch_size", str(work.batch)]
            options += ["--data.max_length", str(work.max_length)]
        return [sys.executable, "-m", "modules", "fit", *options]

    def theirs(self, work: Work, name: str, bf16: bool = False) -> list[str]:
        """Return TRL's command line."""
        start = self.folder / f"{work.name}-start" / "export"
        return [
            *(str(ROOT / ".venv-trl/bin/python"), str(HERE / "with_trl.py"), work.method),
            *(str(start) if work.method == "reward" else self.model(work),),
            *(str(self.folder / f"{work.name}-theirs.jsonl"), self.result(work, name)),
            *("--batch", str(work.batch), "--steps", str(work.steps), "--lr", str(work.lr)),
            *("--max_length", str(work.max_length), "--generations", str(work.generations)),
            *("--max_completion_length", str(work.completion), "--reward", work.reward),
            *(("--lora",) if work.lora else ()),
            *(("--bf16",) if bf16 else ()),
            *(("--checkpointing",) if self.asked.trl_checkpointing else ()),
        ]

    def result(self, work: Work, name: str) -> str:
        return str(self.folder / f"{work.name}-{name}.json")

    def measure(self, work: Work, name: str, command: list[str]) -> Found:
        """Run one side once."""
        wall, memory = self.run(f"{work.name}-{name}", command)
        shutil.rmtree(self.folder / f"{work.name}-{name}" / "checkpoints", ignore_errors=True)  # 1.6 GB each
        found = json.loads(Path(self.result(work, name)).read_text(encoding="utf-8"))
        found["estimate"] = ESTIMATE.search((self.folder / f"{work.name}-{name}.log").read_text(encoding="utf-8"))
        steps = len(found["ends"]) / work.updates
        both = []
        for place in (0, 1):  # seconds of the clock, and of the processor
            ends = [each[place] for each in found["ends"]]
            before = (found["ready"][place] - found["begun"][place]) / steps if work.method == "dpo" else 0.0
            both.append((ends[-1] - ends[work.updates - 1]) / (steps - 1) + before)
            if place == 0:
                found["alone"] = both[0] - before
        return found | {"seconds": both[0], "processor": both[1], "memory": memory, "wall": wall}

    def rates(self, model: str, number: int) -> Found:
        """Measure the rates of matrix products."""
        name = f"rates-{Path(model).name}-{number}"
        self.run(name, [sys.executable, str(HERE / "bench_rates.py"), model])
        return dict(json.loads((self.folder / f"{name}.log").read_text(encoding="utf-8").splitlines()[-1]))


def shrink(work: Work) -> Work:
    """Return a work of two short steps."""
    batch = work.generations if work.generations > 1 else min(2, work.batch)
    return replace(work, batch=batch, steps=2, completion=min(16, work.completion), updates=min(2, work.updates))


def share_accumulation(shipped: Found, work: Work) -> int:
    """Return the micro-batches that give each as many completions as the shipped configuration does."""
    model, data = shipped["model"]["init_args"], shipped["data"]["init_args"]
    completions = model["num_generations"] * data["prompts_per_phase"] // data.get("updates_per_phase", 1)
    return max(1, shipped["trainer"].get("accumulate_grad_batches", 1) * work.batch // completions)


def count_flops(work: Work, ours: Found) -> float:
    """Count the GFLOP that a step needs: 6 per parameter and trained token, under LoRA 4; 2 where tokens are sampled and
    where a frozen reference scores them.

    A prompt counts once for all its completions. Attention is left out, and so are embeddings, which are looked up,
    unless they are the output head too.
    """
    parameters = ours["parameters"] - (ours["embeddings"] if work.method == "reward" else 0)
    tokens = [step["train/num_tokens"] for step in ours["steps"]]
    first, last = tokens[work.updates - 1], tokens[-1]
    trained = (last - first) / (len(tokens) / work.updates - 1)
    flops = work.flops * trained
    if work.samples:
        phases = ours["phases"][1:]
        sampled = sum(phase["prompt_tokens"] + phase["completion_tokens"] for phase in phases) / len(phases)
        flops += 4 * sampled
    return parameters * flops / 1e9


def compare_losses(work: Work, ours: Found, theirs: Found) -> Iterator[tuple[str, float, float, float]]:
    """Yield what must agree: its name, our number, TRL's, and how far they may lie apart."""
    if work.method == "grpo":
        first, mine = theirs["steps"][0], ours["phases"]
        length = first["completions/mean_length"]
        prompts = (first["num_tokens"] - length * work.batch) / work.generations
        yield "prompt tokens of the first phase", mine[0]["prompt_tokens"], prompts, 0.5
        mean = sum(phase["completion_tokens"] for phase in mine) / sum(phase["completions"] for phase in mine)
        other = statistics.mean(step["completions/mean_length"] for step in theirs["steps"])
        yield "mean length of completions", mean, other, LENGTHS * other
        return
    yield "first loss", ours["steps"][0]["train/loss"], theirs["steps"][0]["loss"], TOLERANCE
    if work.method == "dpo":  # whose first loss is log 2 for any rows
        for side in ("chosen", "rejected"):
            name = f"logps/{side}"
            mine, other = ours["steps"][0][f"train/{name}"], theirs["steps"][0][name]
            yield f"first {name}", mine, other, TOLERANCE * abs(other)


def middle(found: list[Found], name: str) -> float:
    return statistics.median(each[name] for each in found)


def report(work: Work, ours: list[Found], theirs: list[Found], rate: float) -> tuple[str, bool]:
    """Print the details of a work; return its last line, and whether the losses agree."""
    agree = True
    for mine, other in zip(ours, theirs, strict=False):
        for what, one, two, allowed in compare_losses(work, mine, other):
            right = abs(one - two) <= allowed
            agree = agree and right
            print(f"  {what}: {one:.5g} and {two:.5g} {'agree' if right else f'DIFFER by more than {allowed:.2g}'}")
    seconds, memory = middle(ours, "seconds"), middle(ours, "memory")
    flops = statistics.median(count_flops(work, each) for each in ours)
    share = flops / seconds / rate
    print(
        f"  ours: {seconds:.3f} s a step, {memory:.2f} GB, {flops:.1f} GFLOP a step ({work.flops:g} per trained token)"
    )
    for each in ours:
        if each["estimate"] is not None:
            size, duration, unit = each["estimate"].groups()
            print(
                f"  ours: estimated {size} GB and {duration} s a {unit}, measured {each['memory']:.2f} GB and "
                f"{each['alone']:.3g} s"
            )
    for name in ("sampling", "scoring", "training") if work.samples else ():
        parts = [phase["times"].get(f"time/{name}", 0.0) for each in ours for phase in each["phases"][1:]]
        print(f"  ours: {name} {statistics.median(parts):.3f} s a phase{share_of_part(name, work, ours, parts, rate)}")
    if not theirs:
        print("  TRL 1.16 has no such trainer")
        return f"bench: {work.name} nanx speed nanx memory {share:.2f} of matmul rate", agree
    other, their_memory = middle(theirs, "seconds"), middle(theirs, "memory")
    sampling = [each["sampling"][1:] for each in theirs if each["sampling"][1:]]
    sampled = f", sampling {statistics.median(map(statistics.mean, sampling)):.3f} s of it" if sampling else ""
    print(f"  TRL: {other:.3f} s a step{sampled}, {their_memory:.2f} GB, {flops / other / rate:.2f} of the rate")
    print(
        f"  processor seconds a step: {middle(ours, 'processor'):.3f} and {middle(theirs, 'processor'):.3f}, "
        f"{middle(theirs, 'processor') / middle(ours, 'processor'):.2f}x; wall time with start-up: "
        f"{middle(ours, 'wall'):.0f} s and {middle(theirs, 'wall'):.0f} s"
    )
    speed, size = other / seconds, memory / their_memory
    return f"bench: {work.name} {speed:.2f}x speed {size:.2f}x memory {share:.2f} of matmul rate", agree


def share_of_part(name: str, work: Work, ours: list[Found], parts: list[float], rate: float) -> str:
    """Write the share of the rate at which a phase samples or trains."""
    if name == "scoring":
        return ""
    steps, phases = ours[0]["steps"], ours[0]["phases"]
    tokens = sum(phase["prompt_tokens"] + phase["completion_tokens"] for phase in phases) / len(phases)
    if name == "training":
        tokens = steps[-1]["train/num_tokens"] / len(phases)
    flops = (2 if name == "sampling" else 6) * ours[0]["parameters"] * tokens / 1e9
    return f", {flops / statistics.median(parts) / rate:.2f} of the rate"


def main(asked: argparse.Namespace) -> int:
    works = [shrink(work) if asked.quick else work for work in WORKS if work.name in asked.works]
    if not (ROOT / ".venv-trl/bin/python").exists():
        raise SystemExit("error: TRL has no environment yet; make bench-env makes it")
    bench = Bench(asked)
    real = (Path(asked.data) / "gsm8k/train.jsonl").is_file()
    print(f"rows: {asked.data if real else 'made up, of like lengths'}; results: {bench.folder}", flush=True)
    bench.prepare(works)
    lines, agree = [], True
    rates: dict[str, list[Found]] = {}
    for work in works:
        model = bench.model(work)
        ours, theirs, half, their_half = [], [], [], []
        print(f"{work.name}:", flush=True)
        for number in range(1, asked.rounds + 1):
            found = bench.rates(model, len(rates.get(model, [])) + 1)
            rates.setdefault(model, []).append(found)
            native = found["bfloat16"] >= NATIVE * found["float32"]
            ours.append(bench.measure(work, f"ours-{number}", bench.ours(work, f"ours-{number}", "32-true")))
            if work.method != "ppo":
                theirs.append(bench.measure(work, f"theirs-{number}", bench.theirs(work, f"theirs-{number}")))
            if work.name in asked.bf16 and native:
                name = f"ours-bf16-{number}"
                half.append(bench.measure(work, name, bench.ours(work, name, "bf16-mixed")))
                name = f"theirs-bf16-{number}"
                their_half.append(bench.measure(work, name, bench.theirs(work, name, bf16=True)))
        last = rates[model][-1]
        rate = statistics.median(each["float32"] for each in rates[model])
        print(
            f"  matrix products of {work.model}'s shapes: fp32 {rate:.0f} GFLOP/s, bf16 "
            f"{statistics.median(each['bfloat16'] for each in rates[model]):.0f} GFLOP/s "
            f"({last['capability']}, {last['threads']} threads)"
        )
        line, same = report(work, ours, theirs, rate)
        lines.append(line)
        agree = agree and same
        if half:
            report_half(bench, work, theirs, half, their_half)
        sys.stdout.flush()
    print("\n".join(lines))
    return int(not agree)


def report_half(bench: Bench, work: Work, theirs: list[Found], half: list[Found], their_half: list[Found]) -> None:
    """Print how bf16 compares with TRL in fp32 and in bf16, and what it does to log-probs."""
    seconds, memory = middle(half, "seconds"), middle(half, "memory")
    print(f"  ours in bf16-mixed: {seconds:.3f} s a step, {memory:.2f} GB")
    print(f"  TRL in bf16: {middle(their_half, 'seconds'):.3f} s a step, {middle(their_half, 'memory'):.2f} GB")
    rows = str(bench.folder / f"{work.name}-theirs.jsonl")
    bench.run(f"{work.name}-error", [sys.executable, str(HERE / "bench_precision.py"), bench.model(work), rows])
    print("  " + (bench.folder / f"{work.name}-error.log").read_text(encoding="utf-8").splitlines()[-1])
    print(
        f"bf16: {work.name} {middle(theirs, 'seconds') / seconds:.2f}x speed {memory / middle(theirs, 'memory'):.2f}x "
        f"memory of TRL in fp32, {middle(their_half, 'seconds') / seconds:.2f}x speed "
        f"{memory / middle(their_half, 'memory'):.2f}x memory of TRL in bf16"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [work.name for work in WORKS]
    parser.add_argument("--works", nargs="+", choices=names, default=names, metavar="WORK", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs; the numbers are medians")
    parser.add_argument("--bf16", nargs="*", choices=names, default=["sft"], help="works that run in bf16 too")
    parser.add_argument("--quick", action="store_true", help="two short steps of each work, to see whether it runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    parser.add_argument("--data", default="../shared/data", help="folder of real rows")
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--trl_checkpointing", action="store_true", help="gradient checkpointing in TRL, its default")
    sys.exit(main(parser.parse_args()))
