"""Continuous batching: a waiting request starts as soon as there is room in the cache.

As many rows run as fit into memory by what they use now. When they outgrow the bound, the youngest rows go back to the
queue; they are computed again later, with the tokens that they have.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from modules.rollout.decoding.decode import ROW_STEP, CachedRows, DecodeStep, SlotCache, layer_dtype
from modules.rollout.decoding.decode_products import DecodeProducts
from modules.rollout.decoding.shelves import BLOCK, BusyRow, Shelves
from modules.rollout.sampling import Ledger

PREFILL_TOKENS = 2048  # padded prompt tokens of one forward
DRAW_ROWS = 256  # most rows of logits that tokens are drawn from at a time
DRAW_LOGITS = 2**20  # on a CPU also about so many logits: 4 MB stay in its cache and need no fresh memory
LEAST_ROWS = 4  # fewest rows of packed products: fewer would take longer
MAX_ROWS = 1024  # most rows of a batch: more make a step longer and bring nothing
ACCELERATOR_STEPS = 16  # decode steps between two looks at what has finished, on a device that waits for each look


@torch.inference_mode()
def run_continuous(
    model: PreTrainedModel,
    prompts: list[list[int]],
    num_generations: int,
    ledger: Ledger,
    max_bytes: float,
    products: DecodeProducts | None = None,
    check_every: int | None = None,
    compiled: bool = False,
) -> dict[str, float]:
    """Finish every request with ``ContinuousBatch``.

    Inference mode is safe here, because the supported models keep nothing between forwards.
    """
    return ContinuousBatch(model, prompts, num_generations, ledger, max_bytes, products, check_every, compiled).run()


@dataclass(frozen=True)
class Job:
    """Tokens to compute, and the requests that go on from them."""

    ids: list[int]
    requests: list[int]


@dataclass(frozen=True)
class Waiting:
    """Requests whose prompt is computed and whose next token is drawn, and which wait for room."""

    cache: SlotCache  # keys and values of the prompts of one forward
    origins: list[int]  # slot of each request's prompt in ``cache``
    requests: list[int]
    tokens: Tensor  # int [K], next token of each request
    positions: list[int]  # the cache column that this token goes to

    def behind(self, size: int) -> "Waiting | None":
        """Return what is left without the first ``size`` requests; None = nothing."""
        if size == len(self.requests):
            return None
        return Waiting(self.cache, self.origins[size:], self.requests[size:], self.tokens[size:], self.positions[size:])


class ContinuousBatch:
    """Rows over shelves, filled from a queue of prompts until every request is finished. Long prompts come first.

    Args:
        model: a model that ``decode.supports`` accepts.
        prompts: token ids of each prompt; at least one prompt.
        num_generations: G; request r is generation r % G of prompt r // G.
        ledger: draws and records tokens.
        max_bytes: bound on keys and values; there is always at least one row. Prompts that are computed and wait for
            room count, up to the ``PREFILL_TOKENS`` columns of one forward or those of one longer prompt.
        products: of the model; None = those of its modules.
        check_every: >= 1, decode steps between two looks at what has finished; None = 1 on CPU, else 16.
        compiled: whether ``torch.compile`` makes the decode step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        num_generations: int,
        ledger: Ledger,
        max_bytes: float,
        products: DecodeProducts | None = None,
        check_every: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.prompts, self.num_generations, self.ledger = model, prompts, num_generations, ledger
        self.compiled = compiled
        steps = check_every or (1 if model.device.type == "cpu" else ACCELERATOR_STEPS)
        self.steps = 1 if ledger.reads_each_token else steps
        # Jobs are taken from the end, so the long ones come first.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self.queue = [
            Job(prompts[index], list(range(index * num_generations, (index + 1) * num_generations))) for index in order
        ]
        # The last token is never fed back, so it needs no column.
        columns = len(self.queue[-1].ids) + ledger.most_left() - 1
        self.shelves = Shelves(model, columns, max_bytes, self.steps, whole=compiled)
        self.prefill_tokens = min(PREFILL_TOKENS, int(max_bytes // self.shelves.column_bytes))
        self.step = DecodeStep(model, columns, products, compiled)
        self.draw_rows = count_draw_rows(model)
        self.waiting: Waiting | None = None
        self.tokens = self.requests = self.positions = torch.zeros(0, dtype=torch.long, device=model.device)
        self.parts: list[CachedRows] = []
        self.room = self.since = 0  # steps until a shelf is full; steps since rows were laid out
        self.admitted = self.ended = self.ended_tokens = 0  # requests so far, and tokens of those that have ended
        self.stats = dict.fromkeys(
            ("decode_steps", "slots", "prefill_tokens", "preempted", "slot_steps", "prefilled"), 0
        )

    def run(self) -> dict[str, float]:
        """Finish every request.

        Returns:
            the numbers that ``InProcessEngine.last_stats`` has.
        """
        self._refill()
        while self.parts:
            if self._decode(min(self.steps, self.room)) or not self.room:
                self._refill()
        stats, tokens = self.stats, self.ledger.num_drawn()
        slot_steps, prefilled = stats.pop("slot_steps"), stats.pop("prefilled")
        occupancy = (tokens - prefilled) / slot_steps if slot_steps else 1.0
        return {**stats, "tokens": tokens, "occupancy": occupancy, "cache_gb": self.shelves.peak / 1e9}

    def _decode(self, steps: int) -> bool:
        """Draw ``steps`` tokens for every row, and return whether rows have finished."""
        before, begun = self.requests, self.ledger.counts(self.requests)
        late = steps > 1 and bool(self.ledger.sampling.stop)
        for _ in range(steps):
            parts = self.parts
            if not self.compiled:
                parts = [part._replace(horizon=part.horizon + self.since) for part in parts]
            logits = self.step(self.tokens, self.positions, parts)
            drawn = [
                self.ledger.draw(rows, requests, late=late)
                for rows, requests in zip(
                    logits.split(self.draw_rows), self.requests.split(self.draw_rows), strict=True
                )
            ]
            self.tokens, finished = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*drawn, strict=True))
            self.requests = self.requests.masked_fill(finished, self.ledger.idle)
            self.positions += 1
            self.since += 1
        self.room -= steps
        self.stats["decode_steps"] += steps
        self.stats["slot_steps"] += steps * len(self.tokens)
        if late:
            self.requests = self.requests.masked_fill(self.ledger.end_late(before, begun), self.ledger.idle)
        return bool((self.requests != before).any())

    def _refill(self) -> None:
        """Take finished rows out, give long rows more columns, and start waiting requests where there is room."""
        requests, rows = self.requests.tolist(), self.shelves.rows
        for row in rows:
            row.position += self.since
        gone = [row for row in rows if requests[row.place] == self.ledger.idle]
        if gone:
            self.ended += len(gone)
            self.ended_tokens += sum(row.position - row.start for row in gone)
            self.shelves.drop(gone)
        for row in sorted(self.shelves.widen(), key=lambda each: -each.age):
            ids = self.prompts[row.request // self.num_generations] + self.ledger.so_far(row.request)
            self.queue.append(Job(ids, [row.request]))
            self.stats["preempted"] += 1
        tokens = [self.tokens]
        while self.waiting is not None or self.queue:
            start = self.waiting.positions[0] if self.waiting is not None else len(self.queue[-1].ids)
            room = self._find_room(start)
            if not room:
                break
            if self.waiting is None:
                self._prefill(room)
                continue
            placed = self._admit(self.waiting, room, sum(map(len, tokens)))
            tokens.append(self.waiting.tokens[:placed])
            self._hold(self.waiting.behind(placed))
            if not placed:
                break
        self._lay_out(torch.cat(tokens))

    def _find_room(self, start: int) -> int:
        """Return how many requests may begin at a column, if all reach the mean length of those that have ended."""
        rows, length = self.shelves.rows, self.ended_tokens // self.ended if self.ended else BLOCK
        later = [max(row.position, row.start + length) for row in rows]
        room = min(self.shelves.find_room(later, start + length), MAX_ROWS - len(rows))
        return room if rows else max(1, room)

    def _admit(self, waiting: Waiting, room: int, offset: int) -> int:
        """Place requests whose tokens follow ``offset`` others, and return how many have found a place."""
        positions = waiting.positions[:room]
        rows = [
            BusyRow(request, position, position, offset + number, self.admitted + number)
            for number, (request, position) in enumerate(zip(waiting.requests, positions, strict=False))
        ]
        self.admitted += len(rows)
        return self.shelves.place(rows, waiting.cache, waiting.origins[:room])

    def _hold(self, waiting: Waiting | None) -> None:
        """Keep requests until there is room for them."""
        self.waiting = waiting
        self.shelves.beside = waiting.cache.num_bytes if waiting is not None else 0
        self.shelves.note()

    def _lay_out(self, tokens: Tensor) -> None:
        """Put the rows in order of their shelves, and fill up to a size that is fast; ``tokens`` stand at their places."""
        places, requests, positions = [], [], []
        self.parts, self.room = [], self.shelves.columns
        for shelf in self.shelves.shelves:
            longest = max(row.position for row in shelf.rows)
            self.room = min(self.room, shelf.cache.columns - longest)
            free = shelf.free if self.compiled else 0
            places += [row.place for row in shelf.rows] + [0] * free
            requests += [row.request for row in shelf.rows] + [self.ledger.idle] * free
            positions += [row.position for row in shelf.rows] + [0] * free
            for place, row in enumerate(shelf.rows, len(places) - len(shelf.rows) - free):
                row.place = place
            horizon = shelf.cache.columns if self.compiled else longest + 1
            self.parts.append(CachedRows(shelf.cache, len(shelf.rows) + free, horizon))
        busy = len(self.shelves.rows)
        self.stats["slots"] = max(self.stats["slots"], busy)
        padding = max(0, self._find_size(busy) - len(places))
        vectors = ((places, 0), (requests, self.ledger.idle), (positions, 0))
        order, self.requests, self.positions = (
            torch.tensor(values + [filler] * padding, dtype=torch.long, device=self.model.device)
            for values, filler in vectors
        )
        self.tokens, self.since = tokens[order], 0

    def _find_size(self, busy: int) -> int:
        """Return how many rows to compute for those that are busy: at least as many as are fast, and compiled 1, 2, 4 or a
        multiple of 16.
        """
        if not self.compiled:
            return max(busy, LEAST_ROWS) if busy and self.step.products.packed else busy
        for size in (0, 1, 2, 4):
            if busy <= size:
                return size
        return min(max(busy, len(self.tokens)), -(-busy // ROW_STEP) * ROW_STEP)

    def _prefill(self, room: int) -> None:
        """Compute the next jobs of the queue, for about ``room`` requests; draw a token for each, and hold those that
        go on.
        """
        chosen = [self.queue.pop()]
        limit = self.prefill_tokens // len(chosen[0].ids)
        while self.queue and len(chosen) < limit and sum(len(job.requests) for job in chosen) < room:
            chosen.append(self.queue.pop())
        device = self.model.device
        lengths = torch.tensor([len(job.ids) for job in chosen], device=device)
        self.stats["prefill_tokens"] += sum(len(job.ids) for job in chosen)
        logits, cache = compute_prompts(self.model, [job.ids for job in chosen], lengths)
        origins = [number for number, job in enumerate(chosen) for _ in job.requests]
        requests = [request for job in chosen for request in job.requests]
        self.stats["prefilled"] += len(requests)
        drawn = [
            self.ledger.draw(logits[rows], numbers)
            for rows, numbers in zip(
                torch.tensor(origins, device=device).split(self.draw_rows),
                torch.tensor(requests, device=device).split(self.draw_rows),
                strict=True,
            )
        ]
        tokens, finished = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        going = (~finished).nonzero()[:, 0]
        kept = going.tolist()
        self.ended += len(requests) - len(kept)
        positions = [len(chosen[origins[each]].ids) for each in kept]
        waiting = Waiting(cache, [origins[i] for i in kept], [requests[i] for i in kept], tokens[going], positions)
        self._hold(waiting if kept else None)


def count_draw_rows(model: PreTrainedModel) -> int:
    """Return from how many rows of logits tokens are drawn at a time."""
    if model.device.type != "cpu":
        return DRAW_ROWS
    return min(DRAW_ROWS, max(1, DRAW_LOGITS // int(model.config.vocab_size)))


def compute_prompts(model: PreTrainedModel, prompts: list[list[int]], lengths: Tensor) -> tuple[Tensor, SlotCache]:
    """Return the logits [P, V] after each prompt, and the keys and values of the P prompts.

    Columns of the cache behind a prompt's entry in ``lengths`` [P] hold garbage.
    """
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    embedded = model.get_input_embeddings()(ids).to(model.lm_head.weight.dtype)
    dtype = layer_dtype(model)
    # A causal model never looks at padding on the right, so no attention mask is needed.
    with torch.autocast(model.device.type, dtype, enabled=dtype != embedded.dtype):
        output = model.model(inputs_embeds=embedded, use_cache=True)
    last = output.last_hidden_state[torch.arange(len(prompts), device=ids.device), lengths - 1]
    layers = output.past_key_values.layers
    keys, values = (
        [each.to(dtype) for each in kind] for kind in zip(*((la.keys, la.values) for la in layers), strict=True)
    )
    return model.lm_head(last), SlotCache(keys, values)
