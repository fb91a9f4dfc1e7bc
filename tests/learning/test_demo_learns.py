"""The RL of ``make demo`` learns for other weights, rows, samples and arithmetic; a stage says so when it does not.

The whole demo, with its warm-up, is run for several seeds by ``tests/benchmarks/recipe_seeds.py``.
"""

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/benchmarks"))

from recipe_seeds import make_start  # noqa: E402 (the table of all seeds and numerics is made by the same function)

from modules.__main__ import main  # noqa: E402

DEMO, SHARED = ROOT / "configs/recipes/demo", ROOT / "configs/recipes/shared.yaml"


def test_the_demo_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """From the built-in model that has learned sums, off by a millionth, in place of the warm-up."""
    start = str(make_start("tiny-addition", tmp_path, seed=2, numerics="perturbed"))
    monkeypatch.chdir(tmp_path)
    for name, short in {"02-fit-grpo": ["--trainer.max_epochs=20"], "03-validate-grpo": []}.items():  # of 150
        (tmp_path / f"{name}.yaml").write_text(
            (DEMO / f"{name}.yaml").read_text().replace("runs/demo/sft/export", start)
        )
        command = [name.split("-")[1], f"--config={SHARED}", f"--config={name}.yaml", "--seed_everything=2", *short]
        capfd.readouterr()
        with suppress(SystemExit):  # 0.85 is right after all of its phases
            main([*command, "--trainer.enable_progress_bar=false"])
    said = capfd.readouterr()
    assert "the answers sampled after GRPO are right" in said.out
    found = re.search(r"^demo: pass@1 (\S+) -> (\S+)$", said.out, re.M)
    assert found is not None
    before, after = map(float, found.groups())
    assert 0.4 <= before <= 0.75
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
