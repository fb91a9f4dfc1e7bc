"""The four categories of SliCK from arrays made by hand, and the match of answers."""

import pytest
import torch

from modules.predict.categories import categorise, matches, normalise

NONE, ALL = torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
THREE = torch.arange(10) < 3
NO_SAMPLE, EVERY_SAMPLE = torch.zeros(10, 16, dtype=torch.bool), torch.ones(10, 16, dtype=torch.bool)
ONE_SAMPLE = torch.arange(160).view(10, 16) == 37


@pytest.mark.parametrize(
    ("greedy", "sampled", "category"),
    [
        (ALL, EVERY_SAMPLE, "HighlyKnown"),
        (ALL, NO_SAMPLE, "HighlyKnown"),  # the samples decide only where no greedy answer is right
        (THREE, EVERY_SAMPLE, "MaybeKnown"),
        (THREE, NO_SAMPLE, "MaybeKnown"),
        (~THREE, NO_SAMPLE, "MaybeKnown"),
        (NONE, ONE_SAMPLE, "WeaklyKnown"),
        (NONE, EVERY_SAMPLE, "WeaklyKnown"),
        (NONE, NO_SAMPLE, "Unknown"),
        (ALL[:1], NO_SAMPLE[:1], "HighlyKnown"),
        (NONE, NO_SAMPLE[:, :0], "Unknown"),
    ],
)
def test_categories(greedy, sampled, category):
    assert categorise(greedy, sampled) == category


def test_samples_are_not_pooled_with_greedy_answers():
    # pooled: 3 + 0 of 170 right would be as weak as 0 + 3 of 170; the categories differ
    three_samples = torch.arange(160).view(10, 16) < 3
    assert int(THREE.sum() + NO_SAMPLE.sum()) == int(NONE.sum() + three_samples.sum()) == 3
    assert categorise(THREE, NO_SAMPLE) != categorise(NONE, three_samples)


@pytest.mark.parametrize(
    ("greedy", "sampled"),
    [(ALL[:0], EVERY_SAMPLE[:0]), (ALL, EVERY_SAMPLE[:9]), (ALL, ALL), (EVERY_SAMPLE, EVERY_SAMPLE)],
)
def test_other_shapes_are_refused(greedy, sampled):
    with pytest.raises(ValueError, match=r"greedy must be \[N_ex\] and sampled \[N_ex, N_sample\], got"):
        categorise(greedy, sampled)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Eiffel Tower. ", "eiffel tower"),
        ("U.S.A.", "usa"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),  # no article inside a word
        ("Saint-Exup\u00e9ry", "saintexup\u00e9ry"),
        ("A", "a"),  # nothing but an article: it stays
        (" ? ", "?"),
    ],
)
def test_normalized_as_squad(text, expected):
    assert normalise(text) == expected


def test_the_first_line_matches_any_alias():
    answers = ["New York City", "NYC"]
    assert matches(" the new york city.\nQ: who?\nA: NYC", answers) and matches("N.Y.C.", answers)
    assert not matches("It is New York City", answers)  # exact, not contained
    assert not matches("\nNYC", answers)  # the answer is what stands on the line of the question mark
    assert not matches("", answers) and not matches("", ["?"]) and matches("?", ["?"])
