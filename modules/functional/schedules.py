"""Learning-rate schedules: the factor of the peak at an optimiser step."""

import math
from typing import Literal

Decay = Literal["exponential", "linear", "cosine"]


def wsd(
    step: float,
    warmup_steps: int,
    decay_start: int,
    total_steps: int,
    decay: Decay = "exponential",
    half_life: float = 1.0,
    final: float = 0.1,
) -> float:
    """Warm up, stay, decay (MiniCPM, arXiv 2404.06395 eq. 1): the factor [] in [0, 1] of the peak learning rate.

    With s = step >= 0, W = warmup_steps, T = decay_start, S = total_steps, 0 <= W <= T < S, the factor is s / W before
    W, and 1 up to T. After T it is

    * exponential: 0.5 ** ((s - T) / half_life), whatever S (the paper prints (s - S) / T, which would rise);
    * linear: 1 - (1 - final) (s - T) / (S - T);
    * cosine: final + (1 - final) (1 + cos(pi (s - T) / (S - T))) / 2.

    Linear and cosine decay stay at ``final`` after S.

    >>> [wsd(s, warmup_steps=2, decay_start=4, total_steps=8, decay="linear", final=0.0) for s in (1, 3, 6, 8)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    if step <= decay_start:
        return 1.0
    if decay == "exponential":
        return float(0.5 ** ((step - decay_start) / half_life))
    done = min(1.0, (step - decay_start) / (total_steps - decay_start))
    fallen = done if decay == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - final) * fallen


def warmup_decay(step: float, warmup_steps: int, total_steps: float, decay: Decay | None, final: float = 0.0) -> float:
    """Warm up linearly, then decay over the rest of the run: the factor [] in [0, 1] of the peak learning rate.

    With s = step >= 0, W = warmup_steps, S = total_steps > W, the factor is (s + 1) / (W + 1) before W, so that even
    the first update moves the weights. After W, with d = min(1, (s - W) / (S - W)), it is 1 - (1 - final) d for linear
    and final + (1 - final) (1 + cos(pi d)) / 2 for cosine decay, and 1 for None or an infinite S.

    >>> [round(warmup_decay(step, 1, 5, "linear"), 2) for step in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay is None or math.isinf(total_steps):
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - (1 - final) * (done if decay == "linear" else (1 - math.cos(math.pi * done)) / 2)
