"""Runs with one planted fault each, and healthy ones, for the doctor: (seed, folder) -> module, data, Trainer."""

import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from callbacks import Doctor
from datamodules import Addition, VerifiableDataModule
from datamodules.sources import Row, Source
from modules import GRPOModule, OnlineDPOModule, PPOModule
from modules.generation import Validation
from modules.networks.policy import Policy
from modules.rewards import (
    CodeTests,
    ExactMatch,
    LengthPenalty,
    NumericMatch,
    OverlongPenalty,
    RegexFormat,
    Repetition,
    ThinkAnswerFormat,
    WeightedSum,
)
from modules.rollout.sampling import Sampling
from modules.types import as_reward

Case = tuple[LightningModule, LightningDataModule, Trainer]
ADD = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


class Sums(Source):
    """Two-digit sums, each row changed by ``change``."""

    def __init__(
        self, seed: int, change: Callable[[dict[str, Any], int], dict[str, Any] | None], plain: bool = True
    ) -> None:
        self.found = []
        for place, row in enumerate(Addition(2000, seed=seed).rows()):
            columns = change({"prompt": row.columns["prompt"], "answer": row.columns["answer"]}, place)
            if columns is not None:
                self.found.append(Row(columns, f"sums#{place}", "sums", plain))

    def rows(self) -> list[Row]:
        return self.found


def make(
    seed: int,
    train: Source | None = None,
    method: type = GRPOModule,
    policy: str = "tiny-addition",
    reward: Any = None,
    lr: float = 3e-4,
    length: int = 5,
    temperature: float = 1.0,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """Make a run of the kind of configs/tiny/grpo.yaml."""
    module = method(
        policy,
        reward or NumericMatch(),
        sampling=Sampling(temperature=temperature, max_completion_length=length),
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        seed=seed,
        **options,
    )
    rows = VerifiableDataModule(train=train or Addition(2000, seed=seed), seed=seed, **(data or {}))
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return module, rows, Trainer(accelerator="cpu", devices=1, **({"max_epochs": 60} | quiet | (trainer or {})))


def save_policy(folder: Path, sharpened: float = 1.0, **changes: Any) -> str:
    """Write ``tiny-addition`` with its logits times ``sharpened``, and changes of its tokenizer."""
    policy = Policy("tiny-addition")
    policy.model.base_model.norm.weight.data *= sharpened
    for name, value in changes.items():
        setattr(policy.tokenizer, name, value)
    if "eos_token" in changes:
        end = policy.tokenizer.eos_token_id
        policy.model.config.eos_token_id = policy.model.generation_config.eos_token_id = end
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@cache
def find_easy() -> tuple[str, ...]:
    """Return the 60 of 2000 sums that the policy is surest to answer right, by its own log-probs."""
    policy = Policy("tiny-addition", dropout=False)
    rows = Addition(2000, seed=7).rows()
    tokens = [policy.tokenizer(row.columns["prompt"] + row.columns["answer"]).input_ids + [2] for row in rows]
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logprobs = policy.token_scores(ids, torch.arange(ids.shape[1])[None].expand_as(ids) >= 6).logprobs.sum(1)
    surest = logprobs.argsort(descending=True)[:60].tolist()
    return tuple(rows[place].columns["prompt"] for place in surest)


def multiply(row: dict[str, Any], place: int) -> dict[str, Any]:
    first, second = row["prompt"][:-1].split("+")
    return {**row, "answer": f"{int(first) * int(second) % 1000 + 1000}"}


def constant(completions: list[str], answers: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def same(completions: list[str], answers: list[str], **columns: Any) -> list[float]:
    return [float(text == answer) for text, answer in zip(completions, answers, strict=True)]


def nothing(completions: list[str], answers: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def words(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {**row, "answer": "the number " + " ".join(row["answer"])}


def program(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {"prompt": row["prompt"], "test": "def check(add):\n    assert add(1, 2) == 3", "entry_point": "add"}


def elsewhere(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {"prompt": row["prompt"], "answer": str(random.Random(place).randrange(1000, 2000)), "total": row["answer"]}


def unmapped(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {"prompt": row["prompt"], "key": f"k{place}", "total": row["answer"]}


def repeat(count: int) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    kept: list[dict[str, Any]] = []

    def change(row: dict[str, Any], place: int) -> dict[str, Any]:
        kept.append(row)
        return kept[place % count]

    return change


def bare(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {**row, "prompt": row["prompt"].removesuffix("=")}


ILL: dict[str, tuple[str, Callable[[int, Path], Case]]] = {
    "a template that the policy never saw": ("template", lambda seed, folder: make(seed, data={"chat": True})),
    "no template, though the policy learned one": (
        "template",
        lambda seed, folder: make(
            seed, Sums(seed, bare), policy=save_policy(folder, chat_template=ADD), data={"chat": False}
        ),
    ),
    "stop token missing": ("stop", lambda seed, folder: make(seed, policy=save_policy(folder, eos_token="<|im_end|>"))),
    "a policy that never stops": ("stop", lambda seed, folder: make(seed, policy="tiny")),
    "unreadable golds": ("golds", lambda seed, folder: make(seed, Sums(seed, words))),
    "programs too hard, without answers": (
        "hard",
        lambda seed, folder: make(seed, Sums(seed, program), reward=CodeTests()),
    ),
    "budget too short": ("budget", lambda seed, folder: make(seed, length=3)),
    "budget far too short": ("budget", lambda seed, folder: make(seed, length=2)),
    "all too hard": ("hard", lambda seed, folder: make(seed, Sums(seed, multiply))),
    "all too hard, told right by another verifier": (
        "hard",
        lambda seed, folder: make(seed, Sums(seed, multiply), validation=Validation(accuracy=ExactMatch())),
    ),
    "a learning rate of 0": ("learning_rate", lambda seed, folder: make(seed, lr=0.0)),
    "all too easy": (
        "easy",
        lambda seed, folder: make(
            seed,
            Sums(7, lambda row, place: row if row["prompt"] in find_easy() else None),
            policy=save_policy(folder, sharpened=3.0),
        ),
    ),
    "a format that never fires": (
        "format",
        lambda seed, folder: make(seed, reward=WeightedSum([NumericMatch(), ThinkAnswerFormat()])),
    ),
    "learning rate 100 times too high": ("learning_rate", lambda seed, folder: make(seed, lr=3e-2)),
    "learning rate 10000 times too low": ("learning_rate", lambda seed, folder: make(seed, lr=3e-8)),
    "temperature 0.1": ("temperature", lambda seed, folder: make(seed, temperature=0.1)),
    "temperature 0.3": ("temperature", lambda seed, folder: make(seed, temperature=0.3)),
    "weights of two verifiers that cancel": (
        "weights",
        lambda seed, folder: make(seed, reward=WeightedSum([NumericMatch(), ExactMatch()], [1.0, -1.0])),
    ),
    "a penalty that takes back what is right": (
        "weights",
        lambda seed, folder: make(seed, reward=WeightedSum([NumericMatch(), as_reward(same)], [1.0, -1.0])),
    ),
    "answers in another column": ("answers", lambda seed, folder: make(seed, Sums(seed, elsewhere))),
    "answers in a column without a known name": ("answers", lambda seed, folder: make(seed, Sums(seed, unmapped))),
    "duplicated prompts": ("repeats", lambda seed, folder: make(seed, Sums(seed, repeat(12)))),
    "a constant reward": ("constant", lambda seed, folder: make(seed, reward=constant)),
    "a reward that is always 0": ("constant", lambda seed, folder: make(seed, reward=nothing)),
    "temperature 2": ("temperature", lambda seed, folder: make(seed, temperature=2.0)),
    "a reward that nearly all completions earn": (
        "signal",
        lambda seed, folder: make(seed, reward=RegexFormat(r"\d{3}"), validation=Validation(accuracy=ExactMatch())),
    ),
    "a verifier that wants another form": (
        "verifier",
        lambda seed, folder: make(seed, reward=ExactMatch(r"The answer is (\d+)\.")),
    ),
}

HEALTHY: dict[str, Callable[[int, Path], Case]] = {
    "two completions a prompt": lambda seed, folder: make(seed, num_generations=2),
    "a length penalty": lambda seed, folder: make(seed, reward=LengthPenalty(NumericMatch(), 0.01)),
    "penalties that nothing earns": lambda seed, folder: make(
        seed, reward=WeightedSum([NumericMatch(), OverlongPenalty(40, 10), Repetition()])
    ),
    "GRPO": lambda seed, folder: make(seed),
    "PPO": lambda seed, folder: make(
        seed, method=PPOModule, num_generations=4, data={"prompts_per_phase": 64, "updates_per_phase": 4}
    ),
    "PPO with one completion": lambda seed, folder: make(seed, method=PPOModule, data={"prompts_per_phase": 128}),
    "online DPO": lambda seed, folder: make(seed, method=OnlineDPOModule, num_generations=8, lr=1e-4),
    "accuracy and format": lambda seed, folder: make(
        seed, reward=WeightedSum([ExactMatch(), RegexFormat(r"\d{3}")], [0.9, 0.1]), data={"prompts_per_phase": 64}
    ),
    "a part that is only measured, one that pulls back": lambda seed, folder: make(
        seed,
        reward=WeightedSum([NumericMatch(), ExactMatch(), RegexFormat(r"\d*[02468]", "even")], [1.0, 0.0, -0.2]),
    ),
    "a chat template": lambda seed, folder: make(
        seed, Sums(seed, bare, plain=False), policy=save_policy(folder, chat_template=ADD)
    ),
}


def examine(case: Case) -> Doctor:
    """Run ``validate``'s hooks without its batches."""
    module, rows, trainer = case
    doctor = Doctor()
    trainer.callbacks.insert(0, doctor)  # type: ignore[attr-defined]
    rows.val = rows.train
    trainer.limit_val_batches = 1
    rows.val_batch_size = 1
    trainer.validate(module, datamodule=rows, verbose=False)
    return doctor
