"""Ends a run at a number of sampled tokens, so that several runs can be compared at equal cost."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.phase import record_of, require_samples
from modules.functional.ranges import check_numbers
from modules.trainer.ranks import from_all_ranks, log_equal


class TokenBudget(Callback):
    """Stops a fit after the phase in which the completions sampled since the start reach ``tokens``.

    So a method whose completions are longer, or that samples more prompts, makes fewer phases. Logs
    ``train/sampled_tokens``, the number so far, of all ranks. Prompts and the results of tools do not count. A resumed
    fit goes on counting.

    Args:
        tokens: >= 1.

    Raises:
        ValueError: ``tokens`` is out of range; in ``setup``, when the module keeps no record.
    """

    def __init__(self, tokens: int) -> None:
        check_numbers("TokenBudget", tokens=(tokens, "[1, inf)"))
        self.tokens, self.sampled = tokens, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that keeps no rollouts or samples none."""
        record_of(pl_module)
        require_samples(pl_module, "TokenBudget")
        if getattr(pl_module, "on_policy", 1) == 0:
            raise ValueError(
                "TokenBudget counts tokens that are sampled, and with model.on_policy 0 none are: leave it out"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the phase, and stop when the budget is spent."""
        mine = sum(rollout.completion.length for rollout in record_of(pl_module).rollouts)
        self.sampled += sum(from_all_ranks([mine]))
        log_equal(pl_module, {"train/sampled_tokens": float(self.sampled)})
        if self.sampled >= self.tokens:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"sampled": self.sampled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.sampled = state_dict["sampled"]
