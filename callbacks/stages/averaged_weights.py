"""Averages the weights during training, for evaluation and export (InstructGPT, arXiv 2203.02155, appendix C.4)."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class AveragedWeights(WeightAveraging):
    """Keeps an exponential moving average of the weights; training itself stays as it is.

    After every update, average <- decay x average + (1 - decay) x weights. The average is what validation measures
    (other callbacks included), what checkpoints hold as ``state_dict``, and what an ``Export`` writes that comes later
    in the list of callbacks.

    Weights that do not move, such as a backbone under adapters, stay bitwise equal in the average. In Lightning's
    ``EMAWeightAveraging`` they do not. The average takes a second copy of the model in memory.

    Args:
        decay: in [0, 1). InstructGPT uses 0.992, an average over about 125 updates.

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.992) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"AveragedWeights decay must lie in [0, 1), got {decay}")
        super().__init__(use_buffers=False, avg_fn=lambda average, weight, updates: average.lerp(weight, 1 - decay))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the average: callbacks that measure in this hook see it too."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the weights that are trained."""
        super().on_validation_epoch_end(trainer, pl_module)
