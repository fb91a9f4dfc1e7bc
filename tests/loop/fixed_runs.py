"""Runs every method for six optimiser steps and prints name, SHA-256 of the final weights and last loss.

Two commits that print the same lines train the same. The numbers depend on the CPU, so compare on one machine:

    python tests/loop/fixed_runs.py > before.txt        all runs, or those that are named: ... fixed_runs.py sft dpo

Every run starts from ``checkpoints_v1/start``, goes through the command line and names classes by their short names
only. A run is three epochs (phases) of two steps; ``MIDDLE`` is a step inside the second.
"""

import contextlib
import copy
import csv
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}  # no thread and no address changes a bit
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout before an installed one

import torch
import yaml

from modules.__main__ import main

CHECKPOINTS = Path(__file__).parent / "checkpoints_v1"
STEPS, MIDDLE = 6, 3

# Spellings that may change with the options of the program; what they mean may not. Every seed is spelled out.
SEED_OF_RUN = {"seed_everything": 1}
SEED_OF_DATA = {"seed": 2}
SEED_OF_SAMPLING = {"seed": 6}  # one with which every step has completions to compare
START = str(CHECKPOINTS / "start")
RULE = {
    "class_path": "RegexFormat",
    "init_args": {"pattern": r"[\x00-\x7f].*"},
}  # an untrained model fulfils it at times
LORA = {"r": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
LOSSES = ("train/loss", "train/policy_loss")  # the first that a method logs
SAMPLES = {"reward": RULE, "sampling": {"temperature": 1.0, "max_completion_length": 6}, **SEED_OF_SAMPLING}
PHASES = {"chat": False, "prompts_per_phase": 4, "updates_per_phase": 2, "inner_epochs": 1, **SEED_OF_DATA}
BATCHES = {"batch_size": 2, "max_length": 64, **SEED_OF_DATA}


def adamw(lr: float) -> dict[str, Any]:
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "eps": 1e-5, "weight_decay": 0.01}}


SUMS = [(a, (7 * a + 3) % 10) for a in range(10)]
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}?"},
            {"role": "assistant", "content": f"{a + b}" + "!" * (a % 4)},
        ]
    }
    for a, b in SUMS
]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}" + "." * (a % 3)} for a, b in SUMS[:8]]
LABELS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b + a % 2}", "label": a % 2 == 0} for a, b in SUMS[:8]]
PROMPTS = [{"prompt": f"{a}+{b}=" + " " * (a % 3), "answer": f"{a + b}"} for a, b in SUMS]

# name -> rows, model, data, callbacks; ``policy`` and ``train`` are added to each
Run = tuple[list[dict[str, Any]], tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], list[dict[str, Any]]]
RUNS: dict[str, Run] = {
    "sft": (
        CONVERSATIONS,
        (
            "SFTModule",
            {
                "label_smoothing": 0.1,
                "neftune_noise_alpha": None,
                "optimizer": adamw(3e-3),
                "scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": STEPS}},
            },
        ),
        ("InstructionDataModule", {**BATCHES, "packing": True, "max_length": 96, "batch_size": 1}),
        [{"class_path": "Export", "init_args": {"folder": "export"}}],
    ),
    "reward": (
        [{**row, "margin": 0.5 * (i % 2)} for i, row in enumerate(PAIRS)],
        ("RewardModule", {"centering": 0.01, "use_margins": True, "optimizer": adamw(3e-3)}),
        ("PreferenceDataModule", {**BATCHES, "chat": False}),
        [],
    ),
    "dpo": (
        PAIRS,
        (
            "DPOModule",
            {
                "beta": 0.1,
                "objective": {"class_path": "Sigmoid"},
                "nll_weight": 0.1,
                "optimizer": adamw(3e-3),
                "scheduler": {
                    "class_path": "WSD",
                    "init_args": {"warmup_steps": 1, "decay_start": 2, "total_steps": STEPS, "decay": "linear"},
                },
            },
        ),
        ("PreferenceDataModule", {**BATCHES, "chat": False}),
        [],
    ),
    "kto": (
        LABELS,
        ("DPOModule", {"beta": 0.1, "objective": {"class_path": "KTO"}, "optimizer": adamw(3e-3)}),
        ("PreferenceDataModule", {**BATCHES, "chat": False}),
        [],
    ),
    "online_dpo": (
        PROMPTS,
        (
            "OnlineDPOModule",
            {
                **SAMPLES,
                "beta": 0.1,
                "objective": {"class_path": "Sigmoid"},
                "num_generations": 4,
                "refresh": "soft",
                "optimizer": adamw(3e-3),
            },
        ),
        ("VerifiableDataModule", PHASES),
        [],
    ),
    "distill": (  # everything that distillation keeps from step to step
        PROMPTS,
        (
            "DistillModule",
            {
                **SAMPLES,
                "condition": "{prompt}{answer} {prompt}",
                "ema": 0.25,
                "objective": {"class_path": "JSD", "init_args": {"beta": 0.5}},
                "on_policy": 0.5,
                "completions": "answer",
                "first_tokens": 0.7,
                "top_k": 8,
                "num_generations": 2,
                "optimizer": adamw(3e-3),
            },
        ),
        ("VerifiableDataModule", PHASES),
        [],
    ),
    "grpo": (
        PROMPTS,
        (
            "GRPOModule",
            {
                **SAMPLES,
                "num_generations": 4,
                "advantage": "modules.functional.advantages.group_zscore",
                "objective": {
                    "class_path": "Clipped",
                    "init_args": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": {"class_path": "TokenMean"}},
                },
                "beta": 0.04,
                "optimizer": adamw(3e-3),
            },
        ),
        ("VerifiableDataModule", PHASES),
        [{"class_path": "Diversity"}, {"class_path": "LengthBias"}],
    ),
    "grpo_choices": (  # everything that GRPO keeps from phase to phase
        PROMPTS,
        (
            "GRPOModule",
            {
                **SAMPLES,
                "reward": {
                    "class_path": "WeightedSum",
                    "init_args": {
                        "rewards": [RULE, {"class_path": "RegexFormat", "init_args": {"pattern": "..", "name": "two"}}],
                        "weights": [1.0, {"start": 0.0, "end": 0.5, "first": 0, "last": 2}],
                    },
                },
                "validation": {"accuracy": RULE},
                "num_generations": 2,
                "advantage": {"class_path": "Centered"},
                "objective": {"class_path": "MirrorDescent"},
                "beta": 0.1,
                "kl_loss": None,
                "refresh_every": 1,
                "entropy": 0.01,
                "dynamic_sampling": {"max_rounds": 3},
                "optimizer": adamw(3e-3),
            },
        ),
        ("VerifiableDataModule", PHASES),
        [],
    ),
    "ppo": (
        PROMPTS,
        (
            "PPOModule",
            {
                **SAMPLES,
                "num_generations": 4,
                "clip": {"ratio": 0.2, "value": 0.2},
                "kl": {"coef": 0.2, "adaptive": {"target": 0.1, "gain": 1.0}},
                "gae": {"gamma": 1.0, "lam": 0.95, "whiten_rewards": True},
                "incentives": {"missing_eos": {"penalty": 0.5}, "entropy": 0.01},
                "value": {
                    "coef": 0.1,
                    "model": START,
                    "lr": 6e-3,
                },  # the policy's own start: adapters beside the policy's
                "lora": LORA,
                "optimizer": adamw(3e-3),
            },
        ),
        ("VerifiableDataModule", PHASES),
        [],
    ),
}


def configuration(name: str) -> dict[str, Any]:
    """Make the YAML of a run, which reads ``rows.jsonl`` and writes into its working directory."""
    _, (method, settings), (source, data), callbacks = copy.deepcopy(RUNS[name])
    checkpoint = {
        "dirpath": "checkpoints",
        "filename": "step{step}",
        "auto_insert_metric_name": False,
        "every_n_train_steps": 1,
        "save_top_k": -1,
        "save_last": "link",
        "enable_version_counter": False,
    }
    return {
        **SEED_OF_RUN,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_epochs": 3,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "log", "version": ""}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": checkpoint}, *callbacks],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": method, "init_args": {"policy": START, **settings}},
        "data": {"class_path": source, "init_args": {"train": "rows.jsonl", **data}},
    }


def fit(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run ``python -m modules fit`` in ``folder``, which is made here, and return its last checkpoint.

    ``arguments`` are added after the run's YAML.
    """
    folder.mkdir(parents=True, exist_ok=True)  # two ranks share it
    rows = "".join(json.dumps(row) + "\n" for row in RUNS[name][0])
    for file, text in ("rows.jsonl", rows), ("config.yaml", yaml.safe_dump(configuration(name), sort_keys=False)):
        part = folder / f"{file}.{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / file)
    with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):  # rows are named by their relative path
        main(["fit", "--config", "config.yaml", *arguments])
    found: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def losses(folder: Path) -> list[float]:
    """Return the logged loss of each step of a run in ``folder``."""
    with (folder / "log" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name = next(name for name in LOSSES if name in rows[0])
    return [float(row[name]) for row in rows if row[name]]


def same(a: Any, b: Any) -> bool:
    """Return whether two parts of checkpoints are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the bytes of all weights, in the order of their names."""
    found = hashlib.sha256()
    for _, weight in sorted(weights.items()):
        found.update(weight.contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(RUNS)
    if unknown:
        sys.exit(f"error: no run named {', '.join(sorted(unknown))}: name some of {', '.join(RUNS)}")
    for each in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            where = Path(temporary) / each
            end = fit(each, where)
            print(each, digest(end["state_dict"]), repr(losses(where)[-1]), flush=True)
