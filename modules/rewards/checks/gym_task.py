"""Scores an answer by the rules of the reasoning-gym task that made the question."""

import ast
import contextlib
import inspect
import io
import json
import re
from functools import lru_cache
from typing import Any

from .words import cut_answer_tag

# The task's own rule calls any text right, so the text is compared with the gold answer.
COMPARED = ("game_of_life_halting",)
# The metadata hold tuples, which JSON makes lists; the task compares tuples.
TUPLES = ("arc_agi", "rearc")
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "Abs", "Integral", "asin", "acos", "atan", "pi", "E"}
_FORMULA = re.compile(r"(?:[A-Za-z]\w*|[\d\s+\-*/^(),]|\.(?![A-Za-z_]))*")


def judge(text: str, answer: str | None, info: dict[str, Any], task: str | None, partial: bool) -> float | None:
    """Return the task's own score, with ``partial`` False only what the task calls right as 1.0 and all else as 0.0.

    None without metadata, for an unknown task, and where the task cannot score even the gold answer.
    """
    metadata = info.get("metadata")
    if isinstance(metadata, str):
        with contextlib.suppress(json.JSONDecodeError):
            metadata = json.loads(metadata)
    if not isinstance(metadata, dict):
        return None
    name = task or metadata.get("source_dataset")
    dataset = load_task(str(name))
    if dataset is None:
        return None
    said = cut_answer_tag(text)
    if said is None:
        return 0.0
    if name in COMPARED:
        return float(answer is not None and said.strip().lower() == answer.strip().lower())
    if name in TUPLES:
        metadata = {key: freeze(value) for key, value in metadata.items()}
    if evaluates(str(name)) and not is_harmless(said):
        return 0.0
    entry = {"question": "", "answer": answer, "metadata": metadata}
    score = ask(dataset, said, entry)
    if score is None:
        return 0.0 if answer is not None and ask(dataset, answer, entry) is not None else None
    return score if partial else float(score >= 1.0)


def ask(dataset: Any, said: str, entry: dict[str, Any]) -> float | None:
    """Return the task's score of an answer; None if its rule fails on it. What it prints is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(dataset.score_answer(said, entry))
    except Exception:
        return None


def prepare() -> None:
    """Load the library."""
    load_task("chain_sum")


@lru_cache(maxsize=256)
def load_task(name: str) -> Any:
    """Return the data set of a task with its default settings; None if there is no such task."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    return reasoning_gym.create_dataset(name, size=1, seed=0) if name in DATASETS and name != "composite" else None


@lru_cache(maxsize=256)
def evaluates(name: str) -> bool:
    """Return whether a task's rule runs the answer as Python code."""
    source = inspect.getsource(type(load_task(name)).score_answer)
    return "eval(" in source or "parse_expr(" in source


def is_harmless(said: str) -> bool:
    """Return whether an answer may be run as code: a Python literal, a formula of known functions, or no call.

    >>> [is_harmless(said) for said in ("[[1, 2]]", "2*(x + sin(x))", "open('f', 'w')", "().__class__")]
    [True, True, False, False]
    """
    try:
        ast.literal_eval(said)
        return True
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    if "(" not in said and "__" not in said and "lambda" not in said:
        return True
    called = set(re.findall(r"([A-Za-z_]\w*)\s*\(", said))
    return (
        "__" not in said
        and _FORMULA.fullmatch(said) is not None
        and all(name in _FUNCTIONS or len(name) == 1 for name in called)
    )


def freeze(value: Any) -> Any:
    """Return a value with tuples in place of its lists."""
    if isinstance(value, list):
        return tuple(freeze(part) for part in value)
    return value
