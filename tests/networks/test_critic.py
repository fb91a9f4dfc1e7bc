"""The critic: its value is that of the state before a token, it starts from a reward model, and only it gets the
gradient.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modules.networks.critic import VALUE, Critic
from modules.networks.lora import POLICY, Lora, find_adapter_parameters, list_adapters
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_model, tiny_tokenizer
from modules.reward import RewardModule
from modules.rewards.learned import LearnedReward
from modules.types import Completion, Rollout

PROMPTS, COMPLETIONS = (4, 9), ((5, 3), (1, 6))  # tokens
LORA = Lora(r=2)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Make two prompts of different length with two completions each.

    They are padded with a token that is no pad token, so that a read of the padding would show.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 261, (n,), generator=generator) for n in PROMPTS]
    completions = [torch.randint(5, 261, (n,), generator=generator) for group in COMPLETIONS for n in group]

    def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
        return padded, torch.arange(padded.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = pad(prompts), pad(completions)
    index = torch.tensor([0, 0, 1, 1])
    fields = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    return fields | {"prompt_index": index}


def values(policy: Policy, critic: Critic, of: dict[str, Tensor]) -> Tensor:
    return critic(policy, of, policy.token_states(of))


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory) -> dict[str, str]:
    """Export reward models, one with all weights trained and one with adapters of the tiny model."""
    found = {}
    for name, lora in (("whole", None), ("adapters", LORA)):
        torch.manual_seed(0)
        module, folder = RewardModule("tiny", lora=lora), tmp_path_factory.mktemp(name)
        generator = torch.Generator().manual_seed(1)
        for weight in (
            module.policy.parameters()
            if lora is None
            else find_adapter_parameters(module.policy.model, POLICY).values()
        ):
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02 if lora is None else 0.1)
        module.moments = torch.tensor([[0.4, 1.7], [0.4, 1.7]])  # mean and deviation, of the score and of its one head
        module.save_pretrained(folder)
        found[name] = str(folder)
    return found


LAYOUTS = {
    "head": (None, None),
    "own model": (None, "tiny"),
    "reward model": (None, "whole"),
    "head on adapters": (LORA, None),
    "adapters": (LORA, "tiny"),
    "adapters of the reward model": (LORA, "adapters"),
    "own model with adapters": (LORA, "whole"),
}


@pytest.fixture(params=LAYOUTS)
def pair(request, reward_models) -> tuple[Policy, Critic]:
    return made(request.param, reward_models)


def made(layout: str, reward_models: dict[str, str], head: bool = True) -> tuple[Policy, Critic]:
    """Make a policy and its critic; with ``head``, the head is not 0 and the adapters have an effect."""
    lora, start = LAYOUTS[layout]
    torch.manual_seed(0)
    policy = Policy("tiny", dropout=False, lora=lora)
    critic = Critic(policy, reward_models.get(start or "", start), lora)
    if head:
        critic.head.weight.data.add_(torch.linspace(-0.1, 0.1, 128))
        models = [policy.model] if critic.backbone is None else [policy.model, critic.backbone.model]
        sets = [(model, name) for model in models for name in sorted(list_adapters(model))]
        for number, (model, name) in enumerate(sets):
            generator = torch.Generator().manual_seed(number)
            for weight in find_adapter_parameters(model, name).values():
                weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return policy, critic


@torch.no_grad()
def test_a_value_does_not_see_the_token_it_is_the_baseline_of(pair):
    policy, critic = pair
    first = batch()
    before = values(policy, critic, first)
    for t in range(5):
        changed = {**first, "completion_ids": first["completion_ids"].clone()}
        changed["completion_ids"][0, t] = 100 if first["completion_ids"][0, t] != 100 else 101
        after = values(policy, critic, changed)
        torch.testing.assert_close(after[0, : t + 1], before[0, : t + 1], atol=1e-6, rtol=0)
        assert bool(((after[0, t + 1 : 5] - before[0, t + 1 : 5]).abs() > 1e-4).all())
        torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_and_other_rows_change_nothing(pair):
    policy, critic = pair
    together = batch()
    found = values(policy, critic, together)
    assert (
        found.shape == (4, 6)
        and found[~together["completion_mask"]].eq(0).all()
        and found[together["completion_mask"]].ne(0).all()
    )
    for row, prompt in enumerate(together["prompt_index"].tolist()):
        tokens = int(together["completion_mask"][row].sum())
        alone = {
            "prompt_ids": together["prompt_ids"][prompt][together["prompt_mask"][prompt]][None],
            "prompt_mask": torch.ones(1, PROMPTS[prompt], dtype=torch.bool),
            "completion_ids": together["completion_ids"][row : row + 1, :tokens],
            "completion_mask": torch.ones(1, tokens, dtype=torch.bool),
            "prompt_index": torch.tensor([0]),
        }
        torch.testing.assert_close(values(policy, critic, alone)[0], found[row, :tokens], atol=5e-5, rtol=0)


@pytest.mark.parametrize("layout", ["head", "own model", "head on adapters", "adapters"])
def test_without_a_reward_model_values_start_at_0(layout, reward_models):
    policy, critic = made(layout, reward_models, head=False)
    assert values(policy, critic, batch()).eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["reward model", "adapters of the reward model", "own model with adapters"])
def test_a_critic_from_a_reward_model_values_a_prefix_at_its_score(layout, reward_models):
    """V at a column is the normalised score of the completion cut before that token."""
    policy, critic = made(layout, reward_models, head=False)
    path, of = reward_models[str(LAYOUTS[layout][1])], batch()
    found, expected = values(policy, critic, of), LearnedReward(path)
    for row, prompt in enumerate(of["prompt_index"].tolist()):
        prompt_ids = of["prompt_ids"][prompt][of["prompt_mask"][prompt]].tolist()
        ids = of["completion_ids"][row][of["completion_mask"][row]].tolist()
        prefixes = [ids[:t] for t in range(len(ids))]
        texts = [policy.tokenizer.decode(prefix) for prefix in prefixes]
        rollouts = [
            Rollout(
                "u",
                policy.tokenizer.decode(prompt_ids),
                prompt_ids,
                None,
                Completion(prefix, [0.0] * len(prefix), text, "length"),
                0,
                {},
                None,
            )
            for prefix, text in zip(prefixes, texts, strict=True)
        ]
        assert found[row, : len(ids)].tolist() == pytest.approx(expected(rollouts), abs=1e-4)
    assert float(found.std()) > 0.05
    assert (float(critic.mean), float(critic.std)) == pytest.approx((0.4, 1.7))


def test_another_vocabulary_is_refused(tmp_path):
    policy, other = Policy("tiny", dropout=False), tiny_tokenizer()
    inner = json.loads(other.backend_tokenizer.to_str())
    vocabulary = inner["model"]["vocab"]
    first, second = other.convert_ids_to_tokens([100, 101])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tiny_model().save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    with pytest.raises(ValueError, match="value.model: the tokens of .* are not those of 'tiny'") as error:
        Critic(policy, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_that_knows_more_tokens_is_taken(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    LlamaForCausalLM(
        LlamaConfig(vocab_size=262, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy("tiny", dropout=False)
    assert values(policy, Critic(policy, str(tmp_path)), batch()).shape == (4, 6)


def reached(policy: Policy, critic: Critic, loss: Tensor) -> set[str]:
    """Return the names of parameters with a gradient that is not 0."""
    parameters: dict[str, Any] = {f"policy.{name}": p for name, p in policy.named_parameters() if p.requires_grad}
    parameters |= {f"critic.{name}": p for name, p in critic.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and bool(gradient.ne(0).any())
    }


def test_gradients_reach_the_critic_or_the_policy(pair):
    """The value loss of a head on the policy's states reaches the policy, unless the states are detached. Nothing else
    is shared.
    """
    policy, critic = pair
    of = batch()
    states = policy.token_states(of)
    learned = set()
    for name in critic.learned(policy):
        learned.add(f"policy.model.{name}" if critic.adapted and not name.startswith("head") else f"critic.{name}")
    weights = torch.linspace(-1, 1, 24).view(4, 6)
    by_values = reached(policy, critic, (critic(policy, of, states) * weights).sum())
    by_policy = reached(policy, critic, (policy.scores_of(states, of).logprobs * weights).sum())
    detached = reached(policy, critic, (critic(policy, of, states.detach()) * weights).sum())
    everything = {f"policy.{name}" for name, p in policy.named_parameters() if p.requires_grad} | {
        f"critic.{name}" for name, p in critic.named_parameters() if p.requires_grad
    }
    assert detached == learned and by_policy == everything - learned
    assert by_values == (learned if critic.adapted or critic.backbone is not None else everything)


def test_layouts_are_what_they_say(reward_models):
    for layout, (lora, model) in LAYOUTS.items():
        policy, critic = made(layout, reward_models)
        adapted = lora is not None and model in ("tiny", "adapters")
        assert (critic.adapted, critic.backbone is not None) == (adapted, model is not None and not adapted), layout
        assert (VALUE in list_adapters(policy.model)) == adapted, layout


def test_the_value_of_a_folder_of_the_policy_is_on_its_backbone(tmp_path: Path):
    """A policy with adapters comes from a folder, and the critic from the same folder."""
    Policy("tiny").save_pretrained(tmp_path)
    policy = Policy(str(tmp_path), dropout=False, lora=LORA)
    critic = Critic(policy, str(tmp_path), LORA)
    assert (
        critic.adapted
        and critic.backbone is None
        and set(critic.learned(policy)) > set(find_adapter_parameters(policy.model, VALUE))
    )


def test_what_is_no_model_is_refused_by_the_name_of_its_option(tmp_path):
    with pytest.raises(ValueError, match="value.model: .* is a folder without config.json"):
        Critic(Policy("tiny", dropout=False), str(tmp_path))


def test_several_heads_start_on_the_scale_of_the_reward(tmp_path):
    """Each head is divided by its own deviation, as in the reward, though one is five and one twenty times as large."""
    module = RewardModule("tiny", num_heads=3)
    module.head.weight.data.mul_(torch.tensor([[1.0], [5.0], [20.0]]))
    module.moments = torch.tensor(
        [[0.5, 2.0], [0.1, 0.5], [-1.0, 2.5], [3.0, 10.0]], dtype=torch.float64
    )  # of their mean, then of each
    module.save_pretrained(tmp_path)
    policy = Policy("tiny", dropout=False)
    ids = torch.randint(5, 261, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"prompt_ids": ids[:, :3], "completion_ids": ids[:, 3:], "prompt_index": torch.tensor([0, 1])}
    batch |= {
        name: torch.ones(2, width, dtype=torch.bool) for name, width in (("prompt_mask", 3), ("completion_mask", 4))
    }
    values = Critic(policy, str(tmp_path))(policy, batch, policy.token_states(batch))
    raw = module.head(module.policy.token_states(batch)).double()  # [2, 4, 3]
    expected = ((raw - torch.tensor([0.1, -1.0, 3.0])) / torch.tensor([0.5, 2.5, 10.0])).mean(-1)
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)
