"""FLAN: puts data sets into words by templates and mixes them by their sizes (arXiv 2109.01652, 2301.13688)."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from datamodules.formats.strict import Refused, load_json
from datamodules.sources.files import read_rows
from datamodules.sources.source import Row, Source
from modules.trainer.seeds import run_seed

ANSWER, NEXT = "\n\n", "\n\n\n"  # in few-shot prompts: before an answer, before the next example


@dataclass
class FlanTemplate:
    """An input and a target with ``{column}`` placeholders. Double a brace that is meant as a brace."""

    input: str
    target: str
    inverted: bool = False  # asks for what is usually given, such as the question to an answer


@dataclass
class FlanTask:
    """A data set and the templates that ask about it."""

    source: str | Source  # a source, or a file, folder or hub id
    templates: str | list[FlanTemplate]  # a list, or a JSON or YAML file that holds one
    options: str = ""  # follows the input where options are shown, such as "\n\nOptions:\n{choices}"; "" = no options


class FlanTemplates(Source):
    """Makes ``prompt`` and ``completion`` from tables of templates. The source of a row is its task.

    Each row draws:

    - a task, at its mixing rate p_i = min(n_i, cap) / sum_j min(n_j, cap);
    - the next of the task's examples, in shuffled passes over all of them;
    - one of the task's templates, inverted ones as often as ``invert`` says;
    - whether the row is few-shot, and whether it shows its options.

    A few-shot prompt begins with other examples of the task in the same template, with "\\n\\n" between input and
    target and "\\n\\n\\n" between examples. A list in a column is written as lines "- item". A zero-shot prompt ends as
    its template does.

    Args:
        tasks: name -> source, templates, options.
        num_examples: rows, >= 1.
        cap: largest number of examples that counts in the mixing rate, >= 1.
        max_per_task: examples of a task that are used and counted as n_i, from the first on, >= 1.
        shots: examples in front of a few-shot row, >= 1.
        few_shot: share of few-shot rows, [0, 1].
        show_options: share of rows with options among the tasks that have some, [0, 1]; inverted templates show none.
        invert: share of inverted templates where a task has both kinds, [0, 1].
        seed: seed of all draws; None = the run's.

    Raises:
        ValueError: there is no task, or an argument is out of range.
    """

    def __init__(
        self,
        tasks: dict[str, FlanTask],
        num_examples: int,
        cap: int = 3000,
        max_per_task: int = 30000,
        shots: int = 3,
        few_shot: float = 0.5,
        show_options: float = 0.5,
        invert: float = 0.3,
        seed: int | None = None,
    ) -> None:
        if not tasks or min(num_examples, cap, max_per_task, shots) < 1:
            raise ValueError(
                "tasks must name at least one task, and num_examples, cap, max_per_task and shots must be at least 1"
            )
        if not all(0 <= share <= 1 for share in (few_shot, show_options, invert)):
            raise ValueError(
                f"few_shot, show_options and invert must lie in [0, 1], got {few_shot}, {show_options} and {invert}"
            )
        self.tasks, self.num_examples, self.cap, self.max_per_task = tasks, num_examples, cap, max_per_task
        self.shots, self.few_shot, self.show_options, self.invert, self.seed = (
            shots,
            few_shot,
            show_options,
            invert,
            run_seed(seed),
        )

    def rows(self) -> list[Row]:
        """Make ``num_examples`` rows, the same at every call. Raises ValueError with task, template, file and line."""
        draw = random.Random(self.seed)
        names = list(self.tasks)
        data = [read_rows(task.source)[: self.max_per_task] for task in self.tasks.values()]
        for name, examples in zip(names, data, strict=True):
            if self.few_shot and len(examples) <= self.shots:
                raise ValueError(
                    f"task {name!r} has {len(examples)} rows, a few-shot row needs {self.shots} beside its own; lower "
                    "shots or few_shot"
                )
        tables = [_templates(name, self.tasks[name].templates) for name in names]
        orders = [_shuffled_passes(len(examples), draw) for examples in data]
        rates = mixing_rates([len(examples) for examples in data], self.cap)
        chosen = draw.choices(range(len(names)), weights=rates, k=self.num_examples)
        return [self._row(names[task], data[task], next(orders[task]), tables[task], draw) for task in chosen]

    def _row(self, name: str, examples: list[Row], index: int, table: list[FlanTemplate], draw: random.Random) -> Row:
        inverted = [template for template in table if template.inverted]
        straight = [template for template in table if not template.inverted]
        template = draw.choice(inverted if inverted and (not straight or draw.random() < self.invert) else straight)
        options = self.tasks[name].options if not template.inverted and draw.random() < self.show_options else ""

        def filled(text: str, row: Row) -> str:
            return fill(text, row, f"template {table.index(template)} of task {name!r}")

        others = draw.sample(range(len(examples) - 1), self.shots) if draw.random() < self.few_shot else []
        shots = [examples[other + (other >= index)] for other in others]
        parts = [filled(template.input + options, row) + ANSWER + filled(template.target, row) + NEXT for row in shots]
        own = examples[index]
        prompt = "".join(parts) + filled(template.input + options, own) + (ANSWER if shots else "")
        return Row({"prompt": prompt, "completion": filled(template.target, own)}, own.origin, name, plain=True)


def mixing_rates(sizes: Sequence[int], cap: int) -> list[float]:
    """Return examples-proportional mixing rates with a cap: min(n_i, cap) / sum_j min(n_j, cap), in [0, 1].

    Example: sizes 1000 and 30000 with cap 3000 give 0.25 and 0.75.
    """
    capped = [min(size, cap) for size in sizes]
    return [size / sum(capped) for size in capped]


def fill(text: str, row: Row, name: str) -> str:
    """Put the row's columns in place of ``{column}``. Raises ValueError with the row, the text and the column."""
    parts: list[str] = []
    for literal, column in _pieces(text, name):
        parts.append(literal)
        if column is None:
            continue
        value = row.columns.get(column)
        if value is None or value != value:  # NaN, which tables hold where a cell is empty
            found = (
                f"is empty in column {column!r}"
                if column in row.columns
                else f"has no column {column!r}, found {', '.join(row.columns)}"
            )
            raise ValueError(f"{row.origin}: the row {found}; {name} needs it")
        parts.append("\n".join(f"- {item}" for item in value) if isinstance(value, list) else str(value))
    return "".join(parts)


def _pieces(text: str, name: str) -> list[tuple[str, str | None]]:
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{name}: {error} in {text!r}; write a brace that is meant as such twice") from error
    if any(column == "" or spec or conversion for _, column, spec, conversion in pieces):
        raise ValueError(
            f"{name}: a placeholder is the name of a column in braces and nothing else, unlike one in {text!r}"
        )
    return [(literal, column) for literal, column, _, _ in pieces]


def _templates(name: str, given: str | list[FlanTemplate]) -> list[FlanTemplate]:
    table = _read_templates(given) if isinstance(given, str) else given
    if not table:
        raise ValueError(f"task {name!r} has no templates")
    return table


def _read_templates(path: str) -> list[FlanTemplate]:
    """Read a file of templates. Raises ValueError with the file and the entry."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        entries: Any = load_json(text) if path.endswith(".json") else yaml.safe_load(text)
    except Refused as error:
        raise ValueError(f"{path}:{error.line}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: not a readable JSON or YAML file of templates: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of templates, found a {type(entries).__name__}")
    for index, entry in enumerate(entries):
        kinds = {"input": str, "target": str, "inverted": bool}
        if (
            not isinstance(entry, dict)
            or not {"input", "target"} <= set(entry) <= set(kinds)
            or not all(isinstance(entry[key], kinds[key]) for key in entry)
        ):
            raise ValueError(
                f"{path}#{index}: a template has the texts input and target, and may have inverted: true, and nothing "
                "else"
            )
    return [FlanTemplate(**entry) for entry in entries]


def _shuffled_passes(size: int, draw: random.Random) -> Iterator[int]:
    """Yield the indices below ``size`` in random order, each once per pass, without end."""
    while True:
        yield from draw.sample(range(size), size)
