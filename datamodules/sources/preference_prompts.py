"""Prompts of preference data, to sample from.

The third step of InstructGPT (arXiv 2203.02155) samples from the data of the second.
"""

import json
from dataclasses import replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from datamodules.formats.conversation import Asked
from datamodules.formats.preference_shapes import read_answers, read_compared
from datamodules.formats.reading import Cells, Reading, UnclearColumn
from datamodules.formats.table import check_mapping
from datamodules.sources.files import read_rows
from datamodules.sources.source import Row, Source


class PreferencePrompts(Source):
    """Returns the prompts of rows that ``PreferenceDataModule`` can read, each once, with the answer None.

    A row has ``prompt`` (text or messages), ``answer`` and, where the data have them, ``tools``. Rows that are ties
    count too. Where no column holds the prompt, it is the turns that all answers share, as in HH-RLHF's transcripts.

    Args:
        path: file, folder or hub id.
        columns: our name of a column -> its name in the data.
        chat: instructions and transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages. None = if the
            DataModule's tokenizer has a chat template, as for reward models and DPO. Other text prompts stay text, and
            ``data.chat`` says how they are rendered.
        on_bad_row: ``drop`` leaves out rows that cannot be read and counts them; ``raise`` makes them an error.

    Raises:
        ValueError: ``on_bad_row`` is another word, or ``columns`` maps a name that is not read.
    """

    def __init__(
        self,
        path: str,
        columns: dict[str, str] | None = None,
        chat: bool | None = None,
        on_bad_row: Literal["raise", "drop"] = "raise",
    ) -> None:
        if on_bad_row not in ("raise", "drop"):
            raise ValueError(f"on_bad_row must be raise or drop, got {on_bad_row!r}")
        check_mapping(columns or {}, "preference")
        self.path, self.columns, self.chat, self.on_bad_row = path, columns or {}, chat, on_bad_row

    def rows(self) -> list[Row]:
        """Return each prompt where it occurs first. Raises ValueError with file and line, or if no row can be read."""
        prompts: dict[str, Row] = {}
        problems: list[ValueError] = []
        given = read_rows(self.path)
        reading = Reading("preference", self.columns)
        for row in given:
            try:
                asked = preference_prompt(row, reading, bool(self.chat))
            except UnclearColumn:
                raise
            except ValueError as error:
                if self.on_bad_row == "raise":
                    raise ValueError(
                        f"{error}; mend the row, or set PreferencePrompts' on_bad_row: drop to leave such rows out"
                    ) from error
                problems.append(error)
                continue
            columns = {"prompt": asked.prompt, "answer": None} | ({"tools": asked.tools} if asked.tools else {})
            prompts.setdefault(json.dumps(columns), replace(row, columns=columns))
        if not prompts:
            raise ValueError(
                f"{given[0].origin}: none of {len(given)} rows from here on can be read; the first: {problems[0]}"
            )
        reading.refuse_unused_mapping(given)
        read = len(given) - len(problems)
        reading.counts.update(
            {"used": len(prompts), "with an earlier prompt": read - len(prompts), "bad": len(problems)}
        )
        if problems:
            reading.note(f"the first bad row: {problems[0]}")
        rank_zero_info(f"{self.path}: prompts of {reading.line()}")
        return list(prompts.values())


def preference_prompt(row: Row, reading: Reading, template: bool) -> Asked:
    """Read the prompt of a row with its context, as ``preference_example`` does, also of a tie.

    Raises ValueError with the row's origin.
    """
    cells = Cells(row, reading)
    compared = read_compared(cells, needs_verdict=False, decided=False)
    asked, _ = read_answers(cells, compared.answers, template, chat=template)
    for name in ("margin", "strength"):
        cells.take(name)
    reading.close(cells, compared.shape)
    if not asked.prompt:
        raise ValueError(f"{row.origin}: the answers share no turn, so there is no prompt")
    return asked
