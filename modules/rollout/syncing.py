"""How an engine gets the weights of a policy, and proves that it has them.

The weights come one at a time under their Hugging Face names. Afterwards a checksum tells of every bit of them, and the
log-probs of fixed sequences tell that the engine's model also computes with them.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modules.networks.lora import merge_layers
from modules.rollout.sampling import SampledPolicy
from modules.trainer.modes import evaluating
from modules.types import EngineError

GAP = 1e-4  # nats; log-probs of the same fp32 weights differ by less than this
GAP_16 = 0.1  # nats; the same of weights of 16 bits
PROBE_ROWS, PROBE_TOKENS = 4, 16
BLOCK_WORDS = 2**16  # words of 8 bytes that a checksum reads as one block
BLOCK_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it loses no bit modulo 2^64
WORD = 2**64


@torch.no_grad()
def merged_weights(policy: SampledPolicy) -> Iterator[tuple[str, Tensor]]:
    """Return the name and value of each weight of the model that a policy samples with, one after another.

    Adapters are merged into the weights as an export merges them. A tied weight comes once, under its first name. A
    sharded weight is gathered when its turn comes, so that all ranks must take all weights in step.

    Args:
        policy: with the model.

    Returns:
        the Hugging Face name of each parameter or saved buffer, and the tensor, which may be the policy's own: copy it
        before the policy trains on.
    """
    model = policy.model
    adapted = merge_layers(model)
    inside: tuple[str, nn.Module] | None = next(adapted, None)
    past: set[str] = set()
    for name, weight in chain(model.named_parameters(), _saved_buffers(model)):
        owner = next((layer for layer in past if name.startswith(layer)), None)
        if owner is None and inside is not None and name.startswith(f"{inside[0]}."):
            layer, plain = inside
            for key, merged in chain(plain.named_parameters(), _saved_buffers(plain)):
                yield f"{layer}.{key}", gather(merged)
            past.add(f"{layer}.")
            inside = next(adapted, None)
        elif owner is None:
            yield name, gather(weight)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that ``state_dict`` holds, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def name_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return each parameter and buffer by name, also buffers that no checkpoint holds; a tied weight comes once."""
    return chain(model.named_parameters(), model.named_buffers())


def transient_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that no checkpoint holds, such as rotary frequencies, by name."""
    saved = {name for name, _ in _saved_buffers(model)}
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def gather(weight: Tensor) -> Tensor:
    """Return the whole of a weight, without gradient; a sharded one is gathered from all ranks (collective)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if isinstance(weight, DTensor):
            return weight.detach().full_tensor()  # type: ignore[attr-defined, no-any-return]
    return weight.detach()


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """Return a text that changes when any bit, the shape or the dtype of a tensor changes.

    Words of 8 bytes are multiplied by odd numbers and added modulo 2^64. Integers add up to the same in every order, so
    it depends on no thread count, processor or device. One changed word always changes it, several do but for a chance
    of about 2^-64.

    Args:
        tensor: any shape, dtype and device.

    >>> checksum(torch.zeros(2, 3))
    'float32[2,3]:0000000000000000'
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    factors, total = odd_numbers().to(data.device), 0
    for block in data.split(8 * BLOCK_WORDS):
        block = nn.functional.pad(block, (0, -len(block) % 8)) if len(block) % 8 else block
        if block.storage_offset() % 8:
            block = block.clone()
        words = block.view(torch.int64)
        total = (total * BLOCK_FACTOR + int((words * factors[: len(words)]).sum())) % WORD
    shape = ",".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{total:016x}"


@cache
def odd_numbers() -> Tensor:
    """Return ``BLOCK_WORDS`` odd numbers of 64 bits without a pattern (SplitMix64 of 1, 2, ...), int64."""
    mixed = np.arange(1, BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((mixed ^ (mixed >> np.uint64(31)) | np.uint64(1)).view(np.int64))


def probe_rows(vocab_size: int, max_positions: int | None = None) -> list[list[int]]:
    """Return the sequences that every engine is probed with, spread over the vocabulary.

    Args:
        vocab_size: >= 1, tokens of the model.
        max_positions: >= 2, positions of the model; None = no limit.

    Returns:
        4 rows of 16 tokens, or of as many as the model has positions for.
    """
    length = min(PROBE_TOKENS, max_positions or PROBE_TOKENS)
    return [
        [(row * length + place + 1) * 2654435761 % vocab_size for place in range(length)] for row in range(PROBE_ROWS)
    ]


@torch.no_grad()
def probe_logprobs(model: PreTrainedModel, rows: list[list[int]]) -> list[list[float]]:
    """Return the log-prob of each token but the first of each row, from a plain forward of the model.

    The logits are computed in the model's precision, without dropout and autocast, and the log-probs in fp32.

    Args:
        model: a causal language model; its mode stays as it was.
        rows: token ids, all rows of the same length.

    Returns:
        nats, for each row one fewer than it has tokens.
    """
    ids = torch.tensor(rows, device=model.device)
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].tolist()  # type: ignore[no-any-return]


def find_bound(model: PreTrainedModel) -> float:
    """Return by how many nats the probe of a copy may differ: 1e-4 in fp32, 0.1 where any weight has 16 bits."""
    return GAP if all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters()) else GAP_16


def check_checksums(expected: Mapping[str, str], found: Mapping[str, str], who: str) -> None:
    """Compare the checksums of the weights that an engine has with those of the policy.

    Args:
        expected: by name, of the policy.
        found: by name, of the engine.
        who: the engine, as the message begins.

    Raises:
        RuntimeError: they differ; one sentence names the first weight.
    """
    for name, value in expected.items():
        if name not in found:
            raise EngineError(f"{who} has no weight {name}: its model is another one than the policy's")
        if found[name] != value:
            raise EngineError(f"{who} has another weight {name} than the policy ({found[name]}, not {value})")
    extra = next((name for name in found if name not in expected), None)
    if extra is not None:
        raise EngineError(f"{who} has a weight {extra} that the policy lacks: its model is another one")


def check_probe(expected: list[list[float]], found: list[list[float]], bound: float, who: str) -> None:
    """Compare the log-probs of the probe that an engine's model gives with those of the policy's model.

    Args:
        expected: nats, of the policy, see ``probe_logprobs``.
        found: nats, of the engine.
        bound: nats, see ``find_bound``.
        who: the engine, as the message begins.

    Raises:
        RuntimeError: one of them differs by more than ``bound``, or is not finite, or their number differs.
    """
    if [len(row) for row in found] != [len(row) for row in expected]:
        raise EngineError(f"{who} gives {sum(map(len, found))} log-probs of the probe, not {sum(map(len, expected))}")
    pairs = zip(chain(*expected), chain(*found), strict=True)
    gaps = [abs(mine - theirs) for mine, theirs in pairs if str(mine) != str(theirs)]  # nan equals nan
    if not all(gap <= bound for gap in gaps):
        worst = next((gap for gap in gaps if gap != gap), max(gaps))
        raise EngineError(
            f"{who} computes other log-probs than the policy: the probe differs by {worst:.3g} nats, more than {bound:g}, "
            "though it should have the same weights"
        )
