"""GRPO's choices in a real Trainer: which groups and completions a phase learns from, and what phases change."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from test_grpo import ASCII, QUIET, Gradients, grpo, weights
from test_ppo import EOS, A, B, Scores, Scripted

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.functional import kl
from modules.generation import Validation
from modules.losses import (
    DPPO,
    GDPO,
    Centered,
    Clipped,
    ImportanceWeights,
    MaxRL,
    MirrorDescent,
    REINFORCEPlusPlus,
    SequenceMean,
)
from modules.rewards import ExactMatch, LengthPenalty, RegexFormat, WeightedSum
from modules.rewards.combined import Ramp
from modules.rollout.phases.dynamic_sampling import DynamicSampling
from modules.rollout.sampling import Sampling


def spread(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """Score completions by their tokens, so that those of a group differ whatever is sampled."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


class Numbers(Logger):
    """Keeps the numbers that are logged at the end of each phase."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None) -> None:
        if "train/reward" in metrics:
            self.found.append(dict(metrics))

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


class Phases(Callback):
    """Keeps what each phase sampled, what it trained on, and what it logged."""

    def __init__(self) -> None:
        self.sampled: list[list[Any]] = []
        self.carried: list[list[Any]] = []
        self.trained: list[list[dict[str, Any]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.sampled.append(list(pl_module.record.rollouts))
            self.carried.append(list(pl_module.record.carried))
            self.trained.append([])
        self.trained[-1].append(dict(batch))

    @property
    def logged(self) -> list[dict[str, float]]:
        return self.numbers.found


def fit(module: GRPOModule, phases: int = 3, prompts: int = 8, updates: int = 1, accumulate: int = 1, **data) -> Phases:
    seen = Phases()
    seen.numbers = Numbers()
    quiet = QUIET | {"logger": seen.numbers, "log_every_n_steps": 1}
    trainer = Trainer(**quiet, max_epochs=phases, accumulate_grad_batches=accumulate, callbacks=[seen])
    rows = VerifiableDataModule(
        module.tokenizer, Addition(400), prompts_per_phase=prompts, updates_per_phase=updates, **data
    )
    trainer.fit(module, rows)
    return seen


def adding(**settings: Any) -> GRPOModule:
    """GRPO on sums, of which the policy solves about half."""
    seed_everything(0)
    settings = {"num_generations": 2, "sampling": Sampling(max_completion_length=5)} | settings
    reward = settings.pop("reward", ExactMatch())
    return GRPOModule(
        "tiny-addition", reward, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5), **settings
    )


class Watched(Clipped):
    """Keeps the micro-batches that it is called with, which have the log-probs that the ratios start from."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []

    def __call__(self, logprobs, batch):
        self.batches.append(dict(batch))
        return super().__call__(logprobs, batch)


def is_mixed(rollouts: list[Any]) -> bool:
    return {rollout.reward for rollout in rollouts} == {0.0, 1.0}


def by_group(rollouts: list[Any]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.uid, []).append(rollout)
    return list(groups.values())


def test_dynamic_sampling_trains_on_mixed_groups_and_loses_none():
    seen = fit(adding(dynamic_sampling=DynamicSampling(max_rounds=5)), phases=4)
    waiting: list[list[Any]] = []
    uids: list[str] = []
    for sampled, carried, (batch,), logged in zip(seen.sampled, seen.carried, seen.trained, seen.logged, strict=True):
        groups = by_group(sampled)
        uids += [group[0].uid for group in groups]
        assert len(groups) == 8 * logged["train/dynamic_sampling/rounds"] > 8
        mixed = [group for group in groups if is_mixed(group)]
        assert logged["train/dynamic_sampling/mixed"] == pytest.approx(len(mixed) / len(groups))
        ready = waiting + mixed
        tokens = [rollout.completion.token_ids for group in ready[:8] for rollout in group]
        kept = [ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        assert kept == tokens  # first what was left over, then in the order of sampling
        assert (batch["rewards"].view(8, 2).sum(1) == 1).all() and (batch["advantages"][:, 0] != 0).all()
        waiting = ready[8:]
        assert [r.uid for r in carried] == [rollout.uid for group in waiting for rollout in group]
        assert logged["train/dynamic_sampling/carried"] == len(waiting) and logged["train/dynamic_sampling/filled"] == 0
        # The reward is that of everything sampled, not the half that mixed groups of two have by construction.
        assert logged["train/reward"] == pytest.approx(sum(r.reward for r in sampled) / len(sampled))
        assert logged["train/num_prompts"] == len(groups)
    assert any(seen.carried) and len(uids) == len(set(uids))  # no prompt twice
    everything = fit(adding(), phases=len(uids) // 8).sampled
    assert uids == [group[0].uid for sampled in everything for group in by_group(sampled)]  # and none left out


def test_carried_groups_keep_the_probabilities_that_they_were_drawn_with():
    watched, sampling = Watched(), Sampling(max_completion_length=5)
    module = adding(dynamic_sampling=DynamicSampling(), sampling=sampling, objective=watched)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)  # the next phase's policy is another
    seen = fit(module, phases=4)
    compared = 0
    for before, batch in zip(seen.carried, watched.batches[1:], strict=False):
        for row, rollout in enumerate(before):
            drawn = torch.tensor(rollout.completion.logprobs)
            torch.testing.assert_close(batch["old_logprobs"][row][: len(drawn)], drawn)
            compared += 1
        fresh = slice(len(before), None)
        gap = (batch["old_logprobs"] - batch["sampler_logprobs"])[fresh].abs().max()
        assert gap < 1e-4
    assert compared > 0


def test_groups_without_a_signal_fill_a_phase_up_when_the_rounds_do_not_suffice():
    seen = fit(adding(reward=RegexFormat("never"), dynamic_sampling=DynamicSampling(max_rounds=2)), phases=2)
    for sampled, (batch,), logged in zip(seen.sampled, seen.trained, seen.logged, strict=True):
        assert len(by_group(sampled)) == 16 and logged["train/dynamic_sampling/filled"] == 8
        assert logged["train/dynamic_sampling/mixed"] == 0 and not batch["advantages"].any()


def test_correctness_decides_and_not_the_reward():
    """Every group has different rewards by its lengths, and only half of them right and wrong answers."""
    reward = WeightedSum([ExactMatch(), LengthPenalty(RegexFormat(".*", name="any"), 0.01)])
    seen = fit(adding(reward=reward, dynamic_sampling=DynamicSampling()), phases=1)
    right = [{rollout.rewards["exact_match"] for rollout in group} for group in by_group(seen.sampled[0])]
    assert seen.logged[0]["train/dynamic_sampling/mixed"] == pytest.approx(sum(len(x) == 2 for x in right) / len(right))


def test_what_dynamic_sampling_needs():
    with pytest.raises(ValueError, match=r"dynamic_sampling: max_rounds must be >= 2, got 1"):
        DynamicSampling(1)
    reward = WeightedSum([RegexFormat("a", name="a"), RegexFormat("b", name="b")])
    with pytest.raises(ValueError, match=r"dynamic_sampling asks which answers are right.*model\.validation\.accuracy"):
        adding(reward=reward, dynamic_sampling=DynamicSampling())
    adding(reward=reward, dynamic_sampling=DynamicSampling(), validation=Validation(ExactMatch()))


ROWS = [([A, B, EOS], "stop"), ([A, A], "length"), ([B, 200, 201], "stop"), ([B], "length")]


def test_truncated_completions_count_in_their_group_and_teach_nothing():
    settings = {
        "reward": Scores(1.0, 0.0, 0.5, 0.9),
        "engine": Scripted(ROWS),
        "objective": Clipped(aggregation=SequenceMean()),
    }
    seen, masked = fit(grpo(**settings), 1, 2), fit(grpo(**settings, mask_truncated=True), 1, 2)
    (plain,), (batch,) = seen.trained[0], masked.trained[0]
    kept = torch.tensor([True, False, True, False] * 2)
    torch.testing.assert_close(batch["advantages"][batch["teaches"]], plain["advantages"][kept], rtol=0, atol=0)
    assert plain["denominator"] == 8 and batch["denominator"] == 4
    # Rows that teach nothing need not be computed.
    assert len(batch["rewards"]) == 4 and batch["teaches"].all()


def test_a_phase_in_which_everything_is_cut_off_is_told():
    rows = [([A, B], "length"), ([A, A], "length")]
    settings = {"num_generations": 2, "reward": Scores(1.0, 0.0), "engine": Scripted(rows), "mask_truncated": True}
    with pytest.warns(UserWarning, match="phase 0: no completion ended within sampling.max_completion_length"):
        fit(grpo(**settings), 1, 2)


def test_entropy_raises_the_entropy_of_a_policy_without_advantages():
    """The gradient is that of -0.3 x the mean entropy over tokens, computed apart."""
    module, seen = grpo(reward=RegexFormat("never"), entropy=0.3), Gradients()
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[seen])
    fresh = grpo(reward=RegexFormat("never"))
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=4))
    batch, _, gradient = seen.steps[0]
    states = fresh.policy.token_states(batch)
    mask = batch["completion_mask"]
    logits = fresh.policy.model.lm_head(states).float()
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    (-0.3 * entropies[mask].sum() / mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in fresh.policy.parameters()])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert gradient.abs().max() > 1e-4


def test_the_reference_moves_every_second_phase():
    module = grpo(measure_kl=True, refresh_every=2)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5)
    kls = [logged["train/kl"] for logged in fit(module, phases=5, prompts=4).logged]
    assert kls[0] == kls[2] == kls[4] == 0.0 and min(kls[1], kls[3]) > 0
    with pytest.raises(ValueError, match="refresh_every moves a reference, and there is none: set beta above 0, or"):
        grpo(refresh_every=2)


def test_mirror_descent_begins_each_phase_without_moments():
    """Adam's first step after a reset moves every weight that has a gradient by the learning rate."""
    moves = {}
    for reset in (True, False):
        module = grpo(objective=MirrorDescent(reset_optimizer=reset), reward=spread)
        module.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-4, eps=1e-12)
        phases = Moves()
        Trainer(**QUIET, max_epochs=3, callbacks=[phases]).fit(
            module, VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=4, updates_per_phase=2)
        )
        moves[reset] = phases.found
    largest = [float(move.abs().max()) for move in moves[True]]
    assert len(largest) == 6
    for first in (0, 2, 4):  # of each phase
        moved = moves[True][first].abs()
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 1e-4), rtol=2e-2, atol=0)
    kept = moves[False][2].abs()
    assert float((kept[kept > 0] - 1e-4).abs().median()) > 1e-5


class Moves(Callback):
    """Keeps by how much each step moved the weights."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = weights(pl_module).clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(weights(pl_module) - self.before)


def test_a_weight_changes_with_the_phase_and_is_its_last_one_outside_of_training():
    ramp = Ramp(0.0, 0.6, first=0, last=2)
    assert [ramp(phase) for phase in (0, 1, 2, 3, None)] == [0.0, pytest.approx(0.3), 0.6, 0.6, 0.6]
    assert [Ramp(0.0, 1.0, 2, 2)(phase) for phase in (0, 1, 2)] == [0.0, 0.0, 1.0]
    reward = WeightedSum([ASCII, RegexFormat(".{4,}", name="long")], [1.0, ramp])
    seen = fit(grpo(reward=reward), phases=3, prompts=2)
    for phase, sampled in enumerate(seen.sampled):
        for rollout in sampled:
            assert rollout.reward == pytest.approx(rollout.rewards["ascii"] + 0.3 * phase * rollout.rewards["long"])
    assert any(rollout.rewards["long"] for rollout in seen.sampled[0])
    assert reward(seen.sampled[0][:1])[0] == pytest.approx(  # nobody trains now
        seen.sampled[0][0].rewards["ascii"] + 0.6 * seen.sampled[0][0].rewards["long"]
    )
    with pytest.raises(ValueError, match="Ramp: last must be >= 3, got 1"):
        Ramp(0.0, 1.0, 3, 1)


def test_gdpo_in_a_run_normalises_each_part():
    reward = WeightedSum([ASCII, RegexFormat(".{4,}", name="long")], [1.0, Ramp(0.5, 0.5, 0, 0)])
    seen = fit(grpo(reward=reward, advantage=GDPO()), phases=1, prompts=4)
    totals = torch.zeros(16)
    for name, weight in (("ascii", 1.0), ("long", 0.5)):
        parts = torch.tensor([rollout.rewards[name] for rollout in seen.sampled[0]]).view(4, 4)
        totals += weight * ((parts - parts.mean(1, keepdim=True)) / (parts.std(1, keepdim=True) + 1e-4)).flatten()
    expected = (totals - totals.mean()) / totals.std(correction=0)
    (batch,) = seen.trained[0]
    torch.testing.assert_close(batch["advantages"][:, 0], expected[expected.abs() > 1e-5], atol=1e-5, rtol=0)


def test_a_kl_in_the_reward_lowers_the_advantage_of_completions_far_from_the_start():
    module = grpo(beta=0.5, kl_loss=None, reward=spread)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5)
    (batch,) = fit(module, phases=2, prompts=4).trained[1]
    mask = batch["completion_mask"]
    returns = batch["rewards"] - 0.5 * ((batch["old_logprobs"] - batch["ref_logprobs"]) * mask).sum(1)
    groups = returns.view(4, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"][:, 0], expected.flatten(), atol=1e-4, rtol=0)
    assert not torch.allclose(returns, batch["rewards"])
    # It is no part of the loss: without an advantage there is no gradient.
    still = grpo(beta=0.5, kl_loss=None, reward=RegexFormat("never"))
    start = weights(still).clone()
    fit(still, phases=1, prompts=2)
    assert torch.equal(weights(still), start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": ImportanceWeights(), "objective": DPPO()}, "DPPO weighs tokens by p of the trainer"),
        ({"advantage": GDPO()}, "GDPO normalises the parts of a WeightedSum"),
        ({"num_generations": 1}, "num_generations is 1: a group needs at least 2 completions to compare"),
        ({"num_generations": 0, "objective": REINFORCEPlusPlus()}, "num_generations is 0, expected at least 1"),
        (
            {"num_generations": 1, "objective": REINFORCEPlusPlus(), "dynamic_sampling": DynamicSampling()},
            "is 1: a group",
        ),
        (
            {"advantage": MaxRL(), "beta": 0.1, "kl_loss": None},
            "MaxRL has no place for a KL in the reward: set kl_loss",
        ),
        ({"advantage": Centered(), "objective": REINFORCEPlusPlus(baseline=True)}, "baseline brings its own advantage"),
        ({"entropy": math.nan}, "GRPOModule: entropy must be finite"),
        ({"refresh_every": 0, "measure_kl": True}, "GRPOModule: refresh_every must be >= 1"),
        ({"kl_loss": kl.k1}, "or null to have k1 in the reward"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        grpo(**settings)


def test_one_completion_per_prompt_suffices_without_a_baseline():
    module = grpo(num_generations=1, objective=REINFORCEPlusPlus())
    (batch,) = fit(module, phases=1, prompts=32).trained[0]
    assert len(batch["rewards"]) == 32
    mask = batch["completion_mask"]
    spread = batch["rewards"][:, None].expand(mask.shape)[mask]
    expected = (spread - spread.mean()) / spread.std(correction=0)
    torch.testing.assert_close(batch["advantages"][mask], expected, atol=1e-4, rtol=0)
