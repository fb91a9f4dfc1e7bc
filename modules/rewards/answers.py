"""Finds the part of a text that is the answer."""

import re


def cut_final_text(text: str) -> str:
    """Return the part of a completion that may hold the answer: the text after the last ``</think>``.

    A completion without these tags is returned whole. One that opens ``<think>`` and never closes it gives "". An
    answer inside the reasoning must not count, because the reader never sees it.
    """
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in text else text


def cut_final_answer(answer: str) -> str:
    """Return the gold answer without its worked solution, stripped: the text after the last ``####`` (GSM8K's mark), or
    all.
    """
    return answer.rpartition("####")[2].strip()


def compile_pattern(pattern: str, owner: str) -> re.Pattern[str]:
    """Compile a regular expression with DOTALL: ``.`` also matches a line end; ``^`` and ``$`` match at the outer ends
    only.

    Args:
        pattern: the regular expression.
        owner: class that asks for it, named in the message.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{owner} got an invalid regular expression {pattern!r}: {error}; correct pattern") from error


def compile_extractor(pattern: str, owner: str) -> re.Pattern[str]:
    """Compile a regular expression like ``compile_pattern``; its only group is the answer.

    Raises:
        ValueError: ``pattern`` is not a regular expression, or it does not have exactly one group.
    """
    compiled = compile_pattern(pattern, owner)
    if compiled.groups != 1:
        raise ValueError(
            f"{owner} needs a pattern with exactly one group, the answer; {pattern!r} has {compiled.groups}; write "
            "(?:...) for other groups"
        )
    return compiled
