"""The numbers of a set of rollouts, under TRL's names: exact over batches and ranks, because they are taken of all
outcomes at once.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modules.functional.advantages import zero_std_fraction
from modules.functional.diagnostics import pass_at_k
from modules.trainer.ranks import from_all_ranks
from modules.types import Outcome, Reward, Rollout


def outcomes(rollouts: Sequence[Rollout], accuracy: Reward | None = None) -> list[Outcome]:
    """One per rollout, in order; ``right`` where ``accuracy`` gives more than 0.5."""
    scores = [None] * len(rollouts) if accuracy is None else accuracy(rollouts)
    return [
        Outcome(
            r.uid,
            r.reward,
            r.rewards,
            len(r.completion.token_ids),
            r.completion.finish == "stop",
            r.entropy,
            None if score is None else score > 0.5,
            r.kl,
        )
        for r, score in zip(rollouts, scores, strict=True)
    ]


def rollout_metrics(found: Sequence[Outcome]) -> dict[str, float]:
    """Prompts, rewards, lengths in tokens, entropy in nats per token, KL in nats per completion.

    Unscorable completions are counted and otherwise left out.
    """
    rewards = column(outcome.reward for outcome in found)
    lengths = column(outcome.length for outcome in found)
    ended = torch.tensor([outcome.stopped for outcome in found])
    numbers = {uid: number for number, uid in enumerate(dict.fromkeys(outcome.uid for outcome in found))}
    group = torch.tensor([numbers[outcome.uid] for outcome in found])
    metrics = {
        "num_prompts": float(len(numbers)),
        "reward": mean(rewards),
        "reward_std": mean(column(std(rewards[group == g]) for g in group.unique())),
        "frac_reward_zero_std": float(zero_std_fraction(rewards, group)),
        "unscorable": float(rewards.isnan().sum()),
        "completions/mean_length": mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": mean((~ended).float()),
        "completions/mean_terminated_length": mean(lengths[ended]),
    }
    for name in found[0].rewards:
        values = column(outcome.rewards[name] for outcome in found)
        metrics |= {f"rewards/{name}/mean": mean(values), f"rewards/{name}/std": std(values)}
    if found[0].kl is not None:
        metrics["sequence_kl"] = mean(column(outcome.kl for outcome in found))
    if found[0].entropy is not None:
        metrics["entropy"] = float((column(outcome.entropy for outcome in found) * lengths).sum() / lengths.sum())
    return metrics


def share_solved(found: Sequence[Outcome], k: int) -> float:
    """pass@k: mean over prompts of the chance that one of k of its scorable completions is right; prompts with fewer do
    not count.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for outcome in found:
        if outcome.right is not None:
            groups[outcome.uid].append(outcome.right)
    solved = [pass_at_k(len(right), sum(right), k) for right in groups.values() if len(right) >= k]
    return sum(solved) / max(1, len(solved))


def column(values: Any) -> Tensor:
    """float64 [N], NaN for None."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)


def mean(values: Tensor) -> float:
    """Mean of the entries [N] that are not NaN; 0 where there is none."""
    kept = values[~values.isnan()]
    return float(kept.mean()) if len(kept) else 0.0


def std(values: Tensor) -> float:
    """Sample standard deviation of the entries [N] that are not NaN; 0 for fewer than two."""
    kept = values[~values.isnan()]
    return float(kept.std()) if len(kept) > 1 else 0.0


def gap_metrics(mask: Tensor, old_logprobs: Tensor, sampler_logprobs: Tensor, kl: Tensor | None) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, and the mean of ``kl`` over tokens, of all ranks
    (collective).

    mask bool [N, Tc]; the others [N, Tc], nats.
    """
    gaps = (old_logprobs - sampler_logprobs).abs()[mask]
    mine = (int(mask.sum()), float(gaps.sum()), float(gaps.max()), 0.0 if kl is None else float(kl[mask].sum()))
    counts, sums, largest, kls = zip(*from_all_ranks([mine]), strict=True)
    tokens = max(1, sum(counts))
    difference = {
        "sampling/sampling_logp_difference/mean": sum(sums) / tokens,
        "sampling/sampling_logp_difference/max": max(largest),
    }
    return difference if kl is None else difference | {"kl": sum(kls) / tokens}
