"""Rewards that compare the answer with the gold one in other forms: an option's letter, words, a task's own rule."""

import importlib.util
from typing import Any

from modules.rewards.verifier import Verifier
from modules.types import Rollout


class MultipleChoice(Verifier):
    """Gives 1.0 when the completion ends with the letter of the right option, else 0.0; None without a gold letter.

    The text after ``</think>`` must state one letter as its answer. If it has an ``<answer>`` tag, only what is in it
    counts. Else the last line counts that states a letter: in ``\\boxed{}``, behind "answer is", "answer:" or
    "option is" (also in Chinese, Japanese, Korean and Thai), or alone on the last line. A letter may have brackets,
    bold type, LaTeX or its option's text around it: ``B``, ``(b)``, ``**B**``, ``$\\text{B}$``, ``B) Paris``. A line
    that states two letters states none, so "A or B" is wrong, and so is the option's text without its letter.

    The gold answer is a letter in one of these forms, or the text of one of the row's ``options``.

    Args:
        name: label of the metric.
    """

    checks_answer = True
    check = "option_letter"
    needs_answer = True

    def __init__(self, name: str = "multiple_choice") -> None:
        super().__init__(name)

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the row's options, if it has some."""
        return {"options": (rollout.info or {}).get("options")}


class TokenF1(Verifier):
    """Gives the F1 of the words that the answer and the gold answer share, in [0, 1]; None without a gold answer.

    The answer is what the only ``<answer>`` tag of the text after ``</think>`` holds, or all of that text. Words are
    compared in lower case, without punctuation and the articles a, an, the, as for SQuAD (arXiv 1606.05250, section
    6.1). In scripts without spaces, such as Chinese and Thai, each letter is a word, as for MLQA (arXiv 1910.07475).

    Args:
        name: label of the metric.
    """

    check = "token_overlap"
    needs_answer = True

    def __init__(self, name: str = "token_f1") -> None:
        super().__init__(name)


class ReasoningGymScore(Verifier):
    """Scores an answer by the rule of the reasoning-gym task that made the question.

    The answer is what the only ``<answer>`` tag of the text after ``</think>`` holds, or all of that text. The row must
    hold the task's ``metadata``, as those of the source ``ReasoningGym`` do; else the score is None. An answer that
    would do more than compute, at a task that runs answers as Python code, gets 0.0. The rule of
    ``game_of_life_halting`` calls any text right, so there the answer must equal the gold one.

    Args:
        task: name of the task; None = the row's, ``metadata.source_dataset``.
        partial: True = give the task's own score, in [0, 1], which for many tasks grows with the share of the text that
            is the gold answer. False = give 1.0 for what the task scores 1, and 0.0 for all else.
        timeout: seconds per rollout.
        name: label of the metric.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: there is no such task, or ``timeout`` is out of range.
    """

    check = "gym_task"

    def __init__(
        self, task: str | None = None, partial: bool = False, timeout: float = 5.0, name: str = "reasoning_gym"
    ) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError(
                "ReasoningGymScore needs the reasoning-gym package; install it with: pip install "
                "'lightning-align[reasoning]'"
            )
        if task is not None:
            from reasoning_gym.factory import DATASETS

            if task not in DATASETS:
                raise ValueError(f"ReasoningGymScore: reasoning-gym has no task '{task}'; name one of its data sets")
        super().__init__(name, {"task": task, "partial": partial}, timeout)
        self.checks_answer = not partial

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return the metadata of the row."""
        return {"metadata": (rollout.info or {}).get("metadata")}
