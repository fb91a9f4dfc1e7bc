"""Texts beside the prompts: the same rows per update for any micro-batches and ranks, resumed without state, held out
by domain.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.forgetting import Forgetting
from datamodules import Addition, PretrainingDataModule, PtxStream, VerifiableDataModule
from modules import GRPOModule
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_tokenizer
from modules.rewards import NumericMatch
from modules.rollout.sampling import Sampling
from modules.types import InstructionBatch, PolicyBatch, PromptBatch, Record

Row = tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]  # ids, supervised, positions


class Recorder(LightningModule):
    """A policy that gives every prompt one completion of one token, and keeps the texts that it should learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy("tiny")
        self.record = Record()
        self.texts: list[InstructionBatch] = []
        self.moved: list[Any] = []

    def scores(self, batch: InstructionBatch) -> Any:
        return self.policy.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids"))

    def collect(self, prompts: PromptBatch) -> dict[str, Tensor]:
        rows = len(prompts["uid"])
        one = torch.ones(rows, 1, dtype=torch.long)
        fields = {"prompt_ids": one, "prompt_mask": one.bool(), "completion_ids": one, "completion_mask": one.bool()}
        return {
            **fields,
            "prompt_index": torch.arange(rows),
            "row_count": torch.ones(rows),
            "active": torch.ones(rows, dtype=torch.bool),
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.moved.append(super().transfer_batch_to_device(batch, torch.device("meta"), dataloader_idx))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        self.texts.append(batch["ptx"])
        return next(self.policy.parameters()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OnRank(VerifiableDataModule):
    """A loader that believes it is one of several processes."""

    place = (0, 1)

    @property
    def rank(self) -> int:
        return self.place[0]

    @property
    def world_size(self) -> int:
        return self.place[1]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Make ten texts of 15 to 24 letters: 16 to 25 tokens with the end token, so a row of 25 holds one text."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + number) * (15 + number)}) + "\n" for number in range(10)))
    return str(path)


def data(stream: PtxStream | None, place: tuple[int, int] = (0, 1), **settings: Any) -> OnRank:
    module = OnRank(
        tiny_tokenizer(), Addition(16), **({"prompts_per_phase": 8, "updates_per_phase": 2, "ptx": stream} | settings)
    )
    module.place = place
    return module


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        **quiet,
        **({"enable_checkpointing": False, "max_epochs": 2} | settings),
    )


def fit(
    folder: Path, stream: PtxStream, place: tuple[int, int] = (0, 1), accumulate: int = 1, **settings: Any
) -> list[InstructionBatch]:
    module = Recorder()
    trainer(folder, accumulate_grad_batches=accumulate, **settings).fit(module, datamodule=data(stream, place))
    return module.texts


def rows(batches: list[InstructionBatch]) -> list[Row]:
    """Return the rows of micro-batches without their padding."""
    found = []
    for batch in batches:
        for ids, kept, learned, positions in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "loss_mask", "position_ids")), strict=True
        ):  # type: ignore[literal-required]
            assert not learned[~kept].any()
            found.append((tuple(ids[kept].tolist()), tuple(learned[kept].tolist()), tuple(positions[kept].tolist())))
    return found


def updates(batches: list[InstructionBatch], accumulate: int) -> list[list[InstructionBatch]]:
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def test_an_update_gets_the_same_rows_in_any_number_of_micro_batches_and_ranks(tmp_path: Path, texts: str) -> None:
    alone = updates(fit(tmp_path, PtxStream(texts, 5, 25)), 1)
    assert len(alone) == 4  # two phases of two updates
    for accumulate, world in ((2, 1), (1, 2), (2, 2)):
        ranks = [
            updates(fit(tmp_path, PtxStream(texts, 5, 25), (rank, world), accumulate), accumulate)
            for rank in range(world)
        ]
        for number, (whole,) in enumerate(alone):
            shares = [batch for rank in ranks for batch in rank[number]]
            assert len(shares) == accumulate * world and all(len(batch["input_ids"]) for batch in shares)
            assert Counter(rows(shares)) == Counter(rows([whole]))
            assert {float(batch["denominator"]) for batch in shares} == {float(whole["denominator"])}
            assert (
                float(whole["denominator"])
                == sum(int(batch["loss_mask"].sum()) for batch in shares)
                == int(whole["loss_mask"].sum())
            )


def test_each_pass_shows_every_text_once_in_a_new_order(tmp_path: Path, texts: str) -> None:
    seen = [ids for ids, _, _ in rows(fit(tmp_path, PtxStream(texts, 5, 25)))]
    assert len(seen) == 20  # four updates of five rows: two passes over ten texts
    assert sorted(seen[:10]) == sorted(seen[10:]) and len(set(seen)) == 10
    assert seen[:10] != seen[10:]
    assert [len(ids) for ids in sorted(seen[:10])] == list(range(16, 26))


def test_rows_are_those_of_the_pretraining_data(tmp_path: Path, texts: str) -> None:
    whole = PretrainingDataModule(tiny_tokenizer(), texts, max_length=64)
    whole.setup("fit")
    (first, *_) = fit(tmp_path, PtxStream(texts, len(whole.train_rows), 64))
    assert sorted(ids for ids, _, _ in rows([first])) == sorted(tuple(row.ids) for row in whole.train_rows)
    lengths = {length for row in whole.train_rows for length in row.documents}
    assert lengths == set(range(16, 26)) and len(whole.train_rows) < 10  # several documents in a row
    # nothing predicts a document's first token: the ten documents have 16 + ... + 25 = 205 tokens, 205 - 10 are learned
    assert float(first["denominator"]) == 195
    for ids, learned, positions in rows([first]):
        assert [place for place, kept in enumerate(learned) if not kept] == [
            place for place, position in enumerate(positions) if position == 0
        ]
        assert len(ids) <= 64


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_inside_a_phase_sees_the_rows_that_it_would_have_seen(
    tmp_path: Path, texts: str, accumulate: int
) -> None:
    def run(folder: str, resume: Path | None = None) -> list[InstructionBatch]:
        module = Recorder()
        every_step = ModelCheckpoint(
            tmp_path / folder,
            filename="step{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=1,
            save_top_k=-1,
        )
        runner = trainer(
            tmp_path, accumulate_grad_batches=accumulate, callbacks=[every_step], enable_checkpointing=True
        )
        runner.fit(module, datamodule=data(PtxStream(texts, 3, 25)), ckpt_path=resume, weights_only=True)
        return module.texts

    straight = run("straight")
    for step in (1, 2, 3):
        checkpoint = tmp_path / "straight" / f"step{step}.ckpt"
        assert rows(run(f"from{step}", checkpoint)) == rows(straight[step * accumulate :])
        (saved,) = torch.load(checkpoint, weights_only=True)["OnRank"]["phase_loader"]["ranks"]
        assert all("ptx" not in batch for batch in saved["micro_batches"])
    assert rows(straight[:accumulate]) != rows(straight[accumulate : 2 * accumulate])


def test_the_trainer_moves_the_texts_with_the_batch(tmp_path: Path, texts: str) -> None:
    module = Recorder()
    trainer(tmp_path).fit(module, datamodule=data(PtxStream(texts, 5, 25)))
    assert set(module.moved[0]["ptx"]) == {"input_ids", "attention_mask", "loss_mask", "position_ids", "denominator"}
    assert {str(value.device) for batch in module.moved for value in batch["ptx"].values()} == {"meta"}


def test_held_out_texts_are_domains_that_the_callback_measures(tmp_path: Path, texts: str) -> None:
    stream = PtxStream(
        texts, 5, 25, val={"letters": texts, "sums": Addition(3)}
    )  # a question with its answer is read, too
    module, forgetting = Recorder(), Forgetting()
    runner = trainer(tmp_path, callbacks=[forgetting])
    runner.fit(module, datamodule=(held_out := data(stream)))
    assert set(held_out.domains) == set(forgetting.start) == {"letters", "sums"}
    assert len(held_out.domains["letters"]) == 10
    assert sum(len(batch["input_ids"]) for batch in held_out.domain_loader("letters")) == 10
    assert forgetting.history[-1]["letters"] != forgetting.start["letters"]  # the weights did move
    assert forgetting.start["letters"] == pytest.approx(
        6, abs=1
    )  # an untrained model over some 260 tokens: ln 260 = 5.6


def test_stages_read_what_they_need(texts: str) -> None:
    for stage, num_rows, num_domains in (("fit", 10, 1), ("validate", 0, 1), ("test", 0, 1), ("predict", 0, 0)):
        stream = PtxStream(texts, 5, 25, val=texts)
        module = data(stream, val=Addition(2, held_out=True))
        module.setup(stage)
        assert (len(stream.rows), len(module.domains)) == (num_rows, num_domains), stage
    assert dict(data(PtxStream(texts)).domains) == dict(data(None).domains) == {}


def test_loading_is_reported(texts: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data(PtxStream(texts, 5, 25, val={"web": texts})).setup("fit")
    assert (
        "ptx: text; 10 rows in = 10 used; 10 documents in 10 rows that are 82.0% full" in caplog.text
    )  # 205 of 250 tokens
    assert "ptx web: text; 10 rows in" in caplog.text


def test_other_texts_of_a_resumed_run_are_told(tmp_path: Path, texts: str, recwarn: pytest.WarningsRecorder) -> None:
    (runs := trainer(tmp_path)).fit(Recorder(), datamodule=(same := data(PtxStream(texts, 3, 25))))
    runs.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["OnRank"]
    earlier = {key: saved[key] for key in ("phase_loader", "content")}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "x" * 20}) + "\n")
    resumed = data(PtxStream(str(other), 3, 25))
    resumed.setup("fit")
    recwarn.clear()
    resumed.load_state_dict(earlier)
    same.load_state_dict(saved)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the training rows are not those that the checkpoint was trained on"):
        resumed.load_state_dict(saved)


def test_real_phases_go_on_with_texts_beside_them(tmp_path: Path, texts: str) -> None:
    """A text may fill the model's positions, because nothing is sampled after it."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "x" * 3000}) + "\n")
    module = GRPOModule("tiny", NumericMatch(), num_generations=2, sampling=Sampling(max_completion_length=2))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=(fitted := data(PtxStream(str(long), 2, 1024))))
    assert max(len(row.ids) for row in fitted.ptx.rows) == 1024  # type: ignore[union-attr]
    with pytest.raises(
        ValueError,
        match=r"train texts has 1025 tokens, but the model has only 1024 positions: lower data\.ptx\.max_length",
    ):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data(PtxStream(str(long), 2, 1025)))


def test_impossible_settings_are_refused_in_one_sentence(tmp_path: Path, texts: str) -> None:
    with pytest.raises(
        ValueError, match="ptx.rows_per_update must be at least 1 and ptx.max_length at least 2, got 0 and 512"
    ):
        PtxStream(texts, 0)
    with pytest.raises(
        ValueError,
        match=r"^data.ptx.rows_per_update \(3\) must be at least 4: each of the 2 micro-batches of an update gets a row on each of 2 ranks$",
    ):
        fit(tmp_path, PtxStream(texts, 3, 25), (1, 2), accumulate=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "abc"}) + "\n" + json.dumps({"content": "abc"}) + "\n")
    with pytest.raises(ValueError, match=f"{bad}:2: found the columns content; looked for messages"):
        fit(tmp_path, PtxStream(str(bad), 3, 25))
    with pytest.raises(ValueError, match="columns maps unknown names txt"):
        fit(tmp_path, PtxStream(texts, 3, 25, columns={"txt": "content"}))
    bad.write_text(json.dumps({"content": "abc"}) + "\n" + json.dumps({"content": 7}) + "\n")
    dropped = data(PtxStream(str(bad), 3, 25, columns={"text": "content"}), on_bad_row="drop")
    dropped.setup("fit")
    assert len(dropped.ptx.rows) == 1  # type: ignore[union-attr]
