"""Supervised fine-tuning data: conversations, prompts with completions, Alpaca rows."""

from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.base import AlignDataModule
from datamodules.chat import Tokens, encode_example
from datamodules.collate import InstructionDataset, MicroBatch
from datamodules.columns import check_mapping, instruction_example
from datamodules.sources import Row, Source
from modules.types import InstructionBatch


class InstructionDataModule(AlignDataModule):
    """Batches of supervised rows (``InstructionBatch``), the same rows per optimiser step for every micro-batch size and rank count.

    Rows hold ``messages``, or ``prompt`` (or ``question``) with ``completion``, both text or both messages, or Alpaca's ``instruction``,
    ``input``, ``output`` (a chat when the tokenizer has a chat template, else text). Learned are the completion and its end token.

    Args:
        tokenizer: a tokenizer, or a path or hub id.
        train: training rows: a source, or a file, a folder or a hub id.
        val: held-out rows.
        columns: our column name -> the data's.
        max_length: tokens of a row, prompt and completion together.
        drop_long: drop longer rows and count them; False makes them an error.
        batch_size: rows per micro-batch and rank; a memory setting as long as its product with accumulation and ranks stays.
        chat: render text prompts as one user message with the chat template.
        system: system message in front of every chat that has none.
        seed: of the shuffle, with the epoch.

    Raises:
        ValueError: naming file and line, in ``setup``, before the first step.
    """

    batch_type = InstructionBatch  # what a module must read

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str,
        train: str | Source,
        val: str | Source | None = None,
        columns: dict[str, str] | None = None,
        max_length: int = 1024,
        drop_long: bool = True,
        batch_size: int = 8,
        chat: bool = False,
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise ValueError(f"batch_size must be at least 1 and max_length at least 2, got {batch_size} and {max_length}")
        check_mapping(columns or {})
        super().__init__(tokenizer, train, val, columns, drop_long, seed)
        self.max_length, self.batch_size, self.chat, self.system = max_length, batch_size, chat, system
        self.train_rows: list[Tokens] = []
        self.val_rows: list[Tokens] = []

    def setup(self, stage: str) -> None:
        """Tokenises everything once; bad rows fail here."""
        self.forget_position()
        self.require_held_out(stage)
        if not self.train_rows:
            self.train_rows = self._load(self.train, "train")
        if self.val is not None and not self.val_rows:
            self.val_rows = self._load(self.val, "val")

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Shuffled by (seed, epoch)."""
        return self.step_loader(self._dataset(self.train_rows), *_sizes(self.train_rows), self.batch_size)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Held-out rows in order; none without ``val``."""
        if not self.val_rows:
            return []
        return self.held_out_loader(self._dataset(self.val_rows), *_sizes(self.val_rows), self.batch_size)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The held-out rows."""
        return self.val_dataloader()

    def encode(self, row: Row) -> Tokens:
        """Tokens of one raw row. Raises ValueError with the row's origin."""
        example = instruction_example(row, self.columns)
        chat = self.chat or (example.is_instruction and self.tokenizer.chat_template is not None)
        return encode_example(self.tokenizer, example.prompt, example.completion, row.origin, chat, self.system)

    def _load(self, source: str | Source, stage: str) -> list[Tokens]:
        rows = self.encode_rows(source, stage, self.encode, lambda tokens: len(tokens.ids), self.max_length)
        lengths, supervised = _sizes(rows)
        self.check_positions(stage, max(lengths), "max_length")
        self.report(stage, len(rows), f"{sum(supervised) / sum(lengths):.1%} of {sum(lengths)} tokens supervised")
        return rows

    def _dataset(self, rows: list[Tokens]) -> InstructionDataset:
        pad = self.tokenizer.pad_token_id
        return InstructionDataset(rows, self.tokenizer.eos_token_id if pad is None else pad)


def _sizes(rows: list[Tokens]) -> tuple[list[int], list[int]]:
    """Tokens and supervised tokens of each row."""
    return [len(row.ids) for row in rows], [sum(row.supervised) for row in rows]
