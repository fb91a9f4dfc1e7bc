"""Preference data: pairs, ranked lists and labelled completions."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, compress
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.base import AlignDataModule
from datamodules.formats.preference_shapes import PreferenceExample, preference_example, settle_verdicts
from datamodules.formats.verdicts import Ours
from datamodules.loaders.step_sampler import MicroBatch
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import encode_example
from modules.functional.masked import pad_rows
from modules.types import PreferenceBatch

Stage = Literal["train", "val", "calibration"]
Kind = Literal["pairs", "labels"]
_KINDS = {"pairs": "ranked completions", "labels": "labelled completions"}
LEVELS = ("significantly better", "better", "slightly better", "negligibly better / unsure")
MARGINS = {
    "small": dict(zip(LEVELS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(LEVELS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}


@runtime_checkable
class ComparesMismatched(Protocol):
    """A module whose loss may need completions after prompts of other examples."""

    compares_mismatched: bool


@dataclass(frozen=True)
class PreferenceTokens:
    """A tokenised example."""

    prompt: list[int]
    completions: list[list[int]]  # each up to and including its end token
    ranks: list[int]  # 0 = best; of a single, labelled completion: 0 = desirable, 1 = undesirable
    margin: float | None
    origin: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all completions."""
        return len(self.prompt) + sum(len(ids) for ids in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(len(ids) for ids in self.completions)


class PreferenceDataModule(AlignDataModule):
    """Batches of examples (``PreferenceBatch``), the same examples per optimiser step for every micro-batch size and
    rank count.

    An example is a prompt with ranked completions, or with one labelled completion; a data set holds one kind. Rows
    hold ``prompt`` (or ``question``, ``context``, ``conversations``, ``instruction`` and ``input``) with one of
    ``chosen`` and ``rejected``; ``completions``, best first or with ``ranks`` (0 = best) or ``scores``; ``output_1``
    and ``output_2`` with ``preference`` or ``label`` (1 or 2, graded between them, 0 or null for a tie); ``completion``
    with ``label`` (true or false). Without such a column, the prompt is the turns that the answers share, in messages
    or in transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ..."). Instructions and transcripts are chats when the
    tokenizer has a chat template. A text prompt that ends as the chat template opens an assistant turn is read as
    rendered. Ties are dropped and counted in ``ties``. No answer is ever cut, because a cut would mark the long
    answers.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: training rows: a source, or a file, a folder or a hub id.
        val: held-out rows, or a share of the training rows to hold out, in (0, 1).
        calibration: completions that a reward model's scores are normalised on: ``prompt`` and ``completion``, as
            ``predict`` writes them of the policy that will be trained with it. One that did not finish (``finish``)
            gets no end token; empty ones are left out.
        columns: our name of a column -> its name in the data.
        max_length: tokens of a prompt with its longest completion.
        drop_long: drop longer examples whole and count them in ``dropped``; False makes them an error.
        batch_size: examples per micro-batch and rank. It changes nothing but memory if batch_size x accumulation x
            ranks stays the same.
        chat: text prompts are user messages of the chat template. None = where the tokenizer has one, unless their
            source says that they are plain (sums, for one).
        system: system message in front of every chat that has none.
        margins: label in column ``strength`` -> how much better the chosen answer should score, or one of Llama 2's
            tables (27), ``small`` or ``large``, for the labels in ``MARGINS``. The key ``preference`` stands for a sure
            verdict where verdicts are graded from 1 to 2. A column ``margin`` needs none.
        balance_length: drop training pairs until the longer answer is chosen as often as the shorter one, in each bin
            of length differences (1, 2 to 3, 4 to 7, ... tokens); counted in ``unbalanced``.
        first_is_better: the verdict that means "the first answer is better": 0 or 1 in a column of zeros and ones, the
            sign (-1 or 1) in a column that goes below 0.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``.
        chat_template_kwargs: variables that the chat template is given, such as ``{enable_thinking: false}``, which
            opens each answer with an empty thought (Qwen3).
        seed: of the shuffle, with the epoch, and of the balancing; None = the run's.

    Raises:
        ValueError: naming file and line, in ``setup``, before the first step; also where two answers of different rank
            are identical.
    """

    batch_type = PreferenceBatch  # what a module must read
    purpose = "preference"
    not_encoded = "ties"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | Source | None = None,
        val: float | str | Source | None = None,
        calibration: str | Source | None = None,
        columns: dict[str, str] | None = None,
        max_length: int = 1024,
        drop_long: bool = True,
        batch_size: int = 8,
        chat: bool | None = None,
        system: str | None = None,
        margins: dict[str, float] | Literal["small", "large"] | None = None,
        balance_length: bool = False,
        first_is_better: Ours | None = None,
        on_bad_row: Literal["raise", "drop"] = "raise",
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise ValueError(
                f"batch_size must be at least 1 and max_length at least 2, got {batch_size} and {max_length}"
            )
        super().__init__(tokenizer, train, val, columns, drop_long, on_bad_row, seed)
        self.max_length, self.batch_size, self.chat, self.system = max_length, batch_size, chat, system
        self.calibration = calibration
        self.chat_template_kwargs = chat_template_kwargs
        self.margins = MARGINS[margins] if isinstance(margins, str) else margins
        self.balance_length, self.first_is_better = balance_length, first_is_better
        self.train_rows: list[PreferenceTokens] = []
        self.val_rows: list[PreferenceTokens] = []
        self.calibration_rows: list[PreferenceTokens] = []
        self.kind: Kind | None = None  # known after ``setup``
        self.ties = {"train": 0, "val": 0}
        self.unbalanced = 0  # training pairs left out by balance_length

    def setup(self, stage: str) -> None:
        """Tokenise everything once; bad rows fail here."""
        self.forget_position()
        self.prepare(stage)
        if not self.train_rows:
            self.train_rows = self._load(self.train, "train")
        if self.val is not None and not self.val_rows:
            self.val_rows = self._load(self.val, "val")
        if stage == "fit" and self.calibration is not None and not self.calibration_rows:
            self.calibration_rows = self._load_calibration(self.calibration)

    def train_dataloader(self) -> DataLoader[MicroBatch]:
        """Give the training examples, shuffled by (seed, epoch)."""
        return self.step_loader(self.make_dataset(self.train_rows), *_sizes(self.train_rows), self.batch_size)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out examples in order; none without ``val``."""
        return self.in_order("val") if self.val_rows else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Give the held-out examples."""
        return self.val_dataloader()

    def in_order(self, stage: Stage) -> DataLoader[MicroBatch]:
        """Give all examples of a stage, each once over all ranks and nearly in their order. Every rank gets the same
        number of batches, with fillers of rank -1.
        """
        rows = {"train": self.train_rows, "val": self.val_rows, "calibration": self.calibration_rows}[stage]
        if not rows:
            raise ValueError(
                f"there are no {stage} rows: "
                + (f"set data.{stage}" if getattr(self, stage) is None else "call setup first")
            )
        return self.held_out_loader(self.make_dataset(rows), *_sizes(rows), self.batch_size)

    def encode(self, row: Row) -> PreferenceTokens | None:
        """Encode one raw row; None = a tie. Raises ValueError with the row's origin."""
        has_template, chat = self.tokenizer.chat_template is not None, self.is_chat(row)
        example = preference_example(row, self.reading, has_template, self.margins, chat)
        if example is None:
            return None
        self.say_chat(row, isinstance(example.prompt, str))
        return self._tokens(example, chat)

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle how columns of verdicts and labels are read."""
        if stage != "calibration":
            settle_verdicts(rows, self.reading, self.first_is_better)

    def _tokens(self, example: PreferenceExample, chat: bool) -> PreferenceTokens:
        prompt: list[int] = []
        completions: list[list[int]] = []
        for answer in example.completions:
            tokens = encode_example(
                self.tokenizer, example.prompt, answer, example.origin, chat, self.system, tools=example.tools
            )
            prompt = tokens.ids[: tokens.supervised.index(True)]
            completions.append(list(compress(tokens.ids, tokens.supervised)))
        first: dict[tuple[int, ...], int] = {}  # rank of each distinct completion
        for ids, rank in zip(completions, example.ranks, strict=True):
            if first.setdefault(tuple(ids), rank) != rank:
                raise ValueError(f"{example.origin}: two answers are identical, so neither is better")
        return PreferenceTokens(prompt, completions, example.ranks, example.margin, example.origin)

    def _load(self, source: str | Source, stage: Stage) -> list[PreferenceTokens]:
        self.ties[stage] = self.bad[stage] = self.dropped[stage] = 0

        def encode(row: Row) -> PreferenceTokens | None:
            tokens = self.encode(row)
            self.ties[stage] += tokens is None
            return tokens

        rows = self.encode_rows(source, stage, encode, lambda tokens: tokens.longest, self.max_length)
        self._check_kind(rows)
        if stage == "train" and self.balance_length:
            rows = self._balanced(rows)
        if self.margins is not None and all(row.margin is None for row in rows):
            raise ValueError(
                f"{rows[0].origin}: margins is set and no {stage} row has a strength; map its column with columns"
            )
        self.check_positions(stage, max(row.longest for row in rows), "max_length")
        self.report(stage, self._summary(rows))
        return rows

    def _load_calibration(self, source: str | Source) -> list[PreferenceTokens]:
        self.dropped["calibration"] = self.bad["calibration"] = 0
        chat = bool(self.chat)  # by rule, prompts are as the policy read them

        def encode(row: Row) -> PreferenceTokens | None:
            if row.columns.get("completion") == "":
                return None
            example = preference_example(
                replace(row, columns={"label": True, **row.columns}),
                self.reading,
                self.tokenizer.chat_template is not None,
                chat=chat,
            )
            assert example is not None
            tokens = self._tokens(example, chat)
            unfinished = row.columns.get("finish", "stop") != "stop"
            return replace(tokens, completions=[ids[:-1] for ids in tokens.completions]) if unfinished else tokens

        rows = self.encode_rows(source, "calibration", encode, lambda tokens: tokens.longest, self.max_length)
        self.report("calibration", "for the mean and the deviation of the scores")
        return rows

    def _check_kind(self, rows: list[PreferenceTokens]) -> None:
        for row in rows:
            kind: Kind = "pairs" if len(row.completions) > 1 else "labels"
            self.kind = self.kind or kind
            if kind != self.kind:
                raise ValueError(
                    f"{row.origin}: {_KINDS[kind]}, and the rows before it are {_KINDS[self.kind]}; give each kind a "
                    "run of its own"
                )

    def _balanced(self, rows: list[PreferenceTokens]) -> list[PreferenceTokens]:
        bins: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index, row in enumerate(rows):
            if len(row.completions) != 2:
                raise ValueError(
                    f"{row.origin}: balance_length needs pairs and this row has {len(row.completions)} completions"
                )
            if (longer_by := chosen_longer_by(row)) != 0:
                bins[abs(longer_by).bit_length()][longer_by > 0].append(index)
        left_out: set[int] = set()
        for number, (shorter, longer) in sorted(bins.items()):
            more, surplus = max(shorter, longer, key=len), abs(len(shorter) - len(longer))
            left_out.update(random.Random(f"{self.seed} {number}").sample(more, surplus))
        self.unbalanced = len(left_out)
        self.reading.drop("left out to balance lengths", len(left_out))
        if len(left_out) == len(rows):
            raise ValueError(
                f"{rows[0].origin}: balance_length leaves none of {len(rows)} pairs, for none has its opposite of like "
                "lengths"
            )
        return [row for index, row in enumerate(rows) if index not in left_out]

    def _summary(self, rows: list[PreferenceTokens]) -> str:
        if self.kind == "labels":
            return f"{sum(row.ranks == [0] for row in rows) / len(rows):.1%} desirable"
        pairs = [row for row in rows if len(row.completions) == 2]
        if not pairs:
            return "ranked completions"
        longer = sum(chosen_longer_by(row) > 0 for row in pairs) / len(pairs)
        return f"the longer answer chosen in {longer:.1%} of pairs"

    def make_dataset(self, rows: list[PreferenceTokens]) -> "PreferenceDataset":
        """Make a data set that the micro-batches of a plan index."""
        pad, module = self.tokenizer.pad_token_id, self.trainer.lightning_module if self.trainer else None
        mismatched = isinstance(module, ComparesMismatched) and module.compares_mismatched
        return PreferenceDataset(rows, self.tokenizer.eos_token_id if pad is None else pad, mismatched)


class PreferenceDataset(Dataset[PreferenceBatch]):
    """Tokenised examples; indexed by a MicroBatch it gives the padded batch, its completions in the order of their
    examples.

    ``margin`` is in every batch when any example has one, 0 for the others.

    Args:
        rows: the examples.
        pad_id: the padding of prompts and completions.
        mismatched: add the completions after other prompts, see ``find_other_prompts``.
    """

    def __init__(self, rows: Sequence[PreferenceTokens], pad_id: int, mismatched: bool = False) -> None:
        self.rows = rows
        self.pad_id = pad_id
        self.others = find_other_prompts(rows) if mismatched else None
        self.offsets = [
            0,
            *accumulate(len(row.completions) for row in rows),
        ]  # number of each example's first completion
        self.has_margin = any(row.margin is not None for row in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, batch: MicroBatch) -> PreferenceBatch:
        made = self.make_batch(batch, [self.rows[index].prompt for index in batch.indices])
        if self.others is not None:
            made["mismatched"] = [
                self.make_batch(part, [cast(list[int], self.others[index]) for index in part.indices])
                for part in batch.step
                if self.others[part.indices[0]] is not None
            ]
        return made

    def make_batch(self, batch: MicroBatch, prompts: list[list[int]]) -> PreferenceBatch:
        """Pad the completions of a micro-batch and the prompts that they follow, one of each example."""
        rows = [self.rows[index] for index in batch.indices]
        prompt_ids, prompt_mask = pad_rows(prompts, self.pad_id)
        completion_ids, completion_mask = pad_rows([ids for row in rows for ids in row.completions], self.pad_id)
        counts = torch.tensor([len(row.completions) for row in rows])
        made = PreferenceBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            prompt_index=torch.arange(len(rows)).repeat_interleave(counts),
            rank=torch.tensor([rank if batch.counts else -1 for row in rows for rank in row.ranks]),
            row=torch.tensor(
                [self.offsets[index] + k for index in batch.indices for k in range(len(self.rows[index].completions))]
            ),
            denominator=torch.tensor(float(batch.denominator)),
        )
        if self.has_margin:
            made["margin"] = torch.tensor([row.margin or 0.0 for row in rows])
        return made


def find_other_prompts(rows: Sequence[PreferenceTokens]) -> list[list[int] | None]:
    """Find, for each example, the prompt of the next example with another prompt; behind the last one comes the first.

    So the prompt depends on the data set alone, and on no batch. It is cut on the left where completion and prompt
    would be longer than the longest example. None where all prompts are equal.
    """
    limit = max(row.longest for row in rows)
    second = next((row.prompt for row in rows if row.prompt != rows[0].prompt), None)
    if second is None:
        return [None] * len(rows)
    others: list[list[int] | None] = []
    following, other = rows[0].prompt, second  # the prompt of the next example, and the next one that differs from it
    for row in reversed(rows):
        if row.prompt != following:
            following, other = row.prompt, following
        room = limit - max(len(ids) for ids in row.completions)
        others.append(other[-room:])
    return others[::-1]


def chosen_longer_by(row: PreferenceTokens) -> int:
    """Count the tokens by which the better of two completions is longer."""
    first, second = (len(ids) for ids in row.completions)
    return first - second if row.ranks[0] < row.ranks[1] else second - first


def _sizes(rows: list[PreferenceTokens]) -> tuple[list[int], list[int]]:
    """Return the tokens of each example, and 1 for each, so that the denominator counts examples."""
    return [row.num_tokens for row in rows], [1] * len(rows)
