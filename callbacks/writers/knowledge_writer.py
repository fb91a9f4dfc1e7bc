"""Writes the rows back with how well a model knows each, so that fine-tuning can filter them."""

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from callbacks.writers.resumable_jsonl import Labels, ResumableJsonl
from modules.types import KNOWLEDGE_CATEGORIES


@runtime_checkable
class Asks(Labels, Protocol):
    """A module that labels facts by asking the policy several times."""

    num_samples: int


class KnowledgeWriter(ResumableJsonl):
    """Writes JSONL with the rows of the data in their order, each with how well the model knows it.

    A row keeps all its columns and gets ``knowledge`` (HighlyKnown, MaybeKnown, WeaklyKnown or Unknown), ``p_greedy``
    and ``p_sampled`` (shares of right answers, [0, 1]).

    A killed run that is started again asks for no fact twice, see :class:`ResumableJsonl`. The shares of the categories
    are in the last printed line, in the report beside the file, and in the loggers as ``predict/knowledge/<category>``.

    Args:
        path: the file; its parent folders are made, and an earlier file is replaced at the end. None =
            ``knowledge.jsonl`` in the run's folder, or the next free name there.

    Raises:
        ValueError: see :class:`ResumableJsonl`.
    """

    reads = Asks
    module = "KnowledgeModule"
    begun_with = "another model, other settings or other rows"
    file = "knowledge.jsonl"

    def report(self, trainer: Trainer, report: dict[str, float]) -> str:
        """Log the shares, and return them in one line."""
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"predict/knowledge/{category}": report[category] for category in KNOWLEDGE_CATEGORIES}, step=0
            )
        return ", ".join(
            [f"{report['rows']:.0f} rows", *(f"{category} {report[category]:.1%}" for category in KNOWLEDGE_CATEGORIES)]
        )
