"""Samples from any causal language model through its Hugging Face forward, in static batches padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from modules.rollout.decoding.continuous import Job
from modules.rollout.decoding.decode import ROW_STEP
from modules.rollout.decoding.shelves import BLOCK
from modules.rollout.sampling import Ledger

GROWTH = 1.25  # when rows outgrow the memory, as many stay as fit at this many times their columns


def run_static(
    model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger, max_bytes: float
) -> dict[str, float]:
    """Finish every request, one batch after the other; arguments and result are those of ``ContinuousBatch``.

    A batch has as many rows as fit if they get as long as those that have ended were on average. If they get longer, the
    last of them go back to the queue and are computed again later, with the tokens that they have. A prompt is computed
    once for each batch that holds some of its requests.
    """
    queue = [
        Job(prompt, list(range(index * num_generations, (index + 1) * num_generations)))
        for index, prompt in enumerate(prompts)
    ]
    stats = {"decode_steps": 0, "slots": 0, "prefill_tokens": 0, "preempted": 0}
    slot_steps = most_columns = prefilled = ended = 0
    column_bytes = count_column_bytes(model)
    capacity = int(max_bytes // column_bytes)
    while queue:
        queue.sort(key=lambda job: len(job.ids))
        length = min(ledger.most_left(), max(1, ledger.num_drawn() // ended) if ended else BLOCK)
        jobs = take_jobs(queue, max(1, capacity // (len(queue[-1].ids) + length - 1)))
        batch = StaticBatch(model, jobs, ledger, capacity)
        stats["decode_steps"] += batch.run()
        queue += [
            Job(prompts[request // num_generations] + ledger.so_far(request), [request]) for request in batch.left
        ]
        requests = sum(len(job.requests) for job in jobs)
        prefilled, ended = prefilled + requests, ended + requests - len(batch.left)
        slot_steps, most_columns = slot_steps + batch.slot_steps, max(most_columns, batch.most_columns)
        stats["slots"], stats["preempted"] = max(stats["slots"], requests), stats["preempted"] + len(batch.left)
        stats["prefill_tokens"] += sum(len(job.ids) for job in jobs)
    tokens = ledger.num_drawn()
    occupancy = (tokens - prefilled) / slot_steps if slot_steps else 1.0
    return {**stats, "tokens": tokens, "occupancy": occupancy, "cache_gb": most_columns * column_bytes / 1e9}


def take_jobs(queue: list[Job], room: int) -> list[Job]:
    """Take jobs for about ``room`` requests from the end of a queue, whole ones unless the first is larger."""
    jobs = [queue.pop()]
    if len(jobs[0].requests) > room:
        queue.append(Job(jobs[0].ids, jobs[0].requests[room:]))
        return [Job(jobs[0].ids, jobs[0].requests[:room])]
    room -= len(jobs[0].requests)
    while queue and len(queue[-1].requests) <= room:
        jobs.append(queue.pop())
        room -= len(jobs[-1].requests)
    return jobs


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
        jobs: prompts, and the requests that go on from each.
        ledger: draws and records tokens.
        capacity: columns of all rows together, which only a single row may exceed.

    Attributes:
        slot_steps: rows that decode steps computed.
        most_columns: most columns of all rows together.
        left: requests that had to go, and are not finished.
    """

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], ledger: Ledger, capacity: int) -> None:
        self.model, self.ledger, self.capacity = model, ledger, capacity
        self.slot_steps = self.most_columns = 0
        self.left: list[int] = []
        self.cache = DynamicCache(config=model.config)
        ids, mask = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left").to(model.device)
            for rows in ([job.ids for job in jobs], [[1] * len(job.ids) for job in jobs])
        )
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        origins, requests = zip(*((at, each) for at, job in enumerate(jobs) for each in job.requests), strict=True)
        rows, self.requests = torch.tensor([origins, requests], device=model.device)  # [N] each
        self.cache.batch_select_indices(rows)
        self.logits, self.mask = logits[rows], mask[rows]  # [N, V], [N, T]

    def run(self) -> int:
        """Finish the requests but those that have to go, and return the number of decode steps."""
        steps = 0
        while True:
            tokens, finished = self.ledger.draw(self.logits, self.requests)
            self.requests = self.requests.masked_fill(finished, self.ledger.idle)
            busy = int((self.requests != self.ledger.idle).sum())
            if not busy:
                return steps
            tokens = self._shrink(tokens, busy)
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            self.logits = self._forward(tokens[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1)
            steps += 1
            self.slot_steps += len(tokens)
            self.most_columns = max(self.most_columns, self.mask.numel())

    def _shrink(self, tokens: Tensor, busy: int) -> Tensor:
        """Keep the ``busy`` rows that fit, the first ones, and a few finished ones; return the ``tokens`` of those kept."""
        rows, columns = self.mask.shape
        fitting = self.capacity // (columns + 1)
        kept = busy if busy <= fitting else max(1, min(busy - 1, int(self.capacity // (columns * GROWTH))))
        size = min(rows, max(kept, min(-(-kept // ROW_STEP) * ROW_STEP, fitting)))
        if size < rows:
            order = (self.requests == self.ledger.idle).sort(stable=True).indices
            self.left += self.requests[order[kept:busy]].tolist()
            chosen = torch.cat([order[:kept], order[busy:]])[:size]
            self.cache.batch_select_indices(chosen)
            tokens, self.requests, self.mask = tokens[chosen], self.requests[chosen], self.mask[chosen]
        return tokens

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
