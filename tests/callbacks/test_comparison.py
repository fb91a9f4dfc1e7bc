"""Comparison over real validations of several models: the file, the table, replaced rows, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import Claims, Comparison


class Model(LightningModule):
    """A module that logs a reward and a perplexity."""

    def __init__(self, reward: float, perplexity: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.reward, self.perplexity = reward, perplexity

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/reward", self.reward, batch_size=1)
        self.log("val/perplexity/texts", self.perplexity, batch_size=1)


def validate(
    file: Path,
    name: str,
    reward: float,
    perplexity: float,
    metrics: dict[str, str] | None = None,
    fast_dev_run: bool = False,
) -> None:
    callback = Comparison(
        name, str(file), metrics or {"proxy reward": "val/reward"}, {"forgetting": "val/perplexity/texts"}
    )
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False, fast_dev_run=fast_dev_run
    )
    trainer.validate(Model(reward, perplexity), DataLoader([torch.ones(1)]), verbose=False)  # type: ignore[arg-type]


def table(said: str) -> list[list[str]]:
    """Return the cells of the last table."""
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in said.splitlines()]
    start = max(place for place, row in enumerate(rows) if row[0] == "metric")
    return [row for row in rows[start:] if len(row) > 1]


def test_every_model_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "all.json"
    validate(file, "start", 0.25, 2.0)
    assert table(capsys.readouterr().out) == [["metric", "start"], ["proxy reward", "0.25"], ["forgetting", "0.00"]]
    validate(file, "dpo", -1.0, 4.0)
    validate(file, "ppo", 1.5, 1.0)
    # log(4) - log(2) = 0.69 and log(1) - log(2) = -0.69
    expected = [
        ["metric", "start", "dpo", "ppo"],
        ["proxy reward", "0.25", "-1.00", "1.50"],
        ["forgetting", "0.00", "0.69", "-0.69"],
    ]
    assert table(capsys.readouterr().out) == expected
    assert json.loads(file.read_text())["dpo"] == {"val/reward": -1.0, "val/perplexity/texts": 4.0}
    assert [path.name for path in file.parent.iterdir()] == ["all.json"]


def test_a_logged_standard_error_stands_behind_its_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.json"
    file.write_text('{"start": {"val/reward": 0.5, "val/reward_standard_error": 0.034}}')
    validate(file, "dpo", 1.0, 4.0)
    assert table(capsys.readouterr().out)[1] == ["proxy reward", "0.50±0.03", "1.00"]


def test_a_model_that_is_measured_again_keeps_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.json"
    validate(file, "start", 0.25, 2.0)
    validate(file, "dpo", -1.0, 4.0)
    validate(file, "start", 0.5, 4.0 * math.e)
    assert table(capsys.readouterr().out) == [
        ["metric", "start", "dpo"],
        ["proxy reward", "0.50", "-1.00"],
        ["forgetting", "0.00", "-1.00"],
    ]


def test_what_one_model_has_no_number_of_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "all.json"
    file.write_text('{"start": {"val/kl": 0.0}}')
    validate(file, "dpo", -1.0, 4.0)
    assert table(capsys.readouterr().out) == [
        ["metric", "start", "dpo"],
        ["proxy reward", "", "-1.00"],
        ["forgetting", "", ""],
    ]


def test_a_metric_that_was_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"Comparison is asked for \['val/kl'\], .*; it logged \['val/perplexity/texts', 'val/reward'\]",
    ):
        validate(tmp_path / "all.json", "dpo", 0.0, 1.0, {"KL": "val/kl"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"start": 1}', '{"start": {"val/reward": "high"}}'])
def test_another_kind_of_file_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "all.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"Comparison: .*all\.json is not a file of metrics by model; delete it, or name another file",
    ):
        validate(tmp_path / "all.json", "dpo", 0.0, 1.0)
    assert (tmp_path / "all.json").read_text() == content
    with pytest.raises(ValueError, match="is not a file of metrics"):
        validate(tmp_path, "dpo", 0.0, 1.0)


def test_a_command_in_which_it_does_nothing_is_refused(tmp_path: Path) -> None:
    comparison, model = Comparison("x", str(tmp_path / "all.json"), {}), Model(0.0, 1.0)
    alone = Trainer(callbacks=[comparison], logger=False, accelerator="cpu")
    for command in (TrainerFn.FITTING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        with pytest.raises(
            ValueError, match=f"keeps what validate measures, and this is {command.value}: remove it, or run"
        ):
            comparison.setup(alone, model, command)
    comparison.setup(
        Trainer(callbacks=[comparison, Claims([])], logger=False, accelerator="cpu"), model, TrainerFn.FITTING
    )


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    validate(tmp_path / "all.json", "dpo", 0.0, 1.0, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
