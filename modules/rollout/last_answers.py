"""Held-out supervised rows as prompts, to see what the policy itself answers."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import torch

from modules.rollout.sampling import SampledPolicy, silent_tokens
from modules.types import InstructionBatch, PromptBatch


def find_last_answers(batch: InstructionBatch, policy: SampledPolicy) -> PromptBatch:
    """Turn each row, or each document of a packed row, into a prompt and its last answer.

    ``answer`` is the last run of supervised tokens as text, decoded as a sampled answer is. The prompt is everything
    before it. Rows whose prompt has fewer than two tokens (whole texts, fillers) are left out. ``uid`` is a digest of
    the prompt, the same on every rank.
    """
    tokenizer, silent = policy.tokenizer, silent_tokens(policy)
    prompts = PromptBatch(uid=[], prompt=[], prompt_ids=[], answer=[], source=[], info=[])
    for ids, supervised in split_documents(batch):
        if True not in supervised:
            continue
        end = len(supervised) - supervised[::-1].index(True)
        start = end - next((back for back, kept in enumerate(reversed(supervised[:end])) if not kept), end)
        if start < 2:
            continue
        prompts["prompt_ids"].append(ids[:start])
        prompts["prompt"].append(str(tokenizer.decode(ids[:start])))
        prompts["answer"].append(str(tokenizer.decode([token for token in ids[start:end] if token not in silent])))
        prompts["uid"].append(hashlib.blake2b(torch.tensor(ids[:start]).numpy().tobytes(), digest_size=8).hexdigest())
        prompts["source"].append("")
        prompts["info"].append({})
    return prompts


def split_documents(batch: InstructionBatch) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the tokens and the loss mask of each row, or of each document of a packed row, without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [range(length) for length in lengths]
    for ids, supervised, places, length in zip(
        batch["input_ids"].tolist(), batch["loss_mask"].tolist(), positions, lengths, strict=True
    ):
        starts = [place for place in range(length) if places[place] == 0]
        for start, end in pairwise([*starts, length]):
            yield ids[start:end], supervised[start:end]
