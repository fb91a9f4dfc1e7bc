"""A frozen copy of a model, which scores and never learns, and its log-probs of a whole data set."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.networks.digests import hash_base, hash_samples
from modules.networks.lora import POLICY, find_adapter_parameters, using
from modules.networks.policy import Policy
from modules.trainer.ranks import from_all_ranks
from modules.trainer.saving import naming, replacing
from modules.types import PolicyBatch, PreferenceBatch


class Frozen:
    """Keeps the policy as it is now, without gradients.

    It is no ``nn.Module``, so that checkpoints and gradient reduction leave it out. A copy of a module shares it.

    A policy with adapters is not copied, because its backbone never changes. Only its adapters are copied, and they are
    put in place while scoring. The reference is then the policy with its first adapters, not the bare backbone.

    Args:
        policy: the model to keep.
        own: True = nobody else uses ``policy``, so it is frozen itself and not copied.
    """

    def __init__(self, policy: Policy, own: bool = False) -> None:
        self.policy = (
            policy if policy.has_adapters else (policy if own else copy.deepcopy(policy)).requires_grad_(False).eval()
        )
        self.weights = (
            {
                f"model.{name}": weight.detach().clone()
                for name, weight in find_adapter_parameters(policy.model, POLICY).items()
            }
            if policy.has_adapters
            else dict(self.policy.named_parameters())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self

    def to(self, device: torch.device) -> "Frozen":
        """Move the weights to ``device``. Modules call this in ``on_fit_start``, because Lightning does not know the
        weights.
        """
        if self.policy.has_adapters:
            self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        else:
            self.policy.to(device)
        return self

    def fingerprint(self) -> str:
        """Return the ``hash_weights`` of the model without adapters, which begin as no change."""
        return hash_weights(self.policy, adapters=False)

    @torch.no_grad()
    def completion_logprobs(self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, Tc] of the completion tokens in nats, zero where ``completion_mask`` is False."""
        with self._in_place():
            return self.policy.completion_scores(batch, temperature).logprobs

    @torch.no_grad()
    def token_states(self, batch: PolicyBatch) -> Tensor:
        """Return the hidden states [N, Tc, H] in which the completion tokens are chosen; see ``Policy``."""
        with self._in_place():
            return self.policy.token_states(batch)

    @torch.no_grad()
    def mix(self, policy: Policy, share: float) -> None:
        """Move the weights towards those of ``policy``: share x theirs + (1 - share) x mine (TR-DPO, arXiv 2404.09656).

        Args:
            policy: a policy with the same parameter names.
            share: weight of the policy, (0, 1]; 1 = copy its weights.
        """
        theirs = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(theirs[name].detach(), share) if share < 1 else weight.copy_(theirs[name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the kept adapters into the policy inside the ``with`` block, and the policy's own back afterwards."""
        if not self.policy.has_adapters:
            yield
            return
        now = {name: weight for name, weight in self.policy.named_parameters() if name in self.weights}
        theirs = {name: weight.data for name, weight in now.items()}
        try:
            for name, weight in now.items():
                weight.data = self.weights[name]
            torch.clear_autocast_cache()  # the cache holds 16-bit copies of the data that were just replaced
            with using(self.policy.model, POLICY):
                yield
        finally:
            for name, weight in now.items():
                weight.data = theirs[name]
            torch.clear_autocast_cache()


def hash_weights(policy: Policy, adapters: bool = True) -> str:
    """Return a hash of names, shapes and a sample of each weight.

    Args:
        policy: the model.
        adapters: count its adapters too.
    """
    return (hash_samples if adapters else hash_base)(policy.state_dict().items())


class ReferenceLogprobs:
    """The reference's token log-probs of every completion of a data set, looked up by row.

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
        with naming(file), replacing(file) as part:
            save_file({"logprobs": table.logprobs}, part)
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
