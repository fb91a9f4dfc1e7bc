"""Studies: the arithmetic of their claims, and runs of a small one as real processes."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from few_rows import lower

from modules.functional.advantages import expected_weight, group_zscore

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "configs/studies"))
STUDIES = sorted(path.parent for path in (ROOT / "configs/studies").glob("*/study.yml"))

from run_study import StudyClaim, find_interval, read_curves, take_late_value  # noqa: E402


def test_an_interval_by_hand():
    # 1, 2, 3: mean 2, deviation 1, Student's 4.303 with two degrees of freedom, 4.303 / sqrt(3) = 2.484
    assert find_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert find_interval([4.0])[1:] == (float("-inf"), float("inf"))
    assert take_late_value([0.0] * 8 + [1.0, 3.0]) == 2.0  # the last fifth of ten
    assert take_late_value([5.0, 7.0]) == 7.0


def test_a_claim_is_shown_when_its_whole_interval_is_within_the_bounds():
    runs = {
        "long": [{"length": [0.0] * 4 + [value]} for value in (11.0, 12.0, 13.0)],
        "short": [{"length": [9.0] * 4 + [value]} for value in (1.1, 2.0, 2.9)],
    }
    # differences on the same seeds: 9.9, 10, 10.1, deviation 0.1, half a width of 0.248; unpaired it would be 2.4
    paired = StudyClaim("longer", "length", "long", "short", at_least=9.7)
    assert paired.check(runs) == (True, "length of long - short: 10 [9.75, 10.2], at least 9.7, 3 seeds")
    assert not StudyClaim("longer", "length", "long", "short", at_least=9.8).check(runs)[0]
    assert not StudyClaim("longer", "length", "short", "long", at_least=9.7).check(runs)[0]
    assert StudyClaim("near", "length", "long", at_least=9.5, at_most=14.5).check(runs)[0]
    assert not StudyClaim("near", "length", "long", at_least=9.5, at_most=14.4).check(runs)[0]
    one_seed = {arm: runs[arm][:1] for arm in runs}
    assert not StudyClaim("longer", "length", "long", "short", at_least=0.0).check(one_seed)[0]
    with pytest.raises(ValueError, match="claim 'x': there is no arm tall, only long, short"):
        StudyClaim("x", "length", "tall", at_least=0.0).check(runs)
    with pytest.raises(ValueError, match="claim 'x': no height was logged; there is length"):
        StudyClaim("x", "height", "long", at_least=0.0).check(runs)
    with pytest.raises(ValueError, match="claim 'x': set at_least or at_most"):
        StudyClaim("x", "length", "long")


def test_curves_are_read_without_gaps(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1.5,\n1,,2\n2,nan,3\n")
    assert read_curves(tmp_path / "metrics.csv") == {"step": [0, 1, 2], "a": [1.5], "b": [2, 3]}


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_claims_name_arms_that_are_there(study):
    settings = yaml.safe_load((study / "study.yml").read_text())
    claims = [StudyClaim(**claim) for claim in settings.get("claims", [])]
    known = {*settings["arms"], *settings.get("measures", {})}
    assert {name for claim in claims for name in (claim.of, claim.than) if name} <= known
    assert len({claim.name for claim in claims}) == len(claims)


def test_a_study_runs_and_reports_and_a_failed_run_fails_it(tmp_path):
    study = tmp_path / "configs/studies/small"
    study.mkdir(parents=True)
    shipped = ROOT / "configs/studies/verifiable-vs-learned"
    short = {"num_examples": 64, "batch_size|prompts_per_phase": 16, "check_val_every_n_epoch": 1}
    for file in shipped.glob("[0-9]*.yaml"):  # after so few rows no answer has its dots
        text = file.read_text().replace("verifiable-vs-learned", "small").replace(r"\.{3,8}", r"\.*")
        (study / file.name).write_text(lower(text, short))
    shutil.copy(shipped / "gold_over_kl.py", study)
    settings = {
        "seeds": [0],
        "arms": {"learned": ["--trainer.max_epochs=2"], "verifier": ["--trainer.max_epochs=2", "--model.beta=-1"]},
        "measures": {"curves": "gold_over_kl.py"},
        "claims": [
            {"name": "right", "metric": "train/reward", "of": "verifier", "at_least": 0.0},
            {"name": "fair", "metric": "start_gold", "of": "curves", "at_least": 0.0},
        ],
        "figure": [{"metric": "val/pass@1", "over": "val/sequence_kl", "label": "gold"}],
    }
    command = [sys.executable, str(ROOT / "configs/studies/run_study.py"), str(study)]

    def run() -> subprocess.CompletedProcess[str]:
        (study / "study.yml").write_text(yaml.safe_dump(settings))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    failed = run()
    assert failed.returncode == 1 and "beta must be >= 0, got -1" in failed.stderr
    settings["arms"]["verifier"] = ["--trainer.max_epochs=2", "--model.reward=ExactMatch"]
    seed = tmp_path / "runs/small/seed-0"
    written = (seed / "reward/metrics.csv").stat().st_mtime_ns
    done = run()
    assert done.returncode == 0, done.stderr
    assert (seed / "reward/metrics.csv").stat().st_mtime_ns == written  # was not run again
    right, fair = done.stdout.splitlines()[-2:]
    assert right.startswith("study: small right not shown train/reward of verifier: ") and right.endswith("1 seeds")
    with (seed / "verifier/metrics.csv").open() as rows:
        rewards = [float(row["train/reward"]) for row in csv.DictReader(rows) if row["train/reward"]]
    assert len(rewards) == 2 and f": {rewards[-1]:.3g} [" in right  # of two phases, the last is the late part
    samples = [json.loads(line) for line in (seed / "held-out.jsonl").read_text().splitlines()]
    assert len(samples) == 64 * 8
    gold = sum(sample["reward"] for sample in samples) / 512
    assert f"start_gold of curves: {gold:.3g} [" in fair
    assert (tmp_path / "runs/small/small.png").stat().st_size > 1000

    measured = (seed / "curves.json").stat().st_mtime_ns
    (seed / "verifier.done").unlink()  # an arm that is run again is measured again
    assert run().returncode == 0 and (seed / "curves.json").stat().st_mtime_ns > measured


def test_groups_of_a_fixed_policy_by_hand():
    script = runpy.run_path(str(ROOT / "configs/studies/grpo-bias/fixed_policy.py"))
    group = script["Group"]
    hard = [group(1, 4, 3.0), group(0, 4, 0.0), group(1, 4, 1.0), group(0, 4, 0.0)]  # rate 1/8
    even = [group(2, 4, 5.0), group(2, 4, 3.0)]  # rate 1/2
    found = script["compare_groups"]({"a": hard, "b": even})
    assert found["weight_hard"] == pytest.approx(1.0 / 2.5) and found["weight_middle"] == pytest.approx(4.0 / 2.5)
    expected = [expected_weight(group_zscore, rate, 4) for rate in (1 / 8, 1 / 2)]
    assert found["ratio_hard"] == pytest.approx((1.0 / 2.5) / (2 * expected[0] / sum(expected)))
    assert found["bias_hard"] == pytest.approx(1 / 4 - 1 / 8)
    p = 1 / 8
    assert found["bias_error_hard"] == pytest.approx(1 / 4 - (p - p**4) / (1 - p**4 - (1 - p) ** 4))
    assert "weight_easy" not in found and json.dumps(found)


def test_gold_over_the_distance_by_hand():
    script = runpy.run_path(str(ROOT / "configs/studies/verifiable-vs-learned/gold_over_kl.py"))
    # the peak 0.8 is at the second of ten validations; the end is the mean of the last two, 0.3 and 7.5
    gold, optimised, kl = (
        [0.6, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.4, 0.4, 0.2],
        range(-1, 9),
        [place / 10 for place in range(11)],
    )
    fall = script["find_fall"]([0.3, *gold], optimised, kl)
    assert fall == pytest.approx({"fall": 0.8 - 0.3, "rise": 7.5 - 0, "peak_kl": 0.2})
    fall = script["find_fall"]([0.9, *gold], optimised, kl)  # the start, where no reward was validated
    assert fall == pytest.approx({"fall": 0.9 - 0.3, "rise": 7.5 + 1, "peak_kl": 0.0})
    # from 0.5 at KL 0 to 0.7 at KL 2: 0.6 halfway, although the KL returns there later
    assert script["find_first"](1.0, [0.0, 2.0, 0.5, 3.0], [0.5, 0.7, 0.1, 0.0]) == pytest.approx(0.6)
    assert script["find_first"](3.0, [0.0, 2.0, 0.5, 3.0], [0.5, 0.7, 0.1, 0.0]) == 0.0
