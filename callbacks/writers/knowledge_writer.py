"""Writes rows back with what a model knows of them: the file that tuning filters by."""

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from callbacks.writers.resumable_jsonl import Labels, ResumableJsonl
from modules.types import KNOWLEDGE_CATEGORIES


@runtime_checkable
class Asks(Labels, Protocol):
    """A module that labels by asking the policy several times."""

    num_samples: int


class KnowledgeWriter(ResumableJsonl):
    """JSONL with the rows of the data, in their order and with all their columns, plus ``knowledge`` (HighlyKnown,
    MaybeKnown, WeaklyKnown or Unknown), ``p_greedy`` and ``p_sampled`` (shares of right answers, [0, 1]).

    A killed run that is started again asks for no fact twice (see :class:`ResumableJsonl`). The shares of the
    categories go into the last line, the report beside the file, and to the loggers as
    ``predict/knowledge/<category>``.

    Args:
        path: the file; its parents are made, and an earlier file is replaced at the end. None = ``knowledge.jsonl`` in the
            run's folder.

    Raises:
        ValueError: see :class:`ResumableJsonl`.
    """

    reads = Asks
    module = "KnowledgeModule"
    begun_with = "another model, other settings or other rows"
    file = "knowledge.jsonl"

    def report(self, trainer: Trainer, report: dict[str, float]) -> str:
        """The shares in one line, and to the loggers."""
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"predict/knowledge/{category}": report[category] for category in KNOWLEDGE_CATEGORIES}, step=0
            )
        return ", ".join(
            [f"{report['rows']:.0f} rows", *(f"{category} {report[category]:.1%}" for category in KNOWLEDGE_CATEGORIES)]
        )
