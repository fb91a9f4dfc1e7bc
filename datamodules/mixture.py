"""Several streams of rows in proportions that change in the decay phase (MiniCPM, arXiv 2404.06395 section 6; FLAN's
cap, 2109.01652).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import count
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.instruction import InstructionDataModule, count_sizes
from datamodules.loaders.mixture_streams import DecayPhase, Stream, check_streams
from datamodules.loaders.step_sampler import MicroBatch, StepSampler
from datamodules.pretraining import load_documents
from datamodules.sources import Source
from datamodules.tokens.encoding import LossOn, Tokens


class MixtureSampler(StepSampler):
    """A StepSampler over the rows that ``draw(first, last, rows_per_step)`` gives for the optimiser steps ``first`` to
    ``last - 1``.

    An epoch has ``num_steps`` steps and begins at the run's ``global_step``, so the rows of a step do not depend on how
    a run is cut into epochs.
    """

    def __init__(
        self,
        *args: Any,
        num_steps: int,
        draw: Callable[[int, int, int], list[int]],
        global_step: Callable[[], int],
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.num_steps, self.draw, self.global_step = num_steps, draw, global_step

    @property
    def num_rows(self) -> int:
        """Rows drawn in an epoch."""
        return self.num_steps * self.rows_per_step

    def order(self, epoch: int) -> list[int]:
        """Return the rows of the epoch's steps. In a resumed epoch, ``global_step`` already counts some of its own
        steps.
        """
        first = self.global_step() - self.start(epoch) // self.accumulate
        return self.draw(first, first + self.num_steps, self.rows_per_step)


class MixtureDataModule(InstructionDataModule):
    """Batches (``InstructionBatch``) of rows drawn from several streams by weight.

    Each row of a step is drawn from one stream, with probabilities that the step's number decides. A stream is read in
    shuffled passes, each row once a pass. The rows of a step depend only on ``seed``, the step's number and the rows
    per step, and the order inside a stream does not depend on other streams. So a stream of weight 0 changes nothing,
    and a checkpoint of the stable phase may be resumed with other decay weights, more streams or another ``num_steps``.
    Texts longer than a row are split, and longer instruction rows are dropped.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        streams: by name. Without any ``weight`` a stream of n rows (pieces, of long texts) has the share min(n, cap) of
            all (FLAN).
        num_steps: optimiser steps of one Trainer epoch. A run that resumes from the end of an epoch begins a new epoch
            of this many steps.
        weigh_by: what weights are shares of: ``tokens`` or ``examples``. Shares of tokens divided by the mean length
            make probabilities.
        cap: see ``streams``.
        decay: when the streams' ``decay_weight`` begins to hold; None = never.
        loss_on: what is learned of a conversation: ``all`` tokens, every ``assistant`` turn with its end of turn, or
            the ``last`` of them only.
        max_length: tokens of a row.
        drop_long: drop longer instruction rows and count them; False makes them an error.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``.
        packing: put several documents into one row, where they do not see each other.
        batch_size: rows per micro-batch and rank.
        chat, system, chat_template_kwargs: as in :class:`InstructionDataModule`.
        seed: of the draws and shuffles; None = the run's.
    """

    needs = ("streams", "num_steps")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        streams: dict[str, Stream] | None = None,
        num_steps: int | None = None,
        weigh_by: Literal["tokens", "examples"] = "tokens",
        cap: int | None = None,
        decay: DecayPhase | None = None,
        loss_on: LossOn = "all",
        max_length: int = 1024,
        drop_long: bool = True,
        on_bad_row: Literal["raise", "drop"] = "raise",
        packing: bool = True,
        batch_size: int = 8,
        chat: bool | None = None,
        system: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        self.check_needs({"streams": streams, "num_steps": num_steps})
        assert streams is not None and num_steps is not None
        check_streams(streams, num_steps, cap, decay)
        held_out = {name: stream.val for name, stream in streams.items() if stream.val is not None}
        super().__init__(
            tokenizer,
            next(iter(streams.values())).train,
            held_out or None,
            loss_on=loss_on,
            max_length=max_length,
            drop_long=drop_long,
            on_bad_row=on_bad_row,
            packing=packing,
            batch_size=batch_size,
            chat=chat,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
            seed=seed,
        )
        self.streams, self.num_steps, self.weigh_by, self.cap, self.decay = streams, num_steps, weigh_by, cap, decay
        self.stream_rows: dict[str, range] = {}  # the places of each stream's rows in ``train_rows``
        self.contents: dict[str, int] = {}  # of each stream, the checksum of its rows
        self._row_sizes: list[float] = []  # mean tokens or examples of a row of each stream
        self._shares: list[tuple[float, float]] = []  # of each stream before and after the switch

    def load_training(self) -> list[Tokens]:
        """Read the rows of all streams, one stream after the other."""
        rows: list[Tokens] = []
        for name, stream in self.streams.items():
            start = len(rows)
            rows += self.load(stream.train, "train", name)
            self.stream_rows[name] = range(start, len(rows))
        self._weigh(rows)
        first, decay = self.probabilities(0), self.decay
        for name, places in self.stream_rows.items():
            tokens = sum(len(rows[place].ids) for place in places)
            later = f", {self.probabilities(decay.end)[name]:.4f} from step {decay.end} on" if decay is not None else ""
            drawn = f"a row is drawn from it with probability {first[name]:.4f}{later}"
            rank_zero_info(
                f"stream {name}: {len(places)} rows, {tokens} tokens, {tokens / len(places):.1f} a row; {drawn}"
            )
        return rows

    def load(self, source: str | Source, stage: Literal["train", "val"], name: str) -> list[Tokens]:
        """Encode the rows of a source of the stream ``name``, with the stream's own settings."""
        stream, seen = self.streams[name], copy(self)
        seen.columns, seen.loss_on = stream.columns or {}, stream.loss_on or self.loss_on
        rows = load_documents(seen, source, stage, name)
        if stage == "train":
            self.contents[name] = seen.content
        return rows

    def probabilities(self, step: int) -> dict[str, float]:
        """Compute the probability of each stream to give a row of the optimiser step ``step``."""
        way = 0.0 if self.decay is None else self.decay.progress(step)
        drawn = [
            ((1 - way) * before + way * after) / size
            for (before, after), size in zip(self._shares, self._row_sizes, strict=True)
        ]
        return {name: each / sum(drawn) for name, each in zip(self.streams, drawn, strict=True)}

    def draw(self, first: int, last: int, rows_per_step: int) -> list[int]:
        """Draw the rows, by their places in ``train_rows``, of the optimiser steps ``first`` to ``last - 1``. One
        uniform number for each row decides which stream gives it.
        """
        generator = random.Random(f"{self.seed} draws")
        passes = {name: shuffled_passes(rows, f"{self.seed} {name}") for name, rows in self.stream_rows.items()}
        drawn: list[int] = []
        for step in range(last):
            chosen = generator.choices(list(passes), list(self.probabilities(step).values()), k=rows_per_step)
            rows = [next(passes[name]) for name in chosen]
            drawn += rows if step >= first else []
        return drawn

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Give the training rows in the order in which they are drawn."""
        trainer = self.trainer
        sampler = partial(
            MixtureSampler,
            num_steps=self.num_steps,
            draw=self.draw,
            global_step=lambda: trainer.global_step if trainer else 0,
        )
        return self.step_loader(
            self.make_dataset(self.train_rows), *count_sizes(self.train_rows), self.batch_size, sampler
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch, how the steps were cut, and the checksum of each stream."""
        state = super().state_dict()
        return state | self._cut() | {"contents": self.contents} if state else state

    def compare_content(self, state: Mapping[str, Any]) -> None:
        """Warn if a stream's rows differ from those of a checkpoint's state. Streams that were added or removed are
        not compared, and checkpoints of earlier versions have no checksums.
        """
        there = state.get("contents", {})
        if any(there.get(name, content) != content for name, content in self.contents.items()):
            self.warn_of_other_rows()

    def _cut(self) -> dict[str, int]:
        assert self._sampler is not None
        return {"rows_per_step": self._sampler.rows_per_step, "accumulate": self._sampler.accumulate}

    def _apply_resume(self) -> None:
        """Accept another ``num_steps``, which changes no step. Raises ValueError for other rows per step, which would
        change every step.
        """
        if self._resume is None or self._sampler is None:
            return
        resume, mine = self._resume, self._cut()
        inside = 0 < resume["position"] < resume["length"]
        if resume["rows_per_step"] != mine["rows_per_step"] or (inside and resume["accumulate"] != mine["accumulate"]):
            raise ValueError(
                f"the checkpoint's steps are of {resume['rows_per_step']} rows in {resume['accumulate']} micro-batches "
                "a rank and this run's of "
                f"{mine['rows_per_step']} in {mine['accumulate']}: resume with the same batch_size, "
                "accumulate_grad_batches and ranks"
            )
        if inside and resume["position"] >= len(self._sampler):
            raise ValueError(
                f"the checkpoint was written after {resume['position'] // mine['accumulate']} steps of an epoch and "
                f"num_steps is {self.num_steps}; it counts from the start of the epoch, so raise it"
            )
        self._sampler.start_at(resume["epoch"], resume["position"])

    def _weigh(self, rows: Sequence[Tokens]) -> None:
        parts = [[rows[place] for place in places] for places in self.stream_rows.values()]
        examples = [sum(len(row.documents) or 1 for row in part) for part in parts]
        tokens = [sum(len(row.ids) for row in part) for part in parts]
        unweighted = all(stream.weight is None for stream in self.streams.values())
        units = examples if unweighted or self.weigh_by == "examples" else tokens
        self._row_sizes = [number / len(part) for number, part in zip(units, parts, strict=True)]
        given = zip(self.streams.values(), examples, strict=True)
        pairs = [
            (stream, float(min(number, self.cap or number) if stream.weight is None else stream.weight))
            for stream, number in given
        ]
        before = [weight for _, weight in pairs]
        after = [weight if stream.decay_weight is None else stream.decay_weight for stream, weight in pairs]
        self._shares = [(one / sum(before), two / sum(after)) for one, two in zip(before, after, strict=True)]


def shuffled_passes(rows: Sequence[int], seed: str) -> Iterator[int]:
    """Give the rows in one permutation after another, drawn by ``seed`` and the number of the pass."""
    for number in count():
        order = list(rows)
        random.Random(f"{seed} {number}").shuffle(order)
        yield from order
