"""Longer forms of what ``make test`` runs: all of it on two ranks, and the whole demo.

``make test`` runs a stage of a recipe on two ranks if it has something new there, stops two methods in every way
there, and starts the demo from what the built-in model has learned.
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from programs import run_program, run_ranks

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "contracts"), str(TESTS / "loop")]

from fixed_runs import RUNS  # noqa: E402
from recipe_seeds import run_recipe  # noqa: E402
from test_shipped_configs import RECIPES, run, stages  # noqa: E402
from test_two_ranks import DDP  # noqa: E402
from two_ranks import TwoRanks  # noqa: E402

EVERY_STOP = """
import sys
from pathlib import Path
from resumes import TWO_RANKS, check_resumes

for method in sys.argv[2:]:
    check_resumes(method, Path(sys.argv[1]) / method, *TWO_RANKS)
"""


@pytest.fixture(scope="module")
def both() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.end()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_stage_ends_on_two_ranks(both: TwoRanks, tmp_path: Path, recipe: Path) -> None:
    for _, arguments in stages(recipe, tmp_path, epochs=2):
        if arguments[0] == "merge":  # one process alone
            run(*arguments, folder=tmp_path)
        else:
            both.run(tmp_path, *arguments, *DDP)


@pytest.mark.parametrize("method", RUNS)
def test_two_ranks_go_on_from_every_stop(tmp_path: Path, method: str) -> None:
    (tmp_path / "every_stop.py").write_text(EVERY_STOP)
    run_ranks("every_stop.py", ".", method, folder=tmp_path, path=[TESTS / "loop"], timeout=500)


def test_the_whole_demo_learns(tmp_path: Path) -> None:
    short = {"02-fit-grpo": ["--trainer.max_epochs=30"]}  # of 150
    said = run_recipe("demo", tmp_path, 2, "perturbed", short, partial(run_program, timeout=1200))
    found = re.search(r"^demo: pass@1 (\S+) -> (\S+)$", said, re.MULTILINE)
    assert found is not None
    before, after = map(float, found.groups())
    assert 0.5 <= before <= 0.75
    assert after >= before + 0.05
