"""Several sets of adapters on one backbone: each computes, learns and is saved alone, and the policy's set is the
default.
"""

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from modules.networks.lora import (
    POLICY,
    Lora,
    add_adapters,
    digest_backbone,
    find_adapter_parameters,
    list_adapters,
    load_adapters,
    merge_adapters,
    read_digest,
    save_adapters,
    using,
)
from modules.networks.policy import Policy
from modules.networks.reference import Frozen
from modules.networks.tiny import tiny_model, tiny_tokenizer
from modules.reward import RewardModule
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


def move(policy: Policy, name: str, seed: int = 1) -> None:
    """Move a set away from its start, where it has no effect."""
    generator = torch.Generator().manual_seed(seed)
    for weight in find_adapter_parameters(policy.model, name).values():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def states(policy: Policy, name: str) -> Tensor:
    with using(policy.model, name), torch.no_grad():
        return policy.token_states(BATCH)


def learns(model: nn.Module) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in model.named_parameters()}


@pytest.fixture
def policy() -> Policy:
    """Make a policy with two more sets, all three away from their start."""
    torch.manual_seed(0)
    policy = Policy("tiny", dropout=False, lora=Lora(r=2))
    for seed, name in enumerate((POLICY, "value", "reward0")):
        if name != POLICY:
            add_adapters(policy.model, Lora(r=2), name)
        move(policy, name, seed)
    return policy


@pytest.mark.parametrize("targets", [(), ("q_proj",)])
def test_another_set_changes_nothing_of_the_first(targets):
    torch.manual_seed(0)
    policy = Policy("tiny", dropout=False, lora=Lora(r=2, target_modules=targets))
    first = find_adapter_parameters(policy.model, POLICY)
    first[next(iter(first))].requires_grad_(False)  # as in a phase in which the critic learns alone
    move(policy, POLICY)
    weights, modes = (
        {name: weight.detach().clone() for name, weight in policy.model.named_parameters()},
        learns(policy.model),
    )
    before = policy.token_states(BATCH)
    add_adapters(policy.model, Lora(r=3, target_modules=targets), "value")
    added = find_adapter_parameters(policy.model, "value")
    after = dict(policy.model.named_parameters())
    assert torch.equal(policy.token_states(BATCH), before)
    assert set(after) == set(weights) | set(added) and set(find_adapter_parameters(policy.model, POLICY)) == set(first)
    assert all(
        torch.equal(after[name], weight) and after[name].requires_grad == modes[name]
        for name, weight in weights.items()
    )
    assert {name.replace(".value.", ".default.") for name in added} == set(
        first
    )  # the same layers, and none inside the adapters
    assert all(weight.requires_grad for weight in added.values())
    with pytest.raises(ValueError, match="already has adapters named 'value'"):
        add_adapters(policy.model, Lora(), "value")


def test_layers_that_the_policy_leaves_alone_stay_so():
    torch.manual_seed(0)
    policy = Policy("tiny", dropout=False, lora=Lora(r=2, target_modules=("q_proj",)))
    before = policy.token_states(BATCH)
    add_adapters(policy.model, Lora(r=2), "value")
    move(policy, "value")
    assert len(find_adapter_parameters(policy.model, "value")) == 7 * len(find_adapter_parameters(policy.model, POLICY))
    assert torch.equal(policy.token_states(BATCH), before)
    assert not torch.equal(states(policy, "value"), before)


def test_sets_added_to_a_policy_have_no_dropout():
    policy = Policy("tiny", dropout=False, lora=Lora())
    add_adapters(policy.model, Lora(dropout=0.5), "value")
    move(policy, "value")
    policy.model.train()
    assert torch.equal(states(policy, "value"), states(policy, "value"))


def test_training_one_set_leaves_the_others_as_they_are(policy):
    before = {name: states(policy, name) for name in (POLICY, "value", "reward0")}
    assert not any(torch.allclose(before[POLICY], before[name], atol=1e-2) for name in ("value", "reward0"))
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad], lr=0.1)
    with using(policy.model, "value"):
        found = policy.token_states(BATCH)
    found.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(states(policy, "value"), before["value"], atol=1e-2)
    assert torch.equal(states(policy, POLICY), before[POLICY]) and torch.equal(
        states(policy, "reward0"), before["reward0"]
    )


def test_gradients_go_to_the_set_that_computed(policy):
    """One backward pass of two losses, after the context, gives the same as two separate passes."""
    with using(policy.model, "value"):
        values = policy.token_states(BATCH).square().sum()
    (policy.completion_scores(BATCH).logprobs.sum() + values).backward()
    together = {name: weight.grad for name, weight in policy.model.named_parameters()}
    policy.zero_grad()
    policy.completion_scores(BATCH).logprobs.sum().backward()
    assert all(weight.grad is None for weight in find_adapter_parameters(policy.model, "value").values())
    for name, weight in find_adapter_parameters(policy.model, POLICY).items():
        torch.testing.assert_close(together[name], weight.grad, atol=1e-5, rtol=1e-5)
    assert all(together[name].any() for name in find_adapter_parameters(policy.model, "value"))
    computed = {*find_adapter_parameters(policy.model, POLICY), *find_adapter_parameters(policy.model, "value")}
    assert {name for name, gradient in together.items() if gradient is not None} == computed


def test_using_ends_whatever_happens_and_decides_not_what_learns(policy):
    modes, before, inside = learns(policy.model), policy.token_states(BATCH), []

    def fail() -> None:
        with using(policy.model, "value"):
            with using(policy.model, "reward0"):
                inside.append(policy.token_states(BATCH))
            inside.append(policy.token_states(BATCH))
            assert learns(policy.model) == modes
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fail)
    assert torch.equal(inside[0], states(policy, "reward0")) and torch.equal(inside[1], states(policy, "value"))
    assert torch.equal(policy.token_states(BATCH), before) and learns(policy.model) == modes
    with pytest.raises(ValueError, match="no adapters named 'values'; it has"), using(policy.model, "values"):
        pass


@pytest.mark.parametrize("trainable", [True, False])
def test_a_saved_set_comes_back(policy, tmp_path, trainable):
    save_adapters(policy.model, "value", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    torch.manual_seed(5)
    other = Policy("tiny", dropout=False, lora=Lora(r=4, target_modules=("v_proj",)))
    start, modes, drawn = states(other, POLICY), learns(other.model), torch.get_rng_state()
    load_adapters(other.model, tmp_path, "critic", trainable)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(states(other, "critic"), states(policy, "value"))
    assert torch.equal(states(other, POLICY), start)
    after = {
        name.replace(".base_layer.", "."): learned
        for name, learned in learns(other.model).items()
        if ".critic." not in name
    }
    assert after == {name.replace(".base_layer.", "."): learned for name, learned in modes.items()}
    assert {weight.requires_grad for weight in find_adapter_parameters(other.model, "critic").values()} == {trainable}


def test_peft_reads_a_saved_set(policy, tmp_path):
    save_adapters(policy.model, "value", tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    with using(policy.model, "value"), torch.no_grad():
        mine = policy.model(input_ids=IDS).logits
        assert torch.equal(theirs(input_ids=IDS).logits, mine)
        assert not torch.allclose(mine, tiny_model()(input_ids=IDS).logits, atol=1e-2)


def test_adapters_of_another_backbone_are_refused(policy, tmp_path):
    save_adapters(policy.model, "value", tmp_path / "adapters")
    assert read_digest(tmp_path / "adapters") == digest_backbone(policy.model)
    assert read_digest(tmp_path) is None
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    other = Policy(str(tmp_path / "other"), dropout=False, lora=Lora(r=2))
    with pytest.raises(ValueError, match="adapters of another backbone"):
        load_adapters(other.model, tmp_path / "adapters", "value", trainable=True)
    assert list_adapters(other.model) == {POLICY}


def test_a_backbone_is_known_by_its_weights_without_adapters_and_output_head(policy):
    digest = digest_backbone(tiny_model())
    assert digest_backbone(policy.model) == digest_backbone(RewardModule("tiny", lora=Lora(r=8)).policy.model) == digest
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    untied = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **small))
    before = digest_backbone(untied)
    untied.lm_head.weight.data.add_(1.0)
    assert digest_backbone(untied) == before
    untied.model.norm.weight.data[0] += 1e-6
    assert digest_backbone(untied) != before


def test_a_set_that_does_not_learn_is_in_no_checkpoint(policy, tmp_path):
    """A run with such a set and a run without it read each other's checkpoints."""
    save_adapters(policy.model, "reward0", tmp_path)
    torch.manual_seed(0)
    bare = Policy("tiny", dropout=False, lora=Lora(r=2))
    rich = copy.deepcopy(bare)
    load_adapters(rich.model, tmp_path, "reward0", trainable=False)
    for one in (rich, copy.deepcopy(rich)):
        assert not any(".reward0." in name for name in one.state_dict())
        one.load_state_dict(bare.state_dict())
        bare.load_state_dict(one.state_dict())
        assert torch.equal(states(one, "reward0"), states(policy, "reward0"))
    with pytest.raises(RuntimeError, match="Missing key"):
        rich.load_state_dict(
            {name: weight for name, weight in rich.state_dict().items() if "lora_A.default" not in name}
        )


def test_the_frozen_policy_is_its_own_set(policy):
    started = policy.completion_scores(BATCH).logprobs.detach()
    reference = Frozen(policy)
    assert reference.weights.keys() == {f"model.{name}" for name in find_adapter_parameters(policy.model, POLICY)}
    for name in (POLICY, "value", "reward0"):
        move(policy, name, 7)
    now = {name: states(policy, name) for name in (POLICY, "value")}
    torch.testing.assert_close(reference.completion_logprobs(BATCH), started, atol=0, rtol=0)
    with using(policy.model, "value"):
        torch.testing.assert_close(reference.completion_logprobs(BATCH), started, atol=0, rtol=0)
        assert torch.equal(policy.token_states(BATCH), now["value"])
    assert all(torch.equal(states(policy, name), found) for name, found in now.items())


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_copies_of_a_module_share_the_frozen_policy(lora):
    reference = Frozen(Policy("tiny", dropout=False, lora=lora))
    assert copy.deepcopy({"reference": reference})["reference"] is reference


def test_merged_is_the_policy_alone(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    plain = Policy(str(tmp_path), dropout=False)
    torch.testing.assert_close(
        plain.completion_scores(BATCH).logprobs, policy.completion_scores(BATCH).logprobs, atol=1e-5, rtol=0
    )
    with using(policy.model, "value"):
        torch.testing.assert_close(
            merge_adapters(policy.model)(input_ids=IDS).logits, plain.model(input_ids=IDS).logits, atol=1e-5, rtol=0
        )
        assert not torch.allclose(policy.model(input_ids=IDS).logits, plain.model(input_ids=IDS).logits, atol=1e-2)
    assert set(merge_adapters(policy.model).state_dict()) == set(tiny_model().state_dict())
    assert list_adapters(policy.model) == {POLICY, "value", "reward0"} and not list_adapters(
        merge_adapters(policy.model)
    )


def test_sampling_uses_the_policys_set(policy):
    torch.manual_seed(0)
    alone = Policy("tiny", dropout=False, lora=Lora(r=2))
    move(alone, POLICY, 0)
    found = []
    for source in (policy, alone):
        engine = InProcessEngine()
        engine.sync_weights(source, 0)
        found.append(engine.generate(IDS.tolist(), 3, Sampling(max_completion_length=8), [0, 9]))
    assert found[0] == found[1]
