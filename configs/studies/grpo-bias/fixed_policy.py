"""What groups weigh at prompts of known difficulty: a policy that does not learn answers them many times."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.group_bias import DIFFICULTIES, Group, GroupBias, name_difficulty
from callbacks.phase import record_of
from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.functional.advantages import expected_weight, group_center, group_zscore, mixed_mean_bias
from modules.losses import Clipped, SequenceMean
from modules.rewards import ExactMatch
from modules.rollout.sampling import Sampling

SIZE, PROMPTS, PHASES = 8, 32, 15
TEMPERATURES = 1.0, 2.0  # so that prompts are easy, and hard


class PromptGroups(Callback):
    """Collects the groups of each prompt over all phases, as ``GroupBias`` sees them."""

    def __init__(self) -> None:
        self.found: dict[str, list[Group]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the phase's groups, which are in the order of its rollouts."""
        record = record_of(pl_module)
        prompts = {rollout.group: rollout.prompt for rollout in record.rollouts}
        groups = GroupBias().find_groups(record.credits or [])
        for prompt, group in zip(prompts.values(), groups, strict=True):
            self.found[prompt].append(group)


def measure(start: Path, seed: int) -> dict[str, float]:
    """Return what groups weigh by difficulty, beside what is expected at the prompts' rates of right answers.

    Weights are those of z-scores with a mean over completions, as published. ``weight_<difficulty>`` is a mean weight /
    the mean over all prompts, ``expected_<difficulty>`` the same of ``expected_weight`` at the rate over all phases,
    and ``centered_<difficulty>`` that of rewards minus their mean. ``ratio_<difficulty>`` is the first / the second.
    ``bias_<difficulty>`` is the mean share of right answers in mixed groups - the prompt's rate, and ``bias_error_``
    that minus ``mixed_mean_bias``.
    """
    found = {}
    for temperature in TEMPERATURES:
        groups = answer_often(start, seed, temperature)
        found |= {f"{prompt} at {temperature}": mine for prompt, mine in groups.items()}
    return compare_groups(found)


def answer_often(start: Path, seed: int, temperature: float) -> dict[str, list[Group]]:
    """Return the groups of each prompt over all phases of a fit at learning rate 0."""
    groups = PromptGroups()
    module = GRPOModule(
        str(start / "export"),
        ExactMatch(r"(\d{3}).*"),
        num_generations=SIZE,
        sampling=Sampling(temperature=temperature, max_completion_length=3),  # the digits; the weights know no length
        objective=Clipped(aggregation=SequenceMean()),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        seed=seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=PHASES,
        callbacks=[groups],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = VerifiableDataModule(module.tokenizer, Addition(PROMPTS, seed=seed), prompts_per_phase=PROMPTS)
    trainer.fit(module, data)
    return groups.found


def compare_groups(found: dict[str, list[Group]]) -> dict[str, float]:
    """Compare the groups of each prompt with what its rate says, see ``measure``."""
    rates = {prompt: fmean(group.rate for group in groups) for prompt, groups in found.items()}
    size = max(group.size for groups in found.values() for group in groups)
    columns = {
        "weight": {prompt: fmean(group.weight for group in groups) for prompt, groups in found.items()},
        "expected": {prompt: expected_weight(group_zscore, rate, size) for prompt, rate in rates.items()},
        "centered": {prompt: expected_weight(group_center, rate, size) for prompt, rate in rates.items()},
    }
    numbers: dict[str, float] = {}
    for difficulty in DIFFICULTIES:
        chosen = [p for p, rate in rates.items() if name_difficulty(rate) == difficulty]
        if not chosen:
            continue
        numbers[f"prompts_{difficulty}"] = len(chosen)
        for name, column in columns.items():
            numbers[f"{name}_{difficulty}"] = fmean(column[p] for p in chosen) / fmean(column.values())
        numbers[f"ratio_{difficulty}"] = numbers[f"weight_{difficulty}"] / numbers[f"expected_{difficulty}"]
        mixed = [(p, group.rate) for p in chosen for group in found[p] if 0 < group.right < group.size]
        if mixed:
            numbers[f"bias_{difficulty}"] = fmean(rate - rates[p] for p, rate in mixed)
            expected = fmean(mixed_mean_bias(rates[p], size) for p, _ in mixed)
            numbers[f"bias_error_{difficulty}"] = numbers[f"bias_{difficulty}"] - expected
    return numbers
