"""Turns sampled completions into what a policy loss needs: records, rewards and padded tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from modules.functional import kl as estimators
from modules.functional.masked import pad_rows
from modules.networks.policy import READ, Policy
from modules.rewards.combined import in_phase
from modules.trainer.pieces import take_rows
from modules.trainer.ranks import from_all_ranks
from modules.types import Completion, Credit, PolicyBatch, PromptBatch, Reward, Rollout, find_attended


def make_rollouts(
    prompts: PromptBatch, completions: list[list[Completion]], reward: Reward | None, phase: int | None = None
) -> list[Rollout]:
    """Make one record per completion, prompt by prompt, and score it.

    Args:
        prompts: P prompts.
        completions: the completions of each prompt.
        reward: what scores them; None = no scores.
        phase: the phase of the training that the scores are for; None = none, see ``Ramp``.

    Returns:
        rollouts; ``group`` is the number of the prompt in the batch.
    """
    thinks = prompts.get("thinks") or [None] * len(completions)
    rollouts = [
        Rollout(
            uid=prompts["uid"][i],
            prompt=prompts["prompt"][i],
            prompt_ids=prompts["prompt_ids"][i],
            answer=prompts["answer"][i],
            completion=completion,
            group=i,
            rewards={},
            reward=None,
            info=prompts["info"][i],
            source=prompts["source"][i],
            thinks=thinks[i],
        )
        for i, group in enumerate(completions)
        for completion in group
    ]
    return score_rollouts(rollouts, reward, phase)


def score_rollouts(rollouts: list[Rollout], reward: Reward | None, phase: int | None = None) -> list[Rollout]:
    """Return the rollouts with the scores of a reward; see ``make_rollouts``."""
    if reward is None:
        return rollouts
    with in_phase(reward, phase):
        parts = reward.score_parts(rollouts)
        return [
            replace(rollout, rewards=part, reward=reward.add_parts(part))
            for rollout, part in zip(rollouts, parts, strict=True)
        ]


def make_batch(rollouts: list[Rollout], device: torch.device) -> PolicyBatch:
    """Make the tensors of a phase that rollouts alone determine, each prompt once.

    Log-probs and advantages are added later.
    """
    prompt_rows = {rollout.group: rollout.prompt_ids for rollout in rollouts}
    position = {group: i for i, group in enumerate(prompt_rows)}
    prompt_ids, prompt_mask = pad_rows(list(prompt_rows.values()))
    completion_ids, completion_mask = pad_rows([rollout.completion.token_ids for rollout in rollouts])
    sampler = torch.zeros(completion_mask.shape)
    sampler[completion_mask] = torch.tensor([x for rollout in rollouts for x in rollout.completion.logprobs])
    attended, completion_mask = completion_mask, leave_out_given(completion_mask, rollouts)
    group = torch.tensor([position[rollout.group] for rollout in rollouts])
    rewards = [float("nan") if rollout.reward is None else rollout.reward for rollout in rollouts]
    parts = [[float("nan") if x is None else x for x in rollout.rewards.values()] for rollout in rollouts]
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "prompt_index": group,
        "sampler_logprobs": sampler,
        "rewards": torch.tensor(rewards),
        "parts": torch.tensor(parts),
        "group": group,
        "stopped": torch.tensor([rollout.completion.finish == "stop" for rollout in rollouts]),
    }
    if completion_mask is not attended:
        batch["attended"] = attended
    return cast(PolicyBatch, {name: values.to(device) for name, values in batch.items()})


def leave_out_given(mask: Tensor, rollouts: list[Rollout]) -> Tensor:
    """Return the mask [N, Tc] without the tokens that were given, by tools or to stop a thought; the same tensor without any."""
    if all(rollout.completion.sampled is None for rollout in rollouts):
        return mask
    kept = mask.clone()
    for row, rollout in zip(kept, rollouts, strict=True):
        if rollout.completion.sampled is not None:
            row[: len(rollout.completion.sampled)] = torch.tensor(rollout.completion.sampled)
    return kept


def leave_out_tokens(batch: PolicyBatch, tokens: Tensor) -> PolicyBatch:
    """Return the batch without these tokens, bool [N, Tc], which are attended to and no part of the loss."""
    kept = {"attended": find_attended(batch), "completion_mask": batch["completion_mask"] & ~tokens}
    return cast(PolicyBatch, {**batch, **kept})


def keep_prompts(batch: PolicyBatch, prompts: list[int]) -> PolicyBatch:
    """Return the batch of a whole phase with the completions of these prompts alone, which get new numbers in order."""
    rows = torch.cat([(batch["prompt_index"] == prompt).nonzero()[:, 0] for prompt in prompts])
    place = torch.zeros(len(batch["prompt_ids"]), dtype=torch.long, device=rows.device)
    place[prompts] = torch.arange(len(prompts), device=rows.device)
    kept = {
        name: values[prompts] if name in ("prompt_ids", "prompt_mask") else values[rows]
        for name, values in cast(dict[str, Tensor], batch).items()
    }
    kept["prompt_index"] = kept["group"] = place[kept["prompt_index"]]
    return cast(PolicyBatch, kept)


def score_in_chunks(
    policy: Policy,
    score: Callable[[PolicyBatch], tuple[Tensor, ...]],
    batch: PolicyBatch,
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply ``score`` to as many completions at a time as a forward pass of the policy without gradients takes.

    Equal completions of a prompt are scored once, because late in training most completions repeat others.

    Args:
        policy: what ``score`` computes with.
        score: batch of n completions -> tensors [n, t] or [n, t, ...].
        batch: N completions.
        rows: int [M], numbers of those to score; default all.

    Returns:
        each tensor as [N, Tc, ...], zero in rows that were not to be scored.
    """
    total, width = batch["completion_ids"].shape
    rows = torch.arange(total, device=batch["completion_ids"].device) if rows is None else rows
    firsts, copies = find_distinct(batch, rows)
    chunks = [firsts[chunk] for chunk in policy.plan_forwards(take_chunk(batch, firsts))]
    columns = list(zip(*(score(take_chunk(batch, chunk)) for chunk in chunks), strict=True))
    scored, found = torch.cat(chunks), list[Tensor]()
    for column in columns:
        values = column[0].new_zeros(total, width, *column[0].shape[2:])
        values[scored] = torch.cat([widen(part, width) for part in column])
        values[rows] = values[firsts][copies]
        found.append(values)
    return tuple(found)


def take_chunk(batch: PolicyBatch, rows: Tensor) -> PolicyBatch:
    """Return what a forward pass reads of the rows int [n], without columns that are padding in all of them."""
    read = {name: value for name, value in batch.items() if name in READ}
    return cast(PolicyBatch, take_rows(read, rows.tolist(), set()))


def widen(values: Tensor, width: int) -> Tensor:
    """Add columns of zeros to values [n, t, ...] so that they are [n, width, ...]."""
    wide = values.new_zeros(len(values), width, *values.shape[2:])
    wide[:, : values.shape[1]] = values
    return wide


def find_distinct(batch: PolicyBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the completions that differ in prompt, tokens, or in which tokens were sampled.

    Args:
        batch: N completions.
        rows: int [M], numbers of those to look at.

    Returns:
        the number of the first of each kind, int [K], in the order of ``rows``; and for each row its place among these,
        int [M].
    """
    attended = find_attended(batch)[rows]
    columns = [batch["prompt_index"][rows][:, None], batch["completion_ids"][rows].masked_fill(~attended, -1)]
    if "attended" in batch:
        columns.append(batch["completion_mask"][rows].long())
    kinds, kind = torch.cat(columns, 1).unique(dim=0, return_inverse=True)  # [K, ...], [M]
    places = torch.arange(len(rows), device=rows.device)
    first = places.new_full((len(kinds),), len(rows)).scatter_reduce(0, kind, places, "amin")
    first, order = first.sort()
    return rows[first], order.argsort()[kind]


class Measured(NamedTuple):
    """What the trainer computes for n completions: log-probs [n, t], and sums over each completion [n]."""

    logprobs: Tensor
    entropy: Tensor  # mean over its tokens, nats
    kl: Tensor | None  # of log pi - log pi_start, nats; None = no reference
    k3: Tensor | None  # of the estimate k3 of the KL, see ``Rollout``


def measure_rows(batch: PolicyBatch, logprobs: Tensor, entropies: Tensor, ahead: bool = False) -> Measured:
    """Sum over each completion what a forward pass with the weights of collection says of its tokens.

    Args:
        batch: n completions; ``ref_logprobs`` where there is a reference, ``stale`` where earlier weights sampled tokens.
        logprobs: [n, t], nats.
        entropies: [n, t], nats.
        ahead: whether other weights sampled all of them, ahead of time. Then w = p of these weights / p of the sampler
            weighs k3, which else is that of the tokens which these weights sampled.
    """
    logprobs, entropies, mask = logprobs.detach(), entropies.detach(), batch["completion_mask"]
    entropy, kl, k3 = entropies.sum(1) / mask.sum(1).clamp(min=1), None, None
    if "ref_logprobs" in batch:
        stale, distances = batch.get("stale", torch.zeros_like(mask)), estimators.k3(logprobs, batch["ref_logprobs"])
        drawn = torch.where(stale, batch["sampler_logprobs"], logprobs)
        kl = (estimators.k1(drawn, batch["ref_logprobs"]) * mask).sum(1)
        weights = (logprobs - batch["sampler_logprobs"]).exp() if ahead else ~stale
        k3 = (distances * weights * mask).sum(1)
    return Measured(logprobs, entropy, kl, k3)


def add_measures(rollouts: list[Rollout], rows: Sequence[int], measured: Measured, version: int) -> None:
    """Put what was measured of n completions into the rollouts, in place.

    Args:
        rollouts: of a phase.
        rows: the number of each completion there; below 0 = it is not there.
        measured: of the completions.
        version: optimiser updates before the weights that measured.
    """
    columns = [[None] * len(rows) if column is None else column.tolist() for column in measured]
    for row, logprobs, entropy, kl, k3 in zip(rows, *columns, strict=True):
        if row >= 0:
            length = len(rollouts[row].completion.token_ids)
            rollouts[row] = replace(
                rollouts[row],
                entropy=entropy,
                kl=kl,
                k3=k3,
                trainer_logprobs=logprobs[:length],
                trainer_version=version,
            )


def weigh_credits(batch: PolicyBatch, weights: Tensor, mask: Tensor) -> list[Credit]:
    """Tell what each completion weighs in the gradient of its update, see ``Credit`` (collective).

    Args:
        batch: of a whole phase of this rank, with advantages [N, Tc] and ``row_count`` [N].
        weights: [N, Tc], of the token losses in their sum.
        mask: bool [N, Tc], the tokens of completions that teach.
    """
    update = batch.get("update", torch.zeros_like(batch["prompt_index"]))  # int [N]
    mine = torch.bincount(update.cpu(), batch["row_count"].cpu().double())  # every rank takes part in every update
    denominators = torch.tensor(from_all_ranks([mine.tolist()]), dtype=torch.float64).sum(0)  # [updates]
    advantages = batch["advantages"].cpu().double() * mask.cpu()
    weighed = (advantages.abs() * weights.cpu()).sum(1) / denominators[update.cpu()].clamp(min=1e-12)  # [N]
    means = advantages.sum(1) / mask.cpu().sum(1).clamp(min=1)
    columns = (batch["group"], batch["completion_mask"].sum(1), batch["rewards"], mask.any(1), means, weighed)
    return [
        Credit(group, length, None if reward != reward else reward, mean if teaches else None, weight)
        for group, length, reward, teaches, mean, weight in zip(*(column.tolist() for column in columns), strict=True)
    ]
