"""Samples from any causal language model through its Hugging Face forward, in static batches padded on the left."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from modules.rollout.sampling import Ledger

ROW_STEP = 16  # batches shrink in steps of this many rows


def run_static(
    model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger, max_batch_tokens: int
) -> dict[str, int]:
    """Finish every request, one batch after the other; arguments and result are those of ``ContinuousBatch``.

    A prompt is computed once for each batch that holds some of its requests. That is once in all if its G rows fit into
    ``max_batch_tokens``.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    stats = {"decode_steps": 0, "slots": 0, "prefill_tokens": 0}
    most_left = ledger.most_left()
    while order:
        columns = len(prompts[order[0]]) + most_left - 1
        rows = max(1, max_batch_tokens // columns)
        chosen, order = order[: max(1, rows // num_generations)], order[max(1, rows // num_generations) :]
        for generations in torch.arange(num_generations).split(min(rows, num_generations)):
            requests = (torch.tensor(chosen)[:, None] * num_generations + generations).flatten().to(model.device)
            stats["decode_steps"] += StaticBatch(
                model, [prompts[index] for index in chosen], len(generations), ledger
            ).run(requests)
            stats["slots"] = max(stats["slots"], len(requests))
            stats["prefill_tokens"] += sum(len(prompts[index]) for index in chosen)
    return stats


class StaticBatch:
    """Rows that start together. Each prompt is computed once and its cache repeated; finished rows are dropped 16 at a
    time.

    Args:
        model: a causal language model with a ``DynamicCache`` and a forward that takes ``position_ids``.
        prompts: P prompts.
        num_generations: rows per prompt.
        ledger: draws and records tokens.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger) -> None:
        self.model, self.ledger = model, ledger
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
