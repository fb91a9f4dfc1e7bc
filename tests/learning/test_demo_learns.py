"""``make demo`` learns whatever the start weights, rows, samples and arithmetic, and says so where it does not."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from demo_seeds import BOUND, run_demo  # noqa: E402 (the table of all seeds and numerics is made by the same function)

from modules.__main__ import main  # noqa: E402


@pytest.mark.parametrize(("seed", "numerics"), [(1, "sse41"), (2, "perturbed")])
def test_the_demo_learns(tmp_path: Path, seed: int, numerics: str) -> None:
    before, after = run_demo(tmp_path, seed, numerics)
    assert 0.4 <= before <= 0.75
    assert after >= BOUND


def test_a_demo_that_did_not_learn_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["--model.policy=tiny", "--ckpt_path=null", "--data.val.num_examples=20", "--trainer.num_sanity_val_steps=-1"]
    with pytest.raises(SystemExit) as stop:
        main(["validate", "--config", str(ROOT / "configs/recipes/demo/03-validate-grpo.yaml"), *changes])
    assert stop.value.code == 1
