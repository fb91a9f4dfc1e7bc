"""The metrics of a set of rollouts, under TRL's names.

They are exact over batches and ranks, because they are computed from all outcomes at once.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.functional.advantages import zero_std_fraction
from modules.functional.diagnostics import pass_at_k
from modules.functional.thoughts import find_thought
from modules.trainer.ranks import from_all_ranks
from modules.types import Outcome, Reward, Rollout, score


def make_outcomes(
    rollouts: Sequence[Rollout], accuracy: Reward | None = None, scored_by: Reward | None = None
) -> list[Outcome]:
    """Return one outcome per rollout, in order.

    Args:
        rollouts: completions with their rewards.
        accuracy: decides ``right``: True where its score is above 0.5. None = not asked. A reward whose scores are
            among the rollouts' is not called again.
        scored_by: the reward that gave the rollouts their scores.
    """
    scores: list[float | None] = [None] * len(rollouts)
    if accuracy is not None and accuracy is scored_by:
        scores = [rollout.reward for rollout in rollouts]
    elif accuracy is not None and scored_by is not None and accuracy in scored_by.list_parts():
        scores = [rollout.rewards[accuracy.name] for rollout in rollouts]
    elif accuracy is not None:
        scores = score(accuracy, rollouts)
    return [
        Outcome(
            r.uid,
            r.reward,
            r.rewards,
            r.completion.length,
            r.completion.finish == "stop",
            r.entropy,
            None if value is None else value > 0.5,
            r.kl,
            r.thinks,
            bool(find_thought(r.text)),
        )
        for r, value in zip(rollouts, scores, strict=True)
    ]


def measure_rollouts(found: Sequence[Outcome]) -> dict[str, float]:
    """Compute the metrics of rewards, lengths (tokens), entropy (nats per token) and KL (nats per completion).

    Completions without a score are counted as ``unscorable`` and left out of the reward metrics, and so are groups
    without any score.

    Args:
        found: outcomes of all ranks; at least one.

    Returns:
        numbers by name, without the stage in front.
    """
    rewards = make_column(outcome.reward for outcome in found)
    lengths = make_column(outcome.length for outcome in found)
    ended = torch.tensor([outcome.stopped for outcome in found])
    numbers = {uid: number for number, uid in enumerate(dict.fromkeys(outcome.uid for outcome in found))}
    group = torch.tensor([numbers[outcome.uid] for outcome in found])
    metrics = {
        "num_prompts": float(len(numbers)),
        "completions/mean_length": average_known(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": average_known((~ended).float()),
        "completions/mean_terminated_length": average_known(lengths[ended], nothing=0.0),
    }
    if found[0].rewards:  # without a reward there is nothing to score
        metrics |= {
            "reward": average_known(rewards),
            "reward_std": average_known(
                make_column(measure_deviation(rewards[group == g]) for g in group[~rewards.isnan()].unique())
            ),
            "frac_reward_zero_std": math.nan if rewards.isnan().all() else float(zero_std_fraction(rewards, group)),
            "unscorable": float(rewards.isnan().sum()),
        }
    for name in found[0].rewards:
        values = make_column(outcome.rewards[name] for outcome in found)
        metrics |= {f"rewards/{name}/mean": average_known(values), f"rewards/{name}/std": measure_deviation(values)}
    if found[0].kl is not None:
        metrics["sequence_kl"] = average_known(make_column(outcome.kl for outcome in found))
    if found[0].entropy is not None:
        metrics["entropy"] = float((make_column(outcome.entropy for outcome in found) * lengths).sum() / lengths.sum())
    if any(outcome.thinks is not None for outcome in found):
        metrics |= measure_modes(found)
    return metrics


def measure_modes(found: Sequence[Outcome]) -> dict[str, float]:
    """Compute how many completions think as they are asked to: of those that are to think, the share with a thought; of
    the others, the share with an empty one or none.
    """
    shares: dict[str, float] = {}
    for name, wanted in (("thinking", True), ("no_thinking", False)):
        mine = [outcome.thought == wanted for outcome in found if (outcome.thinks is not False) == wanted]
        shares |= {f"mode/{name}": sum(mine) / len(mine)} if mine else {}
    return shares


def measure_budgets(found: Mapping[int, Sequence[Outcome]]) -> dict[str, float]:
    """Compute accuracy, its standard error over prompts, and mean tokens at each thinking budget. ``rise`` is the
    accuracy at the largest budget minus the accuracy at the smallest, with the standard error of this difference on the
    same prompts.

    Args:
        found: outcomes of all ranks by budget, in rising order. Those that cannot be judged are left out.
    """
    metrics: dict[str, float] = {}
    by_prompt: list[dict[str, float]] = []
    for budget, outcomes in found.items():
        prompts: dict[str, list[bool]] = defaultdict(list)
        for outcome in outcomes:
            if outcome.right is not None:
                prompts[outcome.uid].append(outcome.right)
        by_prompt.append({uid: sum(right) / len(right) for uid, right in prompts.items()})
        metrics |= measure_mean(f"budget/{budget}/accuracy", list(by_prompt[-1].values()))
        metrics[f"budget/{budget}/length"] = average_known(make_column(outcome.length for outcome in outcomes))
    if by_prompt[1:]:
        least, most = by_prompt[0], by_prompt[-1]
        metrics |= measure_mean("budget/rise", [most[uid] - least[uid] for uid in most if uid in least])
    return metrics


def measure_mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Compute a mean over prompts and, for two prompts or more, its standard error."""
    found = {name: average_known(make_column(values))}
    if len(values) > 1:
        found[f"{name}_standard_error"] = measure_deviation(make_column(values)) / len(values) ** 0.5
    return found


def measure_errors(found: Sequence[Outcome]) -> dict[str, float]:
    """Compute the standard errors of the reward, its parts, pass@1 and the mean length, by the metric's name.

    The completions of a prompt are not independent. So an error is the sample deviation over prompts of the prompt's
    mean, over the root of the number of prompts. It is left out where fewer than two prompts have a value.
    """
    columns: dict[str, list[float | None]] = {
        "reward": [outcome.reward for outcome in found],
        "pass@1": [outcome.right for outcome in found],
        "completions/mean_length": [outcome.length for outcome in found],
    }
    columns |= {f"rewards/{name}/mean": [outcome.rewards[name] for outcome in found] for name in found[0].rewards}
    errors = {}
    for name, values in columns.items():
        groups: dict[str, list[float]] = defaultdict(list)
        for outcome, value in zip(found, values, strict=True):
            if value is not None:
                groups[outcome.uid].append(float(value))
        if len(groups) > 1:
            means = make_column(sum(group) / len(group) for group in groups.values())
            errors[f"{name}_standard_error"] = float(means.std()) / math.sqrt(len(means))
    return errors


def measure_unscored(failures: Mapping[str, int]) -> dict[str, float]:
    """Make metrics of how many completions of this rank got no verdict, by cause."""
    return {f"unscored/{cause}": float(count) for cause, count in failures.items()}


def share_solved(found: Sequence[Outcome], k: int) -> float:
    """Return pass@k: the mean over prompts of the chance that at least one of k completions is right.

    Only scorable completions count. Prompts with fewer than k of them are left out; without any prompt it is NaN.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for outcome in found:
        if outcome.right is not None:
            groups[outcome.uid].append(outcome.right)
    solved = [pass_at_k(len(right), sum(right), k) for right in groups.values() if len(right) >= k]
    return sum(solved) / len(solved) if solved else math.nan


def make_column(values: Any) -> Tensor:
    """Turn numbers into a float64 tensor [N], with NaN for None."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)


def average_known(values: Tensor, nothing: float = math.nan) -> float:
    """Return the mean of the entries [N] that are not NaN; ``nothing`` without any."""
    kept = values[~values.isnan()]
    return float(kept.mean()) if len(kept) else nothing


def measure_deviation(values: Tensor) -> float:
    """Return the sample standard deviation of the entries [N] that are not NaN; 0 for fewer than two."""
    kept = values[~values.isnan()]
    return float(kept.std()) if len(kept) > 1 else 0.0


def sum_gaps(rollouts: Sequence[Rollout], fresh: bool = False) -> list[float]:
    """Sum over the tokens of a phase how far the sampler's log-probs are from the trainer's.

    Args:
        rollouts: of this rank; those without the trainer's log-probs are left out.
        fresh: count only tokens sampled with the weights that the trainer had at collection; False = all sampled
            tokens.

    Returns:
        numbers of rollouts and of tokens; sum and maximum of the differences, nats; sum of ``k3``, NaN without a
        reference.
    """
    kept = [rollout for rollout in rollouts if rollout.trainer_logprobs is not None]
    trainer = torch.tensor([x for each in kept for x in each.trainer_logprobs or []], dtype=torch.float64)
    sampler = torch.tensor([x for each in kept for x in each.completion.logprobs], dtype=torch.float64)
    gaps = (trainer - sampler).abs()[torch.tensor([x for each in kept for x in find_counted(each, fresh)]).bool()]
    kls = [math.nan if each.k3 is None else each.k3 for each in kept]
    largest = float(gaps.max()) if len(gaps) else 0.0
    return [float(len(kept)), float(len(gaps)), float(gaps.sum()), largest, math.fsum(kls)]


def find_counted(rollout: Rollout, fresh: bool) -> list[bool]:
    """Tell which tokens ``sum_gaps`` counts."""
    completion = rollout.completion
    counted = completion.sampled or [True] * len(completion.token_ids)
    if not fresh:
        return counted
    versions = completion.token_versions
    return [mine and version == rollout.trainer_version for mine, version in zip(counted, versions, strict=True)]


def join_gaps(ranks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Make metrics of what ``sum_gaps`` returned on each rank: means over the tokens of all ranks; {} without rollouts."""
    rollouts, counts, sums, largest, kls = zip(*ranks, strict=True)
    if not sum(rollouts):
        return {}
    tokens = max(1.0, sum(counts))
    difference = {
        "sampling/sampling_logp_difference/mean": sum(sums) / tokens,
        "sampling/sampling_logp_difference/max": max(largest),
    }
    return difference if math.isnan(sum(kls)) else difference | {"kl": sum(kls) / tokens}


def measure_weights(weights: Tensor) -> dict[str, float]:
    """Measure the importance weights of the tokens of all ranks, given those of this one (collective); {} without any."""
    mine = [(len(weights), float(weights.sum()), float(weights.min()), float(weights.max()))] if len(weights) else []
    found = from_all_ranks(mine)
    if not found:
        return {}
    counts, sums, smallest, largest = zip(*found, strict=True)
    values = {"min": min(smallest), "mean": sum(sums) / sum(counts), "max": max(largest)}
    return {f"sampling/importance_sampling_ratio/{name}": value for name, value in values.items()}


def add_engine_stats(
    metrics: dict[str, float], stats: Mapping[str, float], tokens: int, seconds: float, syncing: float
) -> None:
    """Add one call of an engine to a phase's metrics ``engine/<name>`` of this rank.

    ``occupancy`` and shares become means over the calls, weighted by their seconds; ``slots`` and what is measured in GB
    the largest; all other numbers sums. ``tokens_per_second`` is tokens / seconds of sampling, over all calls so far.

    Args:
        metrics: numbers of the phase; ``time/sampling`` and ``engine/*`` are changed.
        stats: the engine's ``last_stats``.
        tokens: that the call sampled.
        seconds: of the call, syncing and sampling.
        syncing: seconds of it that the engine took to get the weights; the metric ``sync_seconds``, whatever ``stats`` say.
    """
    before = metrics.get("time/sampling", 0.0) - metrics.get("engine/sync_seconds", 0.0)
    sampling = seconds - syncing
    for name, value in {**stats, "tokens": float(tokens), "sync_seconds": syncing}.items():
        old = metrics.get(f"engine/{name}")
        if old is None:
            joined = value
        elif name == "slots" or name.endswith("_gb"):
            joined = max(old, value)
        elif name == "occupancy" or name.endswith("_share"):
            joined = (old * before + value * sampling) / max(before + sampling, 1e-9)
        else:
            joined = old + value
        metrics[f"engine/{name}"] = joined
    metrics["time/sampling"] = metrics.get("time/sampling", 0.0) + seconds
    metrics["engine/tokens_per_second"] = metrics["engine/tokens"] / max(before + sampling, 1e-9)
