"""What a method with a teacher reads beside a row's prompt: a completion, and the text for the teacher."""

import re
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from transformers import PreTrainedTokenizerBase

from datamodules.formats.reading import is_empty
from datamodules.sources.source import Row
from datamodules.tokens.encoding import Dialogue, Message, encode_example, is_rendered

NAME = re.compile(r"\{([^{}]+)\}")  # in a condition


@runtime_checkable
class HasTeacher(Protocol):
    """A module that learns from a teacher; the attributes beside the first are those of ``Lessons``."""

    on_policy: float  # share of the prompts that it answers itself
    completions: str | None
    condition: str | None


@dataclass(frozen=True)
class Lessons:
    """The columns that such a module reads."""

    completions: str | None = None  # the column with the completions to learn from; None = it samples them all
    condition: str | None = None  # what the teacher reads in place of the question; None = what the student reads

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the module reads, each with its role."""
        told = [name for name in NAME.findall(self.condition or "") if name != "prompt"]
        learned = {self.completions: "completion to learn from"} if self.completions is not None else {}
        return dict.fromkeys(told, "what the teacher is told") | learned

    def encode_completion(self, tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], row: Row) -> list[int]:
        """Encode the row's completion behind its rendered prompt, whose tokens are ``ids``, with its end token.

        Raises ValueError, with the row's origin, for a row without a completion, and for a prompt that none can follow.
        """
        given = row.columns.get(str(self.completions))
        if not isinstance(given, str) or is_empty(given):
            raise ValueError(
                f"{row.origin}: model.completions names the column {self.completions!r}, which holds no text here; "
                "name another column, or sample every completion with model.on_policy 1"
            )
        tokens = encode_example(tokenizer, prompt, given, row.origin)
        learned = sum(tokens.supervised)
        if tokens.ids[:-learned] != ids:
            raise ValueError(
                f"{row.origin}: the prompt ends inside an assistant turn, behind which a row's completion is not read; "
                "sample every completion with model.on_policy 1"
            )
        return tokens.ids[-learned:]

    def ask_teacher(self, tokenizer: PreTrainedTokenizerBase, prompt: Dialogue, row: Row) -> Dialogue:
        """Write the prompt that the teacher reads, with ``condition`` in place of the question.

        The question is the prompt, or the last user message of a conversation.

        Raises ValueError, with the row's origin, for a column without text, for a conversation that does not end with
        its user, and for a prompt that the chat template has rendered already.
        """
        if isinstance(prompt, str) and is_rendered(tokenizer, prompt):
            raise ValueError(
                f"{row.origin}: model.condition is written beside the question, and this prompt is rendered by the "
                "chat template already: give the question itself"
            )
        if isinstance(prompt, str):
            return fill_condition(str(self.condition), prompt, row)
        if prompt[-1]["role"] != "user":
            raise ValueError(
                f"{row.origin}: model.condition is written into the last message, which must be the user's"
            )
        last = {**prompt[-1], "content": fill_condition(str(self.condition), prompt[-1]["content"], row)}
        return [*prompt[:-1], cast(Message, last)]


def fill_condition(condition: str, question: str, row: Row) -> str:
    """Write the question for ``{prompt}`` in a condition, and the text of a column for its name in braces.

    Raises ValueError, with the row's origin, for a column without text.

    >>> fill_condition("{answer} is right. {prompt}", "1+1=", Row({"prompt": "1+1=", "answer": "2"}, "row 1", ""))
    '2 is right. 1+1='
    """

    def find(named: re.Match[str]) -> str:
        value = question if named[1] == "prompt" else row.columns.get(named[1])
        if is_empty(value) or isinstance(value, list | dict):
            raise ValueError(
                f"{row.origin}: model.condition names {named[0]}, and the row has no text there; its columns are "
                f"{', '.join(row.columns)}"
            )
        return str(value)

    return NAME.sub(find, condition)
