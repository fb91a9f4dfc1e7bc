import math
import warnings
from typing import Any

import pytest
import torch

from modules.rollout import Sampling
from modules.rollout.sampling import invert_cdf, sample, truncate


def sampling(**settings: Any) -> Sampling:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sampling(**settings)


def counts(probabilities: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    uniforms = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.bincount(invert_cdf(probabilities.expand(draws, -1), uniforms), minlength=len(probabilities)).double()


@pytest.mark.parametrize("size", [7, 600, 1500, 2048])
def test_inverse_cdf_agrees_with_a_walk_over_the_vocabulary(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    probabilities = (3 * torch.randn(20, size, generator=generator)).softmax(-1)
    uniforms = torch.rand(20, dtype=torch.float64, generator=generator)
    expected = []
    for row, u in zip(probabilities.tolist(), uniforms.tolist(), strict=True):
        total, below, token = math.fsum(row), 0.0, 0
        while below + row[token] <= u * total:
            below += row[token]
            token += 1
        expected.append(token)
    assert invert_cdf(probabilities, uniforms).tolist() == expected


@pytest.mark.parametrize("size", [5, 600, 1300])
def test_draws_have_the_distribution(size: int) -> None:
    """Pearson's statistic has mean K - 1 and variance 2 (K - 1). Draws stay within 4 standard deviations; draws from a
    shifted distribution do not.
    """
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    probabilities, draws = logits.softmax(-1), 40000
    seen = counts(probabilities, draws, seed=2)

    def statistic(expected: torch.Tensor) -> float:
        return float(((seen - draws * expected) ** 2 / (draws * expected)).sum())

    bound = size - 1 + 4 * math.sqrt(2 * (size - 1))
    assert statistic(probabilities.double()) < bound
    assert statistic(probabilities.double().roll(1)) > bound


@pytest.mark.parametrize("size", [9, 600, 1300])
def test_a_zero_probability_token_is_never_drawn(size: int) -> None:
    """Only a few inner tokens have mass, and the uniform numbers are at the ends of [0, 1], where rounding could reach
    a neighbour.
    """
    probabilities = torch.zeros(3, size)
    probabilities[0, 3:6] = torch.tensor([0.1, 0.2, 0.7])
    probabilities[1, [size // 2, size - 3]] = torch.tensor([1e-7, 1.0])
    probabilities[2, size // 3] = 1e-30
    for u in (0.0, 1e-300, 0.1, 0.3, 1 - 2**-53, 1.0):
        drawn = invert_cdf(probabilities, torch.full((3,), u, dtype=torch.float64))
        assert bool((probabilities.gather(1, drawn[:, None]) > 0).all())
    logits = torch.full((1, size), -torch.inf)
    logits[0, [2, size - 2]] = 0.0
    tokens = {
        int(sample(logits, torch.tensor([u], dtype=torch.float64), Sampling())[0])
        for u in (0.0, 0.4999, 0.5, 1 - 2**-53)
    }
    assert tokens == {2, size - 2}


def test_log_probs_after_temperature_and_greedy() -> None:
    logits = torch.tensor([[math.log(4), math.log(1), math.log(9)]])
    u = torch.tensor([0.1], dtype=torch.float64)
    token, logprob = sample(logits, u, Sampling(temperature=0.5))  # squares: 16, 1, 81 of 98
    assert token.tolist() == [0] and logprob.item() == pytest.approx(math.log(16 / 98), abs=1e-6)
    token, logprob = sample(logits, u, Sampling(temperature=0))  # 9 of 14
    assert token.tolist() == [2] and logprob.item() == pytest.approx(math.log(9 / 14), abs=1e-6)


def test_truncation() -> None:
    """The probabilities are .5 .2 .2 .1. top_k 2 keeps the tie; top_p .5 needs one token, .6 two, .7 two, .75 three."""
    logits = torch.tensor([[0.2, 0.5, 0.1, 0.2]]).double().log()
    kept = {p: truncate(logits, 0, p).isfinite()[0].tolist() for p in (0.45, 0.6, 0.75, 1.0)}
    assert truncate(logits, 2, 1.0).isfinite()[0].tolist() == [True, True, False, True]
    assert kept[0.45] == [False, True, False, False]
    assert kept[0.6] == [True, True, False, False]
    assert kept[0.75] == [True, True, False, True]
    assert kept[1.0] == [True] * 4
    _, logprob = sample(logits.float(), torch.tensor([0.0], dtype=torch.float64), sampling(top_p=0.6))  # .2 of .7
    assert logprob.item() == pytest.approx(math.log(2 / 7), abs=1e-6)


def test_settings_out_of_range_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"temperature -1.*top_p 0.*top_k -2.*max_completion_length 0.*stop"):
        Sampling(temperature=-1, top_p=0, top_k=-2, max_completion_length=0, stop=("",))
    with pytest.raises(ValueError, match="stop"):
        Sampling(stop="word")  # type: ignore[arg-type]


def test_truncating_warns_and_greedy_or_plain_does_not() -> None:
    for settings in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.warns(UserWarning, match="differ from the trainer"):
            Sampling(**settings)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampling()
        Sampling(temperature=0, top_p=0.9)
