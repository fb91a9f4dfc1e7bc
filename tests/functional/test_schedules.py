"""The learning rates of the schedules, by hand and on a real optimizer."""

import math

import pytest
import torch

from modules.functional.schedules import wsd
from modules.schedulers import WSD


def test_the_exponential_decay_by_hand():
    factors = {
        step: wsd(step, 10, 100, 130, "exponential", half_life=10) for step in (0, 5, 10, 99, 100, 105, 110, 120, 130)
    }
    expected = {0: 0, 5: 0.5, 10: 1, 99: 1, 100: 1, 105: 0.5**0.5, 110: 0.5, 120: 0.25, 130: 0.125}
    assert factors == pytest.approx(expected, abs=1e-12)
    assert factors[105] == pytest.approx(0.70711, abs=1e-5)
    # As printed in the paper, 0.5 ** ((s - S) / T), the factor would rise above 1 before S.
    assert 0.5 ** ((105 - 130) / 100) > 1


def test_linear_and_cosine_end_at_the_final_share_and_stay():
    # half way: linear 1 - 0.9 / 2 = 0.55; cosine 0.1 + 0.9 * (1 + cos(pi / 2)) / 2 = 0.55; a quarter: linear 0.775,
    # cosine 0.1 + 0.45 (1 + sqrt(0.5))
    assert [wsd(step, 0, 100, 140, "linear", final=0.1) for step in (100, 110, 120, 140, 999)] == pytest.approx(
        [1, 0.775, 0.55, 0.1, 0.1]
    )
    cosine = [wsd(step, 0, 100, 140, "cosine", final=0.1) for step in (100, 110, 120, 140, 999)]
    assert cosine == pytest.approx([1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1, 0.1])


@pytest.mark.parametrize("decay", ["exponential", "linear", "cosine"])
def test_the_curve_has_no_jump(decay):
    curve = [wsd(step / 10, 10, 100, 140, decay, half_life=10, final=0.1) for step in range(1400)]
    assert max(abs(b - a) for a, b in zip(curve, curve[1:], strict=False)) < 0.011  # a step of warm-up is 0.1 / 10
    assert all(a >= b for a, b in zip(curve[100:], curve[101:], strict=False))


def rates(scheduler: WSD, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def make(**settings) -> WSD:
    return WSD(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0),
        **{"warmup_steps": 2, "decay_start": 6, "total_steps": 10} | settings,
    )


def test_the_scheduler_ends_at_a_tenth_of_the_peak_unless_told():
    assert rates(make(), 11) == pytest.approx([0, 1, 2, 2, 2, 2, 2, *(2 * 0.1 ** (k / 4) for k in (1, 2, 3, 4))])
    assert rates(make(half_life=2.0), 9)[-1] == pytest.approx(2 * 0.5)


def test_a_stable_checkpoint_goes_on_as_the_uninterrupted_run_and_branches():
    whole = rates(make(), 11)
    first = make()
    assert rates(first, 5) == whole[:5]
    saved = first.state_dict()
    second = make()
    second.load_state_dict(saved)
    assert rates(second, 6) == whole[5:]
    branch = make(decay_start=8, total_steps=12, decay="linear", final=0.0)
    branch.load_state_dict(saved)
    branch.optimizer.param_groups[0]["lr"] = saved["_last_lr"][0]
    assert rates(branch, 7)[1:] == pytest.approx([2, 2, 2, 1.5, 1, 0.5])


@pytest.mark.parametrize(
    "wrong",
    [{"warmup_steps": 7}, {"decay_start": 10}, {"decay": "sudden"}, {"final": 1.5}, {"half_life": 0.0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_order_are_refused(wrong):
    with pytest.raises(ValueError, match="WSD needs"):
        make(**wrong)
