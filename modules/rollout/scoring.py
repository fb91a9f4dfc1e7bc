"""Turns sampled completions into what a policy loss needs: records, rewards and padded tensors."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from modules.functional.masked import pad_rows
from modules.rewards.combined import in_phase
from modules.trainer.ranks import from_all_ranks
from modules.types import Completion, Credit, PolicyBatch, PromptBatch, Reward, Rollout, find_attended

SCORING_TOKENS = 16384  # padded tokens of one forward without gradients


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


def score_in_chunks(score: Callable[[PolicyBatch], tuple[Tensor, ...]], batch: PolicyBatch) -> tuple[Tensor, ...]:
    """Apply ``score`` to whole groups of at most ``SCORING_TOKENS`` padded tokens at a time; each result is [N, Tc].

    A group that is larger is scored alone. Equal completions of a prompt are scored once, because late in training most
    completions repeat others.
    """
    width, given = batch["completion_ids"].shape[1], "attended" in batch
    lengths = find_attended(batch).sum(1, keepdim=True)
    written = [batch["completion_mask"].long()] if given else []
    rows = torch.cat([batch["prompt_index"][:, None], lengths, batch["completion_ids"], *written], 1)
    distinct, copies = rows.unique(dim=0, return_inverse=True)  # sorted, so still by prompt
    index, lengths, ids, *written = distinct.split([1, 1, width] + [width] * given, 1)
    mask = torch.arange(width, device=rows.device) < lengths
    once = {**batch, "prompt_index": index[:, 0], "completion_ids": ids, "completion_mask": mask}
    if given:
        once |= {"completion_mask": written[0].bool(), "attended": mask}
    parts = [score(part) for part in split_prompts(cast(PolicyBatch, once))]
    return tuple(torch.cat(column)[copies] for column in zip(*parts, strict=True))


def split_prompts(batch: PolicyBatch) -> Iterable[PolicyBatch]:
    """Yield consecutive prompts with their completions; rows must be ordered by prompt."""
    index, width = batch["prompt_index"], batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    rows_per_prompt = index.bincount(minlength=len(batch["prompt_ids"]))
    size = max(1, SCORING_TOKENS // (width * int(rows_per_prompt.max())))
    for start in range(0, len(batch["prompt_ids"]), size):
        rows = ((index >= start) & (index < start + size)).nonzero()[:, 0]
        names = ("completion_ids", "completion_mask", *(("attended",) if "attended" in batch else ()))
        part = {name: batch[name][rows] for name in names}  # type: ignore[literal-required]
        part |= {name: batch[name][start : start + size] for name in ("prompt_ids", "prompt_mask")}  # type: ignore[literal-required]
        yield cast(PolicyBatch, part | {"prompt_index": index[rows] - start})


def add_sums(rollouts: list[Rollout], entropies: Tensor, kl: Tensor | None, mask: Tensor) -> list[Rollout]:
    """Add each rollout's mean token entropy and its summed log-ratio to the start policy.

    Args:
        rollouts: N rollouts.
        entropies: [N, Tc], nats.
        kl: [N, Tc], log pi - log pi_start in nats; None = no reference.
        mask: bool [N, Tc].
    """
    entropy = (entropies.sum(1) / mask.sum(1).clamp(min=1)).tolist()
    sums = [None] * len(rollouts) if kl is None else (kl * mask).sum(1).tolist()
    return [replace(rollout, entropy=e, kl=k) for rollout, e, k in zip(rollouts, entropy, sums, strict=True)]


def add_trainer_logprobs(rollouts: list[Rollout], logprobs: Tensor, version: int) -> list[Rollout]:
    """Add the log-probs of each rollout's tokens that the trainer computed, [N, Tc] in nats, with weights of ``version``."""
    return [
        replace(rollout, trainer_logprobs=row[: len(rollout.completion.token_ids)], trainer_version=version)
        for rollout, row in zip(rollouts, logprobs.tolist(), strict=True)
    ]


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
