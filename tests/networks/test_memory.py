"""The memory estimate: arithmetic by hand, and states counted in optimizers that have stepped."""

import pytest
import torch
from torch import nn

from modules.networks.memory import (
    count_activation_bytes,
    count_states,
    estimate_memory,
    estimate_peak,
    measure_used,
    write_memory_line,
)
from modules.networks.policy import Policy

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
    memory = estimate_memory([frozen, trained, half, trained], optimizer, max_logits=1_000_000, activations=5e6)
    # 500,000 and 250,000 floats of 4 bytes and 250,000 of 2; the tied weight counts once; Adam keeps two floats for
    # each that is trained
    parts = {"weights": 2.0 + 1.0 + 0.5, "gradients": 1.0, "optimizer": 2.0, "activations": 5.0, "logits": 28.0}
    assert memory == parts
    assert write_memory_line(memory, 50.0) == (
        "memory: about 50 MB at most (weights 4 MB, gradients 1 MB, optimizer states 2 MB, activations 5 MB, logits 28 "
        "MB, all else 10 MB)"
    )


PARTS = {"weights": 100.0, "gradients": 100.0, "optimizer": 200.0, "activations": 50.0, "logits": 25.0}


@pytest.mark.parametrize(
    ("used", "most", "stepped", "samples", "expected"),
    [
        (300.0, 320.0, False, False, 300 + 100 + 200 + 50 + 25),
        (600.0, 620.0, True, False, 600 + 100 + 50 + 25),  # resumed: the states are among what is used
        (300.0, 900.0, False, False, 900),  # loading took most
        (300.0, 900.0, False, True, 900 + 200),  # sampling does so again, beside the states
    ],
)
def test_the_peak_is_of_a_step_of_loading_or_of_sampling(used, most, stepped, samples, expected):
    assert estimate_peak(PARTS, used, most, stepped, samples) == expected


def test_layers_that_are_computed_again_keep_their_input_alone():
    config = Policy("tiny").model.config  # 4 layers, hidden 128, between the two parts of the feed-forward 384
    assert count_activation_bytes(config) == 4 * 4 * (11 * 128 + 4 * 384)
    assert count_activation_bytes(config, recomputes=True) == 4 * (11 * 128 + 4 * 384) + 4 * 4 * 128


def test_what_is_used_grows_by_what_is_taken():
    before, _ = measure_used(torch.device("cpu"))
    taken = torch.ones(25_000_000)  # 100 MB
    now, most = measure_used(torch.device("cpu"))
    assert 90 < now - before < 130 and most >= now - 1 and len(taken)
