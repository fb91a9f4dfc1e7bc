"""The base of all DataModules: rows from sources, the tokenizer, dropped rows, loaders that resume inside an epoch."""

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.formats.reading import Reading, UnclearColumn, refuse_mixed_splits
from datamodules.formats.table import Purpose
from datamodules.loaders.step_sampler import MicroBatch, StepSampler
from datamodules.sources import Row, Source
from datamodules.sources.files import hint_at_header, read_rows
from datamodules.sources.held_out import Part, hold_out, parse_share
from modules.functional.thoughts import set_in_template
from modules.trainer.seeds import run_seed

Example = TypeVar("Example")


@runtime_checkable
class HasPositions(Protocol):
    """A module around a causal language model: ``policy.max_positions`` is None or the tokens of its longest row."""

    policy: Any


@runtime_checkable
class HasSampling(Protocol):
    """A module that samples completions, up to ``sampling.max_completion_length`` tokens."""

    sampling: Any


@runtime_checkable
class HasTools(Protocol):
    """A module whose completions may call tools: JSON schemas that prompts tell, or None."""

    tools: list[dict[str, Any]] | None


@runtime_checkable
class HasEngine(Protocol):
    """A module whose engine samples completions, at most ``engine.max_staleness`` phases ahead."""

    engine: Any


class StepLoader(DataLoader[Any]):
    """A DataLoader over micro-batches, with the two methods by which Lightning recognises a loader that resumes.

    The DataModule keeps the state, because Lightning's checkpoints from the end of an epoch hold no state of loaders.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the DataModule keeps the state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class RowsDataModule(LightningDataModule):
    """Rows of a source, shared out over the processes: all that a DataModule for ``predict`` needs.

    Args:
        train: the rows: a source, or what :class:`Files` takes (file, folder, hub id).
        columns: our name of a column -> its name in the data, where detection does not suffice.

    Attributes:
        dropped: rows left out for their length, by stage.
        bad: rows left out because they could not be read, by stage.
        reading: how the rows of the last data set were read.

    Raises:
        ValueError: ``columns`` maps names that the DataModule does not read.
    """

    purpose: ClassVar[Purpose] = "instruction"  # which columns of the table are read
    may_drop: ClassVar[bool] = True  # whether ``on_bad_row`` is an option
    not_encoded: ClassVar[str] = "left out"  # how messages call rows for which ``encode`` gives None
    needs: ClassVar[tuple[str, ...]] = ("train",)  # arguments without which there is nothing to read
    tokenizer: PreTrainedTokenizerBase  # only in DataModules that tokenise; None until ``setup`` takes the module's

    def __init__(self, train: str | Source | None, columns: dict[str, str] | None) -> None:
        super().__init__()
        self.check_needs({"train": train})
        assert train is not None
        self.train, self.columns = train, columns or {}
        self.drop_long = False
        self.on_bad_row: Literal["raise", "drop"] = "raise"
        self.dropped = {"train": 0, "val": 0}
        self.bad = {"train": 0, "val": 0}
        self.content = 0  # checksum of the training rows as they were read; 0 = a resumed run does not compare them
        self.reading = Reading(self.purpose, self.columns)

    @classmethod
    def check_needs(cls, given: Mapping[str, Any], method: str = "<method>") -> None:
        """Refuse a call in which a needed argument is None.

        Args:
            given: some arguments by name.
            method: stem of the configuration in ``configs/tiny`` that runs without any data of the user's.

        Raises:
            ValueError: naming what is missing and how to give it.
        """
        missing = [name for name in cls.needs if name in given and given[name] is None]
        if missing:
            wanted = [f"add --data.{name} {'my.jsonl' if name == 'train' else '...'}" for name in missing]
            raise ValueError(
                f"{cls.__name__} needs {', '.join(missing)}: {'; '.join(wanted)}; with nothing of your own, "
                f"configs/tiny/{method}.yaml runs offline"
            )

    def take_tokenizer(self) -> None:
        """Take the module's tokenizer if none was given. Raises ValueError if the module has none either."""
        if self.tokenizer is None:
            module = self.trainer.lightning_module if self.trainer else None
            found = getattr(module, "tokenizer", None)
            if found is None:
                owner = type(module).__name__ if module is not None else "no module"
                raise ValueError(
                    f"{type(self).__name__} was given no tokenizer and {owner} has one; give it a tokenizer, a path or "
                    "a hub id"
                )
            self.tokenizer = found

    @property
    def rank(self) -> int:
        """Number of this process, 0 without a Trainer."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Processes, 1 without a Trainer."""
        return self.trainer.world_size if self.trainer else 1

    def encode_rows(
        self,
        source: str | Source,
        stage: str,
        encode: Callable[[Row], Example | None],
        length: Callable[[Example], int],
        limit: int,
    ) -> list[Example]:
        """Encode the rows of a source, and set ``reading`` to the account of this source.

        It leaves out and counts rows for which ``encode`` gives None, rows longer than ``limit`` tokens (in
        ``dropped[stage]``) and, with ``on_bad_row`` drop, rows for which ``encode`` raises ValueError (in
        ``bad[stage]``).

        Raises ValueError for bad rows unless ``on_bad_row`` is drop, for long rows unless ``drop_long``, for columns
        that can be read in two ways, and when nothing is left.
        """
        kept: list[Example] = []
        problem: ValueError | None = None
        skipped = too_long = bad = 0
        rows = self.read(source)
        self.reading = Reading(self.purpose, self.columns)
        self.settle(source.whole if isinstance(source, Part) else rows, stage)
        if stage == "train":
            refuse_mixed_splits(rows, self.columns)
            for row in rows:
                self.content = zlib.crc32(repr(row.columns).encode(errors="surrogatepass"), self.content)
        for row in rows:
            try:
                example = encode(row)
            except UnclearColumn:
                raise
            except ValueError as error:
                if self.on_bad_row == "raise":
                    way_out = "; mend the row, or set data.on_bad_row: drop to leave such rows out"
                    headerless = hint_at_header(source, row) if row is rows[0] else ""
                    raise ValueError(f"{error}{headerless}{way_out if self.may_drop else ''}") from error
                problem, bad = problem or error, bad + 1
                continue
            if example is None:
                skipped += 1
            elif length(example) <= limit:
                kept.append(example)
            elif self.drop_long:
                too_long += 1
            else:
                raise ValueError(
                    f"{row.origin}: {length(example)} tokens and the limit is {limit}; raise it or set drop_long: true"
                )
        self.dropped[stage] += too_long
        self.bad[stage] += bad
        self.reading.counts.update({"used": len(kept), self.not_encoded: skipped, "too long": too_long, "bad": bad})
        if problem is not None:
            self.reading.note(f"the first bad row: {problem}")
        if not kept:
            first = f"; the first bad row is {problem}" if problem else ""
            left_out = f"{skipped} left out, {bad} bad, {too_long} longer than {limit} tokens" + (
                " (raise the limit)" if too_long else ""
            )
            raise ValueError(
                f"{rows[0].origin}: of {len(rows)} {stage} rows from here on none is left: {left_out}{first}"
            )
        held_out = isinstance(source, Part) and stage == "val"  # too few rows to have every column
        if stage != "calibration" and not held_out:  # the rows of calibration are what predict writes
            val = getattr(self, "val", None)
            alone = stage == "train" and (val is None or isinstance(val, Part))
            self.reading.refuse_unused_mapping(rows, alone)
        return kept

    def compare_content(self, state: Mapping[str, Any]) -> None:
        """Warn if the training rows differ from those of a checkpoint's state; checkpoints of earlier versions have no
        checksum.
        """
        if self.content and state.get("content", self.content) != self.content:
            self.warn_of_other_rows()

    def warn_of_other_rows(self) -> None:
        """Warn that a resumed fit goes on with other rows than those of its checkpoint."""
        if self.trainer is None or self.trainer.state.fn in (None, "fit"):
            rank_zero_warn(
                "the training rows are not those that the checkpoint was trained on; the run goes on at the same place "
                "in these rows"
            )

    def read(self, source: str | Source) -> list[Row]:
        """Read the rows of a source."""
        return read_rows(source)

    def settle(self, rows: Sequence[Row], stage: str) -> None:
        """Settle in ``reading`` what only all rows together tell, such as a scale of labels, before the first row is
        encoded.
        """

    def report(self, stage: str, detail: str, name: str | None = None) -> None:
        """Print one line about the last data set, on rank 0: how it was read and what became of its rows."""
        rank_zero_info(f"{name or stage}: {self.reading.line()}; {detail}")

    def check_positions(self, stage: str, longest: int, setting: str) -> None:
        """Refuse rows with more tokens than the Trainer's model has positions.

        Args:
            stage: stage of the rows; if the module samples, the longest completion is added to their length.
            longest: tokens of the longest row.
            setting: name of the limit to lower.

        Raises:
            ValueError: naming both lengths and the way out.
        """
        module: Any = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, HasPositions):
            return
        positions = module.policy.max_positions
        sampling = (
            module.sampling
            if isinstance(module, HasSampling) and (stage == "val" or hasattr(module, "collect"))
            else None
        )
        budget = sampling.max_completion_length if sampling is not None else 0
        if positions is None or longest + budget <= positions:
            return
        and_completion = (
            f" and a completion up to {budget} more (model.sampling.max_completion_length)" if budget else ""
        )
        raise ValueError(
            f"the longest {stage} row has {longest} tokens{and_completion}, but the model has only {positions} "
            "positions: "
            f"lower data.{setting} (longer rows are dropped)" + (" or max_completion_length" if budget else "")
        )

    def ready_loader(self, batches: Sequence[Any]) -> DataLoader[Any]:
        """Hand out this rank's finished batches in order.

        A sampler of one replica keeps Lightning from sharing them out again.
        """
        sampler = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type, var-annotated]
        return DataLoader(batches, sampler=sampler, batch_size=None, collate_fn=_as_is)  # type: ignore[arg-type]


def load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a path or hub id; None stays None until :meth:`RowsDataModule.take_tokenizer`."""
    if not isinstance(tokenizer, str):
        return tokenizer  # type: ignore[return-value]
    return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)  # type: ignore[no-any-return]


class AlignDataModule(RowsDataModule):
    """Base of the DataModules that train.

    Args:
        tokenizer: a tokenizer, or a path or hub id for ``AutoTokenizer``; None = the module's.
        train: training rows: a source, or what :class:`Files` takes (file, folder, hub id).
        val: held-out rows, or several sets of them by name (in DataModules with domains), or a share of the training
            rows to hold out, in (0, 1); None = no validation.
        columns: our name of a column -> its name in the data, where detection does not suffice.
        drop_long: drop rows that are too long and count them; False makes them an error.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them; ``raise`` makes them an error.
        seed: of the shuffles; None = the run's.

    Raises:
        ValueError: ``on_bad_row`` is neither, or ``columns`` maps names that the DataModule does not read.
    """

    chat: bool | None = None  # whether text prompts are user messages; None = by rule, see :meth:`is_chat`
    chat_template_kwargs: dict[str, Any] | None = None  # variables that the chat template is given

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | None,
        train: str | Source | None,
        val: float | str | Source | Mapping[str, str | Source] | None,
        columns: dict[str, str] | None,
        drop_long: bool,
        on_bad_row: Literal["raise", "drop"],
        seed: int | None,
    ) -> None:
        super().__init__(train, columns)
        if on_bad_row not in ("raise", "drop"):
            raise ValueError(f"on_bad_row must be raise or drop, got {on_bad_row!r}")
        self.tokenizer = load_tokenizer(tokenizer)
        self.drop_long, self.on_bad_row, self.seed = drop_long, on_bad_row, run_seed(seed)
        share = parse_share(val)
        self.val: Any = val if share is None else share
        self._has_settings = False  # whether ``chat_template_kwargs`` are already set in the tokenizer's template
        self._sampler: StepSampler | None = None
        self._resume: dict[str, int] | None = None

    def prepare(self, stage: str) -> None:
        """Begin ``setup``: take the tokenizer, and hold rows out where ``val`` is a share.

        Raises ValueError for a stage that only reads held-out rows when there are none, and for settings that the chat
        template does not read.
        """
        if stage in ("validate", "test") and self.val is None:
            raise ValueError("there are no held-out rows to evaluate; set data.val")
        self.take_tokenizer()
        if self.chat_template_kwargs and getattr(self, "chat", None) is False:
            raise ValueError(
                "data.chat_template_kwargs are settings of the chat template, and data.chat is false, which leaves it "
                "out: leave out one of them"
            )
        if self.chat_template_kwargs and not self._has_settings:
            # a copy: the model's own tokenizer, which is exported, keeps its template
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.chat_template = set_in_template(self.tokenizer.chat_template, self.chat_template_kwargs)
            self._has_settings = True
        if isinstance(self.val, float):
            share, rows = self.val, self.read(self.train)
            self.train, self.val = hold_out(rows, share, self.seed, self.columns)
            rank_zero_info(
                f"val: {len(self.val.rows())} of {len(rows)} rows are held out of train, by their content and seed "
                f"{self.seed} (data.val {share})"
            )

    def is_chat(self, row: Row) -> bool:
        """Whether a row's text prompt becomes one user message, as ``chat`` says. If ``chat`` is None, it does if the
        tokenizer has a chat template and the row's source does not say that its texts are plain.
        """
        if self.chat is not None:
            return self.chat
        return self.tokenizer.chat_template is not None and not row.plain

    def say_chat(self, row: Row, is_text: bool) -> None:
        """Note in ``reading`` how the text prompt of a row was read, unless it holds messages."""
        if is_text and self.is_chat(row):
            self.reading.note("text prompts are user messages of the chat template")
        elif is_text:
            has = self.tokenizer.chat_template is not None
            why = "the tokenizer has no chat template" if not has else "as their source says" if row.plain else ""
            self.reading.note(f"text prompts are plain text ({why if self.chat is None else 'data.chat: false'})")

    def step_loader(
        self,
        dataset: Dataset[Any],
        lengths: Sequence[int],
        weights: Sequence[int],
        batch_size: int,
        sampler: Callable[..., StepSampler] = StepSampler,
    ) -> StepLoader:
        """Make the training loader, at the position of a loaded checkpoint. Raises ValueError if the checkpoint counts
        other batches than this run.
        """
        if self.trainer is None:
            raise ValueError(
                "the training loader needs a Trainer, which says how many micro-batches and ranks share a step; use "
                "trainer.fit"
            )
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                "overfit_batches replaces the sampler that plans the steps; use limit_train_batches and "
                "limit_val_batches"
            )
        trainer = self.trainer
        self._sampler = sampler(
            lengths,
            weights,
            batch_size,
            accumulate=trainer.accumulate_grad_batches,
            num_replicas=self.world_size,
            rank=self.rank,
            seed=self.seed,
            current_epoch=lambda: trainer.current_epoch,
        )
        self._apply_resume()
        return StepLoader(dataset, sampler=self._sampler, batch_size=None)

    def held_out_loader(
        self, dataset: Dataset[Any], lengths: Sequence[int], weights: Sequence[int], batch_size: int
    ) -> DataLoader[MicroBatch]:
        """Give rows in their order. A denominator counts one micro-batch over all ranks."""
        sampler = StepSampler(lengths, weights, batch_size, num_replicas=self.world_size, rank=self.rank, shuffle=False)
        return DataLoader(dataset, sampler=sampler, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its micro-batches were trained on, how many a whole epoch has, and the rows'
        checksum.

        The Trainer's own counter can restart at 0 inside an epoch on a second resume, so the sampler counts; the
        Trainer only tells whether a batch is in flight.
        """
        if self._sampler is None or self.trainer is None:
            return {}
        epoch, handed_out = self._sampler.begun
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        in_flight = current.ready - current.processed  # type: ignore[attr-defined]
        place = {"epoch": epoch, "position": handed_out - in_flight, "length": len(self._sampler)}
        return place | {"content": self.content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the run go on where the checkpoint was written, also if the loader exists already."""
        self._resume = dict(state_dict)
        self.compare_content(state_dict)
        self._apply_resume()

    def _apply_resume(self) -> None:
        if self._resume is None or self._sampler is None:
            return
        resume, length = self._resume, len(self._sampler)
        if 0 < resume["position"] < resume["length"] != length:
            raise ValueError(
                f"the checkpoint was written inside an epoch of {resume['length']} micro-batches and this run has "
                f"{length}: "
                "resume with the same rows, batch_size, accumulate_grad_batches and ranks, or from the end of an epoch"
            )
        self._sampler.start_at(resume["epoch"], resume["position"])

    def forget_position(self) -> None:
        """Make a run start at the beginning, unless a checkpoint is loaded afterwards."""
        self._sampler, self._resume = None, None


def _as_is(batch: Any) -> Any:
    return batch
