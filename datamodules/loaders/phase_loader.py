"""One rollout phase = one Trainer epoch: collect rollouts at the first ``next()``, then yield the micro-batches of all
updates.

The contracts that this file keeps, each with a test in ``tests/loop``: it is sized, equally on all ranks; the phase
number is the Trainer's epoch; the position moves before the yield; its state travels in the DataModule's checkpoint
entry, one entry per rank, made of tensors, numbers and strings only; everything random is a function of (seed, phase);
collecting runs in the Trainer's precision context, without gradients and in eval mode.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import count
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from modules.trainer.modes import evaluating
from modules.trainer.ranks import from_all_ranks
from modules.trainer.steps import update_of_prompts
from modules.types import (
    Completion,
    Credit,
    HasRecord,
    InstructionBatch,
    PolicyBatch,
    PromptBatch,
    Rollout,
    SampledAhead,
    find_attended,
)

PROMPT_FIELDS = {
    f"{whose}prompt_{name}": f"{whose}prompt_mask" for whose in ("", "teacher_") for name in ("ids", "mask")
}
PHASE_FIELDS = ("denominator", "row_count", "active", "update", "penalties", "parts", "part_weights")


class PhaseLoader:
    """The train loader of on-policy modules.

    Args:
        trainer: gives the phase (``current_epoch``), the micro-batches per update (``accumulate_grad_batches``) and the
            module, whose ``collect(prompts)`` samples, scores and returns the phase's ``PolicyBatch``.
        draw: number of a stretch of prompts, counted from 0 since the start -> this rank's prompts of it. A phase takes
            one stretch; a module that samples further prompts in a phase takes further ones.
        updates_per_phase: optimiser updates made from one phase's rollouts.
        inner_epochs: passes over the rollouts; divides ``updates_per_phase``.
        seed: for the shuffle of groups into updates.
        ptx: number of an update since the start, micro-batch in it -> this rank's texts, which the update learns from
            beside its completions.
        learn: called after a phase is collected, so that later draws may depend on its rollouts.

    Raises:
        ValueError: the numbers do not divide, or differ between ranks.
    """

    def __init__(
        self,
        trainer: Trainer,
        draw: Callable[[int], PromptBatch],
        updates_per_phase: int = 1,
        inner_epochs: int = 1,
        seed: int = 0,
        ptx: Callable[[int, int], InstructionBatch] | None = None,
        learn: Callable[[], None] | None = None,
    ) -> None:
        if updates_per_phase < 1 or inner_epochs < 1 or updates_per_phase % inner_epochs:
            raise ValueError(
                f"updates_per_phase ({updates_per_phase}) must be a positive multiple of inner_epochs "
                f"({inner_epochs}): each pass over the rollouts makes the same number of updates"
            )
        self.trainer, self.draw, self.seed, self.ptx = trainer, draw, seed, ptx
        self.learn = learn
        self.updates, self.inner_epochs = updates_per_phase, inner_epochs
        self.per_pass = updates_per_phase // inner_epochs
        self.phase, self.position = -1, 0
        self.extra = 0  # stretches that phases took beyond their first one
        self.micro_batches: list[PolicyBatch] = []
        length = torch.tensor(len(self), device=trainer.strategy.root_device)
        lengths = {int(n) for n in trainer.strategy.all_gather(length).reshape(-1)}
        if len(lengths) > 1:
            raise ValueError(
                f"the ranks disagree on the micro-batches of a phase: {sorted(lengths)}; give them the same settings"
            )

    def __len__(self) -> int:
        return self.updates * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[PolicyBatch]:
        phase = self.trainer.current_epoch
        if self.phase != phase:
            micro_batches = self.plan(self.collect(phase), phase)
            self.phase, self.position, self.micro_batches = (
                phase,
                0,
                micro_batches,
            )  # together: collecting may be interrupted
        while self.position < len(self):
            self.position += 1  # before the yield: nobody resumes this generator after the last item
            yield self.with_texts(self.position - 1)

    def with_texts(self, position: int) -> PolicyBatch:
        """Add its ptx texts to a planned micro-batch. They are a function of its position, so no checkpoint holds them."""
        batch = self.micro_batches[position]
        if self.ptx is None:
            return batch
        update, micro_batch = divmod(position, self.trainer.accumulate_grad_batches)
        return {**batch, "ptx": self.ptx(self.phase * self.updates + update, micro_batch)}

    def collect(self, phase: int) -> PolicyBatch:
        """Sample and score a phase in the Trainer's precision, without gradients, in evaluation mode."""
        module = cast(LightningModule, self.trainer.lightning_module)
        prompts, further = self.draw(phase + self.extra), count(self.extra + 1)
        prompts["further"] = lambda: self.draw(phase + next(further))
        prompts["ahead"] = lambda phases: self.draw(phase + self.extra + phases)
        prompts["update"] = update_of_prompts(len(prompts["uid"]), self.per_pass)
        prompts["updates"] = self.updates
        with evaluating(module), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            batch: PolicyBatch = module.collect(prompts)  # type: ignore[operator]
            if self.learn is not None:
                self.learn()
        self.extra = next(further) - 1  # after collecting, which may be interrupted
        return batch

    def plan(self, batch: PolicyBatch, phase: int) -> list[PolicyBatch]:
        """Split a phase into updates and these into micro-batches, each with its update's denominator over all ranks.

        An update is a stretch of the drawn prompts, whose order is random already: so k ranks, which drew in turn, make
        the updates that one rank would. Passes after the first visit the updates in another order.
        """
        micro, num_prompts = self.trainer.accumulate_grad_batches, len(batch["prompt_ids"])
        update_of = torch.tensor(update_of_prompts(num_prompts, self.per_pass), device=batch["prompt_index"].device)[
            batch["prompt_index"]
        ]  # [N]
        stretches = [(update_of == update).nonzero()[:, 0] for update in range(self.per_pass)]
        updates = [
            stretches[i] for number in range(self.inner_epochs) for i in self.order(phase, number, self.per_pass)
        ]
        unit = "prompts" if "rank" in batch else "completions"  # compared completions stay together
        smallest = min(
            len(batch["prompt_index"][rows].unique()) if unit == "prompts" else len(rows) for rows in updates
        )
        if smallest < micro:
            raise ValueError(
                f"a phase of {num_prompts} prompts and {len(batch['prompt_index'])} completions on this rank cannot "
                f"make {self.per_pass} updates "
                f"of {micro} micro-batches (the smallest update has {smallest} {unit}): raise prompts_per_phase, or "
                "lower updates_per_phase or accumulate_grad_batches"
            )
        counts = torch.stack([batch["row_count"][rows].sum() for rows in updates])
        counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        planned = zip(updates, counts, strict=True)
        return [select(batch, rows, count) for update, count in planned for rows in split(batch, update, micro)]

    def order(self, phase: int, number: int, updates: int) -> list[int]:
        """Return the order of a pass's updates, a function of (seed, phase, pass); the first pass keeps the order of
        drawing.
        """
        if number == 0:
            return list(range(updates))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + phase) * 1_009 + number)
        return torch.randperm(updates, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict, which only tells Lightning that the loader resumes. The DataModule keeps the
        ``snapshot``.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, see ``state_dict``."""

    def snapshot(self) -> dict[str, Any]:
        """Return the state of all ranks for the checkpoint (collective): phase, position, buffered micro-batches, the
        module's record. It waits for completions that are being sampled.
        """
        record = cast(HasRecord, self.trainer.lightning_module).record
        mine = {
            "phase": self.phase,
            "position": self.position,
            "micro_batches": [move_batch(batch, torch.device("cpu")) for batch in self.micro_batches]
            if self.position < len(self)
            else [],
            "rollouts": [asdict(rollout) for rollout in record.rollouts],
            "carried": [asdict(rollout) for rollout in record.carried],
            "ahead": [
                {
                    "phase": number,
                    "weights": each.weights,
                    "completions": [[asdict(completion) for completion in group] for group in each.completions()],
                }
                for number, each in sorted(record.ahead.items())
                if number > self.phase
            ],
            "credits": None if record.credits is None else [asdict(credit) for credit in record.credits],
            "phase_metrics": dict(record.metrics),
            "extra": self.extra,
        }
        return {"ranks": from_all_ranks([mine])}

    def restore(self, state: dict[str, Any]) -> None:
        """Take this rank's part of a ``snapshot``, at the last whole update: gradients of half an update are in no
        checkpoint.

        Raises ValueError inside a phase if the number of ranks, or of micro-batches in a phase, has changed.
        """
        ranks, world = state["ranks"], self.trainer.world_size
        record = cast(HasRecord, self.trainer.lightning_module).record
        self.extra = ranks[0].get("extra", 0)
        if len(ranks) != world:
            if any(part["micro_batches"] for part in ranks):
                raise ValueError(
                    f"the checkpoint was written inside a phase on {len(ranks)} ranks and cannot go on with {world}: "
                    f"resume on {len(ranks)}, or from a checkpoint written at the end of an epoch"
                )
            if any(part.get("carried") for part in ranks):
                raise ValueError(
                    f"the checkpoint holds groups that {len(ranks)} ranks have yet to learn from (dynamic sampling, partial "
                    f"rollouts) and cannot go on with {world}: resume on {len(ranks)}"
                )
            return
        mine = ranks[self.trainer.global_rank]
        saved = len(mine["micro_batches"])
        if saved and saved != len(self):
            raise ValueError(
                f"the checkpoint was written inside a phase of {saved} micro-batches and this run has {len(self)}: "
                "resume with the same "
                "updates_per_phase and accumulate_grad_batches, or from a checkpoint written at the end of an epoch"
            )
        self.phase = mine["phase"]
        self.position = (
            mine["position"] - mine["position"] % self.trainer.accumulate_grad_batches if saved else len(self)
        )
        self.micro_batches = [move_batch(batch, self.trainer.strategy.root_device) for batch in mine["micro_batches"]]
        record.rollouts = [load_rollout(saved) for saved in mine["rollouts"]]
        record.carried = [load_rollout(saved) for saved in mine.get("carried", [])]
        record.ahead = {saved["phase"]: load_ahead(saved) for saved in mine.get("ahead", [])}
        if mine.get("credits") is not None:
            record.credits = [Credit(**saved) for saved in mine["credits"]]
        record.metrics = mine["phase_metrics"]


def load_ahead(saved: dict[str, Any]) -> SampledAhead:
    """Return the completions of a later phase that a checkpoint holds."""
    completions = [[Completion(**each) for each in group] for group in saved["completions"]]
    return SampledAhead(saved["weights"], lambda: completions)


def load_rollout(saved: dict[str, Any]) -> Rollout:
    """Return the rollout from which ``asdict`` made this dict."""
    return Rollout(**{**saved, "completion": Completion(**saved["completion"])})


def draw_from_stream(places: Iterable[int], num_rows: int, seed: int) -> list[tuple[int, int]]:
    """Find the row and the number of the pass at each place of an endless stream.

    Pass after pass is shuffled anew by (seed, pass).
    """
    return [(order_of_pass(num_rows, seed, place // num_rows)[place % num_rows], place // num_rows) for place in places]


@lru_cache(maxsize=4)
def order_of_pass(num_rows: int, seed: int, number: int) -> list[int]:
    """Return the rows in the order of a pass."""
    order = list(range(num_rows))
    random.Random(f"{seed} {number}").shuffle(order)
    return order


def move_batch(batch: PolicyBatch, device: torch.device) -> PolicyBatch:
    """Return the batch with its tensors on ``device``."""
    return cast(PolicyBatch, {name: value.to(device) for name, value in cast(dict[str, Tensor], batch).items()})


def split(batch: PolicyBatch, rows: Tensor, parts: int) -> list[Tensor]:
    """Deal the rows of one update to ``parts`` micro-batches with like token counts, whole groups where there are
    enough.

    Rows without gradient are left out, unless a micro-batch would stay empty.
    """
    active = rows[batch["active"][rows]]
    tokens = find_attended(batch).sum(1)
    group = batch["prompt_index"][active]
    units = [active[group == g] for g in group.unique()]
    if len(units) < parts and "rank" not in batch:  # compared completions stay together
        units = list(active[:, None])
    if len(units) < parts:
        idle = rows[~batch["active"][rows]]
        units += list(idle[tokens[idle].argsort(stable=True)][: parts - len(units), None])
    bins: list[list[Tensor]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for unit in sorted(units, key=lambda unit: -int(tokens[unit].sum())):
        lightest = loads.index(min(loads))
        bins[lightest].append(unit)
        loads[lightest] += int(tokens[unit].sum())
    return [torch.cat(units).sort().values for units in bins]


def select(batch: PolicyBatch, rows: Tensor, denominator: Tensor) -> PolicyBatch:
    """Return the micro-batch of these rows, with only their prompts and without columns that are padding in all of
    them.
    """
    prompts, index = batch["prompt_index"][rows].unique(return_inverse=True)
    tokens = int(find_attended(batch)[rows].sum(1).max())
    chosen: dict[str, Tensor] = {"denominator": denominator}
    for name, value in cast(dict[str, Tensor], batch).items():
        if name in PROMPT_FIELDS:
            mask = cast(dict[str, Tensor], batch)[PROMPT_FIELDS[name]]
            chosen[name] = value[prompts, : int(mask[prompts].sum(1).max())]
        elif name not in PHASE_FIELDS:
            chosen[name] = value[rows, :tokens] if value.dim() == 2 else value[rows]
    chosen["prompt_index"] = index
    return cast(PolicyBatch, chosen)
