"""The record that modules leave, metrics joined over batches, and the modes that ``evaluating`` restores."""

import contextlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import Export, WinRate
from callbacks.phase import record_of
from datamodules import CandidatesDataModule, SeedTasksDataModule
from modules import GRPOModule, KnowledgeModule, LabelModule, RewardModule, SFTModule
from modules.rewards import ExactMatch
from modules.rollout.sampling import Sampling
from modules.trainer.modes import evaluating
from modules.trainer.ranks import Tally, weighted_means
from modules.types import Record


def test_a_tally_joins_means_sums_and_extremes_of_batches():
    tally = Tally()
    for loss, count, low in ((2.0, 3.0, 0.5), (4.0, 1.0, -1.0)):
        tally.add({"loss": loss}, weight=count)
        tally.add({"tokens": torch.tensor(count)})
        tally.add({"min": low}, join=min)
        tally.add({"max": low}, join=max)
    tally.add({"nothing": 7.0}, weight=0.0)
    # (2 x 3 + 4 x 1) / 4; the mean of the two batches would be 3
    assert tally.join() == {"loss": 2.5, "tokens": 4.0, "min": -1.0, "max": 0.5}
    assert Tally().join() == {}


def test_means_of_nothing_are_left_out():
    assert weighted_means({"half": (1.0, 2.0), "nothing": (0.0, 0.0)}) == {"half": 0.5}


def test_evaluating_puts_every_mode_back_also_after_an_error():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout().eval())
    with contextlib.suppress(RuntimeError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise RuntimeError
    assert [part.training for part in module.modules()] == [True, True, False]


def test_every_module_leaves_a_record():
    rule = ExactMatch()
    training = [SFTModule("tiny"), RewardModule("tiny"), GRPOModule("tiny", rule)]
    predicting = [LabelModule(rule), KnowledgeModule("tiny")]
    for module in (*training, *predicting):
        assert isinstance(record_of(module), Record)
    samples = [record_of(module).held_out is not None for module in training]
    assert samples == [False, False, True]
    assert record_of(SFTModule("tiny", sampling=Sampling())).held_out == []
    with pytest.raises(ValueError, match=r"Linear has no record \(modules.types.Record\) for callbacks"):
        record_of(torch.nn.Linear(1, 1))


def test_a_win_rate_of_a_module_that_samples_nothing_is_refused():
    with pytest.raises(ValueError, match="WinRate compares sampled completions, but SFTModule samples none"):
        WinRate(ExactMatch()).setup(Trainer(logger=False, accelerator="cpu"), SFTModule("tiny"), "fit")


def test_a_module_that_only_predicts_has_no_optimizer_and_refuses_to_train(tmp_path: Path):
    module = LabelModule(ExactMatch())
    assert list(module.parameters()) == [] and not hasattr(module, "tokenizer")
    with pytest.raises(ValueError, match="LabelModule only predicts, so there is nothing to fit; run predict"):
        module.setup("fit")
    trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(ValueError, match="LabelModule lacks save_pretrained or prepare_export"):
        Export(str(tmp_path / "export")).setup(trainer, module, "fit")


def test_data_for_predict_need_no_tokenizer(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}) + "\n")
    data = CandidatesDataModule(str(tmp_path / "rows.jsonl"))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["p"] and batch["prompt_ids"] == [[]]
    for kind in (CandidatesDataModule, SeedTasksDataModule):
        assert not UNREAD & set(inspect.signature(kind).parameters)


UNREAD = {"tokenizer", "val", "seed", "drop_long", "on_bad_row"}
