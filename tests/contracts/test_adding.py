"""What it costs to add one of each kind: files in somebody's own folder, and no registration."""

import csv
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modules.__main__ import main

TINY = Path(__file__).parents[2] / "configs/tiny"
SHORT = [
    "--trainer.max_steps=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--logger=csv",
    "--out=run",
]
FEW = [
    "--data.prompts_per_phase=2",
    "--data.val=null",
    "--model.num_generations=2",
    "--model.sampling.max_completion_length=4",
]
SUMS = "--data.train.num_examples=40"
ALONE = "--trainer.callbacks=null"

REWARD = '''
from modules.types import Reward


class Brevity(Reward):
    """Minus the characters of a completion, over ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        self.name, self.scale = "brevity", scale

    def __call__(self, rollouts):
        return [-len(rollout.completion.text) / self.scale for rollout in rollouts]
'''
FUNCTION = """
def brief(completions, **columns):
    return [-float(len(text)) for text in completions]
"""
SOURCE = '''
from datamodules import Source
from datamodules.sources import Row


class Doubles(Source):
    """n + n for n below ``num_rows``."""

    def __init__(self, num_rows: int = 10) -> None:
        self.num_rows = num_rows

    def rows(self):
        return [Row({"prompt": f"{n}+{n}=", "answer": str(2 * n)}, f"doubles#{n}", "doubles") for n in range(self.num_rows)]
'''
FORMAT = '''
from dataclasses import replace

from datamodules import Files


class Dialogs(Files):
    """Rows with one column ``dialog``, such as ``Q: 1+1= A: 2``."""

    def rows(self):
        return [replace(row, columns=split(row.columns["dialog"])) for row in super().rows()]


def split(dialog: str) -> dict[str, str]:
    question, answer = dialog.removeprefix("Q: ").split(" A: ")
    return {"prompt": question, "completion": answer}
'''
CALLBACK = '''
from lightning.pytorch import Callback


class CountsRollouts(Callback):
    """Says how many completions the last phase had."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        open(self.file, "w").write(str(len(pl_module.record.rollouts)))
'''
LOSS = '''
from modules.losses import PairObjective


class Square(PairObjective):
    """(1 - beta h)^2."""

    def losses(self, chosen, rejected, beta):
        return (1 - beta * (chosen.log_ratio - rejected.log_ratio)).square()
'''
PAGE = '''
import torch
from torch import Tensor

from modules.base import AlignmentModule
from modules.functional.masked import aggregate
from modules.types import InstructionBatch


class UnlikelihoodModule(AlignmentModule):
    """loss = - mean over supervised tokens of log(1 - pi(token)) (arXiv 1908.04319)."""

    def __init__(self, policy: str, lr: float = 1e-3) -> None:
        super().__init__(policy, lambda parameters: torch.optim.AdamW(parameters, lr=lr))

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        logprobs = self.policy.token_scores(batch["input_ids"], batch["loss_mask"]).logprobs
        loss = aggregate(unlikelihood(logprobs), batch["loss_mask"], batch["denominator"])
        self.log_step({"loss": loss, "tokens": float(batch["attention_mask"].sum())})
        return self.step_loss(loss)


def unlikelihood(logprobs: Tensor) -> Tensor:
    return -torch.log1p(-logprobs.exp().clamp(max=0.999))
'''
YAML = """
model: {class_path: kit.unlikelihood.UnlikelihoodModule, init_args: {policy: tiny, lr: 1e-4}}
data:
  class_path: InstructionDataModule
  init_args: {train: {class_path: Addition, init_args: {num_examples: 40}}}
"""
TEST = """
import torch

from kit.unlikelihood import unlikelihood


def test_a_token_of_probability_one_half_costs_log_2():
    assert torch.allclose(unlikelihood(torch.tensor([0.5]).log()), torch.tensor([2.0]).log())
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """add(name=text, ...): write files into the package ``kit`` of a folder of its own, where the user works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*(path for path in sys.path if path), str(tmp_path)])

    def write(**files: str) -> None:
        Path("kit").mkdir()
        for name, text in files.items():
            Path("kit", name.replace("_yaml", ".yaml") if name.endswith("_yaml") else f"{name}.py").write_text(text)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "kit"]:
        del sys.modules[name]


def fit(config: Path | str, *arguments: str) -> dict[str, str]:
    """Fit one step, and return what was logged."""
    main(["fit", f"--config={config}", *SHORT, *arguments])
    with Path("run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: value for row in rows for name, value in row.items() if value}


def test_a_reward_is_one_file(add: Callable[..., None]):
    add(brevity=REWARD)
    logged = fit(
        TINY / "grpo.yaml", "--model.reward=kit.brevity.Brevity", "--model.reward.scale=100", *FEW, SUMS, ALONE
    )
    assert -1 < float(logged["train/rewards/brevity/mean"]) < 0


def test_a_reward_function_is_one_file(add: Callable[..., None]):
    add(brief=FUNCTION)
    logged = fit(TINY / "grpo.yaml", "--model.reward=kit.brief.brief", *FEW, SUMS, ALONE)
    assert float(logged["train/rewards/brief/mean"]) < 0


def test_a_source_is_one_file(add: Callable[..., None], caplog: pytest.LogCaptureFixture):
    add(doubles=SOURCE)
    fit(TINY / "grpo.yaml", "--data.train=kit.doubles.Doubles", "--data.train.num_rows=7", *FEW, ALONE)
    assert "7 rows in = 7 used" in caplog.text


def test_a_format_is_one_file(add: Callable[..., None], caplog: pytest.LogCaptureFixture):
    add(dialogs=FORMAT)
    Path("my.jsonl").write_text('{"dialog": "Q: 1+1= A: 2"}\n' * 3)
    rows = ["--data.train=kit.dialogs.Dialogs", "--data.train.path=my.jsonl", "--data.val=null"]
    assert float(fit(TINY / "sft.yaml", *rows, ALONE)["train/loss"]) > 0
    assert "3 rows in = 3 used" in caplog.text


def test_a_callback_is_one_file(add: Callable[..., None]):
    add(counts=CALLBACK)
    fit(
        TINY / "grpo.yaml",
        ALONE,
        "--trainer.callbacks+=kit.counts.CountsRollouts",
        "--trainer.callbacks.file=said",
        *FEW,
        SUMS,
    )
    assert Path("said").read_text() == "4"


def test_a_loss_is_one_file(add: Callable[..., None]):
    add(square=LOSS)
    few = [SUMS, "--data.batch_size=8", "--data.val=null", "--model.nll_weight=0"]
    logged = fit(TINY / "dpo.yaml", "--model.objective=kit.square.Square", *few, ALONE)
    assert float(logged["train/loss"]) == pytest.approx(1.0, abs=1e-4)  # h is 0 at the first step


def test_a_method_is_three_files(add: Callable[..., None]):
    add(unlikelihood=PAGE, unlikelihood_yaml=YAML, test_unlikelihood=TEST)
    assert float(fit("kit/unlikelihood.yaml")["train/loss"]) > 0
    importlib.import_module("kit.test_unlikelihood").test_a_token_of_probability_one_half_costs_log_2()
