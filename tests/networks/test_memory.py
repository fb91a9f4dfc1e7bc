"""The memory estimate: arithmetic by hand, and states counted in optimizers that have stepped."""

import pytest
import torch
from torch import nn

from modules.networks.memory import count_states, estimate_memory, write_memory_line

OPTIMIZERS = [
    (lambda p: torch.optim.AdamW(p), 2),
    (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
    (lambda p: torch.optim.NAdam(p), 2),
    (lambda p: torch.optim.SGD(p), 0),
    (lambda p: torch.optim.SGD(p, momentum=0.9), 1),
    (lambda p: torch.optim.RMSprop(p), 1),
    (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3),
    (lambda p: torch.optim.Adagrad(p), 1),
]


@pytest.mark.parametrize(("make", "expected"), OPTIMIZERS)
def test_states_are_those_of_an_optimizer_that_has_stepped(make, expected):
    weight = nn.Parameter(torch.ones(3, 5))
    optimizer = make([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [
        value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.shape == weight.shape
    ]
    assert len(kept) == expected == count_states(optimizer.param_groups[0])


def test_megabytes_by_hand():
    frozen, trained, half = (
        torch.zeros(500, 1000),
        nn.Parameter(torch.zeros(250, 1000)),
        torch.zeros(250, 1000, dtype=torch.bfloat16),
    )
    optimizer = torch.optim.AdamW([trained])
    memory = estimate_memory([frozen, trained, half, trained], optimizer, max_logits=1_000_000)
    # 500,000 and 250,000 floats of 4 bytes and 250,000 of 2; the tied weight counts once; Adam keeps two floats for
    # each that is trained
    assert memory == {"weights": 2.0 + 1.0 + 0.5, "gradients": 1.0, "optimizer": 2.0, "logits": 28.0}
    assert write_memory_line(memory) == (
        "memory: 34 MB before activations (weights 4 MB, gradients 1 MB, optimizer states 2 MB, logits at most 28 MB); "
        "activations come on top, with micro-batch x length"
    )
