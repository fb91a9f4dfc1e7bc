"""What will go wrong in this run? Tries a few training prompts before the first phase and warns in plain sentences."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.measures.examination import Examination, Finding, GivesPrompts, SamplesItself
from callbacks.measures.prognosis import bound_share, is_normalised, measure_reach
from callbacks.measures.trial import Trial, percent
from callbacks.phase import record_of
from modules.trainer.modes import evaluating
from modules.trainer.ranks import weighted_means
from modules.types import make_printable

# Largest relative change of what the model computes that one update may make. GRPO on sums learns at 0.5 (all weights)
# and 0.7 (LoRA), and collapses at 1.6 and 2.3.
TOO_FAR = 1.0
TOO_LITTLE = 0.1  # least relative change that all updates together should be able to make
ENOUGH_UPDATES = 10  # a run with fewer updates is a trial, so TOO_LITTLE is not checked


class Doctor(Callback):
    """Looks at a few training prompts before the first phase of a fit, or in ``validate``, and says what it finds.

    It samples and scores these prompts as the run does, with seeds of its own. So the run's numbers, its random state
    and its weights stay as they are; only the reward is called more often. It prints a short summary: pass rates, the
    share of groups without signal, lengths, entropy, time. Then it warns once for each of these causes:

    - answers that are missing, stand in another column, or cannot be read; repeated prompts; rows left out
    - prompts in the wrong form, with or without the chat template
    - a stop token that is written and not obeyed, or never written; a token budget that is too short
    - a temperature at which completions are alike, or do not end; below 0.5 it is always compared with 1
    - a verifier that misses right answers; a part of the reward that never fires; a reward that is constant
    - weights of a ``WeightedSum`` that make a right answer worth nothing, or that let parts cancel each other
    - problems that are too hard or too easy
    - a learning rate so high that one update can change all that the model computes (rate x ``measure_reach`` above 1),
      or so low that the whole run can change hardly anything (below 0.1); checked for optimizers of Adam's kind

    It finds the cause of a symptom by experiments (see ``Examination``), so a healthy run costs one sampling. After the
    first phase of a fit it says how long the other phases will take. A resumed fit is not examined.

    Args:
        num_prompts: training prompts to try, over all ranks, each with the run's number of generations, at least 4.

    Attributes:
        findings: what was found, causes first; None = nothing was examined yet.

    Raises:
        ValueError: ``num_prompts`` is below 1; in ``setup``, the module does not sample, or the data has no prompts.
    """

    def __init__(self, num_prompts: int = 16) -> None:
        if num_prompts < 1:
            raise ValueError(f"Doctor: num_prompts must be at least 1, got {num_prompts}")
        self.num_prompts = num_prompts
        self.findings: list[Finding] | None = None
        self._tells_time = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that does not sample, and data without prompts."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, SamplesItself) or not isinstance(data, GivesPrompts):
            raise ValueError(
                "Doctor looks at methods that learn from their own samples, such as GRPOModule with "
                f"VerifiableDataModule, and this run has {type(pl_module).__name__} and {type(data).__name__}: remove "
                "the callback"
            )

        if pl_module.reward is None:
            raise ValueError(
                f"Doctor looks at what a reward teaches, and model.reward of {type(pl_module).__name__} is null: "
                "remove the callback, or name a reward"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examine a new run. At this hook the Trainer already handles signals, so the examination can be interrupted."""
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            self._examine(trainer, pl_module, trainer.optimizers)
            self._tells_time = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In ``validate``, examine what a fit with these settings would meet."""
        if trainer.state.fn == "validate":
            made: Any = pl_module.configure_optimizers()
            optimizers = made[0] if isinstance(made, tuple) else [made["optimizer"] if isinstance(made, dict) else made]
            self._examine(trainer, pl_module, optimizers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say after the first phase how long the other phases will take."""
        if not self._tells_time:
            return
        self._tells_time = False
        parts = {name: (value, 1.0) for name, value in record_of(pl_module).metrics.items() if name.startswith("time/")}
        times = {name.removeprefix("time/"): seconds for name, seconds in weighted_means(parts).items()}
        phases = count_phases(trainer, trainer.datamodule) - 1  # type: ignore[attr-defined]
        listed = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in times.items())
        if phases > 0 and math.isfinite(phases):
            rank_zero_info(
                f"doctor: the first phase took {sum(times.values()):.3g} s ({listed}); the other {phases:.0f} take "
                f"about {write_time(phases * sum(times.values()))}, without validation"
            )

    def _examine(self, trainer: Trainer, pl_module: Any, optimizers: list[torch.optim.Optimizer]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        context = trainer.precision_plugin.forward_context()
        with isolate_rng(), evaluating(pl_module), torch.no_grad(), context:
            found = Examination(pl_module, data, self.num_prompts, (trainer.global_rank, trainer.world_size))
            self.findings = found.find()
        phases = count_phases(trainer, data)
        self.findings += check_learning_rate(pl_module, optimizers[0], phases * data.updates_per_phase)
        for line in write_findings(found, phases):
            rank_zero_info(f"doctor: {make_printable(line)}")
        for finding in self.findings:
            rank_zero_warn(f"doctor: {make_printable(finding.words)}")
        count = len(self.findings)
        rank_zero_info(f"doctor: {count or 'nothing'} to mend" + (", see the warnings above" if count else ""))


def count_phases(trainer: Trainer, data: Any) -> float:
    """Count the phases of the run: epochs, or fewer where ``max_steps`` ends it before; infinite without a bound."""
    by_epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps / data.updates_per_phase
    return min(by_epochs, by_steps)


def check_learning_rate(module: Any, optimizer: torch.optim.Optimizer, updates: float) -> list[Finding]:
    """Look for a learning rate that can change too much in one update, or too little in all of them.

    Args:
        module: the method; its policy and the scale of its adapters are read.
        optimizer: of the policy, in its first group. A schedule starts from the group's ``initial_lr``.
        updates: of the whole run.
    """
    group = optimizer.param_groups[0]
    rate = float(group.get("initial_lr", group["lr"]))
    reach = measure_reach(module.policy.model, module.lora_scale) if is_normalised(optimizer) else None
    if not any(float(each.get("initial_lr", each["lr"])) > 0 for each in optimizer.param_groups):
        return [Finding("learning_rate", "The learning rate is 0, so nothing is learned: set model.optimizer.lr.")]
    if reach is None or not rate > 0:
        return []
    kind = "adapters" if module.lora_scale is not None else "all weights"
    size = sum(weight.numel() for weight in module.policy.model.parameters()) / 1e6
    model = f"{kind} of this model ({size:,.3g} M parameters)"
    if rate * reach > TOO_FAR:
        return [
            Finding(
                "learning_rate",
                f"At learning rate {rate:g}, one {type(optimizer).__name__} update on {model} can change what it "
                f"computes by {rate * reach:.1f} times its size: set model.optimizer.lr to "
                f"{round_down(TOO_FAR / 4 / reach):g} or less.",
            )
        ]
    if updates >= ENOUGH_UPDATES and updates * rate * reach < TOO_LITTLE:
        return [
            Finding(
                "learning_rate",
                f"At learning rate {rate:g}, all {updates:.0f} updates on {model} together can change what it "
                f"computes by at most {updates * rate * reach:.2g} of its size, so nothing will be seen to rise: "
                f"raise model.optimizer.lr (at most {round_down(TOO_FAR / 4 / reach):g}), or train longer.",
            )
        ]
    return []


def write_findings(found: Examination, phases: float) -> list[str]:
    """Write what was measured: pass rates, groups without signal, lengths and entropy, steps and time."""
    trial, data, sampling = found.trial, found.data, found.sampling
    prompts, count = len(trial.groups), len(trial.all)
    idle = trial.idle(found.size)
    low, high = bound_share(sum(idle), prompts)
    lengths = [len(one.rollout.completion.token_ids) for one in trial.all]
    longest = max(len(prompt.ids) for prompt in data.train_prompts)
    generations = found.module.num_generations
    per_phase = data.prompts_per_phase * generations
    seconds = found.seconds * per_phase / count
    whole = f", {write_time(seconds * phases)} of {phases:.0f} phases" if math.isfinite(phases) else ""
    return [
        f"{prompts} training prompts x {found.num_generations} completions in {write_time(found.seconds)}; "
        f"{write_rates(found, trial)}",
        f"{found.size} completions of a prompt all score the same, and teach nothing, for {percent(idle)} of the "
        f"prompts (95 %: {low:.0%} to {high:.0%})",
        f"completions have {sum(lengths) / count:.3g} of at most {sampling.max_completion_length} tokens, "
        f"{percent(trial.cut())} do not end; entropy {trial.entropy():.2g} nats a token at temperature "
        f"{sampling.temperature:g}; prompts have at most {longest} tokens",
        f"a phase is {data.prompts_per_phase} prompts x {generations} completions and {data.updates_per_phase} "
        f"updates; sampling and scoring take about {write_time(seconds)} of it{whole}, and training comes on top",
    ]


def write_rates(found: Examination, trial: Trial) -> str:
    """Write the histogram of the pass rates, or the mean reward where nothing tells right from wrong."""
    if found.judge is None:
        scores = [one.rollout.reward for one in trial.all if one.rollout.reward is not None]
        return f"mean reward {sum(scores) / max(1, len(scores)):.3g}"
    rates = trial.right()
    inner = [0 < rate <= 0.25 for rate in rates], [0.25 < rate <= 0.5 for rate in rates]
    upper = [0.5 < rate <= 0.75 for rate in rates], [0.75 < rate < 1 for rate in rates]
    counts = [sum(rate == 0 for rate in rates), *map(sum, (*inner, *upper)), sum(rate == 1 for rate in rates)]
    names = ("never", "to 1/4", "to 1/2", "to 3/4", "below 1", "always")
    histogram = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return f"{percent(rates)} are right; prompts by pass rate: {histogram}"


def write_time(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours.

    >>> write_time(75), write_time(90), write_time(7200)
    ('75 s', '1.5 min', '2 h')
    """
    unit, size = ("s", 1) if seconds < 90 else ("min", 60) if seconds < 5400 else ("h", 3600)
    return f"{seconds / size:.2g} {unit}"


def round_down(value: float) -> float:
    """Round a number > 0 down to one digit.

    >>> round_down(0.000123), round_down(2.9)
    (0.0001, 2.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / power) * power:.1g}")
