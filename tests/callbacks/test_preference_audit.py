"""PreferenceAudit in a real Trainer, with a score that turns into length during training."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from programs import run_program
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from callbacks.preference_audit import (
    PreferenceAudit,
    measure_reliability,
    smells_of_length,
    write_audit_line,
    write_audit_table,
)
from modules.types import Record, ScoredPair

pytestmark = pytest.mark.filterwarnings("ignore:audit")

# prompt, tokens of the chosen and of the rejected completion, quality of both
ROWS = [(0, 4, 2, 1, 0), (1, 1, 3, 1, 0), (2, 5, 2, 0, 1), (3, 6, 3, 2, 0)]
FILLER = (-1, 1, 1, 0, 0)


class Scorer(LightningModule):
    """Gives score = quality + weight * tokens, where weight is the number of steps so far.

    At step 0 the score is quality, later it is length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Dropout().eval()
        self.dropout = torch.nn.Dropout(1.0)  # kills the score in training mode
        self.record = Record()
        self.num_scored = 0
        self.logged: list[bool] = []  # whether each validation logged a report

    def score_pairs(self, batch: Tensor) -> list[ScoredPair]:
        assert not torch.is_grad_enabled()
        self.num_scored += 1
        lengths, quality = batch[:, 1:3], batch[:, 3:5]
        scores = self.dropout(quality + self.weight * lengths).tolist()
        found = zip(batch.tolist(), scores, strict=True)
        return [
            ScoredPair(f"p{prompt}", 1, f"c{prompt}", f"r{prompt}", chosen, rejected, *score)
            for (prompt, chosen, rejected, *_), score in found
            if prompt >= 0
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record.pairs = self.score_pairs(batch)

    def on_validation_end(self) -> None:
        self.logged.append("val/audit/accuracy" in self.trainer.callback_metrics)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Pairs(LightningDataModule):
    """Gives one pair per batch, and a filler to a rank without a row. An epoch has one training step."""

    def __init__(self, train: list[Any], val: list[Any] | None) -> None:
        super().__init__()
        self.train, self.val = train, val

    def in_order(self, stage: str) -> DataLoader[Tensor]:
        rows = self.train if stage == "train" else self.val
        assert rows is not None
        size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        padded = [*rows, *[FILLER] * (-len(rows) % size)][rank::size]
        batches = [torch.tensor([row]) for row in padded]
        sampler = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type, var-annotated]
        return DataLoader(batches, sampler=sampler, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([torch.ones(1)] * (self.trainer.world_size if self.trainer else 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return [] if self.val is None else self.in_order("val")


def trainer(folder: Path, audit: PreferenceAudit, **options: Any) -> Trainer:
    options = {
        "logger": TensorBoardLogger(folder, name="logs", version=""),
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        **options,
    }
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(accelerator="cpu", callbacks=[audit], **quiet, **options)


def run(
    folder: Path, audit: PreferenceAudit | None = None, train: Any = ROWS, val: Any = ROWS, **options: Any
) -> Scorer:
    module = Scorer()
    trainer(folder, audit or PreferenceAudit(), **options).fit(module, datamodule=Pairs(train, val))
    return module


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Any:
    """Give events(folder), which reads what a run wrote to TensorBoard."""
    return type(request.getfixturevalue("fit")(Callback(), [[]]))


def test_validate_logs_the_report(tmp_path: Path) -> None:
    running = trainer(tmp_path, PreferenceAudit())
    running.validate(Scorer(), datamodule=Pairs(ROWS, ROWS), verbose=False)
    logged = {name: float(value) for name, value in running.callback_metrics.items()}
    # Scores are the qualities: rows 0, 1 and 3 are right. Only row 1's chosen completion is the shorter one.
    assert logged["val/audit/accuracy"] == 3 / 4
    assert logged["val/audit/accuracy_chosen_shorter"] == 1 / 1
    assert logged["val/audit/accuracy_chosen_longer"] == pytest.approx(2 / 3)
    assert logged["val/audit/longer_wins"] == 3 / 4
    assert logged["val/audit/pairs"] == 4
    assert not (tmp_path / "logs" / "audit.json").exists()


def test_the_last_validation_is_the_report_if_it_saw_the_final_weights(tmp_path: Path, events: Any) -> None:
    module = run(tmp_path)
    assert module.num_scored == 4  # one validation, nothing scored again
    written = content(tmp_path / "logs" / "audit.json")
    assert (written["split"], written["step"]) == ("val", 1)
    # Weight 1: scores 5:2 right, 2:3 wrong, 5:3 right, 8:3 right.
    report = written["report"]
    assert report["accuracy"] == 3 / 4
    assert report["accuracy_chosen_shorter"] == 0.0 != 1.0  # 1 under the first weights
    assert report["accuracy_chosen_longer"] == 1.0
    told = events(tmp_path / "logs")
    assert {name: told.scalars(f"val/audit/{name}") for name in report} == {
        name: [pytest.approx(value, abs=1e-6)] for name, value in report.items()
    }
    assert [file.name for file in (tmp_path / "logs").glob("*audit*")] == ["audit.json"]


def test_final_weights_are_scored_when_the_last_validation_was_earlier(tmp_path: Path) -> None:
    module = run(tmp_path, max_epochs=3, check_val_every_n_epoch=2, precision="32-true")
    assert module.num_scored == 4 + 4
    assert module.dropout.training
    assert not module.frozen.training
    written = content(tmp_path / "logs" / "audit.json")
    assert (written["split"], written["step"]) == ("val", 3)
    # Margins under weight 3 are 1+6, 1-6, -1+9, 2+9; 7, -5, 8 and 11 are the differences behind the Brier score. Weight
    # 2 gave 5, -3, 5, 8.
    squares = [
        (1 - 1 / (1 + torch.tensor(-delta, dtype=torch.float64).exp().item())) ** 2 for delta in (7.0, -5.0, 8.0, 11.0)
    ]
    assert written["report"]["brier"] == pytest.approx(sum(squares) / 4, abs=1e-9)


def test_without_held_out_rows_the_first_training_pairs_are_scored(tmp_path: Path) -> None:
    module = run(tmp_path, PreferenceAudit(str(tmp_path / "new" / "a.json"), max_pairs=2), val=None)
    assert module.num_scored == 2
    written = content(tmp_path / "new" / "a.json")
    assert (written["split"], written["report"]["pairs"]) == ("train", 2)
    assert written["report"]["accuracy"] == 1 / 2  # row 0 right, row 1 wrong
    assert not (tmp_path / "logs" / "audit.json").exists()


def test_figure_and_table(tmp_path: Path, events: Any) -> None:
    run(tmp_path, max_epochs=2)
    told = events(tmp_path / "logs")
    ((step, width, height),) = told.images("audit")
    assert step == 2
    assert width > 400 and height > 200
    ((step, text),) = told.texts("audit")
    assert step == 2
    assert "| accuracy_chosen_shorter | 0.000 |" in text


def test_sanity_check_and_fast_dev_run_leave_nothing(tmp_path: Path, events: Any) -> None:
    path = tmp_path / "a.json"
    run(tmp_path, PreferenceAudit(str(path)), fast_dev_run=True)
    assert not path.exists()
    module = run(tmp_path, PreferenceAudit(str(path)), num_sanity_val_steps=2, limit_val_batches=0.0)
    assert module.num_scored == 4  # no sanity check without validation, but the final weights
    path.unlink()
    module = run(tmp_path, PreferenceAudit(str(path)), num_sanity_val_steps=-1)
    assert module.num_scored == 4 + 4
    assert module.logged == [False, True]
    assert content(path)["report"]["accuracy_chosen_shorter"] == 0.0
    assert len(events(tmp_path / "logs").scalars("val/audit/accuracy")) == 1


def test_a_second_fit_does_not_report_the_first_ones_pairs(tmp_path: Path) -> None:
    audit = PreferenceAudit(str(tmp_path / "a.json"))
    run(tmp_path, audit)
    run(tmp_path, audit, val=[ROWS[1]], check_val_every_n_epoch=2)
    assert content(tmp_path / "a.json")["report"]["pairs"] == 1


def test_without_logger_and_path_only_the_line_remains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path, logger=False)
    (line,) = [message for message in caplog.messages if message.startswith("audit")]
    assert line.startswith(
        "audit of 4 held-out pairs: accuracy 0.75 (chosen shorter 0.00, longer 1.00), longer-wins baseline 0.75, "
        "length correlation within "
        "prompts "
    )
    assert ":" not in line.removeprefix("audit of 4 held-out pairs:")
    assert list(tmp_path.rglob("*.json")) == []
    with caplog.at_level("INFO"):
        run(tmp_path, PreferenceAudit(str(tmp_path / "a.json")), logger=False)
    assert any(
        message.startswith("audit") and message.endswith(f": {tmp_path / 'a.json'}") for message in caplog.messages
    )


def test_the_warning_is_for_scores_that_are_length() -> None:
    healthy = {"pairs": 10_000.0, "accuracy": 0.7, "longer_wins": 0.6, "score_length_pearson_within_prompt": 0.5}
    assert not smells_of_length(healthy)
    assert smells_of_length(healthy | {"score_length_pearson_within_prompt": 0.51})
    assert not smells_of_length(healthy | {"score_length_pearson_within_prompt": -0.9})
    # two standard errors: 2 sqrt(1 / 20000) = 0.0141
    assert not smells_of_length(healthy | {"longer_wins": 0.714})
    assert smells_of_length(healthy | {"longer_wins": 0.715})
    assert not smells_of_length({"pairs": 100.0, "accuracy": 0.7, "longer_wins": 0.6})
    assert "(chosen shorter unknown, longer unknown)" in write_audit_line(healthy, "val")


def test_a_few_pairs_are_no_evidence() -> None:
    """With 2 pairs, two standard errors are 2 sqrt(1 / 4) = 1 for the accuracies and 1.41 for the correlation."""
    few = {"pairs": 2.0, "accuracy": 0.0, "longer_wins": 0.5, "score_length_pearson_within_prompt": 1.0}
    assert not smells_of_length(few)
    assert smells_of_length(few | {"pairs": 200.0})
    assert write_audit_line(few, "train").startswith("audit of 2 training pairs: accuracy 0.00 ")


def test_the_warning_is_given_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, val=ROWS * 5, max_epochs=2)  # within prompts, score and length rise together under weight 2
    assert len([w for w in caught if "little more than length" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, val=[(0, 1, 9, 100, 0), (1, 1, 9, 100, 0)])
    assert [w for w in caught if "little more than length" in str(w.message)] == []


def test_rows_that_make_no_pair_are_said_to(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no prompt has two completions of different ranks"):
        run(tmp_path, val=[FILLER])
    assert not (tmp_path / "logs" / "audit.json").exists()


def test_reliability_by_hand() -> None:
    # sigma(log 3) = 3/4 is in (0.7, 0.8]: 1 of 2 right. sigma(log 19) = 19/20 is in (0.9, 1.0]: 1 of 1. A tie is half
    # right, at confidence 1/2.
    delta = torch.tensor([3.0, 1 / 3, 19.0, 1.0], dtype=torch.float64).log()
    confidence, accuracy = measure_reliability(delta)
    assert confidence.tolist() == pytest.approx([1 / 2, 3 / 4, 19 / 20], abs=1e-9)
    assert accuracy.tolist() == [1 / 2, 1 / 2, 1.0]
    assert write_audit_table({"ece": 0.25}) == "| measure | value |\n|---|---|\n| ece | 0.250 |"


def test_what_cannot_be_audited_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_pairs must be at least 1, got 0"):
        PreferenceAudit(max_pairs=0)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        run(tmp_path, PreferenceAudit(str(tmp_path)))
    with pytest.raises(ValueError, match="fit with a PreferenceDataModule"):
        trainer(tmp_path, PreferenceAudit()).fit(Scorer(), DataLoader([torch.ones(1)]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a BoringModel"):
        trainer(tmp_path, PreferenceAudit()).fit(BoringModel(), datamodule=Pairs(ROWS, ROWS))


SCRIPT = """
import sys
from pathlib import Path
from callbacks.preference_audit import PreferenceAudit
from test_preference_audit import ODD, run

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run(folder, PreferenceAudit(str(folder / "validated.json")), val=ODD, devices=2, strategy="ddp_fork")
    run(folder, PreferenceAudit(str(folder / "scored.json")), val=ODD, devices=2, strategy="ddp_fork", check_val_every_n_epoch=2)
    run(folder, PreferenceAudit(str(folder / "train.json"), max_pairs=3), val=None, devices=2, strategy="ddp_fork")
"""
ODD = [*ROWS, (4, 9, 1, 0, 0)]  # rank 0 gets rows 0 2 4, rank 1 rows 1 3 and a filler


def test_two_ranks_equal_one(tmp_path: Path, events: Any) -> None:
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    done = run_program("two_ranks.py", ".", folder=tmp_path, path=[Path(__file__).parent])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("pairs: accuracy") + done.stdout.count("pairs: accuracy") == 3  # rank zero alone

    one = tmp_path / "one"
    run(one, PreferenceAudit(str(one / "val.json")), val=ODD)
    run(one, PreferenceAudit(str(one / "train.json"), max_pairs=3), val=None)
    expected = content(one / "val.json")
    for name in ("validated", "scored"):
        written = content(tmp_path / f"{name}.json")
        assert (written["split"], written["step"]) == (expected["split"], expected["step"])
        assert written["report"] == pytest.approx(expected["report"], abs=1e-9)
    assert content(tmp_path / "train.json")["report"] == pytest.approx(content(one / "train.json")["report"], abs=1e-9)
    # Under weight 1 row 1 alone is wrong: 4/5, while the ranks have 3/3 and 1/2.
    mean_of_rank_means = (1 + 1 / 2) / 2
    assert (
        events(tmp_path / "logs").scalars("val/audit/accuracy")
        == [pytest.approx(4 / 5, abs=1e-6)]
        != [mean_of_rank_means]
    )
    assert expected["report"]["pairs"] == 5
