"""The audit of the verifiers: the table of the README is that of a fresh run, and an audit sees what is wrong."""

import sys
import warnings
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))
from audit_answers import number_cases  # noqa: E402
from audit_cases import Audit, find_interval, run_audit  # noqa: E402
from audit_verifiers import AUDITS, SLOW, is_within, write_row  # noqa: E402
from constraint_texts import REFERENCES, TEXTS, find_disagreements  # noqa: E402

from modules.rewards.checks.constraint_list import NEEDS_FILES, load_kinds  # noqa: E402
from modules.rewards.checks.constraint_wording import REFUSED  # noqa: E402

ROWS = [line for line in (ROOT / "modules/rewards/README.md").read_text().splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("audit", [audit for audit in AUDITS if audit.name not in SLOW], ids=lambda audit: audit.name)
def test_the_table_is_that_of_a_fresh_run(audit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows without a score are told
        finding = run_audit(audit)
    assert write_row(finding) in ROWS, finding.examples[:3]
    assert is_within(finding)


def test_every_verifier_has_its_row():
    assert [row.split("`")[1] for row in ROWS if row.count("|") == 6] == [audit.name for audit in AUDITS]


def test_the_references_of_ifbench_agree_with_texts_by_hand():
    assert find_disagreements() == []
    assert all(sum(len(texts.right) + len(texts.wrong) for texts in groups) >= 8 for groups in TEXTS.values())


def test_every_kind_of_ifbench_is_audited_or_named():
    kinds = {kind for kind, made in load_kinds().items() if "ifbench" in made.__module__}
    assert kinds - set(NEEDS_FILES) == set(TEXTS) | set(REFUSED) and set(TEXTS) == set(REFERENCES)


def score_loosely(cases):
    return [float(case.answer in case.text) for case in cases]


def test_a_loose_verifier_is_seen():
    finding = run_audit(Audit("loose", score_loosely, lambda rng: number_cases(rng, 40)))
    assert not is_within(finding)
    assert finding.high > 0.1 * finding.may_be_high  # an answer in the thinking, or the first of two
    assert any("only in the thinking" in kind for kind in finding.kinds)


def test_the_cases_are_those_of_the_seed():
    assert list(number_cases(Random(1), 3)) == list(number_cases(Random(1), 3)) != list(number_cases(Random(2), 3))


def test_intervals_by_hand():
    # without errors: 0 to z^2 / (n + z^2), 3.8415 / 13.8415
    assert find_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    # half of 100: 1/2 -+ 1.96 sqrt(1 / 400 + 3.8415 / 40000) / 1.038415
    assert find_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
