"""Generated problems with verifiable answers, from the reasoning-gym library."""

from collections.abc import Iterator
from typing import Any
from zlib import crc32

from datamodules.sources.source import Row, Source, optional_import
from modules.trainer.seeds import run_seed

HELD_OUT_ONE_IN = 10


class ReasoningGym(Source):
    """Generates ``size`` distinct problems of one task.

    Columns ``question``, ``answer``, ``metadata`` and, where ``completion`` is set, ``completion``. About one question
    in ten is held out by a fixed hash of its text. So a held-out problem occurs in no training set of any seed.

    Args:
        task: name in reasoning-gym, such as ``chain_sum``.
        size: distinct problems, >= 1.
        seed: problem i is generated from ``seed`` + i; None = the run's.
        options: the task's own settings, such as ``{"max_terms": 2}``.
        completion: format string for a supervised completion, with the fields ``{question}``, ``{answer}`` and those of
            the task's metadata, such as ``{expression}``; None = no completion.
        held_out: take held-out questions in place of training questions.

    Raises:
        ValueError: ``size`` is below 1; in ``rows``, reasoning-gym refuses the task or its options, or ``completion``
            uses another field.
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
        completion: str | None = None,
        held_out: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.task = task
        self.size = size
        self.seed = run_seed(seed)
        self.options = options or {}
        self.completion = completion
        self.held_out = held_out

    def rows(self) -> list[Row]:
        """Return ``size`` rows, no question twice. Raises ValueError when the task has fewer problems."""
        found: dict[str, dict[str, Any]] = {}
        for block in self._blocks():
            before = len(found)
            for problem in block:
                if is_held_out(problem["question"]) == self.held_out:
                    found.setdefault(problem["question"], problem)
                if len(found) == self.size:
                    return [self._row(index, problem) for index, problem in enumerate(found.values())]
            if len(found) == before:
                break
        side = "held-out" if self.held_out else "training"
        raise ValueError(
            f"size is {self.size} but only {len(found)} distinct {side} problems of {self.task} were found with "
            f"{self.options}"
        )

    def _blocks(self) -> Iterator[Any]:
        gym = optional_import("reasoning_gym", "reasoning")
        length = max(1000, 10 * self.size)
        seed = self.seed
        while True:
            try:
                block = gym.create_dataset(self.task, size=length, seed=seed, **self.options)
            except (AssertionError, TypeError, ValueError) as error:
                raise ValueError(f"reasoning-gym refuses task {self.task!r} with {self.options}: {error}") from error
            yield block
            seed += length

    def _fill(self, fields: dict[str, Any]) -> dict[str, str]:
        if self.completion is None:
            return {}
        try:
            return {"completion": self.completion.format(**fields)}
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"completion {self.completion!r} of {self.task} may only use the fields {', '.join(fields)}"
            ) from error

    def _row(self, index: int, problem: dict[str, Any]) -> Row:
        known = {"question": problem["question"], "answer": str(problem["answer"])}
        columns = {**known, "metadata": problem["metadata"], **self._fill({**problem["metadata"], **known})}
        side = "-held-out" if self.held_out else ""
        return Row(columns, f"{self.task}{side}#{index}", self.task)


def is_held_out(question: str) -> bool:
    """Return whether a question is held out. The hash is fixed, so the answer is the same in every process."""
    return crc32(question.encode()) % HELD_OUT_ONE_IN == 0
