"""Supervised fine-tuning data: conversations, prompts with completions, Alpaca rows, plain text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.base import AlignDataModule
from datamodules.formats.instruction_shapes import (
    InstructionExample,
    check_format,
    encode_instruction,
    instruction_example,
)
from datamodules.formats.prompt_shapes import settle_choices
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import LossOn, Message, Tokens
from datamodules.tokens.packing import pack
from modules.functional.masked import pad_rows
from modules.types import InstructionBatch

IDK = "I don't know."
UNKNOWN = ("WeaklyKnown", "Unknown")  # categories of the column ``knowledge`` that ``unknown: drop`` leaves out


class InstructionDataModule(AlignDataModule):
    """Batches of supervised rows (``InstructionBatch``), the same rows per optimiser step for every micro-batch size
    and rank count.

    Rows hold ``messages``; ShareGPT's ``conversations``; ``prompt`` (or ``question``) with ``completion``, both text or
    both messages; Alpaca's ``instruction``, ``input``, ``output``; or plain ``text``, which is learned whole.
    ``datamodules/formats/instruction_shapes.py`` lists them.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: training rows: a source, or a file, a folder or a hub id.
        val: held-out rows, several sets of them by domain, or a share of the training rows to hold out, in (0, 1).
        columns: our name of a column -> its name in the data.
        format: of the rows, by name; None = found from their columns.
        loss_on: what is learned of a conversation: every ``assistant`` turn with its end of turn, the ``last`` of them
            only, or ``all`` tokens.
        max_length: tokens of a row, prompt and completion together.
        drop_long: drop longer rows and count them; False makes them an error.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``.
        packing: put several training rows into one of ``max_length`` tokens, where they do not see each other.
        batch_size: rows (packed rows with ``packing``) per micro-batch and rank. It changes nothing but memory if
            batch_size x accumulation x ranks stays the same.
        chat: text prompts are user messages of the chat template. None = where the tokenizer has one, unless their
            source says that they are plain (sums, for one). Without a template, instructions get Alpaca's own prompt.
        system: system message in front of every chat that has none.
        unknown: for training rows with a column ``knowledge`` (arXiv 2405.05904): ``drop`` keeps HighlyKnown and
            MaybeKnown rows; ``idk`` answers the Unknown ones with "I don't know."
        chat_template_kwargs: variables that the chat template is given, such as ``{enable_thinking: false}``, which
            opens each answer with an empty thought (Qwen3).
        seed: of the shuffle, with the epoch; None = the run's.

    Attributes:
        domains: held-out rows by domain, ``val`` where ``val`` is one set.

    Raises:
        ValueError: naming file and line, in ``setup``, before the first step.
    """

    batch_type = InstructionBatch  # what a module must read
    not_encoded = "not known (data.unknown)"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | Source | None = None,
        val: float | str | Source | dict[str, str | Source] | None = None,
        columns: dict[str, str] | None = None,
        format: str | None = None,
        loss_on: LossOn = "assistant",
        max_length: int = 1024,
        drop_long: bool = True,
        on_bad_row: Literal["raise", "drop"] = "raise",
        packing: bool = False,
        batch_size: int = 8,
        chat: bool | None = None,
        system: str | None = None,
        unknown: Literal["keep", "drop", "idk"] = "keep",
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise ValueError(
                f"batch_size must be at least 1 and max_length at least 2, got {batch_size} and {max_length}"
            )
        for name, value, known in (
            ("loss_on", loss_on, get_args(LossOn)),
            ("unknown", unknown, ("keep", "drop", "idk")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
        check_format(format)
        super().__init__(tokenizer, train, val, columns, drop_long, on_bad_row, seed)
        self.format, self.loss_on, self.max_length, self.packing, self.batch_size = (
            format,
            loss_on,
            max_length,
            packing,
            batch_size,
        )
        self.chat, self.system, self.unknown = chat, system, unknown
        self.chat_template_kwargs = chat_template_kwargs
        self.train_rows: list[Tokens] = []
        self.domains: dict[str, list[Tokens]] = {}

    @property
    def val_rows(self) -> list[Tokens]:
        """Held-out rows of all domains."""
        return [row for rows in self.domains.values() for row in rows]

    def setup(self, stage: str) -> None:
        """Tokenise everything once; bad rows fail here."""
        self.forget_position()
        self.prepare(stage)
        if not self.train_rows:
            self.train_rows = self.load_training()
        if self.val is not None and not self.domains:
            sets = self.val if isinstance(self.val, dict) else {"val": self.val}
            self.domains = {name: self.load(source, "val", name) for name, source in sets.items()}

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Give the training rows, shuffled by (seed, epoch)."""
        return self.step_loader(self.make_dataset(self.train_rows), *count_sizes(self.train_rows), self.batch_size)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out rows in order; none without ``val``."""
        rows = self.val_rows
        return self.held_out_loader(self.make_dataset(rows), *count_sizes(rows), self.batch_size) if rows else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out rows."""
        return self.val_dataloader()

    def domain_loader(self, name: str) -> DataLoader[MicroBatch]:
        """Give this rank's share of one domain's rows, in order, in as many batches on every rank."""
        rows = self.domains[name]
        return self.held_out_loader(self.make_dataset(rows), *count_sizes(rows), self.batch_size)

    def load_training(self) -> list[Tokens]:
        """Read the training rows, and pack them if asked."""
        rows = self.load(self.train, "train", "train")
        return pack(rows, self.max_length) if self.packing else rows

    def load(self, source: str | Source, stage: Literal["train", "val"], name: str) -> list[Tokens]:
        """Encode all rows of a source."""

        def encode(row: Row) -> Tokens | None:
            return self.encode(row, self.unknown if stage == "train" else "keep")

        rows = self.encode_rows(source, stage, encode, lambda tokens: len(tokens.ids), self.max_length)
        if stage == "train" and self.unknown != "keep" and not self.reading.has_read("knowledge"):
            raise ValueError(
                f"data.unknown {self.unknown} has no effect, for no row of {name} has a column knowledge; map it with "
                "data.columns, or let KnowledgeModule sort the rows first"
            )
        lengths, supervised = count_sizes(rows)
        self.check_positions(stage, max(lengths), "max_length")
        self.report(stage, f"{sum(supervised) / sum(lengths):.1%} of {sum(lengths)} tokens supervised", name)
        return rows

    def encode(self, row: Row, unknown: str = "keep") -> Tokens | None:
        """Encode one raw row; None = ``unknown`` leaves it out. Raises ValueError with the row's origin."""
        chat = self.is_chat(row)
        example = instruction_example(row, self.reading, self.format, chat, known=unknown != "keep")
        self.say_chat(row, isinstance(example.prompt, str) and not example.whole)
        unused = {
            "data.system": self.system,
            "data.chat": self.chat,
            "data.chat_template_kwargs": self.chat_template_kwargs,
            "data.loss_on last": True if self.loss_on == "last" else None,
        }
        unused = unused if example.whole else {}
        for option in [option for option, value in unused.items() if value is not None]:
            self.reading.note(f"{option}: not used, for a document is no chat")
        if unknown == "drop" and example.knowledge in UNKNOWN:
            return None
        if unknown == "idk" and example.knowledge == "Unknown":
            example = replace_answer(example)
        return encode_instruction(self.tokenizer, example, chat, self.system, self.loss_on)

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle how numbers beside options are read."""
        settle_choices(self.reading.rows_with(rows, "options"), self.reading, ("completion", "answer"))

    def make_dataset(self, rows: list[Tokens]) -> "InstructionDataset":
        """Make a data set that the micro-batches of a plan index."""
        pad = self.tokenizer.pad_token_id
        return InstructionDataset(rows, self.tokenizer.eos_token_id if pad is None else pad)


class InstructionDataset(Dataset[InstructionBatch]):
    """Tokenised rows; indexed by a MicroBatch it gives the padded batch.

    Packed rows come with ``position_ids``, which start at 0 in every document; each padding token is a document of its
    own.
    """

    def __init__(self, rows: list[Tokens], pad_id: int) -> None:
        self.rows = rows
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch) -> InstructionBatch:
        rows = [self.rows[index] for index in batch.indices]
        ids, attention_mask = pad_rows([row.ids for row in rows], self.pad_id)
        loss_mask, _ = pad_rows([row.supervised for row in rows], False)
        padded = InstructionBatch(
            input_ids=ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask.bool() & batch.counts,
            denominator=torch.tensor(float(batch.denominator)),
        )
        if any(row.documents for row in rows):
            positions = [
                [place for length in row.documents or [len(row.ids)] for place in range(length)] for row in rows
            ]
            padded["position_ids"], _ = pad_rows(positions, 0)
        return padded


def replace_answer(example: InstructionExample) -> InstructionExample:
    """Replace the last answer of an example by "I don't know." Raises ValueError for a plain text, which asks nothing."""
    if example.whole:
        raise ValueError(f"{example.origin}: unknown: idk needs a question and its answer, and the row is a plain text")
    if isinstance(example.completion, str):
        return replace(example, completion=IDK)
    return replace(example, completion=[*example.completion[:-1], Message(role="assistant", content=IDK)])


def count_sizes(rows: list[Tokens]) -> tuple[list[int], list[int]]:
    """Count the tokens and the supervised tokens of each row."""
    return [len(row.ids) for row in rows], [sum(row.supervised) for row in rows]
