"""``make demo`` learns for other start weights, rows, samples and arithmetic, and says so when it does not."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
from programs import run_program

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from recipe_seeds import run_recipe  # noqa: E402 (the table of all seeds and numerics is made by the same function)

from modules.__main__ import main  # noqa: E402


def test_the_demo_learns(tmp_path: Path) -> None:
    run = partial(run_program, timeout=1200)
    short = {"02-fit-grpo": ["--trainer.max_epochs=30"]}  # of 150
    found = re.search(r"^demo: pass@1 (\S+) -> (\S+)$", run_recipe("demo", tmp_path, 2, "perturbed", short, run), re.M)
    assert found is not None
    before, after = map(float, found.groups())
    assert 0.5 <= before <= 0.75
    assert after >= before + 0.05


def test_a_warm_up_that_does_not_reach_its_bound_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_epochs=1",
        "--data.train.num_examples=320",
        "--trainer.val_check_interval=5",
        "--trainer.enable_progress_bar=false",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / "configs/recipes/demo/01-fit-sft.yaml"), *short])
    assert stop.value.code == 1
    said = capfd.readouterr()
    assert "claim: the warm-up answers six of ten held-out sums right: NOT held (0" in said.out
    assert "error: 1 of 1 claims did not hold: the warm-up answers six of ten held-out sums right (0" in said.err
