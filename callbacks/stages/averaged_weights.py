"""A slow average of the weights, for evaluation and export (InstructGPT, arXiv 2203.02155, appendix C.4)."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class AveragedWeights(WeightAveraging):
    """Lightning's ``WeightAveraging`` with average <- decay x average + (1 - decay) x weights after every update;
    training itself stays as it is.

    The whole validation, other callbacks' too, the weights in checkpoints' ``state_dict``, and an ``Export`` listed
    behind it are of the average. Weights that do not move, such as a backbone under adapters, are the same in the
    average bit for bit, which they are not in Lightning's ``EMAWeightAveraging``. It takes a second copy of the model.

    Args:
        decay: [0, 1); InstructGPT's 0.992 looks back some 125 updates.

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, decay: float = 0.992) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"AveragedWeights decay must lie in [0, 1), got {decay}")
        super().__init__(use_buffers=False, avg_fn=lambda average, weight, updates: average.lerp(weight, 1 - decay))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: callbacks that measure in this hook see the average as well."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run's own weights again."""
        super().on_validation_epoch_end(trainer, pl_module)
