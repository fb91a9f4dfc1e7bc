"""Continuous batching: each prompt is computed once, and a waiting request starts whenever a slot is free."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from modules.rollout.decode import DecodeStep, SlotCache
from modules.rollout.ledger import Ledger

PREFILL_TOKENS = 2048  # padded prompt tokens of one forward
DRAW_ROWS = 256  # first tokens are drawn from this many rows of logits at a time
ROW_STEP = 16  # batches shrink in steps of this many rows: on CPU 2 rows cost as much as 12


@dataclass(frozen=True)
class Waiting:
    """K requests whose prompt is computed and whose first token is drawn, and which wait for a slot."""

    cache: SlotCache  # keys and values of the prompts of one forward
    rows: Tensor  # int [K], row of each request's prompt in ``cache``
    requests: Tensor  # int [K], numbers of the requests
    tokens: Tensor  # int [K], first token of each request
    positions: Tensor  # int [K], the cache column that this token goes to

    def split(self, size: int) -> tuple["Waiting", "Waiting"]:
        """Return the first ``size`` requests and the others."""
        fields = (self.rows, self.requests, self.tokens, self.positions)
        return Waiting(self.cache, *(field[:size] for field in fields)), Waiting(
            self.cache, *(field[size:] for field in fields)
        )


class ContinuousBatch:
    """Slots over one cache, filled from a queue of prompts until every request is finished. Long prompts come first.

    Args:
        model: a model that ``decode.supports`` accepts.
        prompts: token ids of each prompt; at least one prompt.
        num_generations: G; request r is generation r % G of prompt r // G.
        ledger: draws and records tokens.
        max_batch_tokens: bound on the cache columns of all slots together; there is always at least one slot. Prompts
            that are computed and wait for a slot take at most ``PREFILL_TOKENS`` columns more, or those of one longer
            prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        num_generations: int,
        ledger: Ledger,
        max_batch_tokens: int,
    ) -> None:
        self.model, self.prompts, self.num_generations, self.ledger = model, prompts, num_generations, ledger
        # Prompts are taken from the end, so the long ones come first.
        self.queue = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        # The last token is never fed back, so it needs no column.
        columns = len(prompts[self.queue[-1]]) + ledger.sampling.max_completion_length - 1
        slots = max(1, min(len(prompts) * num_generations, max_batch_tokens // columns))
        self.prefill_tokens = min(PREFILL_TOKENS, max_batch_tokens)
        self.cache = SlotCache.allocate(model, slots, columns)
        self.step = DecodeStep(model, columns)
        self.waiting: Waiting | None = None
        self.requests = torch.full((slots,), ledger.idle, device=model.device)
        self.tokens, self.positions = torch.zeros_like(self.requests), torch.zeros_like(self.requests)
        self.horizon = 0
        self.stats = {"decode_steps": 0, "slots": slots, "prefill_tokens": 0}

    def run(self) -> dict[str, int]:
        """Finish every request.

        Returns:
            ``decode_steps``, ``slots`` (of the largest batch) and ``prefill_tokens`` (prompt tokens computed).
        """
        busy = self._refill()
        while busy:
            logits = self.step(self.tokens, self.positions, self.cache, self.horizon)
            self.tokens, finished = self.ledger.draw(logits, self.requests)
            self.positions += 1  # a refill sets idle slots back to 0, so they never overtake the busy ones
            self.horizon += 1
            self.stats["decode_steps"] += 1
            if bool(finished.any()):
                self.requests[finished] = self.ledger.idle
                busy = self._refill()
        return self.stats

    def _refill(self) -> bool:
        """Give free slots to waiting requests, compute prompts as needed, and return whether any slot is busy."""
        free = (self.requests == self.ledger.idle).nonzero()[:, 0]
        while len(free) and (self.queue or self.waiting):
            admitted, rest = (self.waiting or self._prefill()).split(len(free))
            slots, free = free.split([len(admitted.rows), len(free) - len(admitted.rows)])
            self.cache.put(slots, admitted.cache, admitted.rows)
            self.requests[slots], self.tokens[slots], self.positions[slots] = (
                admitted.requests,
                admitted.tokens,
                admitted.positions,
            )
            self.waiting = rest if len(rest.rows) else None
        self.positions[free] = 0
        self.horizon = int(self.positions.max()) + 1
        busy = len(self.requests) - len(free)
        if busy and len(free):
            self._compact(free, busy)
        return busy > 0

    def _compact(self, free: Tensor, busy: int) -> None:
        """Move busy slots to the front and drop empty ones behind them, down to a multiple of 16 rows, or to a single
        row.
        """
        size = 1 if busy == 1 else min(len(self.requests), -(-busy // ROW_STEP) * ROW_STEP)
        movers = (self.requests[size:] != self.ledger.idle).nonzero()[:, 0] + size
        holes = free[: len(movers)]  # ascending, and at least as many below ``size`` as there are movers
        self.cache.put(holes, self.cache, movers)
        for field in (self.requests, self.tokens, self.positions):
            field[holes] = field[movers]
        self.requests, self.tokens, self.positions = self.requests[:size], self.tokens[:size], self.positions[:size]
        self.cache.shrink(size)

    def _prefill(self) -> Waiting:
        """Compute the next prompts of the queue and draw first tokens for all their requests; keep those that go on."""
        chosen = [self.queue.pop()]
        limit = self.prefill_tokens // len(self.prompts[chosen[0]])
        while self.queue and len(chosen) < limit:
            chosen.append(self.queue.pop())
        device = self.model.device
        lengths = torch.tensor([len(self.prompts[index]) for index in chosen], device=device)
        self.stats["prefill_tokens"] += int(lengths.sum())
        logits, cache = compute_prompts(self.model, [self.prompts[index] for index in chosen], lengths)
        rows = torch.arange(len(chosen), device=device).repeat_interleave(self.num_generations)
        generations = torch.arange(self.num_generations, device=device).repeat(len(chosen))
        requests = torch.tensor(chosen, device=device)[rows] * self.num_generations + generations
        drawn = [
            self.ledger.draw(logits[r], q)
            for r, q in zip(rows.split(DRAW_ROWS), requests.split(DRAW_ROWS), strict=True)
        ]
        tokens, finished = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        going = ~finished
        return Waiting(cache, rows[going], requests[going], tokens[going], lengths[rows][going])


def compute_prompts(model: PreTrainedModel, prompts: list[list[int]], lengths: Tensor) -> tuple[Tensor, SlotCache]:
    """Return the logits [P, V] after each prompt, and the keys and values of the P prompts.

    Columns of the cache behind a prompt's entry in ``lengths`` [P] hold garbage.
    """
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    # A causal model never looks at padding on the right, so no attention mask is needed.
    output = model.model(input_ids=ids, use_cache=True)
    last = output.last_hidden_state[torch.arange(len(prompts), device=ids.device), lengths - 1]
    layers = output.past_key_values.layers
    return model.lm_head(last), SlotCache([layer.keys for layer in layers], [layer.values for layer in layers])
