"""Rows that teach one model to think or not, as a flag in the prompt asks (Qwen3, 2505.09388, section 4.3)."""

import random
from dataclasses import replace
from typing import Any

from datamodules.formats.conversation import looks_like_messages, read_messages
from datamodules.formats.reading import Cells, Reading, is_empty
from datamodules.sources.files import read_rows
from datamodules.sources.source import Row, Source
from modules.functional.thoughts import asks_for_thought, find_thought
from modules.trainer.seeds import run_seed

THINK, NO_THINK = "/think", "/no_think"
ANSWERS = ("completion", "answer")  # the columns of a prompt's answer


class ThinkingFusion(Source):
    """Returns rows with a thought and rows without one, each with the flag ``/think`` or ``/no_think`` in its prompt.

    The flag is written behind the last message of the user, so that it wins over earlier ones. Some rows that think get
    none, since thinking is the default. The answer of a row that does not think begins with an empty thought. Rows hold
    ``messages``, or a prompt with a completion, by any of their names; other columns stay.

    Args:
        thinking: rows whose answers think: a source, or a file, folder or hub id.
        plain: rows whose answers do not.
        unflagged: share of the rows that think without a flag, [0, 1]. Qwen3's is not published.
        separator: text between a prompt and its flag.
        empty: the empty thought, as the chat template writes it.
        prompts: the rows are prompts to sample from; their answers stay as they are.
        seed: of the draw of unflagged rows; None = the run's.

    Raises:
        ValueError: ``unflagged`` is out of range, or ``empty`` is no empty thought.
    """

    def __init__(
        self,
        thinking: str | Source,
        plain: str | Source,
        unflagged: float = 0.2,
        separator: str = " ",
        empty: str = "<think>\n\n</think>\n\n",
        prompts: bool = False,
        seed: int | None = None,
    ) -> None:
        if not 0 <= unflagged <= 1:
            raise ValueError(f"unflagged must lie in [0, 1], got {unflagged}")
        if find_thought(empty) != "" or "</think>" not in empty:
            raise ValueError(f"empty must be an empty thought, such as '<think></think>', got {empty!r}")
        self.thinking, self.plain, self.unflagged, self.separator = thinking, plain, unflagged, separator
        self.empty, self.prompts, self.seed = empty, prompts, run_seed(seed)

    def rows(self) -> list[Row]:
        """Return the rows that think, then the others, each with an origin of its own.

        Raises ValueError, with the origin, for a row of the other kind.
        """
        draw = random.Random(self.seed)
        thinking = [self.write(row, True, draw.random() >= self.unflagged) for row in read_rows(self.thinking)]
        names = {row.origin for row in thinking}
        plain = [self.write(row, False, True) for row in read_rows(self.plain)]
        return thinking + [
            replace(row, origin=f"{row.origin} {NO_THINK}") if row.origin in names else row for row in plain
        ]

    def write(self, row: Row, thinks: bool, flagged: bool) -> Row:
        """Return a row with its flag and, where it does not think, an empty thought.

        A row that thinks and asks not to, in an earlier message, gets a flag in any case.
        """
        cells = Cells(row, Reading("instruction"))
        columns = dict(row.columns)
        asks = next((name for name in ("messages", "prompt", "instruction") if cells.holds(name)), None)
        if asks is None:
            raise ValueError(
                f"{row.origin}: ThinkingFusion needs messages, or a prompt with a completion; found "
                f"{', '.join(map(str, row.columns))}"
            )
        if asks == "instruction" and cells.holds("input"):
            asks = "input"  # which stands below the instruction
        asked = self.read(cells, asks)
        answers = next((name for name in ANSWERS if cells.holds(name)), None) if asks != "messages" else None
        written = {cells.name(name) for name in (*ANSWERS, "reasoning") if cells.holds(name)}
        if not self.prompts:
            place = asked if answers is None else self.read(cells, answers)
            answered = self.answer(cells, place, thinks)
            if answers is None:
                asked = answered
            else:
                columns[cells.name(answers)] = answered
        beside = [text for name, text in row.columns.items() if isinstance(text, str) and name not in written]
        if flagged or any(asks_for_thought(part) is False for part in (asked, *beside)):
            asked = self.flag(asked, THINK if thinks else NO_THINK, row.origin)
        columns[cells.name(asks)] = asked
        return replace(row, columns=columns)

    def read(self, cells: Cells, name: str) -> Any:
        """Return the text in a column, or its messages with our names of their fields."""
        value = cells.values[cells.name(name)]
        if not looks_like_messages(value):
            if not isinstance(value, str):
                raise cells.wrong_type(name, value, "text or messages")
            return value
        found = read_messages(value, cells.place(name))
        return [
            {**turn, "weight": 0} if number in found.unlearned else dict(turn)
            for number, turn in enumerate(found.turns)
        ]

    def answer(self, cells: Cells, answer: Any, thinks: bool) -> Any:
        """Return an answer with an empty thought where it does not think. Raises ValueError for one that thinks."""
        last = answer if isinstance(answer, str) else answer[-1]["content"]
        if not isinstance(answer, str) and answer[-1]["role"] != "assistant":
            raise ValueError(
                f"{cells.origin}: the row has no answer behind the last message of the user: set ThinkingFusion's "
                "prompts: true for prompts to sample from"
            )
        thought = find_thought(last)
        beside = "" if isinstance(answer, str) else answer[-1].get("reasoning_content", "")
        column = cells.values[cells.name("reasoning")] if cells.holds("reasoning") else ""
        has_thought = any(part and not is_empty(part) for part in (thought, beside, column))
        if has_thought != thinks:
            what = (
                "no thought, such as <think>...</think> before its answer: move it to plain"
                if thinks
                else "a thought: remove it, or move the row to thinking"
            )
            raise ValueError(f"{cells.origin}: the row is among ThinkingFusion's {self.kind(thinks)} and has {what}")
        if thinks or thought is not None:
            return answer
        if isinstance(answer, str):
            return self.empty + answer
        return [*answer[:-1], {**answer[-1], "content": self.empty + last}]

    @staticmethod
    def kind(thinks: bool) -> str:
        """Return the name of the argument that brings such rows."""
        return "thinking" if thinks else "plain"

    def flag(self, asked: Any, flag: str, origin: str) -> Any:
        """Return a prompt with a flag behind its last message of the user."""
        if isinstance(asked, str):
            return asked + self.separator + flag
        places = [place for place, turn in enumerate(asked) if turn["role"] == "user"]
        if not places:
            raise ValueError(f"{origin}: there is no message of the user to write {flag} into")
        turns = list(asked)
        turns[places[-1]] = {**turns[places[-1]], "content": turns[places[-1]]["content"] + self.separator + flag}
        return turns
