"""Every metric of the table in ``callbacks/README.md`` is the number that the table says, on one rank and on two.

``recorded_run`` fits each method for real and writes down weights, rows and rollouts. Here each metric is computed
again from these, row by row, without padding, and without the functions that compute the losses and metrics of a run.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from statistics import fmean, pvariance, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from programs import ROOT, run_program, run_ranks
from torch import Tensor

from modules.types import Rollout
from tests.methods.recorded_run import (
    BUDGET,
    DECAY,
    FORM,
    GOOD,
    IMPORTANCE,
    LR,
    TEMPERATURE,
    Evaluation,
    Form,
    Gold,
    Good,
    Recording,
    Scripted,
    Step,
    make_module,
)

TIMES = ["train/time/sampling", "train/time/scoring", "train/time/training"]
TIMES += ["train/completions_per_second", "train/tokens_per_second"]
TIMES += ["train/engine/tokens_per_second", "train/engine/sync_seconds"]
METHODS = ["sft", "reward", "dpo", "kto", "grpo", "ppo", "online_dpo"]
BETA, NLL, CENTERING, KL_COEF, MISSING_EOS, LAMBDA = 0.1, 0.1, 0.1, 0.07, 0.3, 0.95
Numbers = dict[str, float]

# Metrics that no method computes by itself, and the file that compares each with arithmetic of its own.
ELSEWHERE = {
    r"train/(?:gate|dropped)": "tests/losses/test_policy_loss.py",
    r"(?:train|val)/unscored/.*": "tests/methods/test_on_policy.py",
    r"(?:train|val)/mode/<mode>|val/budget/.*": "tests/methods/test_thinking_methods.py",
    r"train/dynamic_sampling/\w+": "tests/methods/test_grpo_choices.py",
    r"train/(?:partial|staleness)/\w+": "tests/loop/test_partial_rollouts.py",
    r"train/overlap/\w+": "tests/loop/test_overlap.py",
    r"train/reuse/\w+": "tests/rollout/test_reuse.py",
    r"train/engine/<name>": "tests/rollout/test_metrics.py",
    r"train/engine_mismatch/.*": "tests/callbacks/test_engine_mismatch.py",
    r"train/group_bias/baseline_bias_easy": "tests/callbacks/test_group_bias.py",  # no such group in these runs
    r"val/perplexity/<domain>|val/forgetting.*": "tests/callbacks/test_forgetting.py",
    r"val/audit/.*": "tests/callbacks/test_audit_report.py",
    r"val/refusal/.*": "tests/callbacks/test_refusal.py",
    r"val/win_rate.*": "tests/callbacks/test_win_rate.py",
    r"val/length_controlled_win_rate": "tests/callbacks/test_length_controlled_win_rate.py",
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def share(flags: Sequence[bool]) -> float:
    return fmean(map(float, flags))


# The rows: what one rank would see, from what all ranks saw.


@lru_cache(maxsize=1)
def recordings(method: str, ranks: int) -> list[Recording]:
    with TemporaryDirectory() as folder:
        arguments = [str(Path(__file__).with_name("recorded_run.py")), method, str(ranks), folder]
        (run_program if ranks == 1 else run_ranks)(*arguments, folder=ROOT)
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


class Scores(NamedTuple):
    """What a model says about the T tokens of a completion."""

    logprobs: Tensor  # [T]
    entropies: Tensor  # [T]
    hits: Tensor  # [T], whether the token is the most likely one
    mean_logits: Tensor  # [T]
    states: Tensor  # [T, H], that chose the token
    last: Tensor  # [H], at the last token


class Model:
    """The method's networks with weights that were written down."""

    def __init__(self, method: str, weights: dict[str, Tensor]) -> None:
        self.module = make_module(method).eval()
        self.module.load_state_dict(weights)

    @torch.no_grad()
    def read(self, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Scores:
        out = self.module.policy.model(torch.tensor([prompt + completion]), output_hidden_states=True)
        logits, states = out.logits[0, len(prompt) - 1 : -1], out.hidden_states[-1][0]
        table, tokens = (logits / temperature).log_softmax(-1), torch.tensor(completion)
        return Scores(
            table[range(len(completion)), tokens],
            -(table.exp() * table).sum(-1),
            (logits.argmax(-1) == tokens).float(),
            logits.mean(-1),
            states[len(prompt) - 1 : -1],
            states[-1],
        )


class Answer(NamedTuple):
    """A completion of an example; rank 0 = best, or desirable."""

    prompt: list[int]
    ids: list[int]
    rank: int


def read_examples(batches: Sequence[dict[str, Any]]) -> list[list[Answer]]:
    """Take the examples of preference batches apart, without the fillers."""
    examples = []
    for batch in batches:
        prompts, completions = (
            [ids[mask].tolist() for ids, mask in zip(batch[f"{kind}_ids"], batch[f"{kind}_mask"], strict=True)]
            for kind in ("prompt", "completion")
        )
        index, rank = batch["prompt_index"].tolist(), batch["rank"].tolist()
        for place, prompt in enumerate(prompts):
            answers = [Answer(prompt, completions[i], rank[i]) for i in range(len(rank)) if index[i] == place]
            if answers[0].rank >= 0:
                examples.append(answers)
    return examples


# SFT, the reward model, DPO and KTO: a step or a validation, from its batches and the weights before it.


def measure_instructions(model: Model, start: Model, batches: list[dict[str, Any]]) -> Numbers:
    rows = [
        (ids[keep].tolist(), kept[keep])
        for batch in batches
        for ids, keep, kept in zip(batch["input_ids"], batch["attention_mask"], batch["loss_mask"], strict=True)
        if kept.any()
    ]
    found = [(model.read(ids[:1], ids[1:]), kept[1:]) for ids, kept in rows]
    logprobs, entropies, hits = (
        [x for scores, kept in found for x in getattr(scores, name)[kept].tolist()]
        for name in ("logprobs", "entropies", "hits")
    )
    tokens = sum(len(ids) for ids, _ in rows)
    return {
        "loss": -fmean(logprobs),
        "entropy": fmean(entropies),
        "mean_token_accuracy": fmean(hits),
        "supervised_fraction": len(logprobs) / tokens,
        "tokens": tokens,
    }


def over_examples(examples: list[list[Any]], value: Callable[[Any, Any], float], ranks: list[list[int]]) -> float:
    """Average a function of (better, worse) over the pairs of each example, and then over the examples with pairs."""
    means = []
    for answers, places in zip(examples, ranks, strict=True):
        values = [
            value(answers[i], answers[j])
            for i in range(len(places))
            for j in range(len(places))
            if places[i] < places[j]
        ]
        means += [fmean(values)] if values else []
    return fmean(means)


def count_tokens(examples: list[list[Answer]]) -> int:
    return sum(len(answers[0].prompt) + sum(len(answer.ids) for answer in answers) for answers in examples)


def measure_scores(model: Model, start: Model, batches: list[dict[str, Any]]) -> Numbers:
    examples = read_examples(batches)
    head = model.module.head.weight.detach().mean(0)
    scores = [[float(model.read(a.prompt, a.ids).last @ head) for a in answers] for answers in examples]
    ranks = [[a.rank for a in answers] for answers in examples]
    everything = [score for answers in scores for score in answers]

    def mean(value: Callable[[float, float], float]) -> float:
        return over_examples(scores, value, ranks)

    return {
        "loss": mean(lambda c, r: -math.log(sigmoid(c - r)) + CENTERING * (c + r) ** 2),
        "accuracy": mean(lambda c, r: c > r),
        "margin": mean(lambda c, r: c - r),
        "mean_reward": mean(lambda c, r: (c + r) / 2),
        "rewards/chosen": mean(lambda c, r: c),
        "rewards/rejected": mean(lambda c, r: r),
        "min_reward": min(everything),
        "max_reward": max(everything),
        "tokens": count_tokens(examples),
    }


@dataclass
class Weighed:
    """A completion with its sums under the policy and the start."""

    rank: int
    logps: float
    reward: float  # beta log(pi / start)
    tokens: int
    logits: float  # sum over the tokens of the mean logit


def weigh(model: Model, start: Model, answer: Answer, temperature: float = 1.0) -> Weighed:
    scores = model.read(answer.prompt, answer.ids, temperature)
    logps, reference = (float(s.logprobs.sum()) for s in (scores, start.read(answer.prompt, answer.ids, temperature)))
    return Weighed(answer.rank, logps, BETA * (logps - reference), len(answer.ids), float(scores.mean_logits.sum()))


def measure_pairs(examples: list[list[Weighed]]) -> Numbers:
    """Compute what DPO and online DPO have in common."""
    ranks = [[a.rank for a in answers] for answers in examples]

    def mean(value: Callable[[Weighed, Weighed], float]) -> float:
        return over_examples(examples, value, ranks)

    return {
        "loss": mean(lambda c, r: -math.log(sigmoid(c.reward - r.reward))),
        "rewards/chosen": mean(lambda c, r: c.reward),
        "rewards/rejected": mean(lambda c, r: r.reward),
        "rewards/accuracies": mean(lambda c, r: c.reward > r.reward),
        "rewards/margins": mean(lambda c, r: c.reward - r.reward),
        "logps/chosen": mean(lambda c, r: c.logps),
        "logps/rejected": mean(lambda c, r: r.logps),
        "likelihood_displacement": mean(lambda c, r: c.reward < 0 and r.reward < 0),
    }


def measure_tokens(model: Model, examples: list[list[Answer]]) -> Numbers:
    found = [model.read(answer.prompt, answer.ids) for answers in examples for answer in answers]
    entropies, hits = (torch.cat([getattr(s, name) for s in found]) for name in ("entropies", "hits"))
    return {"entropy": float(entropies.mean()), "mean_token_accuracy": float(hits.mean())}


def measure_preferences(model: Model, start: Model, batches: list[dict[str, Any]]) -> Numbers:
    examples = read_examples(batches)
    weighed = [[weigh(model, start, answer) for answer in answers] for answers in examples]
    ranks = [[a.rank for a in answers] for answers in examples]

    def mean(value: Callable[[Weighed, Weighed], float]) -> float:
        return over_examples(weighed, value, ranks)

    likelihood = mean(lambda c, r: c.logps / c.tokens)
    found = measure_pairs(weighed) | measure_tokens(model, examples) | {"tokens": count_tokens(examples)}
    return found | {
        "loss": found["loss"] - NLL * likelihood,
        "logits/chosen": mean(lambda c, r: c.logits) / mean(lambda c, r: c.tokens),
        "logits/rejected": mean(lambda c, r: r.logits) / mean(lambda c, r: r.tokens),
    }


def measure_labels(model: Model, start: Model, batches: list[dict[str, Any]]) -> Numbers:
    examples = read_examples(batches)
    mismatched = read_examples([part for batch in batches for part in batch["mismatched"]])
    prompt_of = {tuple(answer.ids): answer.prompt for (answer,) in examples}
    assert len(mismatched) == len(examples) == len(prompt_of)
    assert all(prompt_of[tuple(answer.ids)] != answer.prompt for (answer,) in mismatched)
    kl = max(0.0, fmean(weigh(model, start, answer).reward / BETA for (answer,) in mismatched))
    weighed = [weigh(model, start, answer) for (answer,) in examples]
    sides = {"chosen": [w for w in weighed if w.rank == 0], "rejected": [w for w in weighed if w.rank == 1]}
    gaps = [(w.reward - BETA * kl, w.rank) for w in weighed]
    found = {
        "loss": fmean(0.5 * sigmoid(gap) if rank else 1.5 * sigmoid(-gap) for gap, rank in gaps),
        "kl": kl,
        "tokens": count_tokens(examples),
    } | measure_tokens(model, examples)
    for side, rows in sides.items():
        if not rows:  # a mean over nothing
            continue
        found |= {
            f"rewards/{side}": fmean(w.reward for w in rows),
            f"logps/{side}": fmean(w.logps for w in rows),
            f"logits/{side}": sum(w.logits for w in rows) / sum(w.tokens for w in rows),
        }
    return found


# Methods that sample: a phase, its steps, and a validation, from rollouts and weights.


class Row:
    """A rollout, with what the models say of it."""

    def __init__(self, rollout: Rollout, policy: Model, start: Model) -> None:
        self.rollout, self.uid, self.ids = rollout, rollout.uid, rollout.completion.token_ids
        (self.good,), (self.form,), (self.gold,) = (reward([rollout]) for reward in (Good(), Form(), Gold()))
        self.reward = None if self.good is None or self.form is None else GOOD * self.good + FORM * self.form
        self.truncated = len(self.ids) == BUDGET
        self.scores, reference = (m.read(rollout.prompt_ids, self.ids, TEMPERATURE) for m in (policy, start))
        self.old = self.scores.logprobs
        self.log_ratio = self.old - reference.logprobs  # to the start
        self.kl = float(self.log_ratio.sum())
        self.k3 = torch.exp(-self.log_ratio) - 1 + self.log_ratio


class Phase:
    """The rollouts of all ranks in one phase."""

    def __init__(self, rollouts: list[Rollout], policy: Model, start: Model) -> None:
        self.rows = [Row(rollout, policy, start) for rollout in rollouts]
        self.scored = [row for row in self.rows if row.reward is not None]
        self.groups = {row.uid: [r for r in self.rows if r.uid == row.uid] for row in self.rows}
        self.policy = policy

    @cached_property
    def rewards(self) -> list[list[float]]:
        """The scores of each group that has any."""
        found = [[row.reward for row in group if row.reward is not None] for group in self.groups.values()]
        return [rewards for rewards in found if rewards]

    @cached_property
    def advantages(self) -> dict[int, float]:
        """(reward - mean) / (deviation + 1e-4) in the group, by the id of the row."""
        found = {}
        for group in self.groups.values():
            scored = [row for row in group if row.reward is not None]
            rewards = [row.reward for row in scored]
            for row in scored:
                deviation = stdev(rewards) if len(rewards) > 1 else 0.0
                found[id(row)] = (row.reward - fmean(rewards)) / (deviation + 1e-4) if deviation else 0.0
        return found

    @cached_property
    def pairs(self) -> list[tuple[Row, Row]]:
        """The first best and the first worst of each group whose rewards differ."""
        groups = [[row for row in group if row.reward is not None] for group in self.groups.values()]
        found = [(max(g, key=lambda r: r.reward), min(g, key=lambda r: r.reward)) for g in groups if g]
        return [(best, worst) for best, worst in found if best.reward > worst.reward]

    @cached_property
    def token_rewards(self) -> list[list[float]]:
        """PPO's, of each scored row."""
        found = []
        for row in self.scored:
            rewards = (-KL_COEF * row.log_ratio).tolist()
            rewards[-1] += row.reward - MISSING_EOS * row.truncated
            found.append(rewards)
        return found

    @cached_property
    def values(self) -> list[list[float]]:
        head = self.policy.module.critic.head.weight.detach()[0]
        return [(row.scores.states @ head).tolist() for row in self.scored]

    @cached_property
    def returns(self) -> list[list[float]]:
        return [
            [a + v for a, v in zip(advantages, values, strict=True)]
            for advantages, values in zip(self.plain_advantages, self.values, strict=True)
        ]

    @cached_property
    def plain_advantages(self) -> list[list[float]]:
        """GAE with gamma 1: the sum of lambda^k delta_(t + k)."""
        found = []
        for rewards, values in zip(self.token_rewards, self.values, strict=True):
            deltas = [r + v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
            found.append([sum(LAMBDA**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))])
        return found


def within(rows: list[Row], value: Callable[[Row], float]) -> list[float]:
    """Subtract from each value the mean of its group."""
    groups = {row.uid: fmean(value(r) for r in rows if r.uid == row.uid) for row in rows}
    return [value(row) - groups[row.uid] for row in rows]


def measure_rollouts(phase: Phase) -> Numbers:
    """Compute what a phase and a validation have in common."""
    rows, lengths = phase.rows, [len(row.ids) for row in phase.rows]
    parts = {"good": [row.good for row in rows if row.good is not None], "form": [row.form for row in rows]}
    return {
        "num_prompts": len(phase.groups),
        "reward": fmean(row.reward for row in phase.scored),
        "reward_std": fmean(stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in phase.rewards),
        "frac_reward_zero_std": share([len(set(rewards)) == 1 for rewards in phase.rewards]),
        "unscorable": len(rows) - len(phase.scored),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(length for length in lengths if length < BUDGET),
        "completions/clipped_ratio": share([row.truncated for row in rows]),
        "sequence_kl": fmean(row.kl for row in rows),
        "entropy": float(torch.cat([row.scores.entropies for row in rows]).mean()),
        **{f"rewards/{name}/mean": fmean(values) for name, values in parts.items()},
        **{f"rewards/{name}/std": stdev(values) for name, values in parts.items()},
    }


def measure_phase(method: str, phase: Phase, first: Phase) -> Numbers:
    rows = phase.rows
    gaps = torch.cat([(row.old - torch.tensor(row.rollout.completion.logprobs)).abs() for row in rows])
    found = measure_rollouts(phase) | {
        "kl": float(torch.cat([row.k3 for row in rows]).mean()),
        "sampling/sampling_logp_difference/mean": float(gaps.mean()),
        "sampling/sampling_logp_difference/max": float(gaps.max()),
    }
    if method in IMPORTANCE:
        weights = [weight for row in rows for weight in importance(method, row)]
        measures = {"min": min, "mean": fmean, "max": max}
        found |= {f"sampling/importance_sampling_ratio/{name}": of(weights) for name, of in measures.items()}
    if method == "ppo":
        objective = [row.reward - MISSING_EOS * row.truncated - KL_COEF * row.kl for row in phase.scored]
        values, returns = ([x for row in of for x in row] for of in (phase.values, phase.returns))
        errors = [r - v for r, v in zip(returns, values, strict=True)]
        found |= {"kl_coef": KL_COEF, "rlhf_reward": fmean(objective)}
        found |= {"explained_variance": 1 - pvariance(errors) / pvariance(returns)}
    return found | measure_callbacks(phase, first)


def measure_callbacks(phase: Phase, first: Phase) -> Numbers:
    def proxy_and_gold(of: Phase) -> tuple[float, float]:
        return fmean(row.reward for row in of.scored), fmean(row.gold for row in of.rows if row.gold is not None)

    (proxy, gold), (proxy_first, gold_first) = proxy_and_gold(phase), proxy_and_gold(first)
    rewards, lengths = within(phase.scored, lambda r: r.reward), within(phase.scored, lambda r: len(r.ids))
    xy, xx, yy = (
        sum(a * b for a, b in zip(*both, strict=True)) for both in ((rewards, lengths), (rewards,) * 2, (lengths,) * 2)
    )
    words = [[tuple(row.ids[i : i + n]) for row in phase.rows for i in range(len(row.ids) - n + 1)] for n in (1, 2)]
    texts = [[row.rollout.completion.text for row in group] for group in phase.groups.values()]
    found = measure_rollouts(phase)
    return {
        "overoptimization/proxy": proxy,
        "overoptimization/gold": gold,
        "overoptimization/gap": (proxy - proxy_first) - (gold - gold_first),
        "overoptimization/sqrt_kl": math.sqrt(max(0.0, fmean(row.kl for row in phase.rows))),
        "diversity/entropy": found["entropy"],
        "diversity/distinct_1": len(set(words[0])) / len(words[0]),
        "diversity/distinct_2": len(set(words[1])) / len(words[1]),
        "diversity/distinct_answers": fmean(len(set(group)) / len(group) for group in texts),
        "diversity/frac_reward_zero_std": found["frac_reward_zero_std"],
        "length_bias/correlation": xy / math.sqrt(xx * yy),
        "length_bias/right_length": fmean(len(row.ids) for row in phase.scored if row.reward > 0.5),
        "length_bias/wrong_length": fmean(len(row.ids) for row in phase.scored if row.reward <= 0.5),
        "length_bias/truncated": found["completions/clipped_ratio"],
    }


def find_denominators(steps: Sequence[Step]) -> dict[tuple[int, ...], float]:
    """Find what the update divides by that has a completion; those without gradient need not be in any."""
    found = {}
    for batch in (batch for step in steps for batch in step.batches):
        rows = [a for answers in read_examples([batch | {"rank": batch["group"]}]) for a in answers]
        found |= {(*row.prompt, -1, *row.ids): float(batch["denominator"]) for row in rows}
    return found


def measure_group_bias(phase: Phase, steps: Sequence[Step]) -> Numbers:
    denominators, weights = find_denominators(steps), {}
    for row in phase.scored:  # a token mean, so each token weighs 1 / the denominator
        size = abs(phase.advantages[id(row)]) * sum(importance("grpo", row))
        weights[id(row)] = size and size / denominators[*row.rollout.prompt_ids, -1, *row.ids]
    total, found = sum(weights.values()), {}
    bins: dict[str, list[list[Row]]] = {"hard": [], "middle": [], "easy": []}
    for group in phase.groups.values():
        scored = [row for row in group if row.reward is not None]
        if scored:
            rate = share([row.reward > 0.5 for row in scored])
            bins["hard" if rate <= 0.25 else "easy" if rate >= 0.75 else "middle"].append(scored)
    mixed = {name: [g for g in groups if len({r.reward > 0.5 for r in g}) == 2] for name, groups in bins.items()}
    for name, groups in bins.items():
        found[f"gradient_share_{name}"] = sum(weights[id(row)] for group in groups for row in group) / total
        if any(mixed.values()):
            found[f"group_share_{name}"] = len(mixed[name]) / sum(map(len, mixed.values()))
        rates = [(share([row.reward > 0.5 for row in group]), len(group)) for group in mixed[name]]
        if rates:
            found[f"baseline_bias_{name}"] = fmean((p - p**n) / (1 - p**n - (1 - p) ** n) - p for p, n in rates)
    for right, name in ((True, "right"), (False, "wrong")):
        found[f"{name}_length"] = fmean(len(row.ids) for row in phase.scored if (row.reward > 0.5) == right)
    lengths = [len(row.ids) for row in phase.scored]
    parts: dict[int, list[float]] = {}
    for row in phase.scored:
        below = sum(length < len(row.ids) for length in lengths) + lengths.count(len(row.ids)) / 2
        weight = fmean(importance("grpo", row))
        parts.setdefault(int(10 * below / len(lengths)) + 1, []).append(phase.advantages[id(row)] * weight)
    found |= {f"advantage_decile_{number}": fmean(values) for number, values in parts.items()}
    return {f"group_bias/{name}": value for name, value in found.items()}


def measure_clips(ratios: list[float], advantages: list[float], high: float) -> Numbers:
    both = list(zip(ratios, advantages, strict=True))
    low_mean, high_mean = share([r < 0.8 and a < 0 for r, a in both]), share([r > 1 + high and a > 0 for r, a in both])
    return {
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,
        "approx_kl": fmean(r - 1 - math.log(r) for r in ratios),
    }


def clipped(ratio: float, advantage: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 0.8), 1 + high) * advantage)


def count_row_tokens(step: Step, rows: list[Row]) -> int:
    """Count the tokens of completions, and those of their prompts once in each micro-batch."""
    wanted = {(*row.rollout.prompt_ids, -1, *row.ids) for row in rows}
    tokens, found = 0, 0
    for batch in step.batches:
        computed = [a for answers in read_examples([batch | {"rank": batch["group"]}]) for a in answers]
        trained = [a for a in computed if (*a.prompt, -1, *a.ids) in wanted]
        tokens += sum(len(prompt) for prompt in {tuple(a.prompt) for a in trained}) + sum(len(a.ids) for a in trained)
        found += len(trained)
    assert found == len(rows)
    return tokens


def new_ratios(now: Model, row: Row) -> list[float]:
    return (now.read(row.rollout.prompt_ids, row.ids, TEMPERATURE).logprobs - row.old).exp().tolist()


def importance(method: str, row: Row) -> list[float]:
    """The weights of a row's tokens: truncated per token for GRPO, masked per completion for PPO."""
    gaps = (row.old - torch.tensor(row.rollout.completion.logprobs)).double()
    if method == "grpo":
        return [min(math.exp(gap), IMPORTANCE[method]) for gap in gaps.tolist()]
    weight = math.exp(float(gaps.sum()))
    return [weight if weight <= IMPORTANCE[method] else 0.0] * len(gaps)


def measure_grpo_step(phase: Phase, now: Model, start: Model, step: Step) -> Numbers:
    trained = [row for row in phase.scored if phase.advantages[id(row)] != 0]
    ratios = [new_ratios(now, row) for row in trained]
    flat = [
        (ratio, phase.advantages[id(row)] * weight)
        for row, mine in zip(trained, ratios, strict=True)
        for ratio, weight in zip(mine, importance("grpo", row), strict=True)
    ]
    total = sum(clipped(ratio, advantage, 0.28) for ratio, advantage in flat)
    return measure_clips(*map(list, zip(*flat, strict=True)), 0.28) | {
        "policy_loss": total / sum(len(row.ids) for row in phase.scored),
        "effective_batch": len(trained),
        "tokens": count_row_tokens(step, trained),
    }


def measure_ppo_step(phase: Phase, now: Model, start: Model, step: Step) -> Numbers:
    ratios = [r for row in phase.scored for r in new_ratios(now, row)]
    plain = [a for row in phase.plain_advantages for a in row]
    mean, deviation = fmean(plain), math.sqrt(pvariance(plain) + 1e-8)
    weights = [weight for row in phase.scored for weight in importance("ppo", row)]
    advantages = [(a - mean) / deviation * weight for a, weight in zip(plain, weights, strict=True)]
    head = now.module.critic.head.weight.detach()[0]
    values = [v for row in phase.scored for v in (now.read(row.rollout.prompt_ids, row.ids).states @ head).tolist()]
    old, returns = ([x for row in of for x in row] for of in (phase.values, phase.returns))
    squares = [
        ((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2) for v, o, r in zip(values, old, returns, strict=True)
    ]
    texts = [batch["ptx"] for batch in step.batches]
    learned, tokens = [], 0
    for text in texts:
        for ids, kept, positions in zip(text["input_ids"], text["loss_mask"], text["position_ids"], strict=True):
            tokens += len(ids)
            begins = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
            for begin, end in zip(begins, begins[1:], strict=False):
                if end - begin > 1:
                    document = ids[begin:end].tolist()
                    learned += now.read(document[:1], document[1:]).logprobs[kept[begin + 1 : end]].tolist()
    return measure_clips(ratios, advantages, 0.2) | {
        "policy_loss": fmean(clipped(r, a, 0.2) for r, a in zip(ratios, advantages, strict=True)),
        "value_loss": fmean(max(pair) / 2 for pair in squares),
        "value_clip_ratio": share([bound > free for free, bound in squares]),
        "ratio/mean": fmean(ratios),
        "ratio/var": pvariance(ratios),
        "ratio/deviation": fmean(abs(r - 1) for r in ratios),
        "ptx_loss": -fmean(learned),
        "tokens": count_row_tokens(step, phase.scored) + tokens,
    }


def measure_online_dpo_step(phase: Phase, now: Model, start: Model, step: Step) -> Numbers:
    examples = [
        [weigh(now, start, Answer(row.rollout.prompt_ids, row.ids, rank), TEMPERATURE) for rank, row in enumerate(pair)]
        for pair in phase.pairs
    ]
    rows = [row for pair in phase.pairs for row in pair]
    return measure_pairs(examples) | {"effective_batch": len(rows), "tokens": count_row_tokens(step, rows)}


def measure_held_out(rows: list[Row], greedy: list[float | None]) -> Numbers:
    """Compute pass@1, pass@3, the greedy accuracy and standard errors; a prompt needs k scorable completions."""
    found: Numbers = {"greedy_accuracy": share([value > 0.5 for value in greedy if value is not None])}
    for k in (1, 3):
        solved = []
        for uid in dict.fromkeys(row.uid for row in rows):
            right = [row.good > 0.5 for row in rows if row.uid == uid and row.good is not None]
            if len(right) >= k:
                solved.append(share([any(drawn) for drawn in combinations(right, k)]))
        found[f"pass@{k}"] = fmean(solved)
    measures: dict[str, Callable[[Row], float | None]] = {
        "reward": lambda row: row.reward,
        "pass@1": lambda row: None if row.good is None else float(row.good > 0.5),
        "completions/mean_length": lambda row: len(row.ids),
        "rewards/good/mean": lambda row: row.good,
        "rewards/form/mean": lambda row: row.form,
    }
    for name, measure in measures.items():
        means = []
        for uid in dict.fromkeys(row.uid for row in rows):
            values = [value for row in rows if row.uid == uid and (value := measure(row)) is not None]
            means += [fmean(values)] if values else []
        found[f"{name}_standard_error"] = stdev(means) / math.sqrt(len(means))
    return found


# The comparison.

OFFLINE = {
    "sft": measure_instructions,
    "reward": measure_scores,
    "dpo": measure_preferences,
    "kto": measure_labels,
}
ON_POLICY = {"grpo": measure_grpo_step, "ppo": measure_ppo_step, "online_dpo": measure_online_dpo_step}


def measure_update(method: str, number: int, step: Step, parameters: list[str]) -> Numbers:
    """Compute what the weights before and after a step of plain gradient descent say."""
    lr = LR[method] * DECAY**number
    gradient = {name: (step.before[name] - step.after[name]).double() / lr for name in parameters}

    def norm(start: str) -> float:
        return math.sqrt(sum(float(x.square().sum()) for name, x in gradient.items() if name.startswith(start)))

    found = {"grad_norm": norm(""), "learning_rate": lr}
    return found | ({"grad_norm/policy": norm("policy"), "grad_norm/value": norm("critic")} if method == "ppo" else {})


class Compared(NamedTuple):
    name: str
    expected: list[float]  # over the steps, phases or validations of the run
    logged: list[float]


def compare(method: str, ranks: int) -> Iterator[Compared]:
    """Compute and read every number of a run, but its times."""
    saw = recordings(method, ranks)
    logged = saw[0].logged
    steps = [
        Step(first.phase, first.before, [batch for step in mine for batch in step.batches], first.after)
        for mine in zip(*(recording.steps for recording in saw), strict=True)
        for first in mine[:1]
    ]
    start = Model(method, steps[0].before)
    parameters = [name for name, _ in start.module.named_parameters()]  # without a second name of tied weights
    updates = [measure_update(method, number, step, parameters) for number, step in enumerate(steps)]
    rows: list[tuple[str, list[Numbers]]] = [("train", updates)]
    evaluations: list[list[Evaluation]] = [list(each) for each in zip(*(r.evaluations for r in saw), strict=True)]
    if method in OFFLINE:
        measure = OFFLINE[method]
        of_steps = [measure(Model(method, step.before), start, step.batches) for step in steps]
        of_evaluations = []
        for ranked in evaluations:
            batches = [batch for evaluation in ranked for batch in evaluation.batches]
            found = measure(Model(method, ranked[0].weights), start, batches)
            of_evaluations.append({k: v for k, v in found.items() if k not in ("tokens", "supervised_fraction")})
    else:
        rollouts = [[r for rank in each for r in rank] for each in zip(*(r.phases for r in saw), strict=True)]
        policies = [next(Model(method, s.before) for s in steps if s.phase == p) for p in range(len(rollouts))]
        phases = [Phase(each, policy, start) for each, policy in zip(rollouts, policies, strict=True)]
        rows.append(("train", [measure_phase(method, phase, phases[0]) for phase in phases]))
        lengths = [sum(len(row.ids) for row in phase.rows) for phase in phases]
        rows.append(("train", [{"sampled_tokens": sum(lengths[: p + 1])} for p in range(len(phases))]))
        rows.append(("train", [{"engine/tokens": length / ranks} for length in lengths]))
        if method == "grpo":
            of_phase = [[step for step in steps if step.phase == p] for p in range(len(phases))]
            rows.append(("train", list(map(measure_group_bias, phases, of_phase))))
        of_steps = [ON_POLICY[method](phases[s.phase], Model(method, s.before), start, s) for s in steps]
        of_evaluations = []
        for ranked in evaluations:
            held_out = Phase([r for e in ranked for r in e.rollouts], Model(method, ranked[0].weights), start)
            first_of = {row.uid: row.rollout for row in held_out.rows}
            scripted = [(r, Scripted().write(r.prompt_ids, 0, 0.0)) for r in first_of.values()]
            greedy = [
                Good().grade(Rollout(r.uid, r.prompt, r.prompt_ids, r.answer, c, 0, {}, None)) for r, c in scripted
            ]
            of_evaluations.append(measure_rollouts(held_out) | measure_held_out(held_out.rows, greedy))
    tokens = [step.pop("tokens") for step in of_steps]
    totals = [{"num_tokens": sum(tokens[: i + 1])} for i in range(len(tokens))]
    for stage, numbers in (*rows, ("train", of_steps), ("train", totals), ("val", of_evaluations)):
        for name in dict.fromkeys(name for each in numbers for name in each):
            tag, expected = f"{stage}/{name}", [each.get(name, math.nan) for each in numbers]
            if name.startswith("group_bias/"):  # a phase with nothing to count logs nothing
                expected = [value for value in expected if not math.isnan(value)]
            yield Compared(tag, expected, [line[tag] for line in logged if tag in line])


@cache
def compared(method: str, ranks: int) -> list[Compared]:
    return list(compare(method, ranks))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_number_is_what_the_table_says(method, ranks):
    found = compared(method, ranks)
    wrong = [each for each in found if each.logged != pytest.approx(each.expected, rel=2e-4, abs=2e-5, nan_ok=True)]
    assert wrong == [], "\n".join(map(str, wrong))
    tags = {name for line in recordings(method, ranks)[0].logged for name in line}
    assert tags - {each.name for each in found} - set(TIMES) == {"epoch"}
    check_times(method, ranks)


def check_times(method: str, ranks: int) -> None:
    """Compare the times of a run with the test's own clock."""
    saw = recordings(method, ranks)
    logged = saw[0].logged
    tokens = [line["train/num_tokens"] for line in logged if "train/num_tokens" in line]
    speeds = [line["train/tokens_per_second"] for line in logged if "train/tokens_per_second" in line]
    for before, after, speed, step in zip([0.0, *tokens], tokens, speeds, saw[0].steps, strict=False):
        assert (after - before) / step.seconds < speed < 20 * (after - before) / step.seconds
    for number, line in enumerate([line for line in logged if "train/time/training" in line]):
        sampling, scoring, training = (line[name] for name in TIMES[:3])
        inside = fmean(sum(s.seconds for s in r.steps if s.phase == number) for r in saw)
        assert 0 < sampling < scoring and 0.5 * inside < training <= 1.5 * inside
        speed, syncing = (line[f"train/engine/{name}"] for name in ("tokens_per_second", "sync_seconds"))
        each = [sum(rollout.completion.length for rollout in r.phases[number]) for r in saw]
        assert 0 <= syncing < sampling and speed > 0.5 * fmean(each) / sampling
        assert sampling + scoring + training < max(recording.seconds[number] for recording in saw)
        rollouts = sum(len(recording.phases[number]) for recording in saw)
        assert line["train/completions_per_second"] == pytest.approx(rollouts / (sampling + scoring + training))


def test_the_whole_table_is_computed_again():
    table = (ROOT / "callbacks/README.md").read_text().split("## Metrics")[1]
    names = re.findall(r"`((?:train|val)/[^`]+)`", table)
    tags = {each.name for method in METHODS for each in compared(method, 1)} | set(TIMES)
    patterns = {name: re.sub(r"<\w+>|\\\*", "[^/]+", re.escape(name)) for name in names}
    assert all(len(line.split(" | ")) == 3 for line in table.splitlines() if line.startswith("| `"))
    missing = [
        name
        for name in names
        if not any(re.fullmatch(pattern, name) for pattern in ELSEWHERE)
        and not any(re.fullmatch(patterns[name], tag) for tag in tags)
    ]
    assert len(names) > 90 and missing == []
    assert all((ROOT / file).is_file() for file in ELSEWHERE.values())


def test_the_recorded_runs_are_hard_cases():
    (saw,) = recordings("grpo", 1)
    rollouts = [rollout for phase in saw.phases for rollout in phase]
    groups = {(p, r.uid): [] for p, phase in enumerate(saw.phases) for r in phase}
    for p, phase in enumerate(saw.phases):
        for rollout in phase:
            groups[p, rollout.uid].append(rollout.reward)
    assert [None] * 4 in groups.values() and any(None in group != [None] * 4 for group in groups.values())
    assert {rollout.completion.finish for rollout in rollouts} == {"stop", "length"}
    assert any(len(set(group)) == 1 for group in groups.values()) and len(groups) == 18
    by_name = {each.name: each.expected for method in METHODS for each in compared(method, 1)}
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "value_clip_ratio", "kl", "ratio/var"):
        assert any(abs(value) > 1e-3 for value in by_name[f"train/{name}"]), name
    weights = {name: [each.expected for each in compared(name, 1) if "importance" in each.name] for name in IMPORTANCE}
    assert any(2.0 in values for values in weights["grpo"]) and any(0.0 in values for values in weights["ppo"]), weights
