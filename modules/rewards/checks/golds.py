"""Cuts the answer out of a gold solution: behind ``####``, or in a box."""

import re


def cut_final_answer(answer: str) -> str:
    """Return the gold answer without its worked solution, stripped: what its last ``####`` marks (GSM8K), else what is
    in its last ``\\boxed{}``, else all of it.

    >>> cut_final_answer("4 + 4 = 8\\n#### 8"), cut_final_answer("It is $\\\\boxed{4}$.")
    ('8', '4')
    """
    marked = cut_marked(answer)
    boxed = None if marked != answer else find_boxed(answer)
    return (marked if boxed is None else boxed).strip()


def cut_marked(text: str) -> str:
    """Return the line behind the last ``####`` if the text ends with it; else the text, since that is a heading."""
    final = text.rpartition("####")[2].strip() if "####" in text else ""
    return final if final and "\n" not in final else text


def find_boxed(text: str) -> str | None:
    """Return what the last ``\\boxed{}`` of a text holds; None without one that is closed."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", rest) if box else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()]
    return None
