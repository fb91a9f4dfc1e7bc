"""Does the model refuse harmless prompts, or comply with harmful ones?"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.measures.refusals import is_refusal, refusal_rates
from callbacks.phase import find_tensorboards, require_period
from callbacks.samples import escape_cell, indent_block
from modules.trainer.ranks import from_all_ranks, log_equal
from modules.types import FULL_COMPLIANCE, FULL_REFUSAL, REFUSAL_LABELS, cut_final_text

NUM_MISJUDGED = 3  # wrong answers shown of each kind


@runtime_checkable
class Responds(Protocol):
    """The part of a module that ``Refusal`` calls."""

    def respond(self, conversations: Sequence[list[dict[str, str]]], max_completion_length: int = 256) -> list[str]:
        """Return greedy answers of the current weights, in order."""


class ClassifiesAnswers(Protocol):
    """A judge of refusals, such as ``RefusalJudge``."""

    def classify(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str | None]:
        """Return ``1_full_compliance``, ``2_full_refusal`` or ``3_partial_refusal`` per answer; None = no valid
        verdict.
        """


class RowSource(Protocol):
    """A source of rows, each with ``columns`` and ``origin``."""

    def rows(self) -> Any:
        """Return all rows in a fixed order."""


class AskedPrompt(NamedTuple):
    """One prompt, as a row of the file gives it."""

    text: str
    safe: bool  # True = should be answered
    type: str  # the kind of prompt; "" = none given


class GivenAnswer(NamedTuple):
    """The model's answer to a prompt, with its label."""

    row: int  # index of the prompt
    text: str
    label: str | None  # None = the judge had no valid verdict


class Refusal(Callback):
    """Asks the model safe and unsafe prompts at the end of validation and counts its refusals (XSTest, 2308.01263).

    The sanity check counts as a validation. Logs shares in [0, 1], over all ranks:

    - ``val/refusal/over_refusal``: safe prompts that are refused in full.
    - ``val/refusal/unsafe_compliance``: unsafe prompts that are answered in full.
    - With a judge, ``val/refusal/over_refusal_with_partial``: safe prompts that are refused in full or in part.

    With a judge it also logs ``val/refusal/invalid``: the number of prompts without a valid verdict, which are in no
    share. TensorBoard gets ``val/refusal``: a table by type of prompt, and a few of the wrong answers.

    Without a judge, an answer is a refusal if it begins like one, see ``is_refusal``. The reasoning up to ``</think>``
    is not read. A ModelCheckpoint that monitors one of these metrics needs the same ``every_n_epochs``.

    Args:
        prompts: a CSV or JSONL file with the columns ``prompt``, ``label`` (``safe`` or ``unsafe``) and optionally
            ``type``.
        max_completion_length: tokens of an answer, >= 1.
        every_n_epochs: epochs between measurements; ``validate`` always measures.
        judge: labels the answers, partial refusals included; None = the first words decide.
        limit: number of prompts to ask, at least 2, taken at even distances from the unsafe and then the safe ones.
        source: a source of such rows, in place of a file.

    Raises:
        ValueError: a setting is out of range, or not exactly one of ``prompts`` and ``source`` is set; in ``setup``, a
            row is bad, one of the two kinds of prompt is missing, or the module cannot answer; at the start of a fit,
            the fit has no validation.
    """

    def __init__(
        self,
        prompts: str | None = None,
        max_completion_length: int = 128,
        every_n_epochs: int = 1,
        judge: ClassifiesAnswers | None = None,
        limit: int | None = None,
        source: RowSource | None = None,
    ) -> None:
        require_period("every_n_epochs", every_n_epochs)
        if max_completion_length < 1 or (limit is not None and limit < 2):
            raise ValueError(
                "Refusal: max_completion_length must be at least 1 and limit at least 2 (one prompt of each kind), "
                f"got {max_completion_length} and {limit}"
            )
        if (prompts is None) == (source is None):
            raise ValueError("Refusal: set either prompts (a file) or source")
        self.source = prompts if prompts is not None else source
        self.max_completion_length, self.every_n_epochs, self.judge, self.limit = (
            max_completion_length,
            every_n_epochs,
            judge,
            limit,
        )
        self.prompts: list[AskedPrompt] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts, and refuse a module that cannot answer."""
        if not isinstance(pl_module, Responds) or not getattr(pl_module, "forms_logits", True):
            raise ValueError(
                f"Refusal asks the model, but {type(pl_module).__name__} gives no answers: remove the callback."
            )
        if stage in ("fit", "validate") and not self.prompts:
            assert self.source is not None
            prompts = sorted(read_prompts(self.source), key=lambda prompt: prompt.safe)
            count = min(self.limit or len(prompts), len(prompts))
            self.prompts = [prompts[index * len(prompts) // count] for index in range(count)]
            if {prompt.safe for prompt in self.prompts} != {True, False}:
                only = "safe" if self.prompts[0].safe else "unsafe"
                raise ValueError(
                    f"{read_name(self.source)}: all {count} prompts are {only}; add prompts of the other kind, or a "
                    "model that treats all prompts alike looks perfect"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without validation. Raises ValueError."""
        if not trainer.enable_validation:
            raise ValueError(
                "Refusal asks at the end of validation, but this fit has none: set data.val, or remove the callback."
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask this rank's share of the prompts and log over all ranks."""
        always = trainer.state.fn == "validate" or trainer.sanity_checking
        if not always and (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        mine = range(trainer.global_rank, len(self.prompts), trainer.world_size)
        answers = sorted(from_all_ranks(self._ask(pl_module, mine)))
        rates = refusal_rates([answer.label for answer in answers], [prompt.safe for prompt in self.prompts])
        if self.judge is None:
            del rates["over_refusal_with_partial"]  # the matcher knows no partial refusal
        metrics = {f"val/refusal/{name}": rate for name, rate in rates.items()}
        log_equal(pl_module, metrics)
        for logger in find_tensorboards(trainer):
            if trainer.sanity_checking:  # Lightning logs nothing then
                logger.log_metrics(metrics, step=trainer.global_step)
            logger.experiment.add_text(
                "val/refusal", report_rates(self.prompts, answers), global_step=trainer.global_step
            )

    def _ask(self, pl_module: LightningModule, indices: Sequence[int]) -> list[GivenAnswer]:
        """Ask some of the prompts and label the answers."""
        assert isinstance(pl_module, Responds)
        prompts = [self.prompts[index].text for index in indices]
        texts = pl_module.respond(
            [[{"role": "user", "content": prompt}] for prompt in prompts], self.max_completion_length
        )
        labels = classify_by_matching(texts) if self.judge is None else self.judge.classify(prompts, texts)
        return [GivenAnswer(*answer) for answer in zip(indices, texts, labels, strict=True)]


def classify_by_matching(texts: Sequence[str]) -> list[str | None]:
    """Label answers by their first words after the reasoning: full refusal or full compliance; None if the reasoning
    does not end.
    """
    finals = [cut_final_text(text) for text in texts]
    return [
        None if text and not final else FULL_REFUSAL if is_refusal(final) else FULL_COMPLIANCE
        for text, final in zip(texts, finals, strict=True)
    ]


def report_rates(prompts: Sequence[AskedPrompt], answers: Sequence[GivenAnswer]) -> str:
    """Return Markdown: a table of labels by type, and a few refused safe prompts and answered unsafe prompts.

    ``answers`` are in the order of ``prompts``.
    """
    counts: dict[tuple[bool, str], Counter[str | None]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        counts.setdefault((not prompt.safe, prompt.type), Counter())[answer.label] += 1
    table = ["| type | label | prompts | complied | refused | in part | invalid |", "|---|---|---|---|---|---|---|"]
    for (unsafe, kind), labels in sorted(counts.items()):
        cells = [
            escape_cell(kind),
            "unsafe" if unsafe else "safe",
            labels.total(),
            *(labels[label] for label in (*REFUSAL_LABELS, None)),
        ]
        table.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    sections = ["\n".join(table)]
    for safe, wrong, title in (
        (True, FULL_REFUSAL, "Safe, and refused"),
        (False, FULL_COMPLIANCE, "Unsafe, and answered"),
    ):
        found = [answer for answer in answers if prompts[answer.row].safe == safe and answer.label == wrong]
        for answer in found[:: max(1, len(found) // NUM_MISJUDGED)][:NUM_MISJUDGED]:
            sections += [f"**{title}**", indent_block(prompts[answer.row].text), "Answer", indent_block(answer.text)]
    return "\n\n".join(sections)


def read_name(source: str | RowSource) -> str:
    """Return the name of a source for messages."""
    return source if isinstance(source, str) else type(source).__name__


def read_prompts(source: str | RowSource) -> list[AskedPrompt]:
    """Read the prompts of a file or source, at least one. Raises ValueError with file and line when a row is bad."""
    located = (
        locate_rows(Path(source)) if isinstance(source, str) else ((row.origin, row.columns) for row in source.rows())
    )
    prompts = [make_prompt(origin, row) for origin, row in located]
    if not prompts:
        raise ValueError(f"{read_name(source)}: no prompts")
    return prompts


def make_prompt(origin: str, row: Any) -> AskedPrompt:
    """Read one row. Raises ValueError with its origin when a column is missing or holds something else."""
    missing = sorted({"prompt", "label"} - set(row)) if isinstance(row, dict) else ["prompt", "label"]
    if missing:
        raise ValueError(
            f"{origin}: no column {' and no column '.join(missing)}; a row needs prompt and label (safe or unsafe)"
        )
    if row["label"] not in ("safe", "unsafe"):
        raise ValueError(f"{origin}: label is {row['label']!r}, expected safe or unsafe")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError(f"{origin}: the prompt is empty or not text")
    return AskedPrompt(row["prompt"], row["label"] == "safe", str(row.get("type") or ""))


def locate_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of a JSONL file, known by its name, or of a CSV file with a header line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file of prompts")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    line = 1
    try:
        if path.suffix == ".jsonl":
            for line, record in enumerate(text.split("\n"), start=1):
                if record.strip():
                    yield f"{path}:{line}", json.loads(record)
        else:
            header: list[str] | None = None
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            for cells in reader:
                if header is not None and cells and len(cells) != len(header):
                    raise csv.Error(f"the row has {len(cells)} cells and the header {len(header)}")
                if header is not None and cells:
                    yield f"{path}:{line}", dict(zip(header, cells, strict=True))
                header, line = header or cells, reader.line_num + 1
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}:{line}: {error}") from error
