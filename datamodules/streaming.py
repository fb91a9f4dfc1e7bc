"""Supervised rows that are read while the run goes on, for data larger than memory."""

import csv
import gzip
import zlib
from dataclasses import replace
from glob import escape, glob
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from datamodules.formats.reading import Reading
from datamodules.instruction import InstructionDataModule
from datamodules.loaders.stream_loader import Pieces, StreamLoader
from datamodules.sources import Row, Source
from datamodules.sources.files import looks_local, parse_record
from datamodules.sources.held_out import parse_share
from datamodules.sources.locations import explain_hub_error, find_files, read_format, split_hub_id
from datamodules.tokens.encoding import LossOn, Tokens
from datamodules.tokens.packing import split_long
from modules.trainer.ranks import from_all_ranks

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("text", {}),  # a line is parsed here, since the builder for JSON guesses types and fills in columns
    ".ndjson": ("text", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
LINES = tuple(ending for ending, (builder, _) in BUILDERS.items() if builder == "text")


class StreamingDataModule(InstructionDataModule):
    """The batches of :class:`InstructionDataModule`, tokenised as they are read by ``datasets``, shared out over ranks
    and workers.

    A Trainer epoch is ``steps_per_epoch`` optimiser updates; the rows are read again and again, each pass in another
    order. A resumed run skips the rows that it has used, without tokenising them, and goes on exactly where it was,
    with the same number of ranks and workers. Which rows make a step depends on both numbers, and a bad row shows only
    when it is read. Rows of plain ``text`` that are too long are cut into pieces, others dropped and counted.

    Args:
        tokenizer: a tokenizer, or a path or hub id; None = the module's.
        train: files (one, a folder, or a pattern with ``*``) of one kind, JSONL, CSV, TSV, Parquet, Arrow or plain
            lines, or a hub id. In a folder whose file names tell splits, the files of train are read.
        steps_per_epoch: optimiser updates of a Trainer epoch.
        val: held-out rows, read whole: a source, a file, a folder or a hub id, or several by domain.
        columns: our name of a column -> its name in the data.
        format: of the rows, by name; None = found from their columns.
        loss_on: ``assistant``, ``last`` or ``all``.
        max_length: tokens of a row.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them in ``bad``; ``dropped`` counts rows
            that are too long. Rank 0 prints its counts at the end of every epoch and of the run.
        packing: fill rows of ``max_length`` tokens with texts in the order they come.
        batch_size: rows per micro-batch and rank.
        chat: text prompts are user messages of the chat template; None = where the tokenizer has one.
        shuffle_buffer: rows among which the next is drawn.
        num_workers: processes that read and tokenise.
        chat_template_kwargs: variables that the chat template is given, such as ``{enable_thinking: false}``.
        seed: of the shuffle, with the pass; None = the run's.

    Raises:
        ValueError: naming the row, when it is read.
    """

    needs = ("train", "steps_per_epoch")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        train: str | None = None,
        steps_per_epoch: int | None = None,
        val: float | str | Source | dict[str, str | Source] | None = None,
        columns: dict[str, str] | None = None,
        format: str | None = None,
        loss_on: LossOn = "assistant",
        max_length: int = 1024,
        on_bad_row: Literal["raise", "drop"] = "raise",
        packing: bool = False,
        batch_size: int = 8,
        chat: bool | None = None,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        self.check_needs({"train": train, "steps_per_epoch": steps_per_epoch})
        assert steps_per_epoch is not None
        if isinstance(val, int | float) or parse_share(val) is not None:
            raise ValueError(f"the rows of a stream cannot be held out (val {val}); name held-out rows, such as a file")
        if min(steps_per_epoch, shuffle_buffer) < 1 or num_workers < 0:
            raise ValueError(
                "steps_per_epoch and shuffle_buffer must be at least 1 and num_workers at least 0, "
                f"got {steps_per_epoch}, {shuffle_buffer} and {num_workers}"
            )
        super().__init__(
            tokenizer,
            train,
            val,
            columns,
            format,
            loss_on,
            max_length,
            True,
            on_bad_row,
            packing,
            batch_size,
            chat,
            None,
            "keep",
            chat_template_kwargs,
            seed,
        )
        self.steps_per_epoch, self.shuffle_buffer, self.num_workers = steps_per_epoch, shuffle_buffer, num_workers
        self._loader: StreamLoader | None = None
        self._saved: dict[str, Any] | None = None
        self._lines_are_json = False  # of what ``opened`` gives

    def load_training(self) -> list[Tokens]:
        """Read the first row alone, so that a wrong path or column shows before the first step."""
        self._loader = self._saved = None
        self.content = self.sum_files()
        self.reading = Reading(self.purpose, self.columns)
        reader = Pieces(self, self.rank, self.world_size)
        _, _, record = next(reader.numbered(0, 1))
        self._lines_are_json = reader.data._lines_are_json
        said = f"train: rows are streamed from {self.train}, the first"
        if self.on_bad_row == "drop":
            rank_zero_info(f"{said} holds {', '.join(self.parse(record).columns)}")
            return []
        try:
            self.encode_record(record)
        except ValueError as error:
            raise self.name_place(error, record) from error
        rank_zero_info(f"{said}: {self.reading.columns_line()}")
        return []

    def train_dataloader(self) -> Any:
        """Give the stream, from the place of a loaded checkpoint on."""
        if self.trainer is None:
            raise ValueError(
                "the training loader needs a Trainer, which says how many micro-batches and ranks share a step; use "
                "trainer.fit"
            )
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError("overfit_batches replaces the stream; use limit_train_batches and limit_val_batches")
        self._loader = StreamLoader(self, self.trainer, self._loader)
        self._restore()
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Return the places of all ranks (collective), and the files' checksum."""
        if self._loader is None:
            return {}
        return {"ranks": from_all_ranks([self._loader.snapshot()]), "content": self.content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the loader, or keep the state until there is one."""
        self._saved = dict(state_dict)
        self.compare_content(state_dict)
        self._restore()

    def files(self) -> list[str]:
        """Find the files to stream; none for a hub id. Raises ValueError for files of several kinds."""
        path = Path(str(self.train)).expanduser()
        if path.is_dir():
            files = [str(file) for file in find_files(path, list(BUILDERS), None)]
        else:
            named = [str(path)] if path.is_file() else sorted(glob(str(path)))
            files = [name for name in named if read_format(Path(name)) in BUILDERS]
        if not files and (path.exists() or looks_local(str(self.train))):
            raise ValueError(f"{self.train}: there are no files that end in {', '.join(BUILDERS)}")
        kinds = sorted({read_format(Path(name)) for name in files})
        if len(kinds) > 1:
            raise ValueError(
                f"{self.train}: files of several kinds ({', '.join(kinds)}) are no stream; name those of one, such as "
                f"*{kinds[0]}"
            )
        return files

    def sum_files(self) -> int:
        """Compute a checksum of the files' names and sizes, or of the hub id, since the rows are not read."""
        told = [(Path(name).name, Path(name).stat().st_size) for name in self.files()] or str(self.train)
        return zlib.crc32(repr(told).encode(errors="surrogatepass"))

    def opened(self) -> Any:
        """Open the rows as a ``datasets`` stream. Raises ValueError without such a file or hub id."""
        from datasets import load_dataset

        files = self.files()
        self._lines_are_json = any(read_format(Path(name)) in (".jsonl", ".ndjson") for name in files)
        try:
            if files:
                stream = _open(files)
                return stream.filter(_has_text) if read_format(Path(files[0])) in LINES else stream
            return load_dataset(*split_hub_id(str(self.train)), split="train", streaming=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(explain_hub_error(str(self.train), "train", error)) from error

    def encode_record(self, record: Row) -> Tokens | None:
        """Encode a record that :meth:`opened` gives. Raises ValueError with its origin."""
        return self.encode(self.parse(record))

    def parse(self, record: Row) -> Row:
        """Make a row of a record. JSON lines, which are streamed as text, are parsed."""
        if not self._lines_are_json:
            return record
        columns = parse_record(record.columns["text"], record.origin)
        return replace(record, columns=columns if isinstance(columns, dict) else {"text": columns})

    def name_place(self, error: ValueError, record: Row) -> ValueError:
        """Put file and row into an error, in place of the record's number in its share.

        The files are read again up to the record, since a stream does not tell where its records stand.
        """
        for name in self.files():
            for index, other in enumerate(_open([name])):
                if other == record.columns:
                    place = f"{name}:{index + 1}" if read_format(Path(name)) in LINES else f"{name}#{index}"
                    return ValueError(str(error).replace(record.origin, place))
        return error

    def teardown(self, stage: str) -> None:
        """Print what became of the rows."""
        if self._loader is not None:
            self._loader.tell_rows()

    def cut(self, tokens: Tokens) -> list[Tokens]:
        """Cut a plain text that is too long into pieces, and drop another long row."""
        if len(tokens.ids) <= self.max_length:
            return [tokens]
        return split_long(tokens, self.max_length) if tokens.whole else []

    def _restore(self) -> None:
        if self._loader is not None and self._saved is not None:
            self._loader.restore(self._saved["ranks"])


def _open(files: list[str]) -> Any:
    """Open files of one kind as a ``datasets`` stream; empty lines are records too."""
    from datasets import Features, Value, load_dataset

    builder, settings = BUILDERS[read_format(Path(files[0]))]
    if builder == "csv":
        names = _read_header(files[0], settings.get("sep", ","))
        settings = settings | {"features": Features({name: Value("string") for name in names})}
    paths = [escape(name) for name in files]
    return load_dataset(builder, data_files=paths, split="train", streaming=True, **settings)


def _has_text(record: dict[str, Any]) -> bool:
    return bool(str(record["text"]).strip())


def _read_header(path: str, separator: str) -> list[str]:
    """Read the names of the columns of a CSV or TSV file."""
    opened = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=separator), [])
