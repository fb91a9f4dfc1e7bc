"""The matrix products of a decode step from packed weights are those of the modules."""

import pytest
import torch
from conftest import FAST, Holder, build

from modules.networks.lora import Lora, add_adapters
from modules.rollout.decoding import decode_products as products_module
from modules.rollout.decoding.decode import CachedRows, DecodeStep, SlotCache
from modules.rollout.decoding.decode_products import DecodeProducts, can_pack
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling


def compute(policy: Holder, packed: bool, rows: int) -> torch.Tensor:
    """Return the logits [rows, 300] behind two tokens of each row."""
    products = DecodeProducts(policy.model, packed)
    assert products.packed == (packed and can_pack(policy.model))
    step, cache = DecodeStep(policy.model, 8, products), SlotCache.allocate(policy.model, rows, 8)
    tokens, first = torch.arange(rows) * 7 % 300, torch.zeros(rows, dtype=torch.long)
    with torch.no_grad():
        step(tokens, first, [CachedRows(cache, rows, 1)])
        return step(tokens + 1, first + 1, [CachedRows(cache, rows, 2)])


def agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine, theirs, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("name", FAST)  # llama has biases
def test_packed_weights_give_the_logits_of_the_modules(name: str, rows: int) -> None:
    policy = build(FAST[name])
    with torch.no_grad():
        for key, weight in policy.model.named_parameters():
            if key.endswith("bias"):
                weight.copy_(torch.linspace(-1, 1, len(weight)))
    mine = compute(policy, True, rows)
    assert agree(mine, compute(policy, False, rows))
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert not agree(mine, compute(policy, False, rows))


def test_adapters_are_merged_into_packed_weights() -> None:
    policy = build(FAST["qwen3"])
    plain = compute(policy, False, 4)
    add_adapters(policy.model, Lora(r=2, alpha=8.0, dropout=0.0, target_modules=("k_proj", "down_proj")))
    with torch.no_grad():
        for key, weight in policy.model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
    mine = compute(policy, True, 4)
    assert agree(mine, compute(policy, False, 4)) and not agree(mine, plain)


def test_weights_that_changed_are_packed_anew() -> None:
    policy = build(FAST["qwen3"])
    engine = InProcessEngine()
    engine.sync_weights(policy, 0)
    asked = [[5, 6, 7]], 4, Sampling(max_completion_length=8), [1]
    before = engine.generate(*asked)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)
    after = engine.generate(*asked)
    fresh = InProcessEngine()
    fresh.sync_weights(policy, 0)
    assert after == fresh.generate(*asked) != before


def test_large_models_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(FAST["qwen3"])
    monkeypatch.setattr(products_module, "MOST_PACKED", 1e5)
    assert not can_pack(policy.model) and DecodeProducts(policy.model).num_bytes == 0
