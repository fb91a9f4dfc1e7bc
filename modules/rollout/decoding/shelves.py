"""The memory of continuous batching: caches for rows of similar length, within a bound in bytes.

A row takes as many columns as its length needs, in steps, and not as many as its longest completion would need.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modules.rollout.decoding.decode import ROW_STEP, SlotCache

BLOCK = 64  # columns of the shortest shelf
SPARE = 8  # free slots of a new shelf for grown rows, if other rows may need them
TRIM = 1 / 8  # share of the bound that free slots take before they are given back for a new row


@dataclass(eq=False)
class BusyRow:
    """A request that is being sampled."""

    request: int
    start: int  # the column of its first token here
    position: int  # the column that its next token goes to
    place: int  # where it stands in the vectors of the batch
    age: int = 0  # order of admission


@dataclass(eq=False)
class Shelf:
    """A cache and the rows in its first slots."""

    cache: SlotCache
    rows: list[BusyRow]

    @property
    def free(self) -> int:
        return self.cache.slots - len(self.rows)

    def keep(self, chosen: Collection[BusyRow]) -> None:
        """Keep the chosen rows only; the last of them take the slots of others."""
        kept = [slot for slot, row in enumerate(self.rows) if row in chosen]
        holes = sorted(set(range(len(kept))).difference(kept))
        if holes:
            movers = kept[-len(holes) :]
            device = self.cache.keys[0].device
            self.cache.put(torch.tensor(holes, device=device), self.cache, torch.tensor(movers, device=device))
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[len(kept) :]


class Shelves:
    """Caches of all rows that are being sampled.

    Args:
        model: whose keys and values are kept.
        columns: columns that the longest row can need.
        max_bytes: bound on the caches; a single row may exceed it.
        steps: columns that a row must have free.
        whole: whether free slots are computed too, so that shapes change seldom.

    Attributes:
        shelves: the caches.
        beside: bytes that count in addition to those of the shelves.
        peak: most bytes so far.
    """

    def __init__(self, model: PreTrainedModel, columns: int, max_bytes: float, steps: int, whole: bool) -> None:
        self.model, self.columns, self.max_bytes, self.steps, self.whole = model, columns, max_bytes, steps, whole
        self.column_bytes = SlotCache.allocate(model, 1, 1).num_bytes
        self.shelves: list[Shelf] = []
        self.beside = self.peak = 0

    @property
    def rows(self) -> list[BusyRow]:
        return [row for shelf in self.shelves for row in shelf.rows]

    def columns_for(self, position: int) -> int:
        """Return the columns of the shelf for a row whose next token goes to ``position``: 64, 128, 192, 256, 384, ..."""
        needed, size = min(position + self.steps, self.columns), BLOCK
        while size < needed:
            size += max(BLOCK, 1 << (size.bit_length() - 2))
        return self.columns if 2 * size >= self.columns else size

    def num_bytes(self) -> int:
        """Return the bytes that count now."""
        return self.beside + sum(shelf.cache.slots * shelf.cache.columns for shelf in self.shelves) * self.column_bytes

    def note(self) -> None:
        """Remember the bytes if they are the most so far."""
        self.peak = max(self.peak, self.num_bytes())

    def find_room(self, positions: Sequence[int], position: int) -> int:
        """Return how many rows at ``position`` have room beside one row at each of ``positions``, >= 0."""
        taken = sum(map(self.columns_for, positions)) * self.column_bytes
        left = self.max_bytes - self.beside - taken
        return max(0, int(left // (self.columns_for(position) * self.column_bytes)))

    def place(self, rows: Sequence[BusyRow], source: SlotCache, origins: Sequence[int], spare: int = 0) -> int:
        """Copy rows into shelves, in order, as long as there is room. Without any other row there is room for one.

        Args:
            rows: the rows to place.
            source: their keys and values.
            origins: the slot of each row in ``source``.
            spare: slots that a new shelf should have besides those of the rows.

        Returns:
            how many rows have a place now.
        """
        targets: dict[Shelf, list[int]] = {}
        for number, row in enumerate(rows):
            shelf = self._find(self.columns_for(row.position), len(rows) - number, spare)
            if shelf is None:
                break
            targets.setdefault(shelf, []).append(number)
            shelf.rows.append(row)
        for shelf, numbers in targets.items():
            del shelf.rows[-len(numbers) :]
            self._put(shelf, [rows[number] for number in numbers], source, [origins[number] for number in numbers])
        return sum(map(len, targets.values()))

    def _put(self, shelf: Shelf, rows: Sequence[BusyRow], source: SlotCache, origins: Sequence[int]) -> None:
        """Copy rows into the next free slots of a shelf."""
        slots = torch.arange(len(shelf.rows), len(shelf.rows) + len(rows), device=self.model.device)
        shelf.cache.put(slots, source, torch.tensor(origins, device=self.model.device))
        shelf.rows += rows

    def drop(self, gone: Collection[BusyRow]) -> None:
        """Forget rows, and give back what they took where it is much."""
        for shelf in self.shelves:
            shelf.keep(set(shelf.rows).difference(gone))
        for small in sorted(self.shelves, key=lambda each: len(each.rows)):
            alike = [s for s in self.shelves if s is not small and s.cache.columns == small.cache.columns]
            other = next((shelf for shelf in alike if shelf.free >= len(small.rows)), None)
            if small.rows and other is not None:
                self._put(other, small.rows, small.cache, range(len(small.rows)))
                small.rows = []
            if not small.rows:
                self.shelves.remove(small)
            elif self._rounded(len(small.rows)) <= small.cache.slots // 2:
                small.cache.resize(self._rounded(len(small.rows)), small.cache.columns)

    def widen(self) -> list[BusyRow]:
        """Give every row the columns that it needs, and return the youngest rows if these have to go to make room."""
        evicted: list[BusyRow] = []
        for shelf in sorted(self.shelves, key=lambda each: each.cache.columns):
            while shelf in self.shelves:
                late = [row for row in shelf.rows if self.columns_for(row.position) > shelf.cache.columns]
                if not late or self._widen_shelf(shelf, late):
                    break
                youngest = max(self.rows, key=lambda row: row.age)
                evicted.append(youngest)
                self.drop([youngest])
        return evicted

    def _widen_shelf(self, shelf: Shelf, late: list[BusyRow]) -> bool:
        """Give the late rows of a shelf more columns, with the whole shelf if they are its most; False = no room."""
        if 2 * len(late) >= len(shelf.rows):
            columns = max(self.columns_for(row.position) for row in late)
            for slots in (self._rounded(len(shelf.rows)), len(shelf.rows)):
                more = (slots * columns - shelf.cache.slots * shelf.cache.columns) * self.column_bytes
                if self._reclaim(more, shelf) or len(self.rows) == 1:
                    shelf.cache.resize(slots, columns)
                    self.note()
                    return True
            return False
        behind = sum(len(each.rows) for each in self.shelves if each.cache.columns <= shelf.cache.columns) - len(late)
        placed = self.place(late, shelf.cache, [shelf.rows.index(row) for row in late], min(SPARE, behind))
        shelf.keep(set(shelf.rows).difference(late[:placed]))
        return placed == len(late)

    def _find(self, columns: int, wanted: int, spare: int) -> Shelf | None:
        """Return a shelf with that many columns and a free slot, or make one."""
        fitting = [shelf for shelf in self.shelves if shelf.free and shelf.cache.columns >= columns]
        if fitting:
            return min(fitting, key=lambda each: each.cache.columns)
        size = columns * self.column_bytes
        if not self._reclaim(size):
            if self.rows:
                return None
            wanted = spare = 0
        slots = max(1, min(self._rounded(wanted + spare), int((self.max_bytes - self.num_bytes()) // size)))
        shelf = Shelf(SlotCache.allocate(self.model, slots, columns), [])
        self.shelves.append(shelf)
        self.note()
        return shelf

    def _reclaim(self, more: int, beside: Shelf | None = None) -> bool:
        """Return whether there is room for ``more`` bytes, after free slots of other shelves are given back if needed."""
        over = self.num_bytes() + more - self.max_bytes
        if over <= 0:
            return True
        others = [shelf for shelf in self.shelves if shelf is not beside and shelf.free]
        slack = sum(shelf.free * shelf.cache.columns for shelf in others) * self.column_bytes
        if slack < over:
            return False
        for shelf in others:
            shelf.cache.resize(len(shelf.rows), shelf.cache.columns)
        return True

    def _rounded(self, rows: int) -> int:
        return -(-rows // ROW_STEP) * ROW_STEP if self.whole else rows
