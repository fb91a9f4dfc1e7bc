"""The prompts of preference data, to sample from: the third step of InstructGPT (arXiv 2203.02155) on the data of the
second.
"""

import json
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from datamodules.formats.columns import Columns, check_mapping, renamed
from datamodules.formats.preference_columns import KNOWN, READERS, _prompt, _shape
from datamodules.formats.preference_turns import split_answers
from datamodules.sources.files import read_rows
from datamodules.sources.source import Row, Source
from datamodules.tokens.chat import Dialogue


class PreferencePrompts(Source):
    """Rows ``prompt`` (text or messages) with the answer None, of whatever ``PreferenceDataModule`` reads; equal
    prompts once, ties too.

    Without a column for it, a prompt is the turns that all answers share, such as in HH-RLHF's transcripts.

    Args:
        path: file, folder or hub id.
        columns: our column name -> the data's.
        chat: instructions and transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages; None = where the
            tokenizer of the DataModule has a chat template, as for reward models and DPO. Other text prompts stay text,
            and ``data.chat`` says how they are rendered.
        on_bad_row: ``drop`` leaves out rows that cannot be read, with a count of them; ``raise`` makes them an error.
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
        check_mapping(columns or {}, KNOWN)
        self.path, self.columns, self.chat, self.on_bad_row = path, columns or {}, chat, on_bad_row

    def rows(self) -> list[Row]:
        """Each prompt where it comes first. Raises ValueError naming file and line, or when no row can be read."""
        prompts: dict[str, Row] = {}
        problems: list[ValueError] = []
        given = read_rows(self.path)
        for row in given:
            try:
                prompt = preference_prompt(row, self.columns, bool(self.chat))
            except ValueError as error:
                if self.on_bad_row == "raise":
                    raise ValueError(
                        f"{error}; mend the row, or set on_bad_row: drop of PreferencePrompts to leave such rows out"
                    ) from error
                problems.append(error)
                continue
            prompts.setdefault(json.dumps(prompt), Row({"prompt": prompt, "answer": None}, row.origin, row.source))
        if not prompts:
            raise ValueError(
                f"{given[0].origin}: none of {len(given)} rows from here on can be read; the first: {problems[0]}"
            )
        bad = f", {len(problems)} bad rows dropped (the first: {problems[0]})" if problems else ""
        rank_zero_info(f"{self.path}: {len(prompts)} different prompts in {len(given)} rows{bad}")
        return list(prompts.values())


def preference_prompt(row: Row, columns: Columns, template: bool) -> Dialogue:
    """The prompt of a row as ``preference_example`` reads it, of a tie too. Raises ValueError with the row's origin."""
    record = renamed(row, columns)
    shape = _shape(record, columns, row.origin)
    answers = READERS[shape](record, shape, row.origin).answers
    implicit = shape[0] in ("chosen_messages", "messages")
    prompt, _ = split_answers(
        answers, None if implicit else _prompt(record, columns, row.origin, template), row.origin, template
    )
    if not prompt:
        raise ValueError(f"{row.origin}: the answers share no turn, so there is no prompt")
    return prompt
