"""Ranges of the numbers that a user sets."""

import math


def check_numbers(owner: str, **given: tuple[float | None, str]) -> None:
    """Refuse numbers that are not finite or not in their range, all in one message. None passes.

    Args:
        owner: what the numbers belong to, as the user knows it.
        given: name=(number, range), the range in brackets, such as "[0, 1)", "(0, inf)" or "(-inf, inf)".

    Raises:
        ValueError: a number is NaN, infinite or out of its range.

    >>> check_numbers("Clipped", clip_low=(0.2, "[0, inf)"), dual_clip=(0.5, "(1, inf)"))
    Traceback (most recent call last):
    ValueError: Clipped: dual_clip must be > 1, got 0.5
    """
    problems = []
    for name, (number, bounds) in given.items():
        low, high = (float(end) for end in bounds[1:-1].split(","))
        if number is None or (
            math.isfinite(number)
            and (number >= low if bounds[0] == "[" else number > low)
            and (number <= high if bounds[-1] == "]" else number < high)
        ):
            continue
        wanted = [f"{'>=' if bounds[0] == '[' else '>'} {low:g}"] if math.isfinite(low) else []
        wanted += [f"{'<=' if bounds[-1] == ']' else '<'} {high:g}"] if math.isfinite(high) else []
        if not math.isfinite(number):
            wanted.insert(0, "finite")
        problems.append(f"{name} must be {' and '.join(wanted)}, got {number}")
    if problems:
        raise ValueError(f"{owner}: {'; '.join(problems)}")
