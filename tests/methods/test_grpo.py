"""GRPO with each loss and advantage: the gradient of a step by plain loops, and splits that change nothing."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from test_ppo import EOS, A, B, Scores, Scripted
from torch import Tensor

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.functional import kl
from modules.functional.advantages import group_center, leave_one_out
from modules.losses import CISPO, GSPO, Clipped, MirrorDescent, PolicyObjective
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
ASCII = RegexFormat(r"[\x00-\x7f]*", name="ascii")  # about one in five completions of the untrained model
OBJECTIVES = [Clipped(0.02, 0.02), GSPO(0.1, 0.1), CISPO(0.01), MirrorDescent(0.3)]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)


def grpo(**settings: Any) -> GRPOModule:
    seed_everything(0)
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=4)} | settings
    reward = settings.pop("reward", ASCII)
    return GRPOModule("tiny", reward, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5), **settings)


def fit(module: GRPOModule, accumulate: int = 1, updates: int = 2, callbacks: tuple[Callback, ...] = ()) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=list(callbacks))
    data = VerifiableDataModule(
        module.tokenizer, Addition(50), prompts_per_phase=8, updates_per_phase=updates, inner_epochs=updates
    )
    trainer.fit(module, data)
    return trainer


def weights(module: GRPOModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


class Gradients(Callback):
    """Keeps the gradient of each step, and everything that its loss may be computed from."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []  # batch, log-probs now, gradient

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        with torch.no_grad():
            self.now = pl_module.policy.completion_scores(batch, pl_module.sampling.temperature).logprobs
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradient = torch.cat([parameter.grad.flatten() for parameter in pl_module.policy.parameters()])
        self.steps.append((dict(self.batch), self.now, gradient))


def slopes(objective: PolicyObjective, batch: dict[str, Tensor], now: Tensor, rows: int) -> Tensor:
    """Compute d loss / d log-prob [N, Tc] at log-probs ``now`` by loops; ``rows`` completions make the step."""
    found, tokens = torch.zeros_like(now), int(batch["denominator"])
    for i in range(len(now)):
        group = [float(r) for r, g in zip(batch["rewards"], batch["group"], strict=True) if g == batch["group"][i]]
        mean, reward = sum(group) / len(group), float(batch["rewards"][i])
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        a = reward - mean if isinstance(objective, MirrorDescent) else (reward - mean) / (std + 1e-4)
        kept = [t for t in range(now.shape[1]) if batch["completion_mask"][i, t]]
        logs = [float(now[i, t] - batch["old_logprobs"][i, t]) for t in kept]
        for t, log in zip(kept, logs, strict=True):
            if isinstance(objective, MirrorDescent):
                found[i, t] = (-a + objective.tau * sum(logs)) / rows
            elif isinstance(objective, GSPO):
                s = math.exp(sum(logs) / len(kept))
                cut = (a > 0 and s > 1 + objective.clip_high) or (a < 0 and s < 1 - objective.clip_low)
                found[i, t] = 0.0 if cut else -s * a / len(kept) / rows
            elif isinstance(objective, CISPO):
                found[i, t] = -min(math.exp(log), 1 + objective.clip_high) * a / tokens
            elif isinstance(objective, Clipped):
                ratio = math.exp(log)
                cut = (a > 0 and ratio > 1 + objective.clip_high) or (a < 0 and ratio < 1 - objective.clip_low)
                found[i, t] = 0.0 if cut else -ratio * a / tokens
    return found


@each_objective
def test_the_gradient_of_a_step_is_that_of_plain_loops(objective):
    """A phase has two steps, and at the second one the ratios are not 1."""
    module, seen = grpo(objective=objective), Gradients()
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    fit(module, callbacks=(seen,))
    (first, now, gradient), (second, later, gradient_later) = seen.steps
    assert float((now - first["old_logprobs"]).abs().max()) < 1e-5
    assert float((later - second["old_logprobs"]).abs().max()) > 0.02
    rows = {"MirrorDescent": 32, "GSPO": 32}
    policy = grpo().policy
    policy.load_state_dict(start)
    for batch, at, found in ((first, now, gradient), (second, later, gradient_later)):
        total = rows.get(type(objective).__name__, 0)
        assert total in (0, int(batch["denominator"]))
        if isinstance(objective, MirrorDescent):
            assert len(batch["rewards"]) == 32  # the square moves completions of advantage 0 too
        loss = (policy.completion_scores(batch, 1.0).logprobs * slopes(objective, batch, at, total)).sum()
        policy.zero_grad()
        loss.backward()
        by_loops = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        torch.testing.assert_close(found, by_loops, atol=2e-6, rtol=1e-3)
        assert float(found.abs().max()) > 1e-3
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 0.5 * parameter.grad


def test_the_kl_of_a_later_update_is_weighted_by_now_over_old():
    """The second step's tokens were drawn before the first one, so its k3 counts exp(now - old) times."""
    objective, beta, seen = Clipped(0.02, 0.02), 0.5, Gradients()
    module = grpo(objective=objective, beta=beta)
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    fit(module, callbacks=(seen,))
    policy = grpo().policy
    policy.load_state_dict(start)
    for step, (batch, at, found) in enumerate(seen.steps):
        tokens = int(batch["denominator"])
        by_loops = []
        for weighted in (True, False):
            logprobs = policy.completion_scores(batch, 1.0).logprobs
            gap = batch["ref_logprobs"] - logprobs
            old = batch["old_logprobs"] if weighted else logprobs.detach()
            distance = ((logprobs - old).exp() * (gap.exp() - 1 - gap))[batch["completion_mask"]].sum() / tokens
            policy.zero_grad()
            ((logprobs * slopes(objective, batch, at, 0)).sum() + beta * distance).backward()
            by_loops.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
        torch.testing.assert_close(found, by_loops[0], atol=2e-6, rtol=1e-3)
        assert step == 0 or float((found - by_loops[1]).abs().max()) > 1e-4
        with torch.no_grad():
            for parameter, gradient in zip(
                policy.parameters(), found.split([parameter.numel() for parameter in policy.parameters()]), strict=True
            ):
                parameter -= 0.5 * gradient.view_as(parameter)


@each_objective
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_splits_change_nothing(objective, beta):
    """The step comes as one micro-batch or as eleven. Eleven is more than there are groups, so groups are split."""
    whole, split = (grpo(objective=objective, beta=beta) for _ in range(2))
    start = weights(whole)
    fit(whole)
    fit(split, accumulate=11)
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-6, rtol=0)
    assert float((weights(whole) - start).abs().max()) > 1e-3


@each_objective
def test_unscorable_completions_have_no_part(objective):
    """The update is the same with or without the completions that have no score, with a KL too."""
    rows = [([A, B, EOS], "stop"), ([A, A], "length"), ([B, 200, 201], "length")]
    found = []
    for scores, texts in (((1.0, None, 0.5), rows), ((1.0, 0.5), [rows[0], rows[2]])):
        settings = {"num_generations": len(texts), "objective": objective, "beta": 0.1}
        module = grpo(reward=Scores(*scores), engine=Scripted(texts), **settings)
        fit(module, accumulate=2)
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert float((found[0] - weights(grpo())).abs().max()) > 1e-4


@pytest.mark.parametrize("advantage", [group_center, leave_one_out, lambda rewards, group: rewards - 0.5])
def test_the_advantage_is_any_function_of_rewards_and_groups(advantage):
    seen = Gradients()
    fit(grpo(advantage=advantage), updates=1, callbacks=(seen,))
    batch = seen.steps[0][0]
    expected = advantage(batch["rewards"], batch["group"])[:, None] * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], expected)
    assert batch["advantages"].abs().max() > 0


@pytest.mark.parametrize("settings", [{"beta": -1.0}, {"beta": math.nan}, {"beta": math.inf}, {"kl_loss": kl.k1}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        grpo(**settings)
