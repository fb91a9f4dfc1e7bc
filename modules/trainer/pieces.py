"""Computes a micro-batch in pieces of few tokens, so that the memory of its activations is bounded.

A micro-batch is what the DataModule hands out, a piece some of its rows without the padding of the others. The gradient
of the micro-batch is the sum of those of its pieces, because a loss divides by what the whole optimiser step counts.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor

from modules.trainer.cuts import cut_by_length

Batch = dict[str, Any]
OF_PROMPTS = (
    "prompt_ids",
    "prompt_mask",
    "teacher_prompt_ids",
    "teacher_prompt_mask",
    "margin",
)  # one entry per prompt
# How many tokens cost as much as what a forward pass costs beside its tokens, see ``cut_by_length``.
CPU_FORWARD, OTHER_FORWARD = 64, 2048
ONCE = ("mismatched",)  # lists that go with the first piece alone, since what is made of them holds for all


class HasPieces(Protocol):
    """The part of a LightningModule that computes in pieces."""

    trainer: Trainer
    device: torch.device
    piece: int  # number of the piece that is being computed
    gradients_dropped: bool  # whether those of the last step have been dropped before the first piece of this one

    def cut(self, batch: Batch) -> list[Batch]:
        """Return the pieces of a micro-batch, at least one."""


def train_by_pieces(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a ``training_step`` take its micro-batch piece by piece; see ``cut_to_pieces``.

    Each piece but the last is followed by its backward pass at once. The loss that is returned has the value of the
    whole micro-batch and the graph of the last piece, so Lightning, a gradient scaler and ``DistributedDataParallel``
    see one backward pass, and this one alone waits for other ranks. Ranks may have different numbers of pieces, so a
    step that gathers must do so in its first piece. Gradients of the last optimiser step are dropped before the
    forward pass, and so take no memory in it.

    A method that overrides a step and calls it gets whole micro-batches, because it may change the loss.
    """

    @wraps(step)
    def training_step(self: HasPieces, batch: Batch, batch_idx: int) -> Tensor:
        if type(self).training_step is not training_step:  # type: ignore[attr-defined]
            return step(self, batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.gradients_dropped = True
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()
        *pieces, last = self.cut(batch)
        self.piece, total = 0, None
        for piece in pieces:
            loss = step(self, piece, batch_idx)
            with torch.autocast(self.device.type, enabled=False):
                self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)
            total = loss.detach() if total is None else total + loss.detach()
            del loss
            self.piece += 1
        loss = step(self, last, batch_idx)
        return loss if total is None else loss + total

    vars(training_step)["by_pieces"] = True
    return training_step


def can_cut(module: Any) -> bool:
    """Tell whether a module's micro-batches are cut: its step takes pieces, and several backward passes in a step add up,
    on one device or with ranks that hold whole models.

    Sharded models gather weights and reduce gradients in every pass.
    """
    strategy = module.trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    takes_pieces = getattr(type(module).training_step, "by_pieces", False)
    return takes_pieces and whole and not getattr(strategy.model, "static_graph", False)


def cut_to_pieces(batch: Batch, most: int | None, shared: bool = False) -> list[Batch]:
    """Cut a micro-batch into pieces of at most ``most`` padded tokens; a row that is longer is alone.

    A micro-batch that fits stays as it is. Else rows are ordered by length, the longest first, and padded to the longest
    of their piece. Completions that are compared (``rank``) stay with all others of their prompt. Else a prompt is
    repeated where its completions do not fit or differ much in length. Texts that go with completions (``ptx``) are pieces
    of their own, in front.

    Args:
        batch: rows (``InstructionBatch``), or completions of prompts (``PreferenceBatch``, ``PolicyBatch``).
        most: see above; None = no limit.
        shared: a prompt is computed once for all its completions in a piece.
    """
    if most is None or count_padded(batch, shared) <= most:
        return [batch]
    cut: list[Batch] = [{"ptx": piece} for piece in cut_to_pieces(batch["ptx"], most)] if "ptx" in batch else []
    whole, counted = {name: value for name, value in batch.items() if name != "ptx"}, set[int]()
    for rows in plan_pieces(whole, most, shared, together="rank" in batch):
        cut.append(take_rows(whole, rows, counted))
        if "prompt_index" in whole:
            counted.update(whole["prompt_index"][rows].tolist())
    return cut


def compute_in_pieces(
    compute: Callable[[Batch], Iterable[Tensor | None]], batch: Batch, most: int, shared: bool, of_tokens: bool
) -> list[Tensor | None]:
    """Compute tensors of the rows of a batch, without gradients, in pieces of at most ``most`` padded tokens.

    Args:
        compute: batch -> tensors with one row for each of its own; None stays None.
        batch: see ``cut_to_pieces``.
        most: see above.
        shared: see ``cut_to_pieces``.
        of_tokens: the tensors are [N, T], zero at padding; False = [N, H] of any width H.
    """
    if count_padded(batch, shared) <= most:
        return list(compute(batch))
    rows, width = batch["completion_ids" if "completion_ids" in batch else "input_ids"].shape
    found: list[Tensor | None] = []
    for place in plan_pieces(batch, most, shared):
        for number, part in enumerate(compute(take_rows(batch, place, set()))):
            if len(found) == number:
                found.append(None if part is None else part.new_zeros(rows, width if of_tokens else part.shape[1]))
            whole = found[number]
            if part is not None and whole is not None:
                whole[place, : part.shape[1]] = part
    return found


def plan_pieces(batch: Batch, most: int, shared: bool, together: bool = False) -> list[list[int]]:
    """Tell which rows of a batch without texts are computed at a time, the longest first; see ``cut_by_length``.

    Args:
        batch: see ``cut_to_pieces``.
        most: padded tokens; a row that is longer is alone.
        shared: see ``cut_to_pieces``.
        together: never part the completions of a prompt.

    Returns:
        numbers of rows, in order, of each piece.
    """
    kept = batch[next(name for name in ("attended", "completion_mask", "attention_mask") if name in batch)]
    widths = kept.sum(1).tolist()
    forward = CPU_FORWARD if kept.device.type == "cpu" else OTHER_FORWARD
    owners, befores = list(range(len(widths))), [0] * len(widths)
    if "prompt_index" in batch:
        index, lengths = batch["prompt_index"].tolist(), batch["prompt_mask"].sum(1).tolist()
        if shared or together:
            owners, befores = index, lengths if shared else [0] * len(lengths)
        if not shared:  # a prompt is a part of each row
            widths = [width + lengths[owner] for width, owner in zip(widths, index, strict=True)]
    return [sorted(rows) for rows in cut_by_length(widths, owners, befores, most, forward, together)]


def count_padded(batch: Batch, shared: bool) -> int:
    """Count the tokens of a micro-batch with their padding, texts included; it reads shapes alone."""
    if "input_ids" in batch:
        return int(batch["input_ids"].numel())
    rows, width = batch["completion_ids"].shape
    prompts, before = batch["prompt_ids"].shape
    texts = batch["ptx"]["input_ids"].numel() if "ptx" in batch else 0
    return int(rows * width + (prompts if shared else rows) * before + texts)


def count_longest(batch: Batch) -> int:
    """Count the tokens of the longest row with its prompt; it reads shapes alone."""
    if "input_ids" in batch:
        return int(batch["input_ids"].shape[1])
    return int(batch["completion_ids"].shape[1] + batch["prompt_ids"].shape[1])


def take_rows(batch: Batch, rows: list[int], counted: set[int]) -> Batch:
    """Make the batch of a piece: these rows and their prompts, without columns that are padding in all of them.

    Args:
        batch: the micro-batch.
        rows: numbers of the rows, in order.
        counted: prompts of earlier pieces, whose tokens are not counted again; empty = this is the first piece.
    """
    kept = batch[next(name for name in ("attended", "completion_mask", "attention_mask") if name in batch)]
    places, taken = torch.tensor(rows, device=kept.device), Batch()
    width = max(1, int(kept[places].sum(1).max()))
    if "prompt_index" in batch:
        prompts, taken["prompt_index"] = batch["prompt_index"][places].unique(return_inverse=True)
        if counted & (numbers := set(prompts.tolist())):
            taken["prompt_counts"] = torch.tensor([each not in counted for each in sorted(numbers)]).to(kept.device)
    for name, value in batch.items():
        if name in ONCE:
            taken[name] = [] if counted else value
        elif not isinstance(value, Tensor) or value.dim() == 0:
            taken[name] = value
        elif name in OF_PROMPTS:
            mask = batch["teacher_prompt_mask" if "teacher" in name else "prompt_mask"]
            taken[name] = value[prompts, : int(mask[prompts].sum(1).max())] if value.dim() == 2 else value[prompts]
        elif name != "prompt_index":
            taken[name] = value[places, :width] if value.dim() == 2 else value[places]
    return taken
