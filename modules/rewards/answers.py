"""Which part of a text is the answer, and the patterns that find it."""

import re


def cut_final_text(text: str) -> str:
    """The part of a completion that may hold the answer: what follows the last ``</think>``.

    A completion that opens ``<think>`` and never closes it has none (""); one without these tags counts whole. An
    answer inside the reasoning would reward text that the reader never sees.
    """
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in text else text


def cut_final_answer(answer: str) -> str:
    """The gold answer without its worked solution: what follows the last ``####`` (GSM8K's mark), or all of it;
    stripped.
    """
    return answer.rpartition("####")[2].strip()


def compile_pattern(pattern: str, owner: str) -> re.Pattern[str]:
    """Compile with DOTALL (``.`` also matches a line end; ``^`` and ``$`` do not match at inner line ends).

    Raises:
        ValueError: not a regular expression, naming ``owner``.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{owner} got an invalid regular expression {pattern!r}: {error}") from error


def compile_extractor(pattern: str, owner: str) -> re.Pattern[str]:
    """As ``compile_pattern``, for a pattern whose only group is the answer.

    Raises:
        ValueError: not a regular expression, or not exactly one group.
    """
    compiled = compile_pattern(pattern, owner)
    if compiled.groups != 1:
        raise ValueError(
            f"{owner} needs a pattern with exactly one group, the answer; {pattern!r} has {compiled.groups}; write "
            "(?:...) for others"
        )
    return compiled
