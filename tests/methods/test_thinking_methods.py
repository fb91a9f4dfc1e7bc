"""Methods with thinking budgets: the stop text teaches nothing, budgets are drawn anew, validation measures a curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import QUIET, Gradients
from test_tools import Kept, Numbered, OldEngine, naive_logprobs
from torch import Tensor

from datamodules import VerifiableDataModule
from modules import GRPOModule, OnlineDPOModule, PPOModule
from modules.generation import Validation
from modules.losses import GAE, KL
from modules.rewards import ExactMatch, RegexFormat, Repetition
from modules.rollout import Calculator, Environment, Sampling, Thinking

STOP = list(b"</think>")  # the token of a byte is its number + 5


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Prompts, half of which open a thought."""
    path = tmp_path / "rows.jsonl"
    asked = [{"prompt": f"{i}+{i}=" + "<think>" * (i % 2), "answer": str(2 * i)} for i in range(10, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return str(path)


def make(kind: type = GRPOModule, budget: Any = (0, 3), **settings: Any) -> Any:
    seed_everything(0)
    sampling = Sampling(max_completion_length=20, thinking=Thinking(budget, "</think>"))
    known = {"num_generations": 4, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5)}
    return kind("tiny", settings.pop("reward", Numbered()), **known | {"sampling": sampling} | settings)


def fit(module: Any, rows: str, *callbacks: Any) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, VerifiableDataModule(module.tokenizer, rows, chat=False, prompts_per_phase=8))
    return trainer


def check_masks(rollouts: list[Any], batch: dict[str, Tensor]) -> int:
    """Compare the mask with what was sampled, and return how many thoughts were stopped."""
    stopped = 0
    for rollout, mask in zip(rollouts, batch["completion_mask"], strict=True):
        ids, sampled = rollout.completion.token_ids, rollout.completion.sampled or [True] * 20
        assert mask[: len(ids)].tolist() == sampled[: len(ids)] and not mask[len(ids) :].any()
        if rollout.completion.sampled is not None:
            stopped += 1
            given = [token for token, mine in zip(ids, sampled, strict=True) if not mine]
            assert given == [byte + 5 for byte in STOP] and rollout.text.count("</think>") == 1
    return stopped


def test_the_stop_text_is_no_part_of_the_gradient_of_grpo(rows):
    module, seen = make(), Gradients()
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    trainer = fit(module, rows, seen)
    ((batch, _, found),) = seen.steps
    assert check_masks(module.record.rollouts, batch) >= 8 and bool(
        (~batch["completion_mask"][:, 0]).any()
    )  # some begin with it
    fresh = make()
    fresh.policy.load_state_dict(start)
    advantages = torch.tensor([1.0, 0.0, 0.25, 0.5]) - 0.4375
    advantages /= advantages.square().sum().div(3).sqrt() + 1e-4
    count = sum(rollout.completion.length for rollout in module.record.rollouts)
    loss = torch.zeros(())
    for number, rollout in enumerate(module.record.rollouts):
        logprobs, _ = naive_logprobs(fresh, rollout.prompt_ids, rollout.completion)
        loss = loss - float(advantages[number % 4]) * logprobs.sum() / count
    loss.backward()
    by_loop = torch.cat([parameter.grad.flatten() for parameter in fresh.policy.parameters()])
    torch.testing.assert_close(found, by_loop, atol=2e-6, rtol=1e-3)
    assert float(trainer.callback_metrics["train/completions/mean_length"]) == pytest.approx(count / 32)
    assert float(trainer.callback_metrics["train/sampling/sampling_logp_difference/max"]) < 1e-3


def test_the_stop_text_is_no_part_of_the_gradient_of_online_dpo(rows):
    module, seen = make(OnlineDPOModule, beta=0.2), Gradients()
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    fit(module, rows, seen)
    ((batch, _, found),) = seen.steps
    compared = [rollout for number, rollout in enumerate(module.record.rollouts) if number % 4 < 2]
    assert check_masks(compared, batch) >= 4
    fresh = make(OnlineDPOModule, beta=0.2)
    fresh.policy.load_state_dict(start)
    loss = torch.zeros(())
    for group in range(
        8
    ):  # the first of a group scores best and the second worst; at the start -log sigma has slope -1/2
        best, worst = (
            naive_logprobs(fresh, rollout.prompt_ids, rollout.completion)[0].sum()
            for rollout in compared[2 * group : 2 * group + 2]
        )
        loss = loss - 0.5 * 0.2 * (best - worst) / 8
    loss.backward()
    by_loop = torch.cat([parameter.grad.flatten() for parameter in fresh.policy.parameters()])
    torch.testing.assert_close(found, by_loop, atol=2e-6, rtol=1e-3)


def test_generalised_advantages_skip_the_stop_text(rows):
    """Also where a completion begins with it; the value before the first sampled token is that of its state."""
    module, seen = make(PPOModule, gae=GAE(gamma=0.9, lam=0.8), kl=KL(coef=0.0)), Kept()
    torch.nn.init.normal_(module.critic.head.weight)  # it starts at 0
    fit(module, rows, seen)
    batch = seen.batch
    assert check_masks(module.record.rollouts, batch) >= 8
    for row, score in enumerate([1.0, 0.0, 0.25, 0.5] * 8):
        keep = batch["completion_mask"][row]
        values, returns, advantage, following = batch["values"][row][keep].tolist(), [], 0.0, 0.0
        for place, value in reversed([*enumerate(values)]):
            advantage = (score if place == len(values) - 1 else 0.0) + 0.9 * following - value + 0.72 * advantage
            following = value
            returns.insert(0, advantage + value)
        torch.testing.assert_close(batch["returns"][row][keep], torch.tensor(returns), atol=1e-5, rtol=0)
        assert not batch["advantages"][row][~keep].any() and not batch["values"][row][~keep].any()


def train(folder: Path, rows: str, resume: Path | None = None) -> list[Tensor]:
    """Train two phases of two updates, with a checkpoint behind each step, and return the weights."""
    module = make()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_epochs=2, callbacks=[saver])
    data = VerifiableDataModule(module.tokenizer, rows, chat=False, prompts_per_phase=8, updates_per_phase=2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return [*module.policy.parameters()]


def test_a_run_with_drawn_budgets_resumes_bit_for_bit(tmp_path, rows):
    end = train(tmp_path / "whole", rows)
    for step in (1, 2):  # inside a phase, and between two
        again = train(tmp_path / "again", rows, tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(end, again, strict=True))


def validate(module: Any, rows: str) -> dict[str, float]:
    trainer = Trainer(**QUIET)
    data = VerifiableDataModule(module.tokenizer, rows, val=rows, chat=False)
    (metrics,) = trainer.validate(module, data, verbose=False)
    return dict(metrics)


def test_validation_measures_each_budget(rows):
    module = make(
        budget=None,
        reward=Repetition(),
        validation=Validation(RegexFormat(r"(?s).*[0-9].*"), generations=3, budgets=(4, 0)),
    )
    metrics = validate(module, rows)
    assert list(module.record.budgets) == [0, 4]
    means, every = {}, {}
    for budget, outcomes in module.record.budgets.items():
        rates = torch.tensor([float(outcome.right) for outcome in outcomes], dtype=torch.float64).view(20, 3).mean(1)
        means[budget], every[budget] = float(rates.mean()), rates
        assert metrics[f"val/budget/{budget}/accuracy"] == pytest.approx(means[budget])
        assert metrics[f"val/budget/{budget}/accuracy_standard_error"] == pytest.approx(float(rates.std()) / 20**0.5)
        lengths = [outcome.length for outcome in outcomes]
        assert metrics[f"val/budget/{budget}/length"] == pytest.approx(sum(lengths) / 60)
    assert metrics["val/budget/rise"] == pytest.approx(means[4] - means[0])
    error = float((every[4] - every[0]).std()) / 20**0.5  # the prompts are the same at both budgets
    assert metrics["val/budget/rise_standard_error"] == pytest.approx(error)
    assert means[0] + means[4] > 0
    uids = [outcome.uid for outcome in module.record.budgets[0]]
    assert [outcome.uid for outcome in module.record.budgets[4]] == uids and len(set(uids)) == 20


def test_completions_are_compared_with_the_mode_that_is_asked(tmp_path):
    """The model of sums never thinks, unless the prompt opens the thought."""
    asked = ["12+34=/no_think", "12+35=/no_think", "12+36=/think", "12+37=/think<think>", "12+38="]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in asked))
    module = GRPOModule("tiny-addition", ExactMatch(), sampling=Sampling(max_completion_length=8), seed=0)
    metrics = validate(module, str(path))
    assert metrics["val/mode/no_thinking"] == 1.0 and metrics["val/mode/thinking"] == pytest.approx(1 / 3)
    path.write_text(json.dumps({"prompt": "12+34=", "answer": "1"}) + "\n")
    assert not [name for name in validate(module, str(path)) if "mode" in name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 12}, "thought of 12 tokens and the stop text .8. leave no room for an answer in .*_length 20"),
        ({"validation": Validation(ExactMatch(), budgets=(2, 12))}, "thought of 12 tokens and the stop text"),
        ({"validation": Validation(budgets=(2,)), "reward": Repetition()}, "validation.budgets asks which answers"),
        ({"engine": OldEngine()}, "OldEngine keeps no thinking budget .limits_thoughts.: leave model.engine out"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_before_the_first_step(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


@pytest.mark.parametrize("budgets", [(2, 2), (-1,)])
def test_budgets_of_a_validation_are_different_numbers(budgets):
    with pytest.raises(ValueError, match="budgets must be different numbers >= 0"):
        Validation(budgets=budgets)


def test_settings_of_the_template_do_not_reach_turns_of_tools(rows):
    module = make(budget=None, environment=Environment(Calculator))
    module.tokenizer.chat_template = "{% if enable_thinking %}{% endif %}" + module.tokenizer.chat_template
    data = VerifiableDataModule(module.tokenizer, rows, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="data.chat_template_kwargs do not reach the turns behind results of tools"):
        Trainer(**QUIET, max_epochs=1).fit(module, data)
