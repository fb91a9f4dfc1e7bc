"""Distillation of a teacher into a student, on the student's own samples or on given completions (GKD, 2306.13649)."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from modules.base import count_tokens
from modules.functional.masked import pad_rows
from modules.functional.ranges import check_numbers
from modules.generation import Validation
from modules.losses.distillation import (
    Buckets,
    Divergence,
    LazyLogits,
    ReverseKL,
    fill_buckets,
    find_buckets,
    keep_first,
    measure_divergence,
)
from modules.networks.loading import lacks_output_head
from modules.networks.lora import Lora
from modules.networks.policy import MAX_LOGITS, Policy, load_companion
from modules.networks.reference import Frozen
from modules.networks.teacher_table import TeacherTable, describe_weights, read_or_write_table
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.phases.reuse import refuse_reuse
from modules.rollout.phases.segments import require_all_segments
from modules.rollout.phases.staleness import measure_staleness
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import make_batch, make_rollouts
from modules.trainer.pieces import train_by_pieces
from modules.trainer.ranks import from_all_ranks
from modules.trainer.seeds import derive_seed
from modules.types import Completion, PolicyBatch, PromptBatch, Reward, Rollout

EMA = 0.05  # SDPO's


class DistillModule(OnPolicyModule):
    """Moves the student's next-token distributions towards the teacher's, token by token.

    The loss is the mean over the tokens of the whole step of D(teacher, student), where both have read the same tokens.
    No gradient flows through sampling. Each prompt of a phase is answered by the student (on-policy) or by the row's
    own completion (off-policy), in the shares that ``on_policy`` sets. Unlike GKD's, the logits of both models are
    divided by the sampling temperature, as TRL's ``DistillationTrainer`` does.

    A teacher that is the policy itself learns from what only it reads: a demonstration (SDFT, arXiv 2601.19897) or
    feedback (SDPO, arXiv 2601.20802) in a column of the row.

    Args:
        policy: the student: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off.
        teacher: another model with the same tokens; None = the policy itself, which then needs a ``condition``.
        objective: ``ReverseKL``, ``ForwardKL``, ``JSD`` or your own; default ``ReverseKL``.
        on_policy: [0, 1], share of prompts that the student answers (GKD's lambda).
        completions: the column with the completions for the other prompts; they are cut at
            ``sampling.max_completion_length``.
        condition: what the teacher reads in place of the question. ``{prompt}`` stands for the question, and ``{name}``
            for a column: ``"{prompt} An example answer: {demonstration}"``. None = what the student reads.
        ema: [0, 1], share of the policy in its own teacher after each update: teacher <- ema policy + (1 - ema)
            teacher. 0 keeps the start, 1 follows the policy; default 0.05. Another model stays as it is.
        top_k: tokens that the teacher finds most likely; all others count as one. None = the whole vocabulary.
        teacher_cache: folder that keeps the teacher's probabilities for the rows' completions. It is written before the
            first step, and the teacher is not loaded if nothing is missing in it. Needs ``top_k`` and ``on_policy`` 0.
        first_tokens: learn only from the first tokens of each completion: a share in (0, 1), or a number; None = from
            all.
        num_generations: completions that the student samples for a prompt.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours, whose words carry no loss; None = none.
        reward: scores the student's samples, for metrics alone; None = nothing does.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling, and of the choice of prompts that the student answers; None = the run's.

    Raises:
        ValueError: a value is out of range, options exclude each other, or the teacher has other tokens.
    """

    least_generations = 1
    keeps_logprobs = False

    def __init__(
        self,
        policy: str,
        teacher: str | None = None,
        objective: Divergence | None = None,
        on_policy: float = 1.0,
        completions: str = "completion",
        condition: str | None = None,
        ema: float | None = None,
        top_k: int | None = None,
        teacher_cache: str | None = None,
        first_tokens: float | None = None,
        num_generations: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        environment: Environment | None = None,
        reward: Reward | None = None,
        validation: Validation = Validation(),  # noqa: B008
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        refuse_reuse(sampling, "DistillModule")
        super().__init__(
            policy,
            reward,
            num_generations=num_generations,
            sampling=sampling,
            engine=engine,
            environment=environment,
            importance=False,
            reference=False,
            validation=validation,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        self.num_tokens_known = (
            max(self.tokenizer.get_vocab().values()) + 1
        )  # rows beyond are padding of the vocabulary
        check_numbers(
            "DistillModule",
            on_policy=(on_policy, "[0, 1]"),
            ema=(ema, "[0, 1]"),
            top_k=(top_k, f"[1, {self.num_tokens_known - 1}]"),
            first_tokens=(first_tokens, "(0, inf)"),
        )
        if first_tokens is not None and first_tokens > 1 and first_tokens != int(first_tokens):
            raise ValueError(f"first_tokens is {first_tokens}: give a share below 1, or a whole number of tokens")
        self.refuse_contradictions(teacher, on_policy, condition, ema, top_k, teacher_cache, environment, lora)
        require_all_segments(sampling, "DistillModule")
        if self.overlap is not None and on_policy < 1:
            raise ValueError(
                f"max_staleness of the engine is {self.engine.max_staleness}, and only whole phases are sampled ahead: set it "
                f"to 0, or on_policy ({on_policy}) to 1"
            )
        if sampling.partial is not None and (on_policy < 1 or condition is not None):
            raise ValueError(
                "sampling.partial trains in a phase on the prompts of earlier ones too, and neither a row's completion nor a "
                "condition is kept for them: set on_policy to 1 and condition to null, or leave sampling.partial out"
            )
        self.objective, self.on_policy = objective or ReverseKL(), on_policy
        self.completions = completions if on_policy < 1 else None  # read by the DataModule, like the condition
        self.condition, self.first_tokens, self.top_k = condition, first_tokens, top_k
        self.ema = 0.0 if teacher is not None else EMA if ema is None else ema
        self.teacher_path, self.teacher_cache = teacher, teacher_cache
        self.table: TeacherTable | None = None
        self.teacher = None if teacher_cache is not None else self.load_teacher()
        self.reference_id = None if self.teacher is None or self.ema > 0 else self.teacher.fingerprint()

    def refuse_contradictions(
        self,
        teacher: str | None,
        on_policy: float,
        condition: str | None,
        ema: float | None,
        top_k: int | None,
        teacher_cache: str | None,
        environment: Environment | None,
        lora: Lora | None,
    ) -> None:
        """Refuse options that exclude each other.

        Raises:
            ValueError: naming both and the way out.
        """
        if teacher is None and condition is None:
            raise ValueError(
                "teacher is null and so is condition: a policy learns nothing from what it says itself; name a "
                "teacher, or a condition that it reads as its own teacher"
            )
        if condition is not None and ("{prompt}" not in condition or len(re.findall(r"\{[^{}]+\}", condition)) < 2):
            raise ValueError(
                f"condition is {condition!r}: it needs {{prompt}}, where the question goes, and the name of a column "
                "in braces, such as {demonstration}"
            )
        if teacher is not None and ema:
            raise ValueError(
                f"ema moves a teacher that is the policy itself, and teacher is '{teacher}': leave one of them out"
            )
        if lora is not None and teacher is None and (ema is None or 0 < ema < 1):
            raise ValueError(
                "ema averages weights, and averaged adapters are not the adapters of the averaged model: set ema to 0 "
                "or 1"
            )
        if environment is not None and (on_policy < 1 or condition is not None):
            raise ValueError(
                "environment opens each prompt anew, so neither a row's completion nor a condition fits it: set "
                "on_policy to 1 and condition to null"
            )
        if teacher_cache is not None and (teacher is None or top_k is None or on_policy > 0):
            raise ValueError(
                "teacher_cache keeps the top_k of another model on the rows' completions: set teacher, top_k, and "
                "on_policy to 0"
            )
        if not isinstance(self.policy.model.get_output_embeddings(), nn.Linear):
            raise ValueError(
                "lora.target_modules names the output head, whose weights distillation reads: leave it out"
            )

    def load_teacher(self) -> Frozen:
        """Load the teacher, or copy the policy as it is now.

        Raises:
            ValueError: the teacher has other tokens, or no output head.
        """
        if self.teacher_path is None:
            return Frozen(self.policy)
        other = load_companion(self.policy, self.teacher_path, "teacher")
        if lacks_output_head(other.model):
            raise ValueError(
                f"teacher: '{self.teacher_path}' is a classifier without an output head: name a language model"
            )
        return Frozen(other, own=True)

    def on_fit_start(self) -> None:
        """Have the teacher ready before the first step."""
        super().on_fit_start()
        self.ready_teacher()

    def on_validation_start(self) -> None:
        """Have the teacher ready, also where nothing is trained."""
        super().on_validation_start()
        self.ready_teacher()

    def ready_teacher(self) -> None:
        """Move the teacher to the device of the student, or read its probabilities from ``teacher_cache``."""
        if self.teacher is not None:
            self.teacher.to(self.device)
        if self.teacher_cache is None or self.table is not None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = data.every_prompt()
        rows = zip(self.prompts_of_teacher(prompts), self.cut_completions(prompts), strict=True)
        lessons = [(tuple(prompt), tuple(completion)) for prompt, completion in rows]
        assert self.teacher_path is not None
        tokens = sorted(self.tokenizer.get_vocab().items())
        identity = repr((self.teacher_path, self.top_k, self.sampling.temperature, self.trainer.precision, tokens))

        def say() -> Any:
            teacher = self.load_teacher().to(self.device)
            return lambda batch: self.find_buckets(teacher, self.trainer.strategy.batch_to_device(batch))

        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            folder, weights = Path(self.teacher_cache), describe_weights(self.teacher_path)
            self.table = read_or_write_table(lessons, say, folder, identity, weights)

    def prepare(self, batch: PolicyBatch) -> None:
        """Count the tokens that teach."""
        batch["row_count"] = batch["completion_mask"].sum(1).float()
        batch["active"] = batch["completion_mask"].any(1)

    def collect(self, prompts: PromptBatch) -> PolicyBatch:
        """Make one phase of this rank: sample the student's share of completions, and take the others from rows."""
        start = time.perf_counter()
        self.record.metrics = {"time/sampling": 0.0}
        own = [self.answers(uid) for uid in prompts["uid"]]
        if self.partial is not None:
            found = self.gather(prompts)
            sampled, self.record.carried = found.rollouts, found.left
            self.log_phase(found.metrics)
        elif all(own):
            sampled = self.sample_rollouts(prompts)
        else:
            sampled = self.sample_rollouts(pick_prompts(prompts, own)) if any(own) else []
        if self.partial is not None or self.overlap is not None:
            self.log_phase(measure_staleness(sampled, self.global_step))
        if self.reward is not None and any(from_all_ranks([bool(sampled)])):
            self.check_scored(sampled)
        self.record.rollouts = sampled
        others = [not mine for mine in own]
        given = self.recite(pick_prompts(prompts, others)) if any(others) else []
        places = [[place for place, kept in enumerate(each) if kept] for each in (own, others)]
        rollouts = [
            replace(rollout, group=places[side][rollout.group])
            for side, part in enumerate((sampled, given))
            for rollout in part
        ]
        batch = self.make_lessons(sorted(rollouts, key=lambda rollout: rollout.group), prompts)
        scoring = time.perf_counter() - start - self.record.metrics["time/sampling"]
        self.log_phase({"time/scoring": scoring, "time/training": 0.0})
        return batch

    def answers(self, uid: str) -> bool:
        """Tell whether the student answers a prompt of this phase: a function of seed, phase and prompt alone."""
        return derive_seed(self.seed, f"{self.current_epoch} on_policy", uid) < self.on_policy * 2**62

    def recite(self, prompts: PromptBatch) -> list[Rollout]:
        """Make a rollout of each row's own completion."""
        completions = [
            [Completion(ids, [0.0] * len(ids), str(self.tokenizer.decode(ids, skip_special_tokens=True)), "stop")]
            for ids in self.cut_completions(prompts)
        ]
        return make_rollouts(prompts, completions, None)

    def cut_completions(self, prompts: PromptBatch) -> list[list[int]]:
        """Return the tokens of the rows' own completions, as many as the student may sample."""
        return [ids[: self.sampling.max_completion_length] for ids in prompts["completion_ids"]]

    def prompts_of_teacher(self, prompts: PromptBatch) -> list[list[int]]:
        """Return the tokens that the teacher reads before each completion."""
        return prompts["prompt_ids"] if self.condition is None else prompts["teacher_prompt_ids"]

    def make_lessons(self, rollouts: list[Rollout], prompts: PromptBatch) -> PolicyBatch:
        """Make the tensors of completions in the order of their prompts; ``group`` is the number of the prompt."""
        batch = make_batch([replace(rollout, rewards={}, reward=None) for rollout in rollouts], self.device)
        if self.condition is not None:
            seen = pad_rows(prompts["teacher_prompt_ids"])
            batch["teacher_prompt_ids"], batch["teacher_prompt_mask"] = (each.to(self.device) for each in seen)
        if self.table is not None:
            before = self.prompts_of_teacher(prompts)
            lessons = [(tuple(before[each.group]), tuple(each.completion.token_ids)) for each in rollouts]
            batch["lesson"] = torch.tensor([self.table.rows[lesson] for lesson in lessons], device=self.device)
        if self.first_tokens is not None:  # what comes after them need not be computed
            kept = keep_first(batch["completion_mask"], self.first_tokens)
            batch["attended"] = kept.flip(1).cumsum(1).flip(1) > 0
            batch["completion_mask"] = kept
        self.prepare(batch)
        return batch

    @train_by_pieces
    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the mean over the step's tokens."""
        loss = self.divergences(batch).sum() / batch["denominator"]
        self.log_step({"loss": loss, "tokens": count_tokens(batch, batch["completion_mask"].any(1))})
        return self.step_loss(loss)

    def divergences(self, batch: PolicyBatch) -> Tensor:
        """Compute D(teacher, student) [K] of the K tokens that teach, in nats, with gradient."""
        student = self.logits_of(self.policy, self.policy.token_states(batch)[batch["completion_mask"]])
        temperature = self.sampling.temperature
        if self.top_k is None:
            assert self.teacher is not None
            teacher = self.logits_of_teacher(self.teacher, batch)
            return measure_divergence(self.objective, student, teacher, temperature, MAX_LOGITS)
        if self.table is not None:
            known = self.table.of(batch)
        else:
            assert self.teacher is not None
            known = self.find_buckets(self.teacher, batch)
        return self.objective(fill_buckets(student, known.ids, temperature, MAX_LOGITS), known.logprobs)

    def find_buckets(self, teacher: Frozen, batch: PolicyBatch) -> Buckets:
        """Find the teacher's ``top_k`` at the K tokens that teach."""
        assert self.top_k is not None
        return find_buckets(self.logits_of_teacher(teacher, batch), self.top_k, self.sampling.temperature, MAX_LOGITS)

    def logits_of_teacher(self, teacher: Frozen, batch: PolicyBatch) -> LazyLogits:
        """Make the teacher's logits of the K tokens that teach, after the prompts that it reads."""
        if "teacher_prompt_ids" in batch:
            seen = {
                f"prompt_{name}": cast(dict[str, Tensor], batch)[f"teacher_prompt_{name}"] for name in ("ids", "mask")
            }
            batch = cast(PolicyBatch, batch | seen)
        return self.logits_of(teacher.policy, teacher.token_states(batch)[batch["completion_mask"]])

    def logits_of(self, policy: Policy, states: Tensor) -> LazyLogits:
        """Make a model's logits from its hidden states [K, H], without the padding of its vocabulary."""
        head, known = cast(nn.Linear, policy.model.get_output_embeddings()), self.num_tokens_known
        bias = None if head.bias is None else head.bias[:known]
        return LazyLogits(states.to(head.weight.dtype), head.weight[:known], bias)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, then move a teacher that follows the policy."""
        super().optimizer_step(*args, **kwargs)
        if self.ema > 0 and self.teacher is not None:
            self.teacher.mix(self.policy, self.ema)

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Answer held-out prompts as every method does, and measure D on the answers. If ``on_policy`` is 0, D is
        measured on the rows' own completions.
        """
        super().evaluate(prompts, stage)
        rollouts = self.recite(prompts) if self.on_policy == 0 else self.record.held_out
        assert rollouts is not None
        batch = self.make_lessons(rollouts, prompts)
        tokens = batch["row_count"].sum()
        self.log_evaluation({"loss": self.divergences(batch).sum() / tokens}, weight=float(tokens))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what every method saves, and a teacher that moves."""
        super().on_save_checkpoint(checkpoint)
        if self.ema > 0 and self.teacher is not None:
            checkpoint["teacher"] = {name: weight.detach().cpu() for name, weight in self.teacher.weights.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what every method loads, and a teacher that moved."""
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None:
            for name, weight in checkpoint.get("teacher", {}).items():
                self.teacher.weights[name].data.copy_(weight)


def pick_prompts(prompts: PromptBatch, kept: list[bool]) -> PromptBatch:
    """Return the prompts that ``kept`` [P] marks."""
    lists = {name: values for name, values in prompts.items() if isinstance(values, list) and name != "update"}
    picked = {name: [value for value, mine in zip(values, kept, strict=True) if mine] for name, values in lists.items()}
    return cast(PromptBatch, picked)
