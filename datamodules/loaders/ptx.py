"""Texts that a policy must not forget while it learns from rewards: PPO-ptx (InstructGPT, arXiv 2203.02155, equation
2).
"""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from datamodules.base import AlignDataModule, HasPositions
from datamodules.loaders.phase_loader import draw_from_stream
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.pretraining import PretrainingDataModule
from datamodules.sources import Source
from datamodules.sources.held_out import hold_out, parse_share
from datamodules.tokens.encoding import Tokens
from modules.types import InstructionBatch


class PtxStream:
    """Packed texts (``InstructionBatch``) for every optimiser update of an on-policy run, and held-out ones for the
    callback ``Forgetting``.

    Rows hold ``text``, or what ``InstructionDataModule`` reads; every token is learned, and they are packed as by
    ``PretrainingDataModule``. An update takes a stretch of its own from an endless stream of passes, each shuffled by
    (seed, pass). So its rows are a function of the seed and the number of the update alone, for any number of ranks and
    micro-batches, and in a resumed run.

    Args:
        train: texts: a source, or a file, a folder or a hub id.
        rows_per_update: packed rows per optimiser update, over all micro-batches and ranks, each of which gets at least
            one.
        max_length: tokens of a packed row.
        val: held-out texts, several sets of them by domain, or a share of the training texts to hold out, in (0, 1).
        columns: our name of a column -> its name in the data, such as ``{text: content}``.

    Raises:
        ValueError: a number is out of range; in ``setup``, a row cannot be read, with file and line, or there are too
            few rows for an update.
    """

    def __init__(
        self,
        train: str | Source,
        rows_per_update: int = 32,
        max_length: int = 512,
        val: float | str | Source | dict[str, str | Source] | None = None,
        columns: dict[str, str] | None = None,
    ) -> None:
        if rows_per_update < 1 or max_length < 2:
            raise ValueError(
                f"ptx.rows_per_update must be at least 1 and ptx.max_length at least 2, got {rows_per_update} and "
                f"{max_length}"
            )
        self.train, self.columns = train, columns
        self.val: Any = val
        self.rows_per_update, self.max_length = rows_per_update, max_length
        self.texts: Texts | None = None
        self.rows: list[Tokens] = []  # packed, of ``train``

    def setup(self, data: AlignDataModule, stage: str) -> None:
        """Tokenise and pack the texts, with the settings of the DataModule ``data`` that they belong to. Training
        texts are only read in ``fit``.
        """
        shares = data.world_size * (data.trainer.accumulate_grad_batches if data.trainer else 1)
        if stage == "fit" and self.rows_per_update < shares:
            raise ValueError(
                f"data.ptx.rows_per_update ({self.rows_per_update}) must be at least {shares}: each of the "
                f"{shares // data.world_size} micro-batches of an update gets a row on each of {data.world_size} ranks"
            )
        texts = self.texts = self.texts or Texts(data, self)
        texts.trainer = data.trainer
        if (share := parse_share(self.val)) is not None:
            self.train, self.val = hold_out(texts.read(self.train), share, texts.seed, texts.columns)
        if stage == "fit" and not self.rows:
            self.rows = texts.load(self.train, "train", "ptx")
        if stage != "predict" and self.val is not None and not texts.domains:
            sets = self.val if isinstance(self.val, dict) else {"val": self.val}
            texts.domains = {name: texts.load(source, "val", f"ptx {name}") for name, source in sets.items()}

    def batch(self, update: int, share: int, shares: int) -> InstructionBatch:
        """Return rows ``share``, ``share + shares``, ... of an update (>= 0). The denominator counts the supervised
        tokens of all rows of the update.
        """
        assert self.texts is not None
        places = range(update * self.rows_per_update, (update + 1) * self.rows_per_update)
        rows = [row for row, _ in draw_from_stream(places, len(self.rows), self.texts.seed)]
        supervised = sum(sum(self.rows[row].supervised) for row in rows)
        return self.texts.make_dataset(self.rows)[MicroBatch(tuple(rows[share::shares]), supervised)]

    @property
    def content(self) -> int:
        """Checksum of the rows of ``train``, 0 before they are read."""
        return self.texts.content if self.texts is not None else 0

    @property
    def domains(self) -> Mapping[str, list[Tokens]]:
        """Packed held-out rows by domain, after ``setup``."""
        return self.texts.domains if self.texts is not None else {}

    def domain_loader(self, name: str) -> DataLoader[MicroBatch]:
        """Give this rank's share of one domain's rows, in order, in as many batches on every rank."""
        assert self.texts is not None
        return self.texts.domain_loader(name)


class Texts(PretrainingDataModule):
    """The texts of a stream, with the tokenizer and the seed of the DataModule that they belong to."""

    def __init__(self, data: AlignDataModule, stream: PtxStream) -> None:
        super().__init__(
            data.tokenizer, stream.train, stream.val, stream.columns, stream.max_length, data.on_bad_row, seed=data.seed
        )

    def check_positions(self, stage: str, longest: int, setting: str) -> None:
        """Refuse texts that are longer than the model has positions; nothing is sampled behind them."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, HasPositions):
            positions = module.policy.max_positions
            if positions is not None and longest > positions:
                raise ValueError(
                    f"the longest packed row of {stage} texts has {longest} tokens, but the model has only {positions} "
                    "positions: lower data.ptx.max_length (longer texts are split)"
                )
