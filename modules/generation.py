"""The base of methods that answer prompts: engine, rewards, the frozen start policy, evaluation and predictions."""

import re
from dataclasses import dataclass, replace
from typing import Any, cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from modules.base import AlignmentModule
from modules.functional.ranges import check_numbers
from modules.networks.lora import Lora
from modules.networks.policy import load_companion
from modules.networks.reference import Frozen, hash_weights
from modules.rewards.combined import describe_reward, find_accuracy, require_tasks, walk_rewards
from modules.rewards.earned import check_earned
from modules.rewards.learned import LearnedReward
from modules.rewards.verifier import count_failures
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.environment import Environment, check_environment
from modules.rollout.metrics import (
    make_outcomes,
    measure_budgets,
    measure_errors,
    measure_rollouts,
    measure_unscored,
    share_solved,
)
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import (
    add_measures,
    make_batch,
    make_rollouts,
    measure_rows,
    score_in_chunks,
)
from modules.rollout.thinking import Thinking, check_thinking
from modules.rollout.tool_calls import ToolFormat
from modules.trainer.ranks import from_all_ranks
from modules.trainer.seeds import derive_seed, run_seed
from modules.types import Completion, Outcome, PolicyBatch, PromptBatch, Reward, as_reward


@dataclass(frozen=True)
class Validation:
    """How held-out prompts are answered and judged.

    Raises:
        ValueError: a value is out of range.
    """

    # Decides right (score > 0.5) or wrong. None = the part of the reward that compares answers, or the whole reward if
    # it has no parts; learned rewards, judges and sums without such a part leave pass@k out.
    accuracy: Reward | None = None
    generations: int = 1  # >= 1, sampled completions of a prompt, for pass@1 and pass@k
    # >= 0, tokens: the prompts are answered once more at each of these thinking budgets, for ``BudgetCurve``.
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_numbers("validation", generations=(self.generations, "[1, inf)"))
        if len(set(self.budgets)) < len(self.budgets) or min(self.budgets, default=0) < 0:
            raise ValueError(f"validation: budgets must be different numbers >= 0, got {list(self.budgets)}")


class GenerationModule(AlignmentModule):
    """A method whose policy answers prompts, which rewards score.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off.
        reward: scores completions; None = no reward.
        num_generations: completions per prompt.
        sampling: how to sample.
        engine: samples completions; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours; None = no tools.
        reference: keep the frozen start policy, for a loss or to measure the KL; a folder or hub id = keep that model
            instead.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    least_generations = 2  # completions of a prompt that the method needs

    def __init__(
        self,
        policy: str,
        reward: Reward | None,
        *,
        num_generations: int,
        sampling: Sampling,
        engine: RolloutEngine | None,
        environment: Environment | None,
        reference: bool | str,
        validation: Validation,
        lora: Lora | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int | None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False, lora=lora)
        self.num_generations = num_generations
        self.require_generations(self.least_generations)
        if sampling.temperature <= 0:
            raise ValueError(
                f"sampling.temperature is {sampling.temperature}: greedy completions of a prompt are all the same"
            )
        if sampling.top_k == 1:
            raise ValueError("sampling.top_k is 1: completions of a prompt from the likeliest tokens are all the same")
        self.done: set[str] | None = None  # uids that ``predict`` leaves out, see ``SkipsPrompts``
        self.reward = as_reward(reward)
        self.accuracy = as_reward(validation.accuracy) or (find_accuracy(self.reward) if self.reward else None)
        rewards = [each for each in (self.reward, self.accuracy) if each is not None]
        for each in rewards:
            check_stop(each, sampling)
        if lora is not None:
            self.share_backbone()
        self.val_generations, self.val_budgets = validation.generations, sorted(validation.budgets)
        self.sampling, self.seed = sampling, run_seed(seed)
        self.engine = engine or InProcessEngine()
        self.check_budgets()
        self.environment, self.tool_format = environment, None
        check_earned(rewards, environment)
        if environment is not None:
            check_environment(environment, self.engine, sampling)
            self.tool_format = ToolFormat(self.tokenizer, environment.tools(), self.policy.stop_token_ids)
        other = load_companion(self.policy, reference, "reference") if isinstance(reference, str) else None
        self.own_reference = other is None  # the policy as it starts
        self.reference = Frozen(other or self.policy, own=other is not None) if reference else None
        self.reference_id = self.reference.fingerprint() if self.reference is not None else None
        self.record.held_out = []

    def require_generations(self, least: int) -> None:
        """Refuse fewer than ``least`` completions of a prompt."""
        if self.num_generations < least:
            compared = ": a group needs at least 2 completions to compare" if least > 1 else ", expected at least 1"
            raise ValueError(f"num_generations is {self.num_generations}{compared}")

    def check_budgets(self) -> None:
        """Refuse thinking budgets that the engine does not keep, that leave no room for an answer, or that nothing judges."""
        thinking = self.sampling.thinking or Thinking()
        budgets = [*thinking.budgets, *self.val_budgets]
        if budgets and not self.engine.limits_thoughts:
            raise ValueError(
                f"sampling.thinking: {type(self.engine).__name__} keeps no thinking budget (limits_thoughts): leave "
                "model.engine out, or the budgets of sampling.thinking and validation"
            )
        check_thinking(
            thinking, self.tokenizer, budgets, self.sampling.max_completion_length, self.sampling.stop, opened=True
        )
        if self.val_budgets and self.accuracy is None:
            raise ValueError(
                "validation.budgets asks which answers are right, and model.reward does not say that: name a reward that "
                "does, with model.validation.accuracy"
            )

    def share_backbone(self) -> None:
        """Compute reward models that are adapters of the policy's backbone on that backbone."""
        learned = [
            part
            for reward in (self.reward, self.accuracy)
            if reward is not None
            for part in walk_rewards(reward)
            if isinstance(part, LearnedReward)
        ]
        shared = {path for part in learned for path in part.share_backbone(self.policy)}
        for path in dict.fromkeys(path for part in learned for path in part.paths):
            own = (
                "on the policy's backbone"
                if path in shared
                else "on a model of its own: it has no adapters of the policy's backbone"
            )
            rank_zero_info(f"reward {path}: computed {own}")

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """JSON schemas that the prompts are to tell; None = there are no tools, or the chat template writes none."""
        told = self.environment is not None and self.tool_format is not None and self.tool_format.writes_tools
        return self.environment.tools() if told and self.environment is not None else None

    def on_fit_start(self) -> None:
        """Refuse prompts that no reward scores, and move the frozen start policy to the device of the trained one."""
        super().on_fit_start()
        for reward in filter(None, (self.reward, self.accuracy)):
            require_tasks(reward, getattr(self.trainer, "datamodule", None))
        if self.reference is not None:
            self.reference.to(self.device)

    def find_seeds(self, prompts: PromptBatch, phase: str) -> list[int]:
        """Return the seed of each prompt's first completion; the seeds of its other completions follow."""
        return [derive_seed(self.seed, phase, uid) for uid in prompts["uid"]]

    def sample(
        self, prompts: PromptBatch, num_generations: int, sampling: Sampling, phase: str
    ) -> tuple[PromptBatch, list[list[Completion]]]:
        """Sample ``num_generations`` completions of each prompt from the current weights.

        Returns:
            the prompts, as an environment opens them if there is one, and the completions of each.
        """
        self.sync_engine()
        seeds = self.find_seeds(prompts, phase)
        if self.environment is None or self.tool_format is None:
            return prompts, self.engine.generate(prompts["prompt_ids"], num_generations, sampling, seeds)
        return self.environment.sample(self.engine, self.tool_format, prompts, num_generations, sampling, seeds)

    def sync_engine(self) -> None:
        """Give the engine the current weights."""
        self.engine.sync_weights(self.policy, self.global_step)

    def policy_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Compute log-probs and entropies [N, Tc] under the current policy."""
        scores = self.policy.completion_scores(batch, self.sampling.temperature, details=True)
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies

    def reference_scores(self, batch: PolicyBatch) -> tuple[Tensor]:
        """Compute log-probs [N, Tc] under the frozen start policy."""
        assert self.reference is not None
        return (self.reference.completion_logprobs(batch, self.sampling.temperature),)

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sample and score completions of held-out prompts, with the same seeds in every evaluation."""
        self.evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Do the same for ``test``."""
        self.evaluate(prompts, "test")

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Answer a batch of held-out prompts, and keep the scored completions in ``record``. If ``accuracy`` tells
        right from wrong, answer them greedily too.
        """
        before = count_failures(self.reward)
        rollouts = make_rollouts(*self.sample(prompts, self.val_generations, self.sampling, stage), self.reward)
        self.log_evaluation(measure_unscored(count_failures(self.reward, before)))
        batch = make_batch(rollouts, self.device)
        if self.reference is not None:
            self.reference.to(self.device)
            (batch["ref_logprobs"],) = score_in_chunks(self.policy, self.reference_scores, batch)
        logprobs, entropies = score_in_chunks(self.policy, self.policy_scores, batch)
        measured = measure_rows(batch, logprobs, entropies)
        add_measures(rollouts, range(len(rollouts)), measured, self.global_step)
        self.record.held_out = rollouts
        self.record.sampled += make_outcomes(rollouts, self.accuracy, scored_by=self.reward)
        if self.accuracy is not None:
            answers = self.sample(prompts, 1, replace(self.sampling, temperature=0.0), stage)
            greedy = make_rollouts(*answers, self.accuracy)
            self.record.greedy += make_outcomes(greedy, self.accuracy, scored_by=self.accuracy)
        for budget in self.val_budgets:
            thinking = replace(self.sampling.thinking or Thinking(), budget=budget)
            answers = self.sample(prompts, self.val_generations, replace(self.sampling, thinking=thinking), stage)
            limited = make_outcomes(make_rollouts(*answers, self.accuracy), self.accuracy, scored_by=self.accuracy)
            self.record.budgets.setdefault(budget, []).extend(limited)

    def evaluation_metrics(self) -> dict[str, float]:
        """Join the base's metrics; add pass@1, pass@k, greedy accuracy and the numbers of the sampled completions."""
        sampled, greedy = from_all_ranks(self.record.sampled), from_all_ranks(self.record.greedy)
        metrics = super().evaluation_metrics() | measure_rollouts(sampled) | measure_errors(sampled)
        if self.accuracy is None and self.reward is None:
            return metrics
        if self.accuracy is None or (self.accuracy is self.reward and not says_right(self.reward, sampled)):
            rank_zero_warn(
                f"pass@k and greedy_accuracy are left out: a score of {self.reward.name} does not say whether an "
                "answer is right; name a reward that does, with model.validation.accuracy"
            )
            return metrics
        if sampled and all(outcome.right is None for outcome in sampled):
            rank_zero_warn(
                f"{self.accuracy.name} could judge none of the {len(sampled)} held-out completions: have the rows of "
                "data.val answers that it can read? What it would measure is NaN"
            )
        solved = {f"pass@{k}": share_solved(sampled, k) for k in {1, self.val_generations}}
        budgets = {budget: from_all_ranks(self.record.budgets[budget]) for budget in self.record.budgets}
        return metrics | solved | {"greedy_accuracy": share_solved(greedy, 1)} | measure_budgets(budgets)

    def on_validation_end(self) -> None:
        """Let the engine give its memory back."""
        self.release_engine()

    on_test_end = on_predict_end = on_validation_end

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Leave ``num_generations`` scored completions per prompt in ``record.rollouts``, without those in ``done``."""
        wanted = [number for number, uid in enumerate(prompts["uid"]) if uid not in (self.done or ())]
        self.record.rollouts = []
        if wanted:
            asked = cast(PromptBatch, {name: [values[i] for i in wanted] for name, values in prompts.items()})  # type: ignore[index]
            self.record.rollouts = make_rollouts(
                *self.sample(asked, self.num_generations, self.sampling, "predict"), self.reward
            )

    def describe_samples(self) -> dict[str, Any]:
        """Return what determines the samples of ``predict`` and their scores: weights, settings, and the rewards'
        settings.
        """
        asked = [each for each in (self.reward, self.accuracy) if each is not None]
        rewards = [describe_reward(part) for each in asked for part in walk_rewards(each)]
        settings = {"num_generations": self.num_generations, "seed": self.seed, "rewards": rewards}
        return {
            **self.identity(),
            "weights": hash_weights(self.policy),
            **settings,
            "sampling": self.sampling.identity(),
        }

    def find_outcomes(self) -> list[Outcome]:
        """Return the outcomes of ``record.rollouts``, in order; ``right`` by ``accuracy``, None if that cannot tell."""
        return make_outcomes(self.record.rollouts, self.accuracy, scored_by=self.reward)

    def release_engine(self) -> None:
        """Let the engine give its memory back."""
        self.engine.release()

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        self.engine.close()


def says_right(reward: Reward, found: list[Outcome]) -> bool:
    """Return whether scores tell right from wrong: a reward of which that is not known gives nothing but 0 and 1."""
    return bool(reward.checks_answer) or {outcome.reward for outcome in found} <= {0.0, 1.0, None}


def check_stop(reward: Reward, sampling: Sampling) -> None:
    """Refuse a stop string that is a tag which a reward looks for, if it is cut off.

    Raises:
        ValueError: a reward would never find its tag.
    """
    for part in walk_rewards(reward):
        pattern = getattr(part, "pattern", None)
        needed = pattern.pattern.replace("\\", "") if isinstance(pattern, re.Pattern) else ""
        cut = [stop for stop in sampling.stop if re.fullmatch(r"</?\w+>", stop) and stop in needed]
        if cut and not sampling.keep_stop:
            raise ValueError(
                f"sampling.stop cuts {cut[0]!r} off, and the reward {part.name} looks for it: set sampling.keep_stop"
            )
