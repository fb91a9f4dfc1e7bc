"""Adapters: where they are, what learns, merging, the frozen start, and sampling with them."""

import pytest
import torch

from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.networks.reference import Frozen
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling

IDS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {
    "prompt_ids": IDS[:, :4],
    "prompt_mask": torch.ones(2, 4, dtype=torch.bool),
    "completion_ids": IDS[:, 4:],
    "completion_mask": torch.ones(2, 5, dtype=torch.bool),
    "prompt_index": torch.tensor([0, 1]),
}


def moved(policy: Policy) -> Policy:
    """Move the adapters away from their start, where B is 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return policy


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy("tiny", dropout=False, lora=Lora(r=4))


def test_training_starts_at_the_model_itself(policy):
    plain = Policy("tiny", dropout=False)
    torch.testing.assert_close(
        policy.completion_scores(BATCH).logprobs, plain.completion_scores(BATCH).logprobs, atol=1e-6, rtol=0
    )


def test_adapters_of_all_linear_layers_learn_and_nothing_else(policy):
    learned = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in learned)
    assert len(learned) == 4 * 7 * 2  # layers, matrices of a layer, A and B
    wide = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert wide == 4 * 4 * (
        4 * (128 + 128) + 2 * (128 + 384) + (384 + 128)
    )  # layers x r x (in + out) of q k v o, gate and up, down


def test_named_layers_only():
    policy = Policy("tiny", dropout=False, lora=Lora(target_modules=("q_proj",)))
    learned = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert len(learned) == 4 * 2 and all("q_proj" in name for name in learned)


def test_dropout_off_reaches_the_adapters(policy):
    moved(policy).model.train()
    torch.testing.assert_close(
        policy.completion_scores(BATCH).logprobs, policy.completion_scores(BATCH).logprobs, atol=0, rtol=0
    )


def test_export_is_a_plain_model_with_the_adapters_in_it(policy, tmp_path):
    moved(policy).save_pretrained(tmp_path)
    plain = Policy(str(tmp_path), dropout=False)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(
        plain.completion_scores(BATCH).logprobs, policy.completion_scores(BATCH).logprobs, atol=1e-5, rtol=0
    )
    start = Policy("tiny").completion_scores(BATCH).logprobs
    assert not torch.allclose(plain.completion_scores(BATCH).logprobs, start, atol=1e-2)
    assert any(parameter.requires_grad for parameter in policy.parameters())  # the run goes on with its adapters


def test_frozen_start_has_the_adapters_it_started_from(policy):
    """The start of a continued run is not the bare backbone, and its reference must be that start."""
    started = moved(policy).completion_scores(BATCH).logprobs.detach()
    reference = Frozen(policy)
    moved(policy)
    now = policy.completion_scores(BATCH).logprobs.detach()
    assert not torch.allclose(now, started, atol=1e-2)
    torch.testing.assert_close(reference.completion_logprobs(BATCH), started, atol=0, rtol=0)
    torch.testing.assert_close(
        policy.completion_scores(BATCH).logprobs, now, atol=0, rtol=0
    )  # and the policy has its own back
    assert reference.policy is policy  # no second backbone
    reference.mix(policy, 1.0)
    torch.testing.assert_close(reference.completion_logprobs(BATCH), now, atol=0, rtol=0)


@pytest.mark.parametrize("policy_first", [True, False])
def test_frozen_start_under_autocast(policy, policy_first):
    """Autocast keeps 16-bit copies of parameters while its context lasts; a swap must not get the copies of the other
    set.
    """
    reference = Frozen(policy)
    expected = reference.completion_logprobs(BATCH)
    now = moved(policy).completion_scores(BATCH).logprobs.detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        early = reference.completion_logprobs(BATCH) if not policy_first else None
        mine = policy.completion_scores(BATCH).logprobs
        theirs = reference.completion_logprobs(BATCH) if early is None else early
    torch.testing.assert_close(mine, now, atol=0.1, rtol=0)
    torch.testing.assert_close(theirs, expected, atol=0.1, rtol=0)
    assert float((mine - theirs).abs().max()) > 0.3


def test_sampling_uses_the_adapters(policy, tmp_path):
    moved(policy).save_pretrained(tmp_path)
    found = []
    for source in (policy, Policy(str(tmp_path)), Policy("tiny")):
        engine = InProcessEngine()
        engine.sync_weights(source, 0)
        found.append(
            [
                c.token_ids
                for (c,) in engine.generate(IDS.tolist(), 1, Sampling(temperature=0.0, max_completion_length=8), [0, 9])
            ]
        )
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("settings", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="lora: r must be"):
        Lora(**settings)
