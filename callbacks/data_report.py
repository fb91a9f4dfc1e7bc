"""What is in the data? Reports it before training starts."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.measures.documents import Document, find_concerns, find_leaks, report_split, split_row
from callbacks.phase import find_tensorboards, new_figure
from callbacks.samples import escape_cell
from callbacks.writers.output_files import write_json
from modules.types import make_printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IDENTIFIED = 2000  # documents whose language is identified
LENGTHS = ("min", "median", "mean", "p95", "max")


@runtime_checkable
class TokenRow(Protocol):
    """A row of tokens in which some are supervised."""

    ids: list[int]  # [T]
    supervised: list[bool]  # [T]
    documents: tuple[int, ...]  # lengths of the documents in a packed row; empty = one document


@runtime_checkable
class ComparedRow(Protocol):
    """A prompt with the completions that are compared."""

    prompt: list[int]
    completions: list[list[int]]


class ReportedData(Protocol):
    """The part of a DataModule that the report reads."""

    tokenizer: Any
    train_rows: Sequence[Any]
    val_rows: Sequence[Any]
    dropped: dict[str, int]  # rows left out because they are too long, by stage
    bad: dict[str, int]  # rows that could not be read, by stage
    max_length: int  # tokens of a row


class DataReport(Callback):
    """Reports what the training and held-out rows contain, at the start of ``fit`` and ``validate``.

    Rank zero measures the numbers of ``report_split``. It prints them as a table, writes them to a JSON file under
    ``train`` and ``val``, and logs ``data/report`` and ``data/lengths`` to TensorBoard. A ``fast_dev_run`` writes no
    file.

    One warning follows for each of these: more than 1 % duplicates, training rows among the held-out rows, empty
    answers, and more than 5 % of the rows left out.

    A packed row is split into its documents. In preference data, each completion with its prompt is one document. Other
    kinds of data are not reported, and one line says so. ``languages`` gives the share of each language in the answers
    of at most 2000 documents, taken at even distances.

    Args:
        path: the JSON file. Its parent folders are made and an earlier file is replaced. None = ``data_report.json`` in
            TensorBoard's folder, if there is one.

    Raises:
        ValueError: ``path`` is a folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.is_dir():
            raise ValueError(
                f"DataReport: {self.path} is a folder; name a file, such as {self.path / 'data_report.json'}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the data before the first step."""
        self._report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the data, unless the validation belongs to a fit."""
        if trainer.state.fn == "validate":
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        data = cast(ReportedData, trainer.datamodule)  # type: ignore[attr-defined]
        stages = {stage: rows for stage in ("train", "val") if (rows := getattr(data, f"{stage}_rows", None))}
        if not stages or not all(isinstance(rows[0], TokenRow | ComparedRow) for rows in stages.values()):
            rank_zero_info("data report: these data are not rows with learned tokens, so there is nothing to report")
            return
        documents = {
            stage: [document for row in rows for document in find_documents(row)] for stage, rows in stages.items()
        }
        reports = {stage: report_documents(data, stage, len(rows), documents[stage]) for stage, rows in stages.items()}
        if len(stages) == 2:
            reports["train"]["leaked"] = find_leaks(documents["train"], documents["val"])
        self._publish(trainer, reports, documents)
        for stage, numbers in reports.items():
            for sentence in find_concerns(stage, numbers):
                rank_zero_warn(sentence)

    def _publish(
        self, trainer: Trainer, reports: dict[str, dict[str, Any]], documents: dict[str, list[Document]]
    ) -> None:
        from rich.console import Console
        from rich.table import Table

        lines = write_table(reports)
        loggers = find_tensorboards(trainer)
        for logger in loggers:
            figure = new_figure()
            draw_lengths(figure, documents)
            logger.experiment.add_figure("data/lengths", figure, global_step=trainer.global_step)
            logger.experiment.add_text("data/report", write_markdown_table(lines), global_step=trainer.global_step)
        lines = [[make_printable(cell) for cell in line] for line in lines]
        shown = Table(*lines[0], title="data report")
        for line in lines[1:]:
            shown.add_row(*(cell.replace("[", "\\[") for cell in line))  # rich reads brackets as styles
        Console().print(shown)
        path = self.path or next((Path(logger.log_dir) / "data_report.json" for logger in loggers), None)
        if path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            write_json(path, reports)
            rank_zero_info(f"data report: {path}")


def find_documents(row: TokenRow | ComparedRow) -> list[Document]:
    """Split a row into its documents."""
    if isinstance(row, TokenRow):
        return split_row(row.ids, row.supervised, row.documents)
    return [Document(row.prompt + ids, [False] * len(row.prompt) + [True] * len(ids)) for ids in row.completions]


def report_documents(data: ReportedData, stage: str, rows: int, documents: list[Document]) -> dict[str, Any]:
    """Measure one stage: the numbers of ``report_split``, the rows that the DataModule left out, and the languages."""
    tokenizer = data.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    numbers = report_split(rows, documents, set(tokenizer.all_special_ids), decode, data.max_length)
    drawn = documents[:: -(-len(documents) // MAX_IDENTIFIED)]
    texts = ("\n".join(map(decode, document.answers)) for document in drawn)
    return {**numbers, "dropped": data.dropped[stage], "bad": data.bad[stage], "languages": guess_languages(texts)}


def guess_languages(texts: Iterable[str]) -> dict[str, float] | None:
    """Return the share of each language code among the texts that have letters, the most frequent first.

    Returns None when py3langid is not installed.
    """
    try:
        identify = import_module("py3langid").classify
    except ModuleNotFoundError:
        return None
    found = [identify(text)[0] for text in texts if any(letter.isalpha() for letter in text)]
    return {
        code: found.count(code) / len(found) for code in sorted(set(found), key=lambda code: (-found.count(code), code))
    }


def write_table(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the reports as rows of text: one row of headings, then one row per measure."""
    rows = {
        "rows": "{rows}",
        "documents": "{documents}",
        "tokens": "{tokens}",
        "supervised tokens": "{supervised_share:.1%}",
        "exact duplicates": "{duplicates} ({duplicate_share:.1%})",
        "same prompt, other answer": "{same_prompt}",
        "also held out": "{leaked}",
        "empty answers": "{empty_outputs} of {answers}",
        "one-token answers": "{one_token_outputs} of {answers}",
        "prompt tokens: " + ", ".join(LENGTHS): "{prompt_length}",
        "answer tokens: " + ", ".join(LENGTHS): "{output_length}",
        "left out": "{dropped} too long, {bad} unreadable",
        "truncated": "0 (rows are never cut; {at_limit} exactly at the limit)",
        "answers with lists": "{list_share:.1%}",
        "answers that refuse": "{refusal_share:.1%}",
        "answers that begin Sure, ...": "{opener_share:.1%}",
        "first words of answers": "{first_words}",
        "languages of answers": "{languages}",
    }
    cells = [
        {**numbers, "leaked": numbers.get("leaked", "-"), **{key: _cell(key, numbers[key]) for key in COMPOUND}}
        for numbers in reports.values()
    ]
    return [
        ["measure", *reports],
        *([name, *(pattern.format(**values) for values in cells)] for name, pattern in rows.items()),
    ]


COMPOUND = ("prompt_length", "output_length", "first_words", "languages")


def _cell(key: str, values: dict[str, float] | None) -> str:
    if values is None:
        return "unknown: pip install 'lightning-align[language]'"
    if key.endswith("length"):
        return ", ".join(f"{value:.4g}" for value in values.values()) or "-"
    return ", ".join(f"{name} {share:.1%}" for name, share in values.items()) or "-"


def write_markdown_table(lines: list[list[str]]) -> str:
    """Return the table as Markdown."""
    rows = ["| " + " | ".join(escape_cell(cell) for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def draw_lengths(figure: "Figure", documents: dict[str, list[Document]]) -> None:
    """Draw histograms of the lengths: prompts on the left, answers on the right.

    The bars show shares, so that a small set can be compared with a large one.
    """
    for axes, name in zip(figure.subplots(1, 2), ("prompt", "answer"), strict=True):
        for stage, group in documents.items():
            answers = [len(answer) for document in group for answer in document.answers]
            lengths = (
                answers if name == "answer" else [len(prompt) for document in group if (prompt := document.prompt)]
            )
            if lengths:
                axes.hist(
                    lengths,
                    bins=40,
                    weights=[1 / len(lengths)] * len(lengths),
                    alpha=0.5,
                    label=f"{stage}, {len(lengths)}",
                )
        axes.set(xlabel=f"tokens of a {name}" if name == "prompt" else "tokens of an answer", ylabel="share")
        if axes.patches:
            axes.legend()
