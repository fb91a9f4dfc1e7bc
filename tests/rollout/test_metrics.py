"""The metrics of rollouts: computed by hand, and the same for any split into batches."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.generation import Validation
from modules.rewards import RegexFormat, WeightedSum
from modules.rollout.metrics import (
    Outcome,
    add_engine_stats,
    join_gaps,
    make_outcomes,
    measure_errors,
    measure_rollouts,
    share_solved,
    sum_gaps,
)
from modules.rollout.sampling import Sampling
from modules.types import Completion, Reward, Rollout

FIRST = r"[\x00-\x7f].*"


def outcome(
    uid: str,
    reward: float | None,
    length: int,
    stopped: bool = True,
    entropy: float | None = 1.0,
    right: bool | None = None,
) -> Outcome:
    return Outcome(uid, reward, {"exact": reward, "form": 1.0}, length, stopped, entropy, right)


def test_numbers_of_a_phase():
    found = [
        outcome("a", 1.0, 2),
        outcome("a", 0.0, 4, entropy=2.0),
        outcome("b", None, 6, stopped=False),
        outcome("b", 0.5, 8),
    ]
    metrics = measure_rollouts(found)
    assert metrics["reward"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert metrics["reward_std"] == pytest.approx(
        (math.sqrt(0.5) + 0.0) / 2
    )  # std of (1, 0) with ddof 1; one scorable reward has none
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 2)
    assert metrics["unscorable"] == 1
    assert (
        metrics["completions/mean_length"],
        metrics["completions/min_length"],
        metrics["completions/max_length"],
    ) == (5.0, 2.0, 8.0)
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 4)
    assert metrics["completions/mean_terminated_length"] == pytest.approx((2 + 4 + 8) / 3)
    assert metrics["rewards/exact/mean"] == pytest.approx(0.5)
    assert metrics["rewards/exact/std"] == pytest.approx(0.5)  # of 1, 0, 0.5
    assert metrics["rewards/form/std"] == 0.0
    assert metrics["entropy"] == pytest.approx((2 * 1 + 4 * 2 + 6 * 1 + 8 * 1) / 20)  # per token


def test_standard_errors_are_over_prompts():
    found = [
        outcome("a", 1.0, 2, right=True),
        outcome("a", 0.0, 4, right=False),
        outcome("b", 1.0, 5, right=True),
        outcome("b", None, 9),
    ]
    errors = measure_errors(found)
    # rewards 0.5 and 1: deviation 0.5 / sqrt(2), over sqrt(2); lengths 3 and 7: deviation 4 / sqrt(2)
    assert errors["reward_standard_error"] == pytest.approx(0.25)
    assert errors["pass@1_standard_error"] == pytest.approx(0.25)
    assert errors["rewards/exact/mean_standard_error"] == pytest.approx(0.25)
    assert errors["rewards/form/mean_standard_error"] == 0.0
    assert errors["completions/mean_length_standard_error"] == pytest.approx(2.0)
    assert measure_errors(found[:2]) == {}


def test_pass_at_k_is_over_prompts_with_enough_scorable_completions():
    right = {"a": [True, False, False], "b": [True, None, True], "c": [None, None, False]}
    found = [outcome(uid, None, 1, right=value) for uid, values in right.items() for value in values]
    assert share_solved(found, 1) == pytest.approx((1 / 3 + 1.0 + 0.0) / 3)
    assert share_solved(found, 2) == pytest.approx(
        (1 - (2 * 1) / (3 * 2) + 1.0) / 2
    )  # 1 - C(2, 2) / C(3, 2) = 2/3; c has one
    assert math.isnan(share_solved([], 1))


def test_what_nothing_was_scored_for_is_no_number():
    metrics = measure_rollouts([outcome("a", None, 2), outcome("a", None, 3)])
    assert all(math.isnan(metrics[name]) for name in ("reward", "reward_std", "frac_reward_zero_std"))
    assert metrics["unscorable"] == 2 and metrics["completions/mean_length"] == 2.5


def test_outcomes_keep_what_was_scored():
    rollout = Rollout(
        "u", "p", [1], "x", Completion([3, 4], [0.0, 0.0], "x", "length"), 0, {"r": 1.0}, 1.0, entropy=0.5
    )
    assert make_outcomes([rollout], RegexFormat("x")) == [Outcome("u", 1.0, {"r": 1.0}, 2, False, 0.5, True)]
    assert make_outcomes([rollout])[0].right is None


def test_gaps_are_means_over_counted_tokens():
    """Of five tokens one is a tool's, and one was sampled by earlier weights."""
    tokens = Completion([1, 2, 3], [-0.5, -1.0, 0.0], "", "stop", 4, sampled=[True, True, False])
    older = Completion([5, 6], [-1.0, -2.0], "", "stop", 4, versions=[3, 4])
    first, second = (Rollout("u", "p", [1], "x", each, 0, {}, None) for each in (tokens, older))
    first = replace(first, trainer_logprobs=[-0.5, -1.5, 0.0], trainer_version=4, k3=2.0)
    second = replace(second, trainer_logprobs=[-4.0, -1.0], trainer_version=4, k3=1.0)
    assert sum_gaps([first, second]) == [2.0, 4.0, 0.0 + 0.5 + 3.0 + 1.0, 3.0, 3.0]
    assert sum_gaps([first, second], fresh=True) == [2.0, 3.0, 0.0 + 0.5 + 1.0, 1.0, 3.0]
    ranks = [sum_gaps([each], fresh=True) for each in (first, second)]
    assert join_gaps([*ranks, sum_gaps([])]) == {
        "sampling/sampling_logp_difference/mean": 1.5 / 3,
        "sampling/sampling_logp_difference/max": 1.0,
        "kl": 3.0 / 3,
    }
    assert "kl" not in join_gaps([sum_gaps([replace(first, k3=None)])])
    assert join_gaps([sum_gaps([]), sum_gaps([replace(first, trainer_logprobs=None)])]) == {}


def test_numbers_of_several_calls_of_an_engine_are_joined():
    metrics: dict[str, float] = {}
    first = {"decode_steps": 9.0, "slots": 8.0, "cache_gb": 0.5, "occupancy": 0.9, "sync_seconds": 7.0}
    add_engine_stats(metrics, first, tokens=60, seconds=3.0, syncing=1.0)
    assert metrics == {f"engine/{name}": value for name, value in first.items()} | {
        "engine/sync_seconds": 1.0,  # by the clock of the run
        "engine/tokens": 60.0,
        "engine/tokens_per_second": 60 / 2,
        "time/sampling": 3.0,
    }
    second = {"decode_steps": 5.0, "slots": 4.0, "cache_gb": 0.7, "occupancy": 0.5, "replaced": 1.0}
    add_engine_stats(metrics, second, tokens=20, seconds=6.5, syncing=0.5)
    assert metrics == {
        "engine/decode_steps": 14.0,
        "engine/slots": 8.0,
        "engine/cache_gb": 0.7,
        "engine/occupancy": pytest.approx((2 * 0.9 + 6 * 0.5) / 8),
        "engine/replaced": 1.0,
        "engine/sync_seconds": 1.5,
        "engine/tokens": 80.0,
        "engine/tokens_per_second": pytest.approx(80 / 8),
        "time/sampling": 9.5,
    }


class Partly(Reward):
    """A reward that cannot score about every third completion."""

    name = "partly"

    def __call__(self, rollouts):
        return [None if r.completion.token_ids[-1] % 3 == 0 else RegexFormat(FIRST)([r])[0] for r in rollouts]


def test_evaluation_does_not_depend_on_the_batch_size():
    results = []
    for size in (1, 3, 8):
        module = GRPOModule(
            "tiny",
            WeightedSum([Partly(), RegexFormat(FIRST)]),
            validation=Validation(generations=3),
            sampling=Sampling(max_completion_length=4),
        )
        data = VerifiableDataModule(module.tokenizer, Addition(8), val=Addition(8, held_out=True), val_batch_size=size)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        (found,) = trainer.validate(module, data, verbose=False)
        results.append(found)
    assert results[0]["val/unscorable"] > 0
    assert results[0]["val/completions/max_length"] == 4
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-6)


def test_step_metrics_and_unscorable_rewards_do_not_depend_on_accumulation():
    results = []
    for accumulate in (1, 4):
        module = GRPOModule(
            "tiny",
            Partly(),
            4,
            Sampling(max_completion_length=4),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        data = VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=8, updates_per_phase=2)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)
        results.append(
            {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "time" not in name and "second" not in name
            }
        )
    assert results[0]["train/unscorable"] > 0
    assert results[0]["train/approx_kl"] > 1e-3  # the second update is off-policy
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        if name != "train/num_tokens":  # a prompt whose completions two micro-batches share is computed in both
            assert results[1][name] == pytest.approx(value, abs=1e-5), name
