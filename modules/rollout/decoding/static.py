"""Samples from any causal language model through its Hugging Face forward, in static batches padded on the left."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from modules.rollout.decoding.decode import ROW_STEP
from modules.rollout.sampling import Ledger


def run_static(
    model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger, max_bytes: float
) -> dict[str, float]:
    """Finish every request, one batch after the other; arguments and result are those of ``ContinuousBatch``.

    A prompt is computed once for each batch that holds some of its requests. That is once in all if its G rows fit into
    ``max_bytes`` at their full length.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    stats = {"decode_steps": 0, "slots": 0, "prefill_tokens": 0, "preempted": 0}
    most_left, slot_steps, most_columns = ledger.most_left(), 0, 0
    column_bytes = count_column_bytes(model)
    while order:
        columns = len(prompts[order[0]]) + most_left - 1
        rows = max(1, int(max_bytes // (columns * column_bytes)))
        chosen, order = order[: max(1, rows // num_generations)], order[max(1, rows // num_generations) :]
        for generations in torch.arange(num_generations).split(min(rows, num_generations)):
            requests = (torch.tensor(chosen)[:, None] * num_generations + generations).flatten().to(model.device)
            batch = StaticBatch(model, [prompts[index] for index in chosen], len(generations), ledger)
            stats["decode_steps"] += batch.run(requests)
            slot_steps += batch.slot_steps
            most_columns = max(most_columns, batch.most_columns)
            stats["slots"] = max(stats["slots"], len(requests))
            stats["prefill_tokens"] += sum(len(prompts[index]) for index in chosen)
    tokens = ledger.num_drawn()
    occupancy = (tokens - len(prompts) * num_generations) / slot_steps if slot_steps else 1.0
    return {**stats, "tokens": tokens, "occupancy": occupancy, "cache_gb": most_columns * column_bytes / 1e9}


def count_column_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the keys and values of one token."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return sum(each.numel() * each.element_size() for layer in layers for each in (layer.keys, layer.values))


class StaticBatch:
    """Rows that start together. Each prompt is computed once and its cache repeated; finished rows are dropped 16 at a
    time.

    Args:
        model: a causal language model with a ``DynamicCache`` and a forward that takes ``position_ids``.
        prompts: P prompts.
        num_generations: rows per prompt.
        ledger: draws and records tokens.

    Attributes:
        slot_steps: rows that decode steps computed.
        most_columns: most columns of all rows together.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger) -> None:
        self.model, self.ledger = model, ledger
        self.slot_steps = self.most_columns = 0
        self.cache = DynamicCache(config=model.config)
        ids, mask = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left").to(model.device)
            for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
        )
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(num_generations)
        self.logits, self.mask = (x.repeat_interleave(num_generations, 0) for x in (logits, mask))  # [N, V], [N, T]

    def run(self, requests: Tensor) -> int:
        """Finish ``requests`` int [N], one per row, and return the number of decode steps."""
        steps = 0
        while True:
            tokens, finished = self.ledger.draw(self.logits, requests)
            requests = requests.masked_fill(finished, self.ledger.idle)
            busy = int((requests != self.ledger.idle).sum())
            if not busy:
                return steps
            size = -(-busy // ROW_STEP) * ROW_STEP
            if size < len(requests):
                keep = (requests == self.ledger.idle).sort(stable=True).indices[:size]
                self.cache.batch_select_indices(keep)
                requests, tokens, self.mask = requests[keep], tokens[keep], self.mask[keep]
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            self.logits = self._forward(tokens[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1)
            steps += 1
            self.slot_steps += len(requests)
            self.most_columns = max(self.most_columns, self.mask.numel())

    def _forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """Return the logits [N, V] of the last column."""
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
