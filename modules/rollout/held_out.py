"""Held-out supervised rows as prompts: what the policy itself would answer."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from modules.types import InstructionBatch, PromptBatch


def last_answers(batch: InstructionBatch, tokenizer: Any) -> PromptBatch:
    """Split each row, or document of a packed row, into its last answer and the prompt that stands before it.

    The answer is the last supervised stretch, as text without special tokens. Rows without a prompt of two tokens (whole texts, fillers) are left out. ``uid`` is a digest of the prompt, the same
    on every rank.
    """
    prompts = PromptBatch(uid=[], prompt=[], prompt_ids=[], answer=[], source=[], info=[])
    for ids, supervised in documents(batch):
        if True not in supervised:
            continue
        end = len(supervised) - supervised[::-1].index(True)
        start = end - next((back for back, kept in enumerate(reversed(supervised[:end])) if not kept), end)
        if start < 2:
            continue
        prompts["prompt_ids"].append(ids[:start])
        prompts["prompt"].append(tokenizer.decode(ids[:start]))
        prompts["answer"].append(tokenizer.decode(ids[start:end], skip_special_tokens=True))
        prompts["uid"].append(hashlib.blake2b(torch.tensor(ids[:start]).numpy().tobytes(), digest_size=8).hexdigest())
        prompts["source"].append("")
        prompts["info"].append({})
    return prompts


def documents(batch: InstructionBatch) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens and loss mask of each row, of packed rows of each document, without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [range(length) for length in lengths]
    for ids, supervised, places, length in zip(
        batch["input_ids"].tolist(), batch["loss_mask"].tolist(), positions, lengths, strict=True
    ):
        starts = [place for place in range(length) if places[place] == 0]
        for start, end in pairwise([*starts, length]):
            yield ids[start:end], supervised[start:end]
