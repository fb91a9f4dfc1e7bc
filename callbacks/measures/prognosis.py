"""The arithmetic of a forecast from few samples: intervals, paired comparisons, groups without signal, step sizes."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import nn

Z = 1.959964  # 95 %, two-sided
# Optimizers that divide a gradient by its size, so that an update moves a weight by about the learning rate.
NORMALISED = ("adam", "lion", "rmsprop")


def bound_share(successes: float, count: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share from ``successes`` of ``count`` trials, by Wilson's formula.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = successes / n, z = 1.96. For ``count``
    = 0 it is (0, 1). Source: Wilson, J. Am. Stat. Assoc. 22 (1927).

    >>> [round(bound, 3) for bound in bound_share(8, 16)]
    [0.28, 0.72]
    """
    if count == 0:
        return 0.0, 1.0
    share, z = successes / count, Z * Z / count
    middle, half = share + z / 2, Z * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def run_sign_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute the chance of at least as many wins of ``first`` over ``second`` if neither were better (sign test).

    Both hold one value per prompt, in the same order; ties are left out. The chance is 2^-m sum_(i >= k) C(m, i) for k
    wins in m pairs, and 1 without a pair.

    >>> run_sign_test([1, 1, 1, 0], [0, 0, 0, 0])
    0.125
    """
    wins = sum(a > b for a, b in zip(first, second, strict=True))
    pairs = wins + sum(a < b for a, b in zip(first, second, strict=True))
    return sum(math.comb(pairs, i) for i in range(wins, pairs + 1)) / 2**pairs


def expect_equal(values: Sequence[Hashable], size: int) -> float:
    """Compute the chance that ``size`` of these values, drawn without replacement, are all equal.

    sum over distinct values of C(n_v, size) / C(n, size): unbiased for a group of that size. ``size`` is at most n.

    >>> round(expect_equal([1.0, 1.0, 1.0, 0.0], 2), 3)
    0.5
    """
    return sum(math.comb(count, size) for count in Counter(values).values()) / math.comb(len(values), size)


def expect_distinct(values: Iterable[Hashable], drawn: int) -> float:
    """Compute how many distinct values to expect among ``drawn`` of them, taken without replacement.

    sum over distinct values of 1 - C(N - n_v, drawn) / C(N, drawn), for N values of which n_v are equal to v.

    >>> expect_distinct("aabb", 2) == 2 * (1 - 1 / 6)
    True
    """
    counts = Counter(values)
    total = sum(counts.values())
    return sum(
        repeated * (1 - math.comb(total - count, drawn) / math.comb(total, drawn))
        for count, repeated in Counter(counts.values()).items()
    )


def measure_reach(model: Any, lora_scale: float | None) -> float | None:
    """Measure how far an update can move a model, per unit of learning rate, relative to what it computes.

    An optimizer of Adam's kind moves each weight by about lr. If the signs of a row of W fit the input x, its output
    moves by lr sqrt(fan-in) |x|, and W x is rms(W) |x|: a relative change of lr sqrt(fan-in) / rms(W). With LoRA, B
    starts at 0 and the change is lr scale r rms(A) / rms(W). Layers add to one stream, so the whole model moves by the
    number of layers times the median over its matrices. It is a bound: gradients seldom agree in all signs.

    Args:
        model: a Hugging Face causal language model; its trained weights are those that require a gradient.
        lora_scale: alpha / r of its adapters; None = it has none.

    Returns:
        a number in units of 1 / lr; None if no matrix inside the layers is trained.
    """
    ratios = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            continue
        if lora_scale is not None and hasattr(module, "lora_A"):
            base = module.base_layer.weight
            for factor in module.lora_A.values():
                if factor.weight.requires_grad:
                    ratios.append(
                        lora_scale * len(factor.weight) * root_mean_square(factor.weight) / root_mean_square(base)
                    )
        elif lora_scale is None:
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2 and weight.requires_grad:
                ratios.append(math.sqrt(weight.shape[1]) / root_mean_square(weight))
    layers = getattr(model.config, "num_hidden_layers", None)
    return sorted(ratios)[len(ratios) // 2] * layers if ratios and layers else None


def root_mean_square(weight: Any) -> float:
    """Compute the root of the mean square of the weights, at least 1e-12."""
    return max(1e-12, float(weight.detach().float().square().mean().sqrt()))


def is_normalised(optimizer: object) -> bool:
    """Return whether an optimizer's update is about as large as its learning rate, whatever the gradient."""
    names = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    return any(part in name for name in names for part in NORMALISED)
