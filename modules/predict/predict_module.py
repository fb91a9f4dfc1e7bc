"""The base class of methods that only predict."""

from abc import abstractmethod

from lightning.pytorch import Callback, LightningModule

from modules.trainer.stopping import StopTogether
from modules.types import Record


class PredictModule(LightningModule):
    """A method that trains nothing and has no optimizer: ``predict`` leaves its results in ``record`` for a writer.

    Attributes:
        record: what callbacks read.

    Raises:
        ValueError: in ``setup``, the command is not ``predict``.
    """

    reads: str  # class name of the DataModule that it reads from

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that makes all ranks stop together."""
        return [StopTogether()]

    def setup(self, stage: str) -> None:
        """Refuse to train or evaluate."""
        if stage != "predict":
            raise ValueError(f"{type(self).__name__} only predicts, so there is nothing to {stage}; run predict")

    @abstractmethod
    def identity(self) -> dict[str, str | int]:
        """Return what determines the results: a writer does not continue a file begun with another identity."""
