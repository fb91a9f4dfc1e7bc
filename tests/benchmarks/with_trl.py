"""Trains with TRL: the other side of ``bench.py``, in the environment of ``make bench-env``.

Run: .venv-trl/bin/python tests/benchmarks/with_trl.py {sft,reward,dpo,grpo} MODEL_FOLDER ROWS.jsonl RESULT.json --batch 8 ...

The rows are taken in their order. The result has the fields of ``StepClock``'s.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import bench_reward
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def adapters() -> Any:
    """The adapters of configs/overlays/lora.yaml."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def time_sampling(trainer: Any, found: list[float]) -> None:
    """Note the seconds of each call that samples."""
    generate = trainer._generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = generate(*args, **kwargs)
        found.append(time.perf_counter() - start)
        return result

    trainer._generate = timed


def main(asked: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rows = Dataset.from_list([json.loads(line) for line in Path(asked.rows).read_text(encoding="utf-8").splitlines()])
    tokenizer = AutoTokenizer.from_pretrained(asked.model, **({"padding_side": "left"} if asked.work == "grpo" else {}))
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": asked.bf16,
        "fp16": False,
        "use_cpu": True,
        "seed": 0,
        "gradient_checkpointing": asked.checkpointing,
        "per_device_train_batch_size": asked.batch,
        "max_steps": asked.steps,
        "learning_rate": asked.lr,
    }
    given = {"train_dataset": rows, "processing_class": tokenizer}
    in_order = {"train_sampling_strategy": "sequential"}
    clock, sampling = Clock(), []
    if asked.work == "reward":
        model: Any = AutoModelForSequenceClassification.from_pretrained(asked.model, dtype=torch.float32, num_labels=1)
        args: Any = RewardConfig(
            **common, **in_order, max_length=asked.max_length, center_rewards_coefficient=asked.centering
        )
        trainer: Any = RewardTrainer(model=model, args=args, **given)
    else:
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    if asked.work == "sft":
        args = SFTConfig(**common, **in_order, max_length=asked.max_length)
        trainer = SFTTrainer(model=model, args=args, peft_config=adapters() if asked.lora else None, **given)
    elif asked.work == "dpo":
        args = DPOConfig(**common, **in_order, max_length=asked.max_length)
        trainer = DPOTrainer(model=model, args=args, **given)
    elif asked.work == "grpo":
        args = GRPOConfig(
            **common,
            num_generations=asked.generations,
            max_completion_length=asked.max_completion_length,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=model, args=args, reward_funcs=getattr(bench_reward, f"{asked.reward}_of_chats"), **given
        )
        time_sampling(trainer, sampling)
    trainer.add_callback(clock)
    begun = time.perf_counter(), time.process_time()
    trainer.train()
    steps = [each for each in trainer.state.log_history if "loss" in each]
    found = {"begun": begun, "ready": begun, "ends": clock.ends, "steps": steps, "sampling": sampling}
    Path(asked.result).write_text(json.dumps(found, default=float), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("sft", "reward", "dpo", "grpo"))
    for name in ("model", "rows", "result"):
        parser.add_argument(name)
    for name, kind, default in (
        ("batch", int, 8),
        ("steps", int, 6),
        ("max_length", int, 1024),
        ("lr", float, 1e-6),
        ("centering", float, 0.01),
        ("generations", int, 8),
        ("max_completion_length", int, 128),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--reward", default="score")
    for name in ("lora", "bf16", "checkpointing"):
        parser.add_argument(f"--{name}", action="store_true")
    main(parser.parse_args())
