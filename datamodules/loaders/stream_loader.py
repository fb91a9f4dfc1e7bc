"""How streamed rows become the micro-batches of a rank: workers with a share and a place each, and a sized loader that
resumes exactly.
"""

from collections.abc import Iterator
from copy import copy
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.formats.reading import UnclearColumn
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.sources import Row
from datamodules.tokens.encoding import Tokens
from datamodules.tokens.packing import pack
from modules.trainer.ranks import from_all_ranks
from modules.types import InstructionBatch


class Place(NamedTuple):
    """How far one worker has come: all that resuming needs."""

    rows: int = 0  # rows read and used up, over all passes
    pieces: int = 0  # pieces of the next row that are used already
    dropped: int = 0
    bad: int = 0


class Pieces(IterableDataset[Any]):
    """The micro-batches that one rank reads, without denominator, each with its worker and the place behind.

    Each worker has its own share of the rows.

    Args:
        data: how rows are read and encoded.
        rank: this process.
        world_size: processes.
        places: of each worker, where to begin.
        turn: the worker whose micro-batch is due first; those before it begin with None, since a DataLoader asks worker
            0 first.
    """

    def __init__(
        self, data: Any, rank: int, world_size: int, places: dict[int, Place] | None = None, turn: int = 0
    ) -> None:
        self.data = copy(data)
        self.data.trainer = self.data._loader = None  # neither goes to another process
        self.rank, self.world_size, self.places, self.turn = rank, world_size, places or {}, turn

    def __iter__(self) -> Iterator[tuple[InstructionBatch, int, Place] | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if worker < self.turn:
            yield None
        for rows, place in self.batches(
            self.places.get(worker, Place()), self.rank * workers + worker, self.world_size * workers
        ):
            dataset = self.data.make_dataset(rows)
            yield dataset[MicroBatch(tuple(range(len(rows))), 0)], worker, place

    def batches(self, place: Place, share: int, shares: int) -> Iterator[tuple[list[Tokens], Place]]:
        """Give the rows of each micro-batch, and the place behind them."""
        rows: list[Tokens] = []
        filling: list[Tokens] = []  # a packed row with room
        for piece, behind in self.pieces(place, share, shares):
            if not self.data.packing:
                rows.append(piece)
            elif sum(len(part.ids) for part in filling) + len(piece.ids) <= self.data.max_length:
                filling.append(piece)
            else:
                rows += pack(filling, self.data.max_length)
                filling = [piece]
            if len(rows) == self.data.batch_size:
                yield rows, place if self.data.packing else behind
                rows = []
            place = behind

    def pieces(self, place: Place, share: int, shares: int) -> Iterator[tuple[Tokens, Place]]:
        """Encode the rows from a place on, and give the pieces of each with the place behind them."""
        start, used = place.rows, place.pieces
        fruitful = None  # the last pass that gave something
        for number, epoch, row in self.numbered(share, shares, start):
            fruitful = epoch if fruitful is None else fruitful
            if epoch > fruitful + 1:
                raise ValueError(
                    f"{self.data.train}: none of the rows of share {share} is left: {place.bad} bad, {place.dropped} "
                    "too long"
                )
            try:
                tokens = self.data.encode_record(row)
            except ValueError as error:
                if self.data.on_bad_row == "raise" or isinstance(error, UnclearColumn):
                    raise self.data.name_place(error, row) from error
                if place.bad == share == 0:
                    rank_zero_info(f"train: bad rows are left out, the first: {self.data.name_place(error, row)}")
                place = place._replace(bad=place.bad + 1)
                continue
            cut = self.data.cut(tokens) if tokens else []
            place = place._replace(dropped=place.dropped + (not cut))
            for index, piece in enumerate(cut, start=1):
                fruitful = epoch
                if number > start or index > used:
                    place = place._replace(rows=number + (index == len(cut)), pieces=index % len(cut))
                    yield piece, place

    def numbered(self, share: int, shares: int, start: int = 0) -> Iterator[tuple[int, int, Row]]:
        """Read this share of the rows over and over, each with its number and that of the pass.

        A share is whole files where there are enough, else every so many-th row; it begins at number ``start``.
        """
        stream = self.data.opened()
        by_file = stream.num_shards >= shares
        stream = (stream.shard(shares, share, contiguous=False) if by_file else stream).shuffle(
            seed=self.data.seed, buffer_size=self.data.shuffle_buffer
        )
        number = 0
        for epoch in count():
            begun = number
            stream.set_epoch(epoch)
            for index, record in enumerate(
                self.records(stream)
            ):  # iterating the stream itself would share it among workers once more
                if by_file or index % shares == share:
                    if number >= start:
                        origin = f"{self.data.train}, row {index} of share {share} in pass {epoch}"
                        yield (
                            number,
                            epoch,
                            Row({name: value[0] for name, value in record.items()}, origin, str(self.data.train)),
                        )
                    number += 1
            if number == begun:
                raise ValueError(f"{self.data.train}: fewer rows than the {shares} ranks and workers that share them")

    def records(self, stream: Any) -> Iterator[dict[str, list[Any]]]:
        """Give the records of a pass, each in lists of one. Raises ValueError for text that is not UTF-8."""
        try:
            yield from stream.iter(1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.data.train}: not UTF-8 text ({error}); save the file as UTF-8") from error


class StreamLoader:
    """The sized training loader over :class:`Pieces`: an epoch is a fixed number of optimiser steps of the endless
    stream.

    It reads the micro-batches of a whole step before it gives the first, so that their denominator counts the step on
    all ranks.
    """

    def __init__(self, data: Any, trainer: Trainer, before: "StreamLoader | None" = None) -> None:
        self.data, self.trainer = data, trainer
        self.epoch, self.handed_out = -1, 0  # micro-batches of the epoch
        self.places: dict[int, Place] = dict(before.places) if before else {}
        self.read: int = before.read if before else 0  # micro-batches read so far
        self.marks: dict[int, tuple[dict[int, Place], int]] = {}  # of the step underway: handed out -> places, read
        self._told: int = before._told if before else 0  # rows
        self._resume: tuple[int, int] | None = None
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.data.steps_per_epoch * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[InstructionBatch]:
        accumulate = self.trainer.accumulate_grad_batches
        self.epoch, self.handed_out = self.trainer.current_epoch, 0
        if self._resume is not None and self._resume[0] == self.epoch:
            self.handed_out = self._resume[1]
        self._resume = None
        self.marks = {self.handed_out: (dict(self.places), self.read)}
        while self.handed_out < len(self):
            window = [self._next() for _ in range(accumulate)]
            supervised = sum(from_all_ranks([sum(int(batch["loss_mask"].sum()) for batch in window)]))
            begun = self.handed_out
            self.marks = {begun: self.marks[begun], begun + accumulate: (dict(self.places), self.read)}
            for batch in window:
                self.handed_out += 1
                yield {**batch, "denominator": torch.tensor(float(supervised))}  # type: ignore[typeddict-item]
        self.tell_rows()

    def tell_rows(self) -> None:
        """Print what has become of this process's rows so far, unless that was printed before."""
        rows, dropped, bad = (
            sum(getattr(place, name) for place in self.places.values()) for name in ("rows", "dropped", "bad")
        )
        if rows > self._told:
            rank_zero_info(
                f"train: {rows} rows streamed so far by this process = {rows - dropped - bad} used + {dropped} too "
                f"long + {bad} bad"
            )
        self._told = rows

    def snapshot(self) -> dict[str, Any]:
        """Return where this rank is, at the last whole step that was trained on: lists and ints."""
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        trained = self.handed_out - (current.ready - current.processed)  # type: ignore[attr-defined]
        whole = max((mark for mark in self.marks if mark <= trained), default=0)
        places, read = self.marks.get(whole, (self.places, self.read))
        return {
            "epoch": self.epoch,
            "position": whole,
            "read": read,
            "places": {worker: list(place) for worker, place in places.items()},
            "workers": self.data.num_workers,
            "accumulate": self.trainer.accumulate_grad_batches,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the DataModule keeps the state. Lightning takes a loader for one that resumes by this
        method.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def restore(self, ranks: list[dict[str, Any]]) -> None:
        """Go on at a snapshot. Raises ValueError if the number of ranks, of workers or, inside an epoch, of
        micro-batches in a step has changed.
        """
        mine = {"ranks": len(ranks), **{name: ranks[0][name] for name in ("workers", "accumulate")}}
        now = {
            "ranks": self.data.world_size,
            "workers": self.data.num_workers,
            "accumulate": self.trainer.accumulate_grad_batches,
        }
        if not 0 < ranks[0]["position"] < len(self):
            mine["accumulate"] = now["accumulate"]
        if mine != now:
            were, are = (", ".join(f"{value} {name}" for name, value in values.items()) for values in (mine, now))
            raise ValueError(
                f"the checkpoint's stream was read with {were} and this run has {are}: resume with the same"
            )
        state = ranks[self.data.rank]
        self.places = {worker: Place(*place) for worker, place in state["places"].items()}
        self.read, self._resume, self._stream = state["read"], (state["epoch"], state["position"]), None

    def _next(self) -> InstructionBatch:
        if self._stream is None:
            workers = self.data.num_workers
            pieces = Pieces(
                self.data, self.data.rank, self.data.world_size, dict(self.places), self.read % max(1, workers)
            )
            self._stream = iter(DataLoader(pieces, batch_size=None, num_workers=workers))
        item = next(self._stream)
        while item is None:
            item = next(self._stream)
        batch, worker, place = item
        self.places[worker] = Place(*place)
        self.read += 1
        self.data.dropped["train"] = sum(place.dropped for place in self.places.values())
        self.data.bad["train"] = sum(place.bad for place in self.places.values())
        return batch
