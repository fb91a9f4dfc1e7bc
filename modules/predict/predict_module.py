"""What the modules share that only predict."""

from abc import abstractmethod

from lightning.pytorch import Callback, LightningModule

from modules.trainer.stopping import StopTogether
from modules.types import Record


class PredictModule(LightningModule):
    """A method that trains nothing: ``predict`` leaves what it found in ``record`` for a writer. No optimizer.

    Attributes:
        record: what callbacks read.

    Raises:
        ValueError: in ``setup``, another command than ``predict``.
    """

    reads: str  # the DataModule that gives what it reads

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()

    def configure_callbacks(self) -> list[Callback]:
        """What every run has: an end that all ranks reach."""
        return [StopTogether()]

    def setup(self, stage: str) -> None:
        """Refuse to train or evaluate."""
        if stage != "predict":
            raise ValueError(f"{type(self).__name__} trains and evaluates nothing: run predict, not {stage}")

    @abstractmethod
    def identity(self) -> dict[str, str | int]:
        """What determines the result: a writer does not go on with a file that was begun otherwise."""
