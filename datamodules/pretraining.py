"""Plain text to go on pretraining with: every token is learned, and rows are packed."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from datamodules.instruction import InstructionDataModule, count_sizes
from datamodules.sources import Source
from datamodules.tokens.encoding import Tokens
from datamodules.tokens.packing import pack, split_long


class PretrainingDataModule(InstructionDataModule):
    """Packed rows (``InstructionBatch``) of documents with the loss on all their tokens.

    Rows hold ``text``, or what :class:`InstructionDataModule` reads. A document longer than a row is split, never
    dropped; documents in one row do not see each other. Nothing predicts the first token of a document or piece, so it
    is not learned.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: training rows: a source, or a file, a folder or a hub id.
        val: held-out rows, several sets of them by domain, or a share of the training rows to hold out, in (0, 1).
        columns: our name of a column -> its name in the data, such as ``{text: content}``.
        max_length: tokens of a packed row.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``.
        batch_size: packed rows per micro-batch and rank.
        seed: of the shuffle, with the epoch; None = the run's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | Source | None = None,
        val: float | str | Source | dict[str, str | Source] | None = None,
        columns: dict[str, str] | None = None,
        max_length: int = 1024,
        on_bad_row: Literal["raise", "drop"] = "raise",
        batch_size: int = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            train,
            val,
            columns=columns,
            loss_on="all",
            max_length=max_length,
            on_bad_row=on_bad_row,
            packing=True,
            batch_size=batch_size,
            seed=seed,
        )

    def load(self, source: str | Source, stage: Literal["train", "val"], name: str) -> list[Tokens]:
        """Read and pack the rows of a source."""
        return load_documents(self, source, stage, name, whole=True)

    def load_training(self) -> list[Tokens]:
        """Read and pack the training rows."""
        return self.load(self.train, "train", "train")


def load_documents(
    data: InstructionDataModule, source: str | Source, stage: Literal["train", "val"], name: str, whole: bool = False
) -> list[Tokens]:
    """Encode the rows of a source, packed if ``data`` packs. Plain texts (with ``whole`` all rows) are split at
    ``max_length``; other long rows are dropped.
    """

    def length(tokens: Tokens) -> int:
        return 1 if whole or tokens.whole else len(tokens.ids)

    documents = data.encode_rows(source, stage, data.encode, length, data.max_length)
    num_documents = len(documents)
    rows = [piece for document in documents for piece in split_long(document, data.max_length) if len(piece.ids) > 1]
    if data.packing:
        rows = pack(rows, data.max_length)
    lengths, supervised = count_sizes(rows)
    data.check_positions(stage, max(lengths), "max_length")
    made = (
        f"{num_documents} documents in {len(rows)} rows that are {sum(lengths) / len(rows) / data.max_length:.1%} full"
    )
    data.report(stage, f"{made}, {sum(supervised) / sum(lengths):.1%} of {sum(lengths)} tokens supervised", name)
    return rows
