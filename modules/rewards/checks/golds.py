"""Cuts the answer out of a gold solution: behind ``####``, in a box, in an ``<answer>`` tag, behind a heading."""

import re

_FRAMES = [
    re.compile(form, re.DOTALL | re.IGNORECASE)
    for form in (
        r"<answer>(.*)</answer>",
        r"(?:the\s+)?(?:final\s+)?(?:answer|a)\s*(?::|\uff1a)(.*)|(?:the\s+)?(?:final\s+)?answer\s+is\b\s*:?(.*)",
        r"\*\*((?:(?!\*\*).)*)\*\*",
    )
]


def cut_final_answer(answer: str) -> str:
    """Return the gold answer without its worked solution, stripped: what its last ``####`` marks (GSM8K), else what is
    in its last ``\\boxed{}``, else all of it, without a tag, a heading or bold type around it.

    >>> cut_final_answer("4 + 4 = 8\\n#### 8"), cut_final_answer("It is $\\\\boxed{4}$."), cut_final_answer("**Answer:** 4")
    ('8', '4', '4')
    """
    marked = cut_marked(answer)
    boxed = None if marked != answer else find_boxed(answer)
    return cut_frames((marked if boxed is None else boxed).strip())


def cut_frames(answer: str) -> str:
    """Return an answer without the tag, the heading and the bold type around it, stripped.

    >>> cut_frames("<answer> The answer is **5** </answer>"), cut_frames("A: 5"), cut_frames("**3** and **4**")
    ('5', '5', '**3** and **4**')
    """
    answer = re.sub(r"\A\*\*([^*]*:)\*\*", r"\1", answer.strip())  # a heading in bold type
    for frame in _FRAMES:
        if (found := frame.fullmatch(answer)) is not None:
            inner = next(group for group in found.groups() if group is not None).strip()
            if inner:
                return cut_frames(inner)
    return answer


def cut_marked(text: str) -> str:
    """Return the line behind the last ``####`` if the text ends with it; else the text, since that is a heading."""
    final = text.rpartition("####")[2].strip() if "####" in text else ""
    return final if final and "\n" not in final else text


def find_boxed(text: str) -> str | None:
    """Return what the last ``\\boxed{}`` or ``\\fbox{}`` of a text holds; None without one that is closed."""
    _, box, rest = text.replace("\\fbox{", "\\boxed{").rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", rest) if box else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()]
    return None
