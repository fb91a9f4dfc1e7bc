"""The command line as a user meets it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from few_rows import few_rows

from modules.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["--config", str(CONFIGS / "overlays/cpu_tiny.yaml"), "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Give refusal(method, arguments, command="fit"), which returns the one line that ends the run.

    It fails unless there is exactly one line.
    """

    def run(method: str, *arguments: str, command: str = "fit") -> str:
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    command,
                    "--config",
                    few_rows(method),
                    *TINY,
                    "--trainer.default_root_dir",
                    str(tmp_path),
                    *arguments,
                ]
            )
        assert stop.value.code in (1, 2)
        said = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in said) == 1
        assert said[-1].startswith("error: ")
        return said[-1]

    return run


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Give run(method, arguments, command="fit"), a short run that must succeed."""

    def call(method: str, *arguments: str, command: str = "fit") -> None:
        main(
            [
                command,
                "--config",
                few_rows(method),
                *TINY,
                "--trainer.default_root_dir",
                str(tmp_path),
                *arguments,
            ]
        )

    return call
