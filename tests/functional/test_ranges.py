"""The checks of a user's numbers: NaN, infinities and both kinds of bounds."""

import math

import pytest

from modules.functional.ranges import check_numbers


@pytest.mark.parametrize(
    ("bounds", "fine", "wrong"),
    [
        ("[0, inf)", [0, 0.0, 1e300, None], [-1e-9, math.inf, math.nan, -math.inf]),
        ("(0, inf)", [1e-300, 5], [0.0, -1.0, math.inf, math.nan]),
        ("[0, 0.5)", [0.0, 0.499], [0.5, -0.1, math.nan]),
        ("(0, 1]", [1.0, 0.1], [0.0, 1.1]),
        ("(-inf, inf)", [-7.0, 0], [math.nan, math.inf, -math.inf]),
    ],
)
def test_a_number_is_finite_and_in_its_range(bounds, fine, wrong):
    for number in fine:
        check_numbers("kl", coef=(number, bounds))
    for number in wrong:
        with pytest.raises(ValueError, match="^kl: coef must be "):
            check_numbers("kl", coef=(number, bounds))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        check_numbers("gae", gamma=(1.5, "[0, 1]"), lam=(0.5, "[0, 1]"), beta=(math.nan, "(0, inf)"))
    assert str(error.value) == "gae: gamma must be >= 0 and <= 1, got 1.5; beta must be finite and > 0, got nan"
