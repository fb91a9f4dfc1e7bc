"""The plan of an epoch: which rows make one optimiser step, and which micro-batch and rank computes each."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import DistributedSampler


class MicroBatch(NamedTuple):
    """What one rank computes in one ``training_step``."""

    indices: tuple[int, ...]  # rows, at least one
    denominator: int  # supervised tokens of the whole optimiser step, all micro-batches and ranks
    counts: bool = True  # False: a filler for a rank without a row, to be computed with an all-False loss mask
    step: tuple["MicroBatch", ...] = ()  # in the first micro-batch of a step: all those of this rank in the step


class StepSampler(DistributedSampler[MicroBatch]):
    """Yields this rank's micro-batches of the current epoch.

    The rows are put in ``order``, permuted by (``seed``, epoch), and cut into windows of ``batch_size * accumulate *
    num_replicas`` rows, one optimiser step each, so the rows of a step and its denominator depend on that product
    alone. Inside a window the rows are ordered by
    length: a micro-batch holds rows of like length and ranks get like numbers of tokens. The last window keeps its
    fewer rows, in fewer micro-batches, as many on every rank. It derives from DistributedSampler so that Lightning puts
    no sampler around it.

    Args:
        lengths: tokens of each row.
        weights: what each row adds to the denominator, such as its supervised tokens.
        batch_size: rows per micro-batch and rank, at most.
        accumulate: micro-batches per optimiser step.
        current_epoch: asked when iteration starts. (``set_epoch`` runs one ahead when an epoch-end checkpoint is
            resumed under max_steps.)
        shuffle: False keeps the order of the rows between windows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[int],
        batch_size: int,
        accumulate: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        current_epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.weights = weights
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.current_epoch = current_epoch
        self.begun = (-1, 0)  # epoch, micro-batches handed out in it
        self._start = (-1, 0)

    def start_at(self, epoch: int, position: int) -> None:
        """Make ``epoch`` begin at micro-batch ``position``, or before it at the start of its optimiser step; other
        epochs begin at 0.

        Gradients of half a step are in no checkpoint, so its first micro-batches are computed again.
        """
        self._start = (epoch, position if position == len(self) else position - position % self.accumulate)

    @property
    def rows_per_step(self) -> int:
        """Rows of a whole optimiser step, all micro-batches and ranks."""
        return self.batch_size * self.accumulate * self.num_replicas

    @property
    def num_rows(self) -> int:
        """Rows that an epoch goes through."""
        return len(self.lengths)

    def order(self, epoch: int) -> list[int]:
        """Return the ``num_rows`` rows of an epoch, in the order in which steps take them."""
        order = list(range(self.num_rows))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def start(self, epoch: int) -> int:
        """Return the micro-batch at which ``epoch`` begins: 0, unless a checkpoint is resumed inside it."""
        return self._start[1] if self._start[0] == epoch else 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, the same on every rank."""
        whole, rest = divmod(self.num_rows, self.rows_per_step)
        return whole * self.accumulate + -(-rest // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch = self.current_epoch()
        start = self.start(epoch)
        self.begun = (epoch, start)
        for position, batch in enumerate(self.plan(epoch)):
            if position >= start:
                self.begun = (epoch, position + 1)  # before the yield: nobody resumes a generator behind its last item
                yield batch

    def plan(self, epoch: int) -> list[MicroBatch]:
        """Plan all micro-batches of this rank in ``epoch``."""
        order, size = self.order(epoch), self.rows_per_step
        return [batch for start in range(0, len(order), size) for batch in self._window(order[start : start + size])]

    def _window(self, rows: list[int]) -> Iterator[MicroBatch]:
        rows = sorted(rows, key=lambda row: -self.lengths[row])
        denominator = sum(self.weights[row] for row in rows)
        parts = -(-len(rows) // (self.batch_size * self.num_replicas))
        step = []
        for part in range(parts):
            dealt = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
            mine = tuple(row for place, row in enumerate(dealt) if self._owner(place) == self.rank)
            step.append(MicroBatch(mine, denominator) if mine else MicroBatch((dealt[-1],), denominator, counts=False))
        yield step[0]._replace(step=tuple(step))
        yield from step[1:]

    def _owner(self, place: int) -> int:
        """Deal rows to ranks in the order 0 .. last, last .. 0, so that no rank always gets the longer row."""
        turn, seat = divmod(place, self.num_replicas)
        return seat if turn % 2 == 0 else self.num_replicas - 1 - seat
