"""Held-out supervised rows as prompts: what the policy itself would answer."""

import hashlib
from typing import Any

import torch

from modules.types import InstructionBatch, PromptBatch


def last_answers(batch: InstructionBatch, tokenizer: Any) -> PromptBatch:
    """The last supervised stretch of each row as ``answer`` (text without special tokens), what stands before it as the prompt.

    Rows without a prompt of two tokens (whole texts, fillers) are left out. ``uid`` is a digest of the prompt, the same on every rank.
    """
    prompts = PromptBatch(uid=[], prompt=[], prompt_ids=[], answer=[], source=[], info=[])
    for ids, supervised in zip(batch["input_ids"].tolist(), batch["loss_mask"].tolist(), strict=True):
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
