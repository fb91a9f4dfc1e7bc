"""Sampling from a copy of the weights in 16 bits, and through a compiled decode step."""

import logging

import pytest
import torch
from conftest import FAST, GENERAL, SIZES, Holder, build, ragged
from transformers import Qwen3Config

from modules.networks.lora import Lora, add_adapters
from modules.rollout import InProcessEngine, Sampling
from modules.rollout import engine as engine_module
from modules.rollout.decoding.decode_products import DecodeProducts
from modules.types import Completion

SEEDS = [7 + 100 * i for i in range(10)]
SHORT = Sampling(max_completion_length=20)


def engine_for(policy: Holder, precision: str) -> InProcessEngine:
    engine = InProcessEngine(precision=precision)  # type: ignore[arg-type]
    engine.sync_weights(policy, 1)
    return engine


def sampled(engine: InProcessEngine) -> list[list[Completion]]:
    return engine.generate(ragged(10), 2, SHORT, SEEDS)


def log_weights(policy: Holder, groups: list[list[Completion]]) -> torch.Tensor:
    """Return log p of the policy's plain forward / p of the sampler for each sampled token, one after the other."""
    found = []
    for prompt, group in zip(ragged(10), groups, strict=True):
        for each in group:
            with torch.no_grad():
                logits = policy.model.eval()(input_ids=torch.tensor([prompt + each.token_ids])).logits[0]
            ids = torch.tensor(each.token_ids)[:, None]
            exact = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids)[:, 0]
            found.append(exact - torch.tensor(each.logprobs))
    return torch.cat(found)


@pytest.mark.parametrize("name", FAST)
def test_a_copy_in_16_bits_is_near_but_not_the_same(name: str) -> None:
    """bf16 has 8 bits: numbers are off by up to 0.4 %, and logits of this model's size by a few hundredths."""
    policy = build(FAST[name])
    state = {key: weight.clone() for key, weight in policy.model.state_dict().items()}
    engine = engine_for(policy, "bf16")
    weights = log_weights(policy, sampled(engine))
    assert 1e-5 < weights.abs().mean() < 0.05
    assert all(torch.equal(weight, state[key]) for key, weight in policy.model.state_dict().items())
    assert all(each.dtype == torch.float32 and each.requires_grad for each in policy.model.parameters())


def test_what_is_copied_in_which_precision(qwen3: Holder) -> None:
    """A block has q 64 x 128, k and v 64 x 64, o 128 x 64 and three of 64 x 96; the embedding is 300 x 64, as the head."""
    engine = engine_for(qwen3, "bf16")
    sampled(engine)
    linear = 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 96)
    norms = 2 * (64 + 64 + 32 + 32) + 64
    packed = 2 * linear + 4 * 300 * 64 if DecodeProducts(engine._shadow).packed else 0  # once more, in another order
    copied = 2 * (linear + 300 * 64) + 4 * (norms + 300 * 64) + packed
    assert engine.last_stats["copy_gb"] == pytest.approx(copied / 1e9)
    plain = engine_for(qwen3, "same")
    sampled(plain)
    assert engine.last_stats["cache_gb"] < 0.6 * plain.last_stats["cache_gb"]
    assert engine.copies_weights and not plain.copies_weights
    assert plain.last_stats["copy_gb"] == DecodeProducts(qwen3.model).num_bytes / 1e9


def test_the_copy_is_of_the_last_sync(qwen3: Holder) -> None:
    engine = engine_for(qwen3, "bf16")
    before = sampled(engine)
    with torch.no_grad():
        for parameter in qwen3.model.parameters():
            parameter.mul_(1.2)
    assert sampled(engine) == before  # the policy trains on; the copy stays
    engine.sync_weights(qwen3, 2)
    after = sampled(engine)
    assert after != before and log_weights(qwen3, after).abs().mean() < 0.1
    engine.release()
    with pytest.raises(ValueError, match=r"call sync_weights\(policy, version\) again between release and generate"):
        sampled(engine)
    engine.sync_weights(qwen3, 2)
    assert sampled(engine) == after


def test_adapters_are_copied_too() -> None:
    policy = build(FAST["qwen2"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_adapters(policy.model, Lora(r=2, alpha=8.0, dropout=0.0))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    assert 1e-5 < log_weights(policy, sampled(engine_for(policy, "bf16"))).abs().mean() < 0.1


def test_auto_says_what_it_chose_by_measurement(
    qwen3: Holder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is set below and above every measurement."""
    caplog.set_level(logging.INFO)
    for bound, chosen in ((0.0, "bf16"), (1e9, "fp32")):
        caplog.clear()
        monkeypatch.setattr(engine_module, "GAIN", bound)
        engine = engine_for(qwen3, "auto")
        assert engine.copies_weights == (chosen == "bf16")
        (line,) = [each.getMessage() for each in caplog.records if "InProcessEngine" in each.getMessage()]
        assert line.startswith(f"InProcessEngine: samples in {chosen}; matrix products of this model in bf16 are ")


def test_what_cannot_be_used_is_refused(qwen3: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = build(GENERAL["gpt2"])
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel cannot use the fast decode step, .* leave precision bf16 out"
    ):
        engine_for(gpt2, "bf16")
    with pytest.raises(ValueError, match="leave compile and check_every out"):
        InProcessEngine(compile=True, check_every=4).sync_weights(gpt2, 0)
    assert not engine_for(gpt2, "auto").copies_weights
    monkeypatch.setattr(engine_module, "PARITY_BF16", 1e-9)
    with pytest.raises(ValueError, match="in bf16 differ by .* nats on average .* use precision same"):
        engine_for(qwen3, "bf16")
    for settings in ({"precision": "fp8"}, {"check_every": 0}, {"max_cache_gb": 0.0}):
        with pytest.raises(ValueError, match=f"InProcessEngine: {next(iter(settings))} "):
            InProcessEngine(**settings)  # type: ignore[arg-type]


def test_a_compiled_step_gives_the_same_completions() -> None:
    """Its shapes are those of the check at the first sync, 16 rows and 5 + 3 - 1 columns, so it compiles once."""
    policy = build(Qwen3Config(**(SIZES | {"num_hidden_layers": 1}), head_dim=32))
    prompts, sampling, seeds = [[5, 6, 7, 8, 9], [30, 31, 32]], Sampling(max_completion_length=3), [7, 107]
    plain = engine_for(policy, "same").generate(prompts, 6, sampling, seeds)
    engine = InProcessEngine(compile=True)
    engine.sync_weights(policy, 1)
    compiled = engine.generate(prompts, 6, sampling, seeds)
    for mine, theirs in zip(sum(compiled, []), sum(plain, []), strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
