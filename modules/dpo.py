"""Direct Preference Optimization (arXiv 2305.18290) and later losses on preferences."""

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from modules.base import AlignmentModule, count_tokens
from modules.functional.logprobs import sequence_logprobs
from modules.functional.ranges import check_numbers
from modules.losses.preference import (
    PairObjective,
    Pairs,
    PreferenceObjective,
    Sequences,
    Sigmoid,
    find_pairs,
    find_sides,
    make_scored_pairs,
    measure_logits,
    measure_preferences,
)
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores, load_companion
from modules.networks.reference import Frozen, ReferenceLogprobs, reference_logprobs
from modules.trainer.pieces import train_by_pieces
from modules.trainer.ranks import from_all_ranks, mean_and_error
from modules.types import PreferenceBatch, ScoredPair

NOISE = 0.01  # nats; a mean log-ratio closer to 0 comes from a few steps and is no reason to warn
STANDARD_ERRORS = 2.0  # a mean log-ratio closer to 0 than so many standard errors may be chance


class DPOModule(AlignmentModule):
    """Minimises the mean over examples of -log sigma(beta h).

    h is log(pi / pi_ref) of the chosen completion minus that of the rejected one. Log-probs are sums over the
    completion and its end token, and a prompt is computed once for all its completions. The reference is the policy as
    it starts, or another model. Its log-probs of all rows are computed before the first step and kept on disk; then its
    weights are dropped. With ``lora`` the reference is the policy with its initial adapters and takes no memory of its
    own. Margins of the data are for the audit; no loss here reads them.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id; usually a model that was fine-tuned before.
        beta: strength of the tie to the reference, > 0; default the objective's own (0.1 for most).
        objective: the loss; default ``Sigmoid``, DPO's own. ``KTO`` takes labelled completions, the others pairs.
        reference: another model as the reference (TRL's ``ref_model``), such as that of an earlier round; default the
            policy as it starts.
        reference_free: use a uniform reference, so that h is the difference of log-probs.
        nll_weight: >= 0, weight of the chosen completion's negative log-likelihood per token, which keeps its
            likelihood from falling (RPO, arXiv 2404.19733).
        lora: train low-rank adapters instead of all weights.
        cache_dir: folder of files with the reference's log-probs, named by model, rows and precision; None =
            ``reference`` in the run's folder. A Trainer without ``default_root_dir`` writes no file.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-6.
        scheduler: optimizer -> scheduler, stepped per update.

    Raises:
        ValueError: a value is out of range; there is a reference for a loss without one, or one with another vocabulary;
            in ``setup``, the objective cannot learn from the rows.
    """

    def __init__(
        self,
        policy: str,
        beta: float | None = None,
        objective: PreferenceObjective | None = None,
        reference: str | None = None,
        reference_free: bool = False,
        nll_weight: float = 0.0,
        lora: Lora | None = None,
        cache_dir: str | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False, lora=lora)
        self.objective = objective or Sigmoid()
        self.beta = self.objective.beta if beta is None else beta
        check_numbers("DPOModule", beta=(self.beta, "(0, inf)"), nll_weight=(nll_weight, "[0, inf)"))
        if reference_free and self.objective.compares_mismatched:
            raise ValueError("KTO measures the KL to a reference: reference_free must be false")
        self.nll_weight, self.cache_dir = nll_weight, cache_dir
        self.needs_reference = self.objective.uses_reference and not reference_free
        if reference is not None and not self.needs_reference:
            raise ValueError(
                f"reference is '{reference}' and {type(self.objective).__name__} is computed without one: leave it out"
            )
        self.own_reference = reference is None  # the policy as it starts
        other = load_companion(self.policy, reference, "reference") if reference else None
        self.reference = Frozen(other or self.policy, own=other is not None) if self.needs_reference else None
        self.reference_id = self.reference.fingerprint() if self.reference is not None else None
        self.tables: dict[str, ReferenceLogprobs] = {}  # by stage of the data
        self.mismatched_tables: dict[str, ReferenceLogprobs] = {}  # the same for completions after other prompts
        self._tables_of: Any = None  # the DataModule that the tables belong to
        self.kl = torch.zeros(())  # KTO's KL for the optimiser step
        self._held_out: list[tuple[Sequences, PreferenceBatch]] = []  # batches of KTO's evaluation so far, on this rank
        # log-ratios of the epoch's chosen and rejected completions, on this rank
        self._log_ratios: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
        self._warned = False

    def setup(self, stage: str) -> None:
        """Refuse rows that the objective cannot learn from."""
        super().setup(stage)
        if not self.paired and isinstance(self.objective, PairObjective):
            raise ValueError(
                f"{type(self.objective).__name__} compares completions, but these rows hold one labelled completion "
                "each: use KTO"
            )
        if self.nll_weight > 0 and not self.paired:
            raise ValueError("nll_weight raises chosen completions, but these rows hold labelled ones: set it to 0")
        if self.needs_reference and not hasattr(self.data, "in_order"):
            raise ValueError(
                f"{type(self.data).__name__} has no in_order(stage), whose batches the reference reads before the "
                "first step: derive it from PreferenceDataModule, or set reference_free"
            )
        if self._tables_of is not self.data:
            self.tables, self.mismatched_tables, self._tables_of = {}, {}, self.data

    @property
    def paired(self) -> bool:
        """Whether the rows are comparisons and not labelled completions."""
        return bool(getattr(self.data, "kind", "pairs") == "pairs")

    @property
    def compares_mismatched(self) -> bool:
        """Whether the loss needs completions after other prompts, which the DataModule then gives."""
        return self.objective.compares_mismatched

    @property
    def data(self) -> Any:
        """The DataModule; ``in_order`` gives its rows, and ``val`` is None if it holds out no rows."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Compute or read the reference's log-probs of all rows, then drop a reference that costs memory."""
        super().on_fit_start()
        self.precompute("train", "val")
        if self.reference is not None and self.reference.policy is not self.policy:
            self.reference = None

    @property
    def cache(self) -> Path | None:
        """Folder of the reference's log-probs; None = none is written, for a Trainer without a folder of its own."""
        root = Path(self.trainer.default_root_dir).absolute()
        if self.trainer.fast_dev_run or (self.cache_dir is None and root == Path.cwd()):  # type: ignore[attr-defined]
            return None
        return Path(self.cache_dir or root / "reference")

    def precompute(self, *stages: str) -> None:
        """Fill ``tables``, and for KTO ``mismatched_tables``, for stages that are missing there.

        Raises:
            ValueError: the reference is gone, or all prompts that KTO would train on are equal.
        """
        for stage in stages:
            if not self.needs_reference or stage in self.tables or (stage == "val" and self.data.val is None):
                continue
            if self.reference is None:
                raise ValueError(
                    "the reference was dropped when the first fit began: make a new DPOModule for other data"
                )
            self.reference.to(self.device)
            with self.trainer.precision_plugin.forward_context():
                batches, place = self.data.in_order(stage), self.trainer.strategy.batch_to_device
                if self.compares_mismatched and any("mismatched" not in batch for batch in batches):
                    raise ValueError(
                        f"KTO measures the KL on completions after other prompts, and the batches of "
                        f"{type(self.data).__name__} have no 'mismatched': use PreferenceDataModule"
                    )
                how = place, self.cache, str(self.trainer.precision)
                self.tables[stage] = reference_logprobs(self.reference, batches, *how)
                if not self.compares_mismatched:
                    continue
                others = [part for batch in batches for part in batch["mismatched"]]
                if others:
                    self.mismatched_tables[stage] = reference_logprobs(self.reference, others, *how)
                elif stage == "train":
                    raise ValueError(
                        "KTO measures the KL on completions after other prompts, and all training rows have the same "
                        "prompt"
                    )

    def sequences(self, batch: PreferenceBatch, stage: str) -> tuple[Sequences, TokenScores]:
        """Sum each completion's log-probs under policy and reference; return them and the policy's token scores."""
        scores = self.policy.completion_scores(batch, details=True)
        reference = self.tables[stage].of(batch) if stage in self.tables else None
        return self.objective.sum_tokens(scores.logprobs, reference, batch), scores

    def loss(self, sequences: Sequences, batch: PreferenceBatch, pairs: Pairs, kl: Tensor) -> Tensor:
        """Compute the sum [] of the loss over the examples of the batch; ``kl`` [] is KTO's."""
        loss = self.objective.total(sequences, batch, pairs, self.beta, kl)
        if self.nll_weight > 0:
            loss = loss - self.nll_weight * (sequences.plain / sequences.lengths)[pairs.better] @ pairs.weight
        return loss + 0 * sequences.logps.sum()  # so that a batch of fillers has a gradient, of zero

    @train_by_pieces
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the mean over the step's examples."""
        if self.compares_mismatched and batch["mismatched"]:
            self.kl = self.step_kl(batch["mismatched"])
            self.log_step({"kl": self.kl}, weight=1.0)
        sequences, scores = self.sequences(batch, "train")
        self.check_start(sequences)
        pairs = find_pairs(batch)
        loss = self.loss(sequences, batch, pairs, self.kl) / batch["denominator"]
        tokens = count_tokens(batch, batch["rank"] >= 0)
        self.log_step({"loss": loss, "tokens": tokens})
        for name, (value, weight) in self.metrics(sequences, scores, batch, pairs).items():
            self.log_step({name: value}, weight)
        log_ratios = self.objective.implicit_rewards(sequences, self.beta).detach() / self.beta
        for side, (rows, _) in find_sides(batch["rank"], pairs if self.paired else None).items():
            self._log_ratios[side].append(log_ratios[rows.unique()])
        return self.step_loss(loss)

    def on_train_epoch_start(self) -> None:
        """Forget the log-ratios of the last epoch."""
        self._log_ratios = {"chosen": [], "rejected": []}

    def on_train_epoch_end(self) -> None:
        """Warn once if both sides lost likelihood over the epoch, by more than chance (likelihood displacement)."""
        if not self.tables or self._warned:
            return
        found = {side: mean_and_error(torch.cat(each).tolist()) for side, each in self._log_ratios.items() if each}
        if found and all(mean < -max(NOISE, STANDARD_ERRORS * error) for mean, error in found.values()):
            self._warned = True
            falls = " and ".join(f"the {side} by {-mean:.2g} +- {error:.1g}" for side, (mean, error) in found.items())
            rank_zero_warn(
                "chosen and rejected completions have both become less likely than under the reference, "
                f"{falls} nats (likelihood displacement): the probability goes to answers that nobody compared; raise "
                "model.nll_weight or model.beta, or lower the learning rate"
            )

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log means over the held-out examples, and leave the scored pairs in ``record.pairs``."""
        self.evaluate(batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log the same under ``test/``."""
        self.evaluate(batch)

    def evaluate(self, batch: PreferenceBatch) -> None:
        """Log loss and metrics of a held-out batch, and leave its pairs in ``record.pairs``."""
        sequences, scores = self.sequences(batch, "val")
        examples = float(batch["prompt_index"][batch["rank"] >= 0].unique().numel())
        pairs = find_pairs(batch)
        if self.compares_mismatched:
            known = {name: batch[name] for name in ("prompt_index", "rank")}  # type: ignore[literal-required]
            self._held_out.append((sequences, cast(PreferenceBatch, known)))
            total, count = self.mismatched_ratios(batch["mismatched"], "val").tolist()
            self.log_evaluation({"kl": total / max(count, 1.0)}, count)
        else:
            self.log_evaluation({"loss": self.loss(sequences, batch, pairs, self.kl) / max(examples, 1.0)}, examples)
        for name, (value, weight) in self.metrics(sequences, scores, batch, pairs).items():
            self.log_evaluation({name: value}, weight)
        self.record.pairs = make_scored_pairs(
            self.tokenizer, batch, self.objective.implicit_rewards(sequences, self.beta), pairs
        )

    @torch.no_grad()
    def score_pairs(self, batch: PreferenceBatch) -> list[ScoredPair]:
        """Return every pair of a batch with its implicit rewards and texts.

        The rows are held-out ones, or training rows if none are held out.
        """
        sequences, _ = self.sequences(batch, "train" if self.data.val is None else "val")
        rewards = self.objective.implicit_rewards(sequences, self.beta)
        return make_scored_pairs(self.tokenizer, batch, rewards, find_pairs(batch))

    def metrics(
        self, sequences: Sequences, scores: TokenScores, batch: PreferenceBatch, pairs: Pairs
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute means [] with their weights, under TRL's names."""
        assert scores.entropies is not None and scores.hits is not None and scores.mean_logits is not None
        rewards = self.objective.implicit_rewards(sequences, self.beta)
        counted = batch["completion_mask"] & (batch["rank"] >= 0)[:, None]
        tokens = counted.sum()
        compared = pairs if self.paired else None
        found = measure_preferences(rewards, sequences.plain, batch["rank"], compared, referenced=bool(self.tables))
        found |= measure_logits(scores.mean_logits, batch["completion_mask"], batch["rank"], compared)
        details = {"entropy": scores.entropies, "mean_token_accuracy": scores.hits}
        return found | {
            name: ((values * counted).sum() / tokens.clamp(min=1), tokens) for name, values in details.items()
        }

    def step_kl(self, mismatched: list[PreferenceBatch]) -> Tensor:
        """Compute KTO's z0 [] of an optimiser step, the same for all its micro-batches and ranks (collective)."""
        total, count = cast(
            Tensor, self.trainer.strategy.reduce(self.mismatched_ratios(mismatched, "train"), reduce_op="sum")
        )
        return (total / count).clamp(min=0)

    @torch.no_grad()
    def mismatched_ratios(self, mismatched: list[PreferenceBatch], stage: str) -> Tensor:
        """Sum the log-ratios of completions after other prompts, and count the completions, to [2]."""
        found = torch.zeros(2, device=self.device)
        for batch in mismatched:
            counted, mask = batch["rank"] >= 0, batch["completion_mask"]
            logprobs = self.policy.completion_scores(batch).logprobs - self.mismatched_tables[stage].of(batch)
            ratios = sequence_logprobs(logprobs, mask)[counted]
            found += torch.stack([ratios.sum(), counted.sum()])
        return found

    def on_validation_start(self) -> None:
        """Compute or read the reference's log-probs of the held-out rows, for ``validate`` and ``test``."""
        super().on_validation_start()
        self._held_out = []
        self.precompute("val")

    def evaluation_metrics(self) -> dict[str, float]:
        """Join the base's metrics; add KTO's loss, whose KL is known only now (collective)."""
        metrics = super().evaluation_metrics()
        if self.compares_mismatched:
            metrics["kl"] = max(0.0, metrics.get("kl", float(self.kl)))
            kl, held_out = torch.tensor(metrics["kl"], device=self.device), self._held_out
            losses = [float(self.loss(sequences, batch, find_pairs(batch), kl)) for sequences, batch in held_out]
            examples = [int(batch["prompt_index"][batch["rank"] >= 0].unique().numel()) for _, batch in held_out]
            total, count = (sum(from_all_ranks(values)) for values in (losses, examples))
            metrics["loss"] = total / count
        return metrics

    def check_start(self, sequences: Sequences) -> None:
        """Refuse a reference that differs from the policy at step 0, where the two are the same model.

        Raises:
            ValueError: the log-probs of a completion differ by more than rounding.
        """
        if self.global_step == 0 and self.tables and self.own_reference:
            gap = (sequences.logps - sequences.ref_logps).detach().abs()
            whole = self.trainer.precision.startswith("32")
            # A gap of 5e-4 leaves h below 1e-3.
            allowed = (1e-6 * sequences.lengths).clamp(min=5e-4) if whole else 0.1 * sequences.lengths.sqrt()
            if not bool((gap <= allowed).all()):
                raise ValueError(
                    "policy and reference differ before the first update (log-probs of a completion by up to "
                    f"{float(gap.max()):.3g}): "
                    + (f"empty {self.cache}, or name the right policy" if self.cache else "name the right policy")
                )
