"""A short real run of a method, with all that its metrics are made of written down.

``python recorded_run.py METHOD RANKS FOLDER`` fits the tiny model and saves a ``Recording`` of each rank. The rows are
of uneven lengths; no step is full; completions are equal, truncated, unscorable, or all scored alike.
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from callbacks import Diversity, GroupBias, LengthBias, Overoptimization, TokenBudget
from datamodules import InstructionDataModule, NumberTexts, PreferenceDataModule, PtxStream, VerifiableDataModule
from datamodules.sources import Row, Source
from modules import DPOModule, GRPOModule, OnlineDPOModule, PPOModule, RewardModule, SFTModule
from modules.generation import Validation
from modules.losses import KL, KTO, ImportanceWeights, Incentives
from modules.losses.shaping import MissingEos
from modules.rewards import WeightedSum
from modules.rollout.engine import RolloutEngine
from modules.rollout.sampling import Sampling
from modules.types import Completion, Outcome, Reward, Rollout, ScoredPair

EOS, BUDGET, DECAY = 2, 6, 0.9
TEMPERATURE, GOOD, FORM = 0.7, 2.0, 0.5  # weights of the parts of the reward
IMPORTANCE = {"grpo": 2.0, "ppo": 1.0}  # largest weight: truncated per token, masked per completion
LR = {"sft": 0.05, "reward": 0.003, "dpo": 0.03, "kto": 0.03, "grpo": 0.1, "ppo": 0.1, "online_dpo": 0.3}


class Texts(Source):
    """``kind`` instructions, preferences or labels, of uneven lengths; numbers of rows that fill no last step."""

    def __init__(self, kind: str, count: int, start: int = 0) -> None:
        self.kind, self.numbers = kind, range(start, start + count)

    def rows(self) -> list[Row]:
        return [Row(self.columns(number), f"row {number}", "texts", plain=True) for number in self.numbers]

    def columns(self, number: int) -> dict[str, Any]:
        prompt, texts = (
            f"{'?' * (number % 4)}{number}: ",
            [f"{number * k}" * (1 + (number + k) % 3) for k in (3, 7, 11)],
        )
        match self.kind:
            case "instructions":
                return {"prompt": prompt, "completion": texts[0]}
            case "preferences":  # two or three completions, also with equal ranks
                ranks = [[0, 1, 2], [1, 0, 1], [1, 0]][number % 3]
                return {"prompt": prompt, "completions": texts[: len(ranks)], "ranks": ranks}
            case "labels":
                return {"prompt": prompt, "completion": texts[0], "label": number % 3 > 0}
        return {"prompt": prompt, "answer": str(number)}


class Scripted(RolloutEngine):
    """Completions of 1 to ``BUDGET`` tokens that depend on the prompt and their number alone, and so on no rank."""

    def sync_weights(self, policy: Any, version: int) -> None:
        """Scripted completions need no weights."""

    def generate(
        self, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        return [[self.write(prompt, g, sampling.temperature) for g in range(num_generations)] for prompt in prompts]

    def write(self, prompt: list[int], number: int, temperature: float) -> Completion:
        draw = random.Random(repr((prompt, number, temperature)))
        length = draw.randint(1, BUDGET)
        ids = [draw.randint(5, 260) for _ in range(length)]
        stopped = length < BUDGET
        if stopped:
            ids[-1] = EOS
        logprobs = [-3 - 4 * draw.random() for _ in ids]  # around those of the trainer
        return Completion(ids, logprobs, draw.choice("abc"), "stop" if stopped else "length")


class Good(Reward):
    """1 or 0 by the tokens; None for the text c and every seventh prompt; alike within every third prompt."""

    name = "good"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [self.grade(rollout) for rollout in rollouts]

    def grade(self, rollout: Rollout) -> float | None:
        if rollout.completion.text == "c" or int(rollout.answer or 0) % 7 == 5:
            return None
        return 1.0 if int(rollout.answer or 0) % 3 == 0 else float(sum(rollout.completion.token_ids) % 2)


class Form(Reward):
    """A number between 0 and 1 for what was not truncated, else 0.25; alike within every third prompt."""

    name = "form"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        equal = [int(rollout.answer or 0) % 3 == 0 for rollout in rollouts]
        return [
            0.25 if same or rollout.completion.finish == "length" else rollout.completion.token_ids[0] / 261
            for same, rollout in zip(equal, rollouts, strict=True)
        ]


class Gold(Reward):
    """The number of tokens; None for truncated completions."""

    name = "gold"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        tokens = [len(rollout.completion.token_ids) for rollout in rollouts]
        return [None if count == BUDGET else count / BUDGET for count in tokens]


@dataclass
class Step:
    """An optimiser step on this rank."""

    phase: int
    before: dict[str, torch.Tensor]
    batches: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # from the start of its first micro-batch to the end of its last


@dataclass
class Evaluation:
    """A validation on this rank."""

    weights: dict[str, torch.Tensor]
    batches: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[ScoredPair] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    sampled: list[Outcome] = field(default_factory=list)
    greedy: list[Outcome] = field(default_factory=list)


@dataclass
class Recording:
    """What one rank saw."""

    steps: list[Step] = field(default_factory=list)
    phases: list[list[Rollout]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)  # on rank 0
    seconds: list[float] = field(default_factory=list)  # of each phase, with its collection


def copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


class Recorder(Callback):
    """Fills a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.started, self.epoch_started = recording, 0.0, 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epoch_started = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.started = time.perf_counter()
            steps = self.recording.steps
            before = steps[-1].after if steps else copy_weights(pl_module)
            steps.append(Step(trainer.current_epoch, before))
        self.recording.steps[-1].batches.append(dict(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.recording.steps[-1]
        step.seconds = time.perf_counter() - self.started
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            step.after = copy_weights(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.recording.phases.append(list(pl_module.record.rollouts))
        self.recording.seconds.append(time.perf_counter() - self.epoch_started)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.recording.evaluations.append(Evaluation(self.recording.steps[-1].after))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
        evaluation, record = self.recording.evaluations[-1], pl_module.record
        evaluation.batches.append(dict(batch))
        evaluation.pairs += record.pairs
        evaluation.rollouts += record.held_out or []
        evaluation.sampled, evaluation.greedy = list(record.sampled), list(record.greedy)


class Kept(Logger):
    """A logger that keeps each call's numbers."""

    name, version = "kept", 0

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.recording.logged.append({name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none to keep."""


def make_module(method: str) -> Any:
    """Make the module of a method, on the tiny model, with plain gradient descent and a rate that decays."""
    seed_everything(0)
    common: dict[str, Any] = {
        "policy": "tiny",
        "optimizer": lambda parameters: SGD(parameters, lr=LR[method]),
        "scheduler": lambda optimizer: ExponentialLR(optimizer, DECAY),
    }
    sampled = common | {
        "reward": WeightedSum([Good(), Form()], [GOOD, FORM]),
        "num_generations": 4,
        "engine": Scripted(),
        "sampling": Sampling(temperature=TEMPERATURE, max_completion_length=BUDGET),
        "validation": Validation(accuracy=Good(), generations=3),
    }
    match method:
        case "sft":
            return SFTModule(**common)
        case "reward":
            return RewardModule(**common, centering=0.1)
        case "dpo":
            return DPOModule(**common, nll_weight=0.1)
        case "kto":
            return DPOModule(**common, objective=KTO(1.5, 0.5))
        case "grpo":
            return GRPOModule(**sampled, measure_kl=True, importance=ImportanceWeights(cap=IMPORTANCE[method]))
        case "online_dpo":
            return OnlineDPOModule(**sampled)
    incentives = Incentives(missing_eos=MissingEos(0.3), ptx=0.5)
    importance = ImportanceWeights("sequence", IMPORTANCE[method], "mask")
    return PPOModule(**sampled, kl=KL(coef=0.07), incentives=incentives, importance=importance)


def make_data(method: str, tokenizer: Any, ranks: int) -> Any:
    """Make the rows: 11 in steps of 4, or 3 phases of 6 prompts with two updates each."""
    if method == "sft":
        train, val = Texts("instructions", 11), Texts("instructions", 5, start=50)
        return InstructionDataModule(tokenizer, train, val, batch_size=2 // ranks)
    if method in ("reward", "dpo", "kto"):
        kind = "labels" if method == "kto" else "preferences"
        return PreferenceDataModule(tokenizer, Texts(kind, 11), Texts(kind, 5, start=50), batch_size=2 // ranks)
    ptx = PtxStream(NumberTexts(20), rows_per_update=4, max_length=24) if method == "ppo" else None
    phases = {"prompts_per_phase": 6, "updates_per_phase": 2, "inner_epochs": 2, "val_batch_size": 2}
    return VerifiableDataModule(tokenizer, Texts("prompts", 18), Texts("prompts", 5, start=50), ptx=ptx, **phases)


def record(method: str, ranks: int, folder: Path) -> None:
    """Fit and save the recording of this rank as ``rank<k>.pt``."""
    recording, module = Recording(), make_module(method)
    callbacks: list[Callback] = [Recorder(recording)]
    if method in ("grpo", "ppo", "online_dpo"):
        callbacks += [Overoptimization(Gold()), Diversity(), LengthBias(), TokenBudget(10**6)]
    if method == "grpo":
        callbacks.append(GroupBias())
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=3 if method in ("grpo", "ppo", "online_dpo") else 1,
        accumulate_grad_batches=2,
        callbacks=callbacks,
        logger=Kept(recording),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, make_data(method, module.tokenizer, ranks))
    torch.save(recording, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    from tests.methods import recorded_run  # so that what is saved has a module that the reader can import

    recorded_run.record(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
