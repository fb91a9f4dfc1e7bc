"""Layers that are computed again in the backward pass: equal gradients, with dropout and with several sets of adapters,
and fewer bytes kept.
"""

import fixed_runs
import pytest
import torch
from torch import Tensor, nn

from modules import PPOModule
from modules.__main__ import main
from modules.networks.critic import Value
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.rewards import RegexFormat

IDS = torch.randint(5, 261, (4, 24), generator=torch.Generator().manual_seed(0))
BATCH = {
    "prompt_ids": IDS[:2, :12],
    "prompt_mask": torch.ones(2, 12, dtype=torch.bool),
    "completion_ids": IDS[:, 12:],
    "completion_mask": torch.ones(4, 12, dtype=torch.bool),
    "prompt_index": torch.tensor([0, 0, 1, 1]),
}


def move(module: nn.Module) -> None:
    """Move the adapters away from their start, where B is 0 and A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)


def differentiate(module: nn.Module, compute) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a loss, and the bytes of the tensors that its backward pass kept."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
        weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
        size = sum(count for place, count in kept.items() if place not in weights)
    module.zero_grad()
    loss.backward()
    return {name: part.grad.clone() for name, part in module.named_parameters() if part.grad is not None}, size


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_gradients_are_equal_with_dropout_and_less_is_kept():
    policy = Policy("tiny", lora=Lora(r=4, dropout=0.5))
    move(policy)

    def compute() -> Tensor:
        return policy.token_scores(IDS, torch.ones_like(IDS, dtype=torch.bool)).logprobs.sum()

    expected, whole = differentiate(policy, compute)
    policy.recompute_layers()
    found, part = differentiate(policy, compute)
    check_equal(found, expected)
    assert part < whole / 2


def test_the_critic_is_computed_again_with_its_own_adapters():
    module = PPOModule("tiny", RegexFormat("a"), lora=Lora(r=4), value=Value(model="tiny"))
    move(module)

    def compute() -> Tensor:
        states = module.policy.token_states(BATCH)
        values = module.critic(module.policy, BATCH, states)
        return module.policy.scores_of(states, BATCH).logprobs.sum() + values.sum()

    expected, _ = differentiate(module, compute)
    assert any(".value." in name for name in expected) and any(".default." in name for name in expected)
    module.policy.recompute_layers()
    check_equal(differentiate(module, compute)[0], expected)


def test_a_fit_learns_the_same(tmp_path):
    ends = [
        fixed_runs.fit("grpo", tmp_path / str(number), *option)["state_dict"]
        for number, option in enumerate(([], ["--gradient_checkpointing=true"]))
    ]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-4, rtol=0)
    assert not all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())  # other sums


def test_a_command_that_trains_nothing_refuses_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--config=configs/tiny/knowledge.yaml", "--gradient_checkpointing=true", f"--out={tmp_path}"])
    assert "gradient_checkpointing: predict takes no steps; leave it out" in capsys.readouterr().err
