"""Which curves should one look at first? A layout of them for TensorBoard."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.phase import find_tensorboards

Charts = dict[str, list[str]]  # title of a chart -> names of its metrics

ON_REWARDS: dict[str, Charts] = {
    "1 health": {
        "reward, trained and gold": ["train/reward", "train/overoptimization/gold", "val/reward", "val/pass@1"],
        "KL to the start policy, nats per completion": ["train/sequence_kl", "val/sequence_kl"],
        "entropy, nats per token": ["train/entropy", "val/entropy"],
        "length, tokens": ["train/completions/mean_length", "val/completions/mean_length"],
        "share of groups with equal rewards": ["train/frac_reward_zero_std"],
    },
    "2 machinery": {
        "share cut off at the token budget": ["train/completions/clipped_ratio"],
        "gradient norm": ["train/grad_norm", "train/grad_norm/policy", "train/grad_norm/value"],
        "share of tokens clipped": ["train/clip_ratio/region_mean"],
        "critic: explained variance": ["train/explained_variance"],
        "learning rate": ["train/learning_rate"],
        "seconds per phase": ["train/time/sampling", "train/time/scoring", "train/time/training"],
        "tokens per second of sampling": ["train/engine/tokens_per_second"],
        "KL of engine and trainer, nats per token": ["train/engine_mismatch/kl", "train/engine_mismatch/fresh_kl"],
    },
}
ON_PREFERENCES: dict[str, Charts] = {
    "1 health": {
        "loss": ["train/loss", "val/loss"],
        "accuracy": ["train/accuracy", "val/accuracy", "train/rewards/accuracies", "val/rewards/accuracies"],
        "rewards of both sides": ["train/rewards/chosen", "train/rewards/rejected"],
        "margin": ["train/margin", "val/margin", "train/rewards/margins", "val/rewards/margins"],
        "share of pairs with both answers less likely": [
            "train/likelihood_displacement",
            "val/likelihood_displacement",
        ],
    },
    "2 machinery": {"gradient norm": ["train/grad_norm"], "learning rate": ["train/learning_rate"]},
}
ON_TEXTS: dict[str, Charts] = {
    "1 health": {
        "loss": ["train/loss", "val/loss"],
        "token accuracy": ["train/mean_token_accuracy", "val/mean_token_accuracy"],
        "entropy, nats per token": ["train/entropy", "val/entropy"],
        "reward of sampled answers": ["val/reward"],
    },
    "2 machinery": {
        "gradient norm": ["train/grad_norm"],
        "learning rate": ["train/learning_rate"],
        "tokens per second": ["train/tokens_per_second"],
    },
}
LAYOUTS = {"PromptBatch": ON_REWARDS, "PreferenceBatch": ON_PREFERENCES, "InstructionBatch": ON_TEXTS}


class Dashboard(Callback):
    """Adds the tab Custom Scalars to TensorBoard, which shows the curves on a run's health first.

    The DataModule's batches decide which curves these are. Methods that sample: reward and gold reward, KL, entropy,
    length, and the share of groups with equal rewards. Preferences: loss, accuracy and margins. Texts: loss and token
    accuracy.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout into TensorBoard's event file."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Trainer sets it without declaring it
        batch = getattr(data, "batch_type", None)
        layout = LAYOUTS.get(batch.__name__) if batch is not None else None
        for logger in find_tensorboards(trainer) if layout is not None else []:
            charts = {
                group: {title: ["Multiline", [match_whole(tag) for tag in tags]] for title, tags in titles.items()}
                for group, titles in (layout or {}).items()
            }
            logger.experiment.add_custom_scalars(charts)


def match_whole(tag: str) -> str:
    """Return a pattern for this metric alone: TensorBoard also draws every metric whose name begins with a pattern."""
    return re.escape(tag) + "$"
