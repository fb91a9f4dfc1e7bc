"""The base of methods that learn from their own samples: sampling, scoring, the frozen start policy, evaluation."""

import reprlib
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from modules.functional import kl
from modules.generation import GenerationModule, Validation
from modules.losses import ImportanceWeights
from modules.losses.importance import choose_importance
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores
from modules.rewards.answers import name_reader
from modules.rewards.combined import walk_rewards
from modules.rewards.verifier import count_failures
from modules.rollout.engine import RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.metrics import (
    add_engine_stats,
    join_gaps,
    make_outcomes,
    measure_rollouts,
    measure_unscored,
    measure_weights,
    sum_gaps,
)
from modules.rollout.phases.dynamic_sampling import Gathered
from modules.rollout.phases.overlap import Overlap, check_overlap
from modules.rollout.phases.reuse import Drafts, check_reuse
from modules.rollout.phases.segments import (
    begin_rollouts,
    check_partial,
    count_least,
    count_sampled,
    cut_to_segment,
    gather_segments,
)
from modules.rollout.phases.staleness import find_stale, measure_staleness
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import (
    Measured,
    add_measures,
    find_distinct,
    keep_prompts,
    leave_out_tokens,
    make_batch,
    make_rollouts,
    measure_rows,
    score_in_chunks,
    score_rollouts,
    take_chunk,
)
from modules.trainer.ranks import from_all_ranks, log_equal
from modules.trainer.steps import update_of_prompts
from modules.types import Completion, InstructionBatch, PolicyBatch, PromptBatch, Reward, Rollout

# Standard errors. A correct run falls below by chance in 9 (64 completions) or 3 (256) of 100000 phases.
NEGATIVE_KL = 4.0
EQUAL = 3  # phases in a row with equal scores before a warning
ENOUGH = 64  # completions of a phase; with fewer, a standard error is too uncertain


class OnPolicyModule(GenerationModule):
    """A method that samples its phases from the policy itself.

    A subclass says what a phase teaches, in ``prepare``, and the loss.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio starts at 1.
        reward: scores completions; None = no reward.
        num_generations: completions per prompt.
        sampling: how to sample in training.
        engine: samples completions; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours; None = no tools.
        importance: weights that correct for the different probabilities that engine and trainer compute. false = none,
            true = the default ones, None = true if the engine samples from a copy of the weights, else false.
        reference: keep the frozen start policy, for a loss or to measure the KL; a folder or hub id = keep that model
            instead.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    splits_groups = True  # whether completions of a prompt may be in different micro-batches
    keeps_logprobs = True  # whether the rollouts of a phase carry the trainer's log-probs
    reference_moves = False  # whether the reference is another model later on, so that checkpoints hold it
    # What to do in a phase after the first step in which nothing is scored.
    on_unscored: Literal["warn", "stop"] = "warn"

    def __init__(
        self,
        policy: str,
        reward: Reward | None,
        *,
        num_generations: int,
        sampling: Sampling,
        engine: RolloutEngine | None,
        environment: Environment | None,
        importance: ImportanceWeights | bool | None,
        reference: bool | str,
        validation: Validation,
        lora: Lora | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int | None,
    ) -> None:
        super().__init__(
            policy,
            reward,
            num_generations=num_generations,
            sampling=replace(sampling, partial=None),  # of whole completions
            engine=engine,
            environment=environment,
            reference=reference,
            validation=validation,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        self.partial, self.importance = sampling.partial, choose_importance(importance, self.engine.copies_weights)
        check_partial(self.engine, sampling, environment)
        check_overlap(self.engine, environment)
        self.overlap = Overlap(self.engine) if self.engine.max_staleness > 0 else None
        self.drafts = None  # drafts for the completions of the next phases
        if sampling.reuse is not None:
            check_reuse(sampling, self.engine, environment)
            self.drafts = Drafts(self.policy, sampling)
        self._batch_start = 0.0
        self._syncing = 0.0  # seconds of the last sync of the engine
        # ``row`` and what the step so far measured, see ``start_from``
        self._measured: list[tuple[Tensor, Measured]] = []
        self._kl_warned = self._equal_warned = False
        self._equal = 0  # phases in a row in which all scores were equal

    def move_reference(self, moves: bool) -> None:
        """Settle whether the reference moves; checkpoints know a fixed reference by its fingerprint."""
        self.reference_moves = moves
        self.reference_id = None if moves else self.reference_id

    @abstractmethod
    def prepare(self, batch: PolicyBatch) -> None:
        """Add to a phase's batch what the loss needs: advantages or ranks, ``row_count`` and ``active``.

        Numbers of the phase go to ``log_phase``.
        """

    def setup(self, stage: str) -> None:
        """Do what every method does, and begin a fit without what an earlier one left."""
        super().setup(stage)
        if stage == "fit":
            self.record.carried, self.record.ahead = [], {}

    def collect(self, prompts: PromptBatch) -> PolicyBatch:
        """Make one phase of this rank: sample, score, and compute the log-probs that the updates start from.

        If the only update of a phase computes these log-probs itself, only the completions without a gradient are
        scored here.
        """
        start = time.perf_counter()
        self.record.metrics = {"time/sampling": 0.0}
        if self.overlap is None and self.record.ahead:
            rank_zero_warn(
                f"what the checkpoint has of phases {sorted(self.record.ahead)} is sampled anew, because this engine "
                "has no max_staleness"
            )
            self.record.ahead = {}
        before = count_failures(self.reward)
        found = self.gather(prompts)
        self.release_engine()
        self.check_scored(found.rollouts[found.earlier :], count_failures(self.reward, before))
        self.warn_of_equal_scores(found.rollouts[found.earlier :])
        self.record.rollouts = found.rollouts[found.earlier :]
        self.log_phase(found.metrics)
        if self.overlap is not None or self.partial is not None:
            self.log_phase(measure_staleness(found.rollouts, self.global_step))
        whole = make_batch(found.rollouts, self.device)
        whole["row"] = torch.arange(len(found.rollouts), device=self.device) - found.earlier
        if self.overlap is not None or self.partial is not None or found.earlier:
            whole["stale"] = self.find_stale(found, whole)
        if self.reference is not None:
            (whole["ref_logprobs"],) = score_in_chunks(self.policy, self.reference_scores, whole)
        left = self.leaves_scores(prompts)
        if left:
            self.check_start(whole)
        else:
            self.score_phase(whole, found.earlier)
        batch = whole
        if self.partial is not None and not self.partial.learn_earlier:
            batch = leave_out_tokens(batch, batch["stale"])
        if found.chosen is not None:
            batch = keep_prompts(batch, found.chosen)
        if "update" in prompts:
            update = update_of_prompts(len(batch["prompt_ids"]), max(prompts["update"]) + 1)
            batch["update"] = torch.tensor(update, device=self.device)[batch["prompt_index"]]
        self.prepare(batch)
        if left:
            self.score_others(whole, batch["row"][batch["active"]])
        else:
            batch.pop("row")
            batch.pop("stale", None)
        self.record.carried = found.left
        scoring = time.perf_counter() - start - self.record.metrics["time/sampling"]
        self.log_phase({"time/scoring": scoring, "time/training": 0.0})
        return batch

    def leaves_scores(self, prompts: PromptBatch) -> bool:
        """Tell whether the phase's own update computes the log-probs that it starts from, in its forward pass.

        It does, without gradient, if the phase makes one update and nothing needs the log-probs before.
        """
        whole = self.partial is None or self.partial.learn_earlier  # the update scores all tokens of a completion
        return prompts.get("updates") == 1 and self.drafts is None and whole and not self.prepares_from_scores()

    def prepares_from_scores(self) -> bool:
        """Tell whether ``prepare`` reads what the policy computes for the completions, such as ``old_logprobs``."""
        return True

    def score_phase(self, batch: PolicyBatch, earlier: int) -> None:
        """Compute what the updates start from, and fill the record with it.

        Args:
            batch: of the whole phase; gets ``old_logprobs``, and ``values`` where there is a critic.
            earlier: how many completions, the first ones, belong to the record of the phase before.
        """
        score = self.collected_scores if self.drafts is None else self.drafts.noting(self.collected_scores)
        logprobs, entropies, *values = score_in_chunks(self.policy, score, batch)
        if self.drafts is not None:
            *values, ids, kept, places = values
            self.log_phase(
                self.drafts.remember(self.record.rollouts, *(each[earlier:] for each in (ids, kept, places)))
            )
        if values:
            (batch["values"],) = values
        if "ref_logprobs" in batch:
            self.refuse_other_start(kl.k1(logprobs, batch["ref_logprobs"]))
        measured = measure_rows(batch, logprobs, entropies, self.overlap is not None)
        add_measures(self.record.rollouts, batch["row"].tolist(), measured, self.global_step)
        batch["old_logprobs"] = self.as_drawn(batch, logprobs)

    def score_others(self, batch: PolicyBatch, trained: Tensor) -> None:
        """Fill the record for completions without a gradient, which the update does not compute.

        Args:
            batch: of all completions of the phase.
            trained: int [K], the ``row`` of those in the update.
        """
        others = (~torch.isin(batch["row"], trained) & (batch["row"] >= 0)).nonzero()[:, 0]
        if len(others):
            logprobs, entropies = score_in_chunks(self.policy, self.policy_scores, batch, others)
            measured = measure_rows(batch, logprobs, entropies, self.overlap is not None)
            kept = Measured._make(None if each is None else each[others] for each in measured)
            add_measures(self.record.rollouts, batch["row"][others].tolist(), kept, self.global_step)

    def as_drawn(self, batch: PolicyBatch, logprobs: Tensor) -> Tensor:
        """Return log-probs [n, t], in which tokens that earlier weights sampled have the sampler's.

        If the engine samples ahead, nothing is replaced, because ``importance`` weighs these tokens instead.
        """
        if "stale" not in batch or self.overlap is not None:
            return logprobs
        return torch.where(batch["stale"], batch["sampler_logprobs"], logprobs)

    def start_from(self, batch: PolicyBatch, scores: TokenScores) -> PolicyBatch:
        """Return a micro-batch with its ``old_logprobs``, from this forward pass if they were left to the update.

        Args:
            batch: the micro-batch, or a piece of it.
            scores: [n, t] of its completions; with entropies where ``row`` is in the batch.
        """
        if "row" not in batch:
            return batch
        assert scores.entropies is not None
        measured = measure_rows(batch, scores.logprobs, scores.entropies, self.overlap is not None)
        self._measured.append((batch["row"], measured))
        return cast(PolicyBatch, {**batch, "old_logprobs": self.as_drawn(batch, scores.logprobs.detach())})

    def train_scores(self, batch: PolicyBatch, entropy: bool = False) -> TokenScores:
        """Compute scores [n, t] of a micro-batch with gradient; completions that are equal are computed once.

        Args:
            batch: prompts and completions.
            entropy: also return entropies, with gradient. Without it they are returned, without gradient, where the
                record still lacks them.
        """
        rows, copies = find_distinct(batch, torch.arange(len(batch["prompt_index"]), device=self.device))
        names = ("completion_ids", "completion_mask", "prompt_index", *(("attended",) if "attended" in batch else ()))
        fewer = len(rows) < len(copies)
        once = cast(PolicyBatch, {**batch, **{name: batch[name][rows] for name in names}}) if fewer else batch  # type: ignore[literal-required]
        states = self.policy.token_states(once)
        scores = self.policy.scores_of(states, once, self.sampling.temperature, "row" in batch and not entropy, entropy)
        if once is batch:
            return scores
        return TokenScores._make(None if each is None else each[copies] for each in scores)

    def find_stale(self, found: Gathered, batch: PolicyBatch) -> Tensor:
        """Tell which tokens [N, Tc] of a phase earlier weights sampled."""
        if self.overlap is not None or self.partial is not None:
            return find_stale(found.rollouts, self.global_step).to(self.device)
        rows = torch.arange(len(batch["prompt_index"]), device=self.device) < found.earlier
        return rows[:, None].expand_as(batch["completion_mask"])

    def gather(self, prompts: PromptBatch) -> Gathered:
        """Sample and score the completions of a phase; a method may draw further prompts, or carry groups over."""
        if self.partial is not None:
            return self.gather_parts(prompts)
        if self.record.carried:
            rank_zero_warn(
                f"{len(self.record.carried)} completions that the checkpoint carried over (sampling.partial or "
                "dynamic_sampling) are left out, because this run carries none"
            )
        return Gathered(self.sample_rollouts(prompts))

    def gather_parts(self, prompts: PromptBatch) -> Gathered:
        """Begin the completions of a phase, go on with those that were carried over, and score the complete groups."""
        start, phase = time.perf_counter(), str(self.current_epoch)
        sampling = replace(self.sampling, partial=self.partial)
        sampled = self.sample(prompts, self.num_generations, cut_to_segment(sampling), phase)
        begun = begin_rollouts(make_rollouts(*sampled, None), self.find_seeds(prompts, phase), sampling)
        need, updates, micro = len(prompts["uid"]), max(prompts["update"]) + 1, self.trainer.accumulate_grad_batches
        least = count_least(sampling, need, updates, micro, self.num_generations if self.splits_groups else 1)
        found = gather_segments(self.engine, sampling, self.record.carried, begun, need, least)
        tokens = count_sampled([*found.rollouts, *found.left]) - count_sampled(self.record.carried)
        add_engine_stats(self.record.metrics, {}, tokens, time.perf_counter() - start, self._syncing)
        return replace(found, rollouts=score_rollouts(found.rollouts, self.reward, self.current_epoch))

    def sample_rollouts(self, prompts: PromptBatch) -> list[Rollout]:
        """Sample and score ``num_generations`` completions of each prompt for training."""
        start, phase = time.perf_counter(), str(self.current_epoch)
        if self.overlap is not None:
            sampled = prompts, self.sample_ahead(self.overlap, prompts)
            self.record.metrics["time/sampling"] += time.perf_counter() - start
        else:
            reused = 0
            if self.drafts is None:
                sampled = self.sample(prompts, self.num_generations, self.sampling, phase)
            else:
                self.sync_engine()
                before, seeds = self.drafts.reused, self.find_seeds(prompts, phase)
                drawn = self.drafts.generate(
                    self.engine, prompts["prompt_ids"], self.num_generations, seeds, self.global_step
                )
                sampled, reused = (prompts, drawn), self.drafts.reused - before
            tokens = sum(completion.length for group in sampled[1] for completion in group)
            self.add_sampling(tokens - reused, time.perf_counter() - start)
        return make_rollouts(*sampled, self.reward, self.current_epoch)

    def sync_engine(self) -> None:
        """Give the engine the current weights; one that samples ahead keeps those of what it has begun."""
        start = time.perf_counter()
        if self.overlap is None:
            super().sync_engine()
        else:
            self.overlap.sync(self.record.ahead, self.policy, self.global_step)
        self._syncing = time.perf_counter() - start

    def release_engine(self) -> None:
        """Let the engine give its memory back, unless it samples beside the training."""
        if self.overlap is None:
            super().release_engine()

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        if self.overlap is not None:
            self.overlap.close(self.record.ahead)
        super().teardown(stage)

    def sample_ahead(self, overlap: Overlap, prompts: PromptBatch) -> list[list[Completion]]:
        """Return the completions of this phase's prompts, and begin those of a later phase."""
        phase = self.current_epoch

        def ask(number: int) -> Callable[[], list[list[Completion]]]:
            asked = prompts if number == phase else prompts["ahead"](number - phase)
            seeds = self.find_seeds(asked, str(number))
            return partial(self.engine.generate, asked["prompt_ids"], self.num_generations, self.sampling, seeds)

        found, waited = overlap.sample(self.record.ahead, phase, self.policy, self.global_step, ask)
        self.log_phase({"overlap/time_waited": waited})
        return found

    def add_sampling(self, tokens: int, seconds: float) -> None:
        """Add a call of the engine, with the sync before it, to the times and the numbers of the phase."""
        stats = getattr(self.engine, "last_stats", {})
        add_engine_stats(self.record.metrics, stats, tokens, seconds, self._syncing)

    def weigh(self, batch: PolicyBatch, advantages: Tensor) -> Tensor:
        """Multiply advantages [N, Tc] by the weights of ``importance``, if there is one, and log these (collective)."""
        if self.importance is None:
            return advantages
        weights = self.importance(batch)
        self.log_phase(measure_weights(weights[batch["completion_mask"]]))
        return advantages * weights

    def on_train_batch_start(self, batch: PolicyBatch, batch_idx: int) -> None:
        """Start the clock of a micro-batch."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._measured = []
        self._batch_start = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: PolicyBatch, batch_idx: int) -> None:
        """Add a micro-batch to the phase's training time; start-up and validation are no part of it."""
        self.record.metrics["time/training"] = (
            self.record.metrics.get("time/training", 0.0) + time.perf_counter() - self._batch_start
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step, and fill the record with what its forward passes measured."""
        super().on_before_optimizer_step(optimizer)
        for rows, measured in self._measured:
            add_measures(self.record.rollouts, rows.tolist(), measured, self.global_step)
        self._measured = []

    def log_phase(self, metrics: Mapping[str, float]) -> None:
        """Log numbers of this rank as ``train/<name>`` at the end of the phase, averaged over the ranks."""
        self.record.metrics |= metrics

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the phase."""
        metrics = self.phase_metrics()
        log_equal(self, {f"train/{name}": value for name, value in metrics.items()})
        scored = {"reward": metrics["reward"], "kl": metrics.get("kl", 0.0)} if "reward" in metrics else {}
        length = {"length": metrics["completions/mean_length"]} if "completions/mean_length" in metrics else {}
        log_equal(self, scored | length, prog_bar=True, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what every method saves, a reference that moves, and drafts."""
        super().on_save_checkpoint(checkpoint)
        if self.drafts is not None:
            checkpoint["drafts"] = self.drafts.state_dict()
        if self.reference_moves and self.reference is not None:
            checkpoint["reference"] = {name: weight.detach().cpu() for name, weight in self.reference.weights.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what every method loads, a reference that moved, and drafts."""
        super().on_load_checkpoint(checkpoint)
        if self.drafts is not None and "drafts" in checkpoint:
            self.drafts.load_state_dict(checkpoint["drafts"])
        if self.reference is not None:
            for name, weight in checkpoint.get("reference", {}).items():
                self.reference.weights[name].data.copy_(weight)

    def phase_metrics(self) -> dict[str, float]:
        """Measure rewards, lengths, entropy, KL and times, and join what ``log_phase`` collected (collective)."""
        rollouts = self.record.rollouts
        mine = (make_outcomes(rollouts), sum_gaps(rollouts, fresh=self.partial is not None), dict(self.record.metrics))
        outcomes, gaps, logs = zip(*from_all_ranks([mine]), strict=True)
        found = [outcome for each in outcomes for outcome in each]
        names = dict.fromkeys(name for each in logs for name in each)
        parts = {name: [each[name] for each in logs if name in each] for name in names}
        logged = {name: sum(values) / len(values) for name, values in parts.items()}
        seconds = sum(value for name, value in logged.items() if name.startswith("time/"))
        self.check_kl([outcome.kl for outcome in found if outcome.kl is not None])
        measured = measure_rollouts(found) if found else {}
        return measured | join_gaps(gaps) | logged | {"completions_per_second": len(found) / seconds}

    def collected_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Compute what a phase starts from: ``policy_scores``, and values [N, Tc] where the method has a critic."""
        return self.policy_scores(batch)

    def scores(self, batch: InstructionBatch) -> TokenScores:
        """Compute scores [N, T] of the supervised tokens of texts that the policy must not forget."""
        return self.policy.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids"))

    def check_scored(self, rollouts: list[Rollout], failures: Mapping[str, int] | None = None) -> None:
        """Refuse a first phase without any score; warn of a later one or refuse it, as ``on_unscored`` says
        (collective). Log this rank's ``failures`` by cause, summed over the ranks.

        Raises:
            ValueError: the phase is refused, as no completion of any rank has a score.
        """
        scored = any(rollout.reward is not None for rollout in rollouts)
        answer = next((rollout.answer for rollout in rollouts if rollout.answer is not None), None)
        ranks = from_all_ranks([(scored, answer, len(rollouts), Counter(failures))])
        lost = Counter[str]()
        for *_, mine in ranks:
            lost.update(mine)  # keeps a count of 0, which a sum would drop
        self.log_phase(measure_unscored(lost))
        if any(scored for scored, *_ in ranks):
            return
        count, name = sum(each[2] for each in ranks), self.reward.name
        judges = [part for part in walk_rewards(self.reward) if part.checks_answer or hasattr(part, "needs_answer")]
        gold = next((answer for _, answer, *_ in ranks if answer is not None), None)
        if self.global_step > 0:
            said = (
                f"phase {self.current_epoch}: {name} scored none of its {count} completions, so nothing is learned "
                f"from them; their first answer is {reprlib.repr(gold)}"
            )
            if self.on_unscored == "stop":
                raise ValueError(said)
            rank_zero_warn(said)
        elif judges and not any(getattr(part, "needs_answer", True) for part in judges):
            raise ValueError(
                f"{name} scored none of the first {count} completions, and needs no answer: the warnings before this say "
                "why, or a row lacks what it reads"
            )
        elif gold is None:
            raise ValueError(
                f"{name} scored none of the first {count} completions, whose rows have no answer to compare with: name "
                "its column with data.columns, or use a reward that needs no answer"
            )
        else:
            raise ValueError(
                f"{name} scored none of the first {count} completions; the first answer that it was to compare with is "
                f"{reprlib.repr(gold)}: {name_reader(gold)}"
            )

    def warn_of_equal_scores(self, rollouts: list[Rollout]) -> None:
        """Warn once if all scores of a phase are equal, in ``EQUAL`` phases in a row (collective)."""
        mine = {rollout.reward for rollout in rollouts if rollout.reward is not None}
        scores = {score for each in from_all_ranks([sorted(mine)[:2]]) for score in each}
        self._equal = self._equal + 1 if len(scores) == 1 else 0
        if self._equal == EQUAL and not self._equal_warned:
            self._equal_warned = True
            rank_zero_warn(
                f"phase {self.current_epoch}: for {EQUAL} phases {self.reward.name} has given all completions one score, "
                f"now {min(scores):g}, so nothing is learned from it: either the prompts are too hard or too easy, or "
                "completions are cut off before their answers (sampling.max_completion_length), or the reward does not "
                "read the form in which they answer; the callback Samples shows some"
            )

    def check_start(self, batch: PolicyBatch) -> None:
        """Compare policy and reference at step 0 on the first completion; see ``refuse_other_start``."""
        if self.global_step == 0 and self.own_reference and self.reference is not None:
            first = take_chunk(batch, torch.zeros(1, dtype=torch.long, device=self.device))
            self.refuse_other_start(kl.k1(self.policy_scores(first)[0], *self.reference_scores(first)))

    def refuse_other_start(self, log_ratio: Tensor) -> None:
        """Refuse a reference that differs from the policy at step 0, where the two are the same model.

        Raises:
            ValueError: their log-probs differ.
        """
        if self.global_step == 0 and self.own_reference and not (gap := float(log_ratio.abs().max())) <= 1e-3:
            raise ValueError(
                f"policy and reference differ before the first update (log-probs by up to {gap:.3g}): the KL would be "
                "meaningless"
            )

    def check_kl(self, sums: list[float]) -> None:
        """Warn once if the KL of a phase is below 0 by more than chance and rounding explain. ``sums`` has the KL of
        each completion.
        """
        values = torch.tensor(sums, dtype=torch.float64)
        if self._kl_warned or len(values) < ENOUGH:
            return
        mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
        if mean < -NEGATIVE_KL * error - 1e-5:
            self._kl_warned = True
            rank_zero_warn(
                f"the KL to the start is {mean:.3g} +- {error:.2g} nats a completion, and a KL is never below 0: the "
                "completions do not come from the distribution that is scored. Causes: top_p below 1, top_k, an engine "
                "with another temperature or with stop tokens suppressed, dropout, weights that were not synced"
            )
