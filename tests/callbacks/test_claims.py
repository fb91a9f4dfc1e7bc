"""Claims over real validations and fits: claims that hold, claims that fail, and claims that cannot be judged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import Claims, Comparison, Summary
from callbacks.stages.claims import Claim


class Model(LightningModule):
    """Logs a share over some prompts, and a score that is not a share."""

    def __init__(self, share: float, prompts: int | None = 100, **more: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.values = {"val/share": share, "val/score": 3.0} | {f"val/{name}": value for name, value in more.items()}
        if prompts is not None:
            self.values["val/num_prompts"] = float(prompts)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict(self.values, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    return DataLoader([torch.ones(1)])  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **(quiet | options))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("claim")]


def test_a_claim_that_holds_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    claims = [Claim("sums are right", "val/share", at_least=0.85), Claim("scores stay low", "val/score", at_most=3.0)]
    trainer(Claims(claims)).validate(Model(0.93), data(), verbose=False)
    assert said(capsys) == ["claim: sums are right: held (0.93 >= 0.85)", "claim: scores stay low: held (3 <= 3)"]


def test_a_claim_that_fails_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    claims = [
        Claim("sums are right", "val/share", at_least=0.85),
        Claim("scores stay low", "val/score", at_most=2.5),
        Claim("some", "val/share", at_least=0.5),
    ]
    with pytest.raises(
        ValueError,
        match=r"^2 of 3 claims did not hold: sums are right \(0.8475 >= 0.85\); scores stay low \(3 <= 2.5\)$",
    ):
        trainer(Claims(claims)).validate(Model(0.8475), data(), verbose=False)
    assert said(capsys) == [
        "claim: sums are right: NOT held (0.8475 >= 0.85)",
        "claim: scores stay low: NOT held (3 <= 2.5)",
        "claim: some: held (0.8475 >= 0.5)",
    ]


def test_a_claim_that_is_not_required_is_shown_or_not_and_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    claims = [
        Claim("sums are right", "val/share", at_least=0.85, required=False),
        Claim("scores stay low", "val/score", at_most=2.5, required=False),
    ]
    trainer(Claims(claims)).validate(Model(0.93), data(), verbose=False)
    assert said(capsys) == [
        "claim: sums are right: shown (0.93 >= 0.85)",
        "claim: scores stay low: not shown (3 <= 2.5)",
    ]
    claims = [*claims, Claim("all", "val/share", at_least=0.99)]
    with pytest.raises(ValueError, match="^1 of 3 claims did not hold: all "):
        trainer(Claims(claims)).validate(Model(0.93), data(), verbose=False)


def test_the_last_validation_of_a_fit_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims([Claim("warm", "val/share", at_least=0.5)])
    with pytest.raises(ValueError, match="1 of 1 claims did not hold: warm"):
        trainer(claims, max_epochs=2).fit(Model(0.25), data(), data())
    assert said(capsys) == ["claim: warm: NOT held (0.25 >= 0.5)"]


@pytest.mark.parametrize(("share", "holds"), [(0.63, False), (0.65, True)])
def test_two_standard_errors_above_an_earlier_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, holds: bool
) -> None:
    # sqrt(.5 x .5 / 100 + .63 x .37 / 100) = 0.0695 and .5 + 2 x .0695 = 0.639; with .65: 0.0691, 0.638
    compare = {"file": str(tmp_path / "all.json"), "metrics": {"gold": "val/share"}}
    trainer(Comparison("start", **compare)).validate(Model(0.5), data(), verbose=False)
    claims = Claims([Claim("better", "val/share", at_least="start", standard_errors=2)])
    run = trainer(Comparison("dpo", **compare), claims)
    if holds:
        run.validate(Model(share), data(), verbose=False)
        assert said(capsys) == ["claim: better: held (0.65 >= 0.5 + 2 x 0.069, 100 prompts)"]
    else:
        with pytest.raises(ValueError, match="did not hold: better"):
            run.validate(Model(share), data(), verbose=False)
        assert said(capsys) == ["claim: better: NOT held (0.63 >= 0.5 + 2 x 0.070, 100 prompts)"]
    later = Claims([Claim("dpo stays", "val/share", at_most="start", of="dpo")])
    with pytest.raises(ValueError, match=rf"dpo stays \({share} <= 0.5\)"):
        trainer(Comparison("ppo", **compare), later).validate(Model(0.1), data(), verbose=False)


def test_the_logged_standard_error_goes_before_that_of_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    claims = Claims(
        [
            Claim("wins", "val/share", at_least=0.5, standard_errors=2),
            Claim("still", "val/share", at_most=0.7, standard_errors=1),
        ]
    )
    trainer(claims).validate(Model(0.6, share_standard_error=0.04), data(), verbose=False)
    assert said(capsys) == [
        "claim: wins: held (0.6 >= 0.5 + 2 x 0.040, 100 prompts)",
        "claim: still: held (0.6 <= 0.7 - 1 x 0.040, 100 prompts)",
    ]


def test_values_before_training_are_those_of_the_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = Summary("x", "val/share", [])
    summary.before = {"val/share": 0.7}
    with pytest.raises(ValueError, match=r"learns \(0.6 >= 0.7\)"):
        trainer(summary, Claims([Claim("learns", "val/share", at_least="before")]), default_root_dir=tmp_path).validate(
            Model(0.6), data()
        )


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            Claim("x", "val/kl", at_least=0.0),
            "claim 'x': this run has no val/kl; it has val/num_prompts, val/score, val/share",
        ),
        (Claim("x", "val/share", at_least="sft"), "claim 'x': there are no numbers of sft, only of this run"),
        (
            Claim("x", "val/score", at_least=0.0, standard_errors=1),
            "claim 'x': val/score has no standard error: none was logged, and it is not a share of a known number",
        ),
    ],
)
def test_what_cannot_be_judged_is_named(claim: Claim, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(Claims([claim])).validate(Model(0.5), data(), verbose=False)


def test_a_share_of_an_unknown_number_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="not a share of a known number of prompts"):
        trainer(Claims([Claim("x", "val/share", at_least=0.0, standard_errors=1)])).validate(
            Model(0.5, prompts=None), data(), verbose=False
        )


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0.0, "at_most": 1.0}, {"at_least": 0.0, "standard_errors": -1.0}])
def test_bounds_that_say_nothing_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="claim 'x': "):
        Claim("x", "val/share", **bounds)


def test_a_fast_dev_run_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(Claims([Claim("never", "val/share", at_least=1.0)]), fast_dev_run=True).validate(
        Model(0.0), data(), verbose=False
    )
    assert said(capsys) == []
