"""Importance weights between sampler and trainer: values by hand, masks, ranges, and a real run in bf16."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import Addition, VerifiableDataModule
from modules import DistillModule, GRPOModule, OnlineDPOModule, PPOModule
from modules.losses import DPPO, ImportanceWeights
from modules.rewards import RegexFormat
from modules.rollout import InProcessEngine
from modules.rollout.sampling import Sampling

OLD = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, float("nan")]])
LOG_WEIGHTS = torch.tensor([[0.1, 1.0, -0.5], [0.3, 0.2, 5.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
BATCH = {"old_logprobs": OLD, "sampler_logprobs": OLD - LOG_WEIGHTS, "completion_mask": MASK}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (ImportanceWeights(), [[1.105171, 2.0, 0.606531], [1.349859, 1.221403, 0.0]]),
        (ImportanceWeights(beyond="mask"), [[1.105171, 0.0, 0.606531], [1.349859, 1.221403, 0.0]]),
        (ImportanceWeights("sequence", 3.0, "mask"), [[1.822119] * 3, [1.648721, 1.648721, 0.0]]),
        (ImportanceWeights("sequence", 1.7, "mask"), [[0.0] * 3, [1.648721, 1.648721, 0.0]]),
        (ImportanceWeights("sequence", 1.7), [[1.7] * 3, [1.648721, 1.648721, 0.0]]),
    ],
)
def test_values_by_hand(weights, expected):
    torch.testing.assert_close(weights(BATCH), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cap", [0.0, 0.99, math.nan, math.inf])
def test_a_cap_out_of_range_is_refused(cap):
    with pytest.raises(ValueError, match="importance: cap must be .*>= 1"):
        ImportanceWeights(cap=cap)


def test_a_cap_that_leaves_out_what_agrees_is_refused():
    alike = {**BATCH, "sampler_logprobs": OLD}  # w is 1 at the five tokens
    assert ImportanceWeights(cap=1.0, beyond="mask")(alike)[MASK].tolist() == [1.0] * 5
    with pytest.raises(ValueError, match="importance: cap must be >= 1, got 0.5"):
        ImportanceWeights(cap=0.5, beyond="mask")


@pytest.mark.parametrize("wrong", [{"level": "tokens"}, {"beyond": "clip"}])
def test_an_unknown_choice_is_refused(wrong):
    with pytest.raises(ValueError, match="level is token or sequence and beyond truncate or mask"):
        ImportanceWeights(**wrong)


@pytest.mark.parametrize(("precision", "least", "most"), [("32-true", 0.0, 1e-5), ("bf16-mixed", 1e-4, 0.3)])
def test_weights_of_a_run_are_one_where_sampler_and_trainer_compute_alike(tmp_path: Path, precision, least, most):
    module = GRPOModule(
        "tiny",
        RegexFormat(r"[\x00-\x7f].*"),
        num_generations=4,
        sampling=Sampling(max_completion_length=4),
        importance=ImportanceWeights(),
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", precision=precision, max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(8), prompts_per_phase=4))
    found = {
        name: float(trainer.callback_metrics[f"train/sampling/importance_sampling_ratio/{name}"])
        for name in ("min", "mean", "max")
    }
    assert found["min"] <= found["mean"] <= found["max"]
    assert least <= max(1 - found["min"], found["max"] - 1) <= most


class Copying(InProcessEngine):
    """Says that it samples from a copy; its log-probs are those of the policy."""

    copies_weights = True


FORM = RegexFormat(r"[\x00-\x7f].*")


@pytest.mark.parametrize("method", [GRPOModule, PPOModule])
@pytest.mark.parametrize(
    ("settings", "own", "copied"),
    [
        ({}, None, ImportanceWeights()),
        ({"importance": False}, None, None),
        ({"importance": True}, ImportanceWeights(), ImportanceWeights()),
        ({"importance": ImportanceWeights("sequence", 3.0)}, *[ImportanceWeights("sequence", 3.0)] * 2),
    ],
)
def test_the_default_is_on_where_the_engine_copies_the_weights(method, settings, own, copied):
    assert method("tiny", FORM, **settings).importance == own
    assert method("tiny", FORM, engine=Copying(), **settings).importance == copied


def test_nothing_is_weighed_twice_or_where_no_probability_is_read():
    assert GRPOModule("tiny", FORM, engine=Copying(), objective=DPPO()).importance is None
    for doubled in (True, ImportanceWeights()):
        with pytest.raises(
            ValueError, match="DPPO weighs tokens by p of the trainer .* itself, and importance would do"
        ):
            GRPOModule("tiny", FORM, importance=doubled, objective=DPPO())
    assert OnlineDPOModule("tiny", FORM, engine=Copying()).importance is None
    assert DistillModule("tiny", "tiny-addition", engine=Copying()).importance is None
