"""Forgetting in a real Trainer: the tiny model learns one kind of text and loses another."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from programs import run_program

from callbacks.forgetting import Forgetting, measure_forgetting
from datamodules import AdditionPairs, InstructionDataModule, PreferenceDataModule
from datamodules.sources import Row, Source
from datamodules.tokens.encoding import Tokens
from modules import SFTModule

TEXTS = {
    "old": ["0123456789", "01234", "0123456"],
    "new": ["bad", "cab badcab", "abba"],
}  # uneven, so that a mean of means is another number


class Texts(Source):
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def rows(self) -> list[Row]:
        return [
            Row({"prompt": ">", "completion": text}, f"text:{place}", "text") for place, text in enumerate(self.texts)
        ]


def data(val: dict[str, list[str]] | list[str] | None = None) -> InstructionDataModule:
    val = TEXTS if val is None else val
    held_out: Any = {name: Texts(texts) for name, texts in val.items()} if isinstance(val, dict) else Texts(val)
    return InstructionDataModule(SFTModule("tiny").tokenizer, Texts(TEXTS["new"]), held_out, batch_size=2)


def sft() -> SFTModule:
    return SFTModule("tiny", optimizer=partial(torch.optim.AdamW, lr=1e-2))


def trainer(folder: Path, forgetting: Forgetting, **options: Any) -> Trainer:
    options = {
        "logger": TensorBoardLogger(folder, name="logs", version=""),
        "max_epochs": 4,
        "num_sanity_val_steps": 0,
        **options,
    }
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(accelerator="cpu", callbacks=[forgetting], **quiet, **options)


def loss(module: SFTModule, rows: list[Tokens]) -> float:
    """Return nats per learned token, computed one row at a time from the logits."""
    total = count = 0.0
    module.eval()
    for row in rows:
        with torch.no_grad():
            logprobs = module.policy.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = [place for place, learned in enumerate(row.supervised) if learned]
        total -= sum(logprobs[place - 1, row.ids[place]].item() for place in places)
        count += len(places)
    return total / count


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Any:
    """Give events(folder), which reads what a run wrote to TensorBoard."""
    return type(request.getfixturevalue("fit")(Callback(), [[]]))


def test_metrics_by_hand() -> None:
    found = measure_forgetting({"a": 1.5, "b": 0.5, "c": 2.0, "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0})
    # Forgetting 0.5, -0.5 and 0: what b gained does not make up for what a lost, so the mean is 0.5 / 3 and not 0.
    assert found == pytest.approx(
        {
            **{
                f"val/perplexity/{name}": math.exp(value)
                for name, value in {"a": 1.5, "b": 0.5, "c": 2.0, "d": 1.0}.items()
            },
            **{"val/forgetting/a": 0.5, "val/forgetting/b": -0.5, "val/forgetting/c": 0.0, "val/forgetting": 0.5 / 3},
        },
        abs=1e-12,
    )
    assert measure_forgetting({"a": 1.0}, {}) == {"val/perplexity/a": pytest.approx(math.e)}
    assert measure_forgetting({"a": 1000.0}, {})["val/perplexity/a"] == math.inf


def test_learning_one_domain_costs_the_other(tmp_path: Path, events: Any) -> None:
    module, rows, forgetting = sft(), data(), Forgetting()
    running = trainer(tmp_path, forgetting)
    running.fit(module, datamodule=rows)
    assert module.training
    before = {name: loss(SFTModule("tiny"), rows.domains[name]) for name in TEXTS}
    after = {name: loss(module, rows.domains[name]) for name in TEXTS}
    assert after["old"] > before["old"] + 0.1
    assert after["new"] < before["new"] - 0.1
    assert forgetting.start == pytest.approx(before, abs=1e-5)
    told = events(tmp_path / "logs")
    for name in TEXTS:
        perplexities = told.scalars(f"val/perplexity/{name}")
        assert (
            len(perplexities) == 1 + 4
        )  # the start and four validations, the last of which has seen the final weights
        assert (perplexities[0], perplexities[-1]) == pytest.approx(
            (math.exp(before[name]), math.exp(after[name])), rel=1e-4
        )
        curve = told.scalars(f"val/forgetting/{name}")
        assert (curve[0], curve[-1]) == pytest.approx((0.0, after[name] - before[name]), abs=1e-4)
    assert told.scalars("val/forgetting")[-1] == pytest.approx((after["old"] - before["old"]) / 2, abs=1e-4)
    batches = [rows.domains["old"][:2], rows.domains["old"][2:]]
    assert abs(sum(loss(module, batch) for batch in batches) / 2 - after["old"]) > 1e-3  # a mean of means would be seen
    assert [step for step, _, _ in told.images("val/forgetting")] == [8]
    assert [row["step"] for row in forgetting.history] == [0, 2, 4, 6, 8]


def test_the_end_is_measured_when_the_last_validation_was_earlier(tmp_path: Path, events: Any) -> None:
    module, rows, forgetting = sft(), data(), Forgetting()
    trainer(tmp_path, forgetting, max_epochs=3, check_val_every_n_epoch=2).fit(module, datamodule=rows)
    assert [row["step"] for row in forgetting.history] == [0, 4, 6]
    assert events(tmp_path / "logs").scalars("val/perplexity/old")[-1] == pytest.approx(
        math.exp(loss(module, rows.domains["old"])), rel=1e-4
    )


def test_the_sanity_check_is_a_start(tmp_path: Path, events: Any) -> None:
    forgetting = Forgetting()
    trainer(tmp_path, forgetting, max_epochs=1, num_sanity_val_steps=1).fit(sft(), datamodule=data(TEXTS["old"]))
    assert set(forgetting.start) == {"val"}  # the name of the only set
    assert [row["step"] for row in forgetting.history] == [0, 2]
    assert events(tmp_path / "logs").scalars("val/forgetting/val")[0] == 0.0


def test_a_resumed_run_and_a_validation_compare_with_the_true_start(tmp_path: Path) -> None:
    first = Forgetting()
    running = trainer(tmp_path, first, max_epochs=2)
    running.fit(sft(), datamodule=data())
    running.save_checkpoint(tmp_path / "half.ckpt")
    second = Forgetting()
    resumed = trainer(tmp_path, second)
    module, rows = sft(), data()
    resumed.fit(module, datamodule=rows, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    resumed.save_checkpoint(tmp_path / "end.ckpt")
    assert second.start == first.start
    assert [row["step"] for row in second.history] == [0, 2, 4, 6, 8]
    half = {name: first.history[-1][name] for name in TEXTS}
    assert abs(half["old"] - first.start["old"]) > 0.05  # a start at the resumption would be seen

    held_out = trainer(tmp_path, Forgetting(), logger=False)
    held_out.validate(sft(), datamodule=data(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    lost = loss(module, rows.domains["old"]) - first.start["old"]
    assert float(held_out.callback_metrics["val/forgetting/old"]) == pytest.approx(lost, abs=1e-4)
    assert float(held_out.callback_metrics["val/forgetting"]) == pytest.approx(lost / 2, abs=1e-4)


def test_validation_without_a_start_logs_perplexities_only(tmp_path: Path) -> None:
    running = trainer(tmp_path, Forgetting(), logger=False)
    running.validate(sft(), datamodule=data(), verbose=False)
    logged = {name for name in running.callback_metrics if "perplexity" in name or "forgetting" in name}
    assert logged == {"val/perplexity/old", "val/perplexity/new"}


def test_what_has_nothing_to_forget_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a BoringModel"):
        trainer(tmp_path, Forgetting()).fit(BoringModel(), datamodule=data())
    without = InstructionDataModule(SFTModule("tiny").tokenizer, Texts(TEXTS["new"]))
    with pytest.raises(ValueError, match=r"set data\.val"):
        trainer(tmp_path, Forgetting()).fit(sft(), datamodule=without)
    pairs = PreferenceDataModule(SFTModule("tiny").tokenizer, AdditionPairs(4))
    with pytest.raises(ValueError, match="use an InstructionDataModule"):
        trainer(tmp_path, Forgetting()).fit(sft(), datamodule=pairs)


SCRIPT = """
import json, sys
from pathlib import Path
from callbacks.forgetting import Forgetting
from test_forgetting import data, sft, trainer

FOLDER = Path(sys.argv[1])

class Written(Forgetting):
    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        (FOLDER / f"{trainer.global_rank}.json").write_text(json.dumps([self.start, self.history]))

if __name__ == "__main__":
    trainer(FOLDER, Written(), max_epochs=1, devices=2, strategy="ddp_fork").fit(sft(), datamodule=data())
"""


def test_two_ranks_measure_what_one_would(tmp_path: Path) -> None:
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    done = run_program("two_ranks.py", ".", folder=tmp_path, path=[Path(__file__).parent])
    assert done.returncode == 0, done.stderr[-3000:]
    (start, history), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [start, history] == other
    # Rank 0 has the rows of 11 and 8 tokens, rank 1 the one of 6: sums over ranks, not the mean of their means.
    rows = data()
    rows.setup("fit")
    expected = {name: loss(SFTModule("tiny"), rows.domains[name]) for name in TEXTS}
    assert start == pytest.approx(expected, abs=1e-5)
    assert [row["step"] for row in history] == [0, 1]
