"""Log-probs of a whole data set under the frozen reference: computed once, kept on disk, and looked up by row."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.networks.frozen import Frozen
from modules.trainer.ranks import from_all_ranks
from modules.types import PreferenceBatch


class ReferenceLogprobs:
    """The reference's token log-probs of every completion of a data set.

    Args:
        logprobs: float [sum of lengths], nats, all completions one after the other.
        starts: int [rows + 1], where each completion begins, and where the last one ends.
    """

    def __init__(self, logprobs: Tensor, starts: Tensor) -> None:
        self.logprobs, self.starts = logprobs, starts

    def of(self, batch: PreferenceBatch) -> Tensor:
        """Return the log-probs [N, Tc] of the batch's completions, zero where masked.

        Raises:
            IndexError: the batch has a row that the table does not hold.
        """
        mask = batch["completion_mask"]
        if int(batch["row"].max()) + 1 >= len(self.starts):
            raise IndexError(
                f"row {int(batch['row'].max())} is not among the {len(self.starts) - 1} completions with reference "
                "log-probs"
            )
        places = (self.starts[batch["row"].cpu()][:, None] + torch.arange(mask.shape[1]))[mask.cpu()]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, self.logprobs[places].to(mask.device))


def reference_logprobs(
    reference: Frozen,
    batches: Iterable[PreferenceBatch],
    place: Callable[[PreferenceBatch], PreferenceBatch],
    folder: Path | None,
    precision: str,
) -> ReferenceLogprobs:
    """Return the log-probs of all rows: read from ``folder`` if they are there, else computed and written to it
    (collective).

    A file in ``folder`` is used if it was made with the same model, rows and precision.

    Args:
        reference: the frozen model.
        batches: this rank's batches; together the ranks hold every row.
        place: moves a batch to the model's device.
        folder: the cache; None = no cache.
        precision: the Trainer's precision, such as ``32-true``.
    """
    kept = [batch for batch in batches if int(batch["rank"].min()) >= 0]  # without filler rows
    rows = from_all_ranks([(int(row), int(mask.sum())) for batch in kept for row, _, mask in _completions(batch)])
    lengths = torch.tensor([length for _, length in sorted(dict(rows).items())])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    file = None if folder is None else folder / f"{digest(reference, kept, precision)}.safetensors"
    if file is not None and all(from_all_ranks([file.is_file()])):
        return ReferenceLogprobs(load_file(file)["logprobs"], starts)
    mine = [
        (int(row), scores[mask])
        for batch in kept
        for scores in [reference.completion_logprobs(place(batch)).float().cpu()]
        for (row, _, mask), scores in zip(_completions(batch), scores, strict=True)
    ]
    found = dict(from_all_ranks(mine))
    table = ReferenceLogprobs(torch.cat([found[row] for row in sorted(found)]), starts)
    if file is not None and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({"logprobs": table.logprobs}, partial)
        partial.replace(file)
    return table


def digest(reference: Frozen, batches: Iterable[PreferenceBatch], precision: str) -> str:
    """Return the file name of the table, a hash of all that determines it (collective).

    That is the reference's weights, the precision, and the tokens of all ranks' rows, hence the chat template too.
    """
    rows = hashlib.blake2b()
    for batch in batches:
        prompts = [ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        for (row, ids, mask), index in zip(_completions(batch), batch["prompt_index"].tolist(), strict=True):
            rows.update(repr((int(row), prompts[index], ids[mask].tolist())).encode())
    weights = hashlib.blake2b(precision.encode())
    # The policy's own adapters may have moved by now, so the reference's copies stand for them.
    mine = reference.weights if reference.policy.has_adapters else {}
    frozen = {name: weight for name, weight in reference.policy.state_dict().items() if name not in mine}
    for name, weight in [*frozen.items(), *mine.items()]:
        weights.update(name.encode())
        weights.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    whole = hashlib.blake2b("".join(from_all_ranks([rows.hexdigest(), weights.hexdigest()])).encode(), digest_size=16)
    return whole.hexdigest()


def _completions(batch: PreferenceBatch) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Return (row, ids, mask) of each completion of a batch."""
    return zip(batch["row"].cpu(), batch["completion_ids"].cpu(), batch["completion_mask"].cpu(), strict=True)
