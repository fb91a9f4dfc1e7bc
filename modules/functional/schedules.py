"""Learning-rate schedules as factors of the peak, by optimiser step."""

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
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 eq. 1): the factor [] in [0, 1] of the peak learning rate.

    step s >= 0, W = warmup_steps, T = decay_start, S = total_steps, 0 <= W <= T < S: s / W before W; 1 up to T; behind
    it
    exponential: 0.5 ** ((s - T) / half_life), whatever S (the paper prints (s - S) / T, which would rise);
    linear: 1 - (1 - final) (s - T) / (S - T); cosine: final + (1 - final) (1 + cos(pi (s - T) / (S - T))) / 2; both
    stay at ``final`` behind S.
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
