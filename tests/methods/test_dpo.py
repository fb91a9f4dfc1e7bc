"""DPO in a real Trainer: the loss against plain rows, the reference and its cache, splits, resume, and refusals."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from programs import run_ranks
from torch.utils.data import DataLoader

from callbacks import PreferenceAudit
from datamodules import AdditionPairs, PreferenceDataModule
from datamodules.sources import Row, Source
from modules import DPOModule
from modules.losses import (
    IPO,
    KTO,
    ORPO,
    Hinge,
    LengthDesensitized,
    LengthMargin,
    LengthNormalized,
    Robust,
    Sigmoid,
    SimPO,
)
from modules.losses.preference import Sequences, find_pairs, measure_logits
from modules.networks.lora import Lora

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
PAIRS = [
    Sigmoid(),
    Robust(),
    IPO(),
    IPO(average=True),
    Hinge(),
    LengthNormalized(),
    LengthMargin(),
    LengthDesensitized(),
    SimPO(),
    ORPO(),
]


class Labels(Source):
    """Labelled rows: right sums are desirable, wrong ones are not."""

    def __init__(self, num_sums: int = 12, held_out: bool = False):
        self.sums = AdditionPairs(num_sums, dots=2, held_out=held_out)

    def rows(self):
        rows = self.sums.rows()
        sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
        return [
            Row(
                {"prompt": row.columns["prompt"], "completion": row.columns[side], "label": side == "chosen"},
                f"{row.origin} {side}",
                "labels",
            )
            for row, side in sides
        ]


def dpo(folder: Path, lr: float = 1e-3, **settings) -> DPOModule:
    seed_everything(0)
    settings = {
        "cache_dir": str(folder / "reference"),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
    } | settings
    return DPOModule("tiny", **settings)


def fit(
    module: DPOModule, batch_size: int = 4, resume: Path | None = None, train: Source | None = None, **settings
) -> Trainer:
    settings = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0} | settings
    trainer = Trainer(**(QUIET | settings))
    val = AdditionPairs(6, dots=4, held_out=True) if train is None else None
    data = PreferenceDataModule(module.tokenizer, train or AdditionPairs(12, dots=4), val=val, batch_size=batch_size)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: DPOModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


@pytest.mark.parametrize("objective", [*PAIRS, KTO()], ids=lambda objective: type(objective).__name__)
def test_every_objective_runs_and_moves_the_policy(tmp_path, objective):
    module = dpo(tmp_path, objective=objective, nll_weight=0.1)
    start = weights(module)
    trainer = fit(module, max_epochs=1)
    assert torch.isfinite(weights(module)).all() and not torch.equal(start, weights(module))
    assert {"train/loss", "train/rewards/chosen", "train/logps/rejected", "val/rewards/accuracies"} <= set(
        trainer.callback_metrics
    )
    assert bool(module.tables) == objective.uses_reference


def gradient_at_the_reference(objective, beta: float) -> list[float]:
    logps = torch.tensor([-10.0, -14.0], dtype=torch.float64, requires_grad=True)
    sequences = Sequences(logps, logps.detach().clone(), torch.tensor([5.0, 10.0], dtype=torch.float64), logps)
    batch = {"prompt_index": torch.tensor([0, 0]), "rank": torch.tensor([0, 1])}
    objective.total(sequences, batch, find_pairs(batch), beta, torch.tensor(0.0)).backward()
    return logps.grad.tolist()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Sigmoid(), [-0.05, 0.05]),  # -beta / 2
        (Sigmoid(0.1), [-0.04, 0.04]),  # -(1 - 2 e) beta / 2
        (Robust(0.1), [-0.0625, 0.0625]),  # -beta / 2 / (1 - 2 e)
        (IPO(), [-10.0, 10.0]),  # 2 (0 - 1 / (2 beta)) = -1 / beta
        (IPO(average=True), [-2.0, 1.0]),  # the same over 5 and 10 tokens
        (Hinge(), [-0.1, 0.1]),  # -beta
        (LengthNormalized(), [-0.01, 0.005]),  # -beta / 2 over 5 and 10 tokens
        (
            LengthMargin(0.01),
            [-0.1 * 0.5124973964842103, 0.1 * 0.5124973964842103],
        ),  # -beta sigma(-alpha (5 - 10)) = -beta sigma(0.05)
        (LengthDesensitized(), [-0.05, 0.05]),  # its weights are in the sums already
        (
            SimPO(0.5),
            [-0.1 * 0.6364525402815664 / 5, 0.1 * 0.6364525402815664 / 10],
        ),  # -beta sigma(0.56) over 5 and 10, 0.56 = 0.5 - 0.1 (-2 + 1.4)
        # log odds -0.7377415, s = sigma(0.7377415) = 0.6765018: -(1 + beta s / (1 - e^-2)) / 5 and beta s / (1 -
        # e^-1.4) / 10
        (
            ORPO(),
            [
                -(1 + 0.1 * 0.6765017863168391 / 0.8646647167633873) / 5,
                0.1 * 0.6765017863168391 / 0.7534030360583935 / 10,
            ],
        ),
        (KTO(), [-0.0125, 0.0125]),  # -+ beta / 4, each completion half of the example
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "uses_reference") else str(value),
)
def test_gradient_where_policy_and_reference_agree(objective, expected):
    assert gradient_at_the_reference(objective, beta=0.1) == pytest.approx(expected, rel=1e-6)


def test_loss_is_that_of_plain_rows(tmp_path):
    """The loss is -log sigma(beta h) from each row alone. The reference is the start policy; the policy has moved."""
    module = dpo(tmp_path, lr=0.1, beta=0.5)
    trainer = fit(module)
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    start = dpo(tmp_path).policy.eval()
    losses = []
    for row in trainer.datamodule.val_rows:
        logps = []
        for policy in (module.policy, start):
            for completion in row.completions:
                ids = torch.tensor([row.prompt + completion])
                with torch.no_grad():
                    logprobs = policy.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
                logps.append(logprobs[len(row.prompt) - 1 :].sum())
        h = (logps[0] - logps[2]) - (logps[1] - logps[3])
        losses.append(-torch.nn.functional.logsigmoid(0.5 * h))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert float(torch.stack(losses).mean()) != pytest.approx(0.6931, abs=1e-3)  # it has moved


def test_logits_are_means_over_the_vocabulary_and_the_tokens_of_a_side(tmp_path):
    module = dpo(tmp_path, lr=0.1)
    trainer = fit(module)
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    for side, name in enumerate(("chosen", "rejected")):
        each = []
        for row in trainer.datamodule.val_rows:
            ids = torch.tensor([row.prompt + row.completions[side]])
            with torch.no_grad():
                each.append(module.policy.model(ids).logits[0, len(row.prompt) - 1 : -1].mean(1))  # [Tc]
        mean, of_means = torch.cat(each).mean(), torch.stack([logits.mean() for logits in each]).mean()
        assert float(trainer.callback_metrics[f"val/logits/{name}"]) == pytest.approx(float(mean), abs=1e-5)
        assert abs(float(mean - of_means)) > 1e-4


def test_the_logits_of_ranked_and_labelled_completions_by_hand():
    logits, mask = (
        torch.tensor([[1.0, 2.0], [4.0, 9.0], [6.0, 8.0]]),
        torch.tensor([[True, True], [True, False], [True, True]]),
    )
    # ranks 0, 1, 2: pairs 0-1, 0-2 and 1-2, each 1/3. Chosen: sums 3, 3 and 4 over 2, 2 and 1 tokens; rejected: 4, 14
    # and 14 over 1, 2 and 2
    rank = torch.tensor([0, 1, 2])
    pairs = find_pairs({"prompt_index": torch.tensor([0, 0, 0]), "rank": rank})
    ranked = measure_logits(logits, mask, rank, pairs)
    assert [float(value) for value, _ in ranked.values()] == pytest.approx([10 / 5, 32 / 5])
    assert [weight for _, weight in ranked.values()] == pytest.approx([5 / 3, 5 / 3])
    # labelled: good ones have 3 + 4 over 2 + 1 tokens, bad ones 14 over 2
    labelled = measure_logits(logits, mask, torch.tensor([0, 0, 1]), None)
    assert {name: (float(value), weight) for name, (value, weight) in labelled.items()} == {
        "logits/chosen": (pytest.approx(7 / 3), 3.0),
        "logits/rejected": (7.0, 2.0),
    }


@pytest.mark.parametrize("settings", [{}, {"objective": KTO()}], ids=["dpo", "kto"])
def test_splits_change_nothing(tmp_path, settings):
    """A step has 12 examples in one micro-batch or in three."""
    whole, split = dpo(tmp_path, **settings), dpo(tmp_path, **settings)
    start = weights(whole)
    fit(whole, batch_size=12)
    fit(split, batch_size=4, accumulate_grad_batches=3)
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)
    assert float((weights(whole) - start).abs().max()) > 1e-5


RANKS = """
import sys
import warnings
from pathlib import Path

import torch
from tests.methods.test_dpo import dpo, fit, weights

if __name__ == "__main__":
    module = dpo(Path(sys.argv[1]))
    trainer = fit(module, batch_size=3, devices=2, strategy="ddp")
    if trainer.is_global_zero:
        torch.save(weights(module), Path(sys.argv[1]) / "weights.pt")
"""


def run_script(folder: Path, script: str) -> None:
    """Run a script as two ranks, in ``folder``."""
    (folder / "ranks.py").write_text(script)
    run_ranks("ranks.py", ".", folder=folder)


def test_two_ranks_make_the_run_of_one(tmp_path):
    alone = dpo(tmp_path / "alone")
    fit(alone, batch_size=6)
    run_script(tmp_path, RANKS)
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), weights(alone), atol=1e-6, rtol=0)


def test_reference_is_computed_once_and_kept_on_disk(tmp_path):
    fit(dpo(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "reference").iterdir()}
    assert len(files) == 2  # train and val
    again = dpo(tmp_path, lr=0.0)
    fit(again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "reference").iterdir()} == files
    assert again.reference is None  # it takes no memory while training
    other = dpo(tmp_path)
    other.policy.model.lm_head.weight.data.add_(0.01)
    other.reference.policy.model.lm_head.weight.data.add_(0.01)
    fit(other)
    assert len(list((tmp_path / "reference").iterdir())) == 4  # another model, other log-probs


def test_a_trainer_without_a_folder_leaves_none_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = dpo(tmp_path, cache_dir=None)
    fit(module, max_epochs=1, logger=False)
    assert list(tmp_path.iterdir()) == [] and len(module.tables) == 2
    fit(dpo(tmp_path, cache_dir=None), max_epochs=1, logger=False, default_root_dir="run")
    assert len(list(Path("run/reference").iterdir())) == 2


def test_a_wrong_reference_is_refused(tmp_path):
    module = dpo(tmp_path)
    module.policy.model.lm_head.weight.data.mul_(1.1)
    with pytest.raises(ValueError, match="policy and reference differ before the first update"):
        fit(module)


def exported(folder: Path, lr: float) -> str:
    """Export a policy after a short training."""
    module = dpo(folder, lr=lr)
    fit(module, max_epochs=1)
    module.policy.save_pretrained(folder / "export")
    return str(folder / "export")


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_another_model_may_be_the_reference(tmp_path, lora):
    """At step 0 h is not 0, and the loss is that of plain rows with the named model."""
    first = exported(tmp_path, lr=0.1)
    module = dpo(tmp_path, reference=first, lr=0.0, beta=0.5, lora=lora)
    trainer = fit(module, max_epochs=1)
    assert module.reference is None
    reference, rewards = DPOModule(first, reference_free=True).policy, []
    policy = DPOModule("tiny", reference_free=True).policy
    for row in trainer.datamodule.val_rows:
        batch = {name: torch.tensor([row.prompt + row.completions[0]]) for name in ("ids", "mask")}
        keep = torch.arange(batch["ids"].shape[1])[None] >= len(row.prompt)
        with torch.no_grad():
            rewards.append(
                0.5
                * float(
                    (
                        policy.token_scores(batch["ids"], keep).logprobs
                        - reference.token_scores(batch["ids"], keep).logprobs
                    ).sum()
                )
            )
    assert float(trainer.callback_metrics["val/rewards/chosen"]) == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    assert max(map(abs, rewards)) > 0.01


def test_a_reference_that_cannot_be_compared_is_refused(tmp_path):
    first = exported(tmp_path, lr=0.1)
    with pytest.raises(ValueError, match="SimPO is computed without one: leave it out"):
        dpo(tmp_path, reference=first, objective=SimPO())
    with pytest.raises(ValueError, match="Sigmoid is computed without one"):
        dpo(tmp_path, reference=first, reference_free=True)
    tokenizer = DPOModule("tiny", reference_free=True).tokenizer
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "export")
    with pytest.raises(
        ValueError,
        match="are not those of 'tiny'; name a model with the same tokenizer|has 262 tokens and the model only 261",
    ):
        dpo(tmp_path, reference=first)


def test_other_data_need_another_reference(tmp_path):
    module = dpo(tmp_path)
    fit(module, max_epochs=1)
    with pytest.raises(ValueError, match="make a new DPOModule for other data"):
        fit(module, train=AdditionPairs(8, seed=1))


def test_resume_is_bitwise(tmp_path):
    settings = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = dpo(tmp_path, **settings)
    fit(whole, enable_checkpointing=True, callbacks=[every])
    for step in (1, 3, 4):
        resumed = dpo(tmp_path, **settings)
        fit(
            resumed,
            resume=tmp_path / f"step={step}.ckpt",
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(tmp_path / "again")],
        )
        assert torch.equal(weights(resumed), weights(whole))


def test_adapters_alone_learn_and_the_reference_is_their_start(tmp_path):
    module = dpo(tmp_path, lora=Lora(r=4), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}
    fit(module)
    changed = {name for name, parameter in module.policy.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora" in name for name in changed)
    frozen = module.reference.weights
    assert frozen.keys() == {name for name in before if "lora" in name}
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.items())
    module.policy.save_pretrained(tmp_path / "export")
    plain = DPOModule(str(tmp_path / "export"), reference_free=True).policy
    ids = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(
        plain.token_scores(ids, keep).logprobs, module.policy.token_scores(ids, keep).logprobs, atol=1e-5, rtol=0
    )


def test_it_warns_when_both_sides_lose_likelihood(tmp_path):
    """It warns only when both sides fall by more than chance; a likelihood term keeps the chosen ones up.

    12 pairs fall by 2.7 +- 1.6 and 8.2 +- 2.2 nats, which may be chance; 48 pairs fall by 52 +- 5 and 57 +- 5.
    """
    big = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), "beta": 0.01}
    with pytest.warns(UserWarning, match="likelihood displacement"):
        fit(dpo(tmp_path, **big), max_epochs=4, train=AdditionPairs(48, dots=4))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*likelihood displacement.*")
        fit(dpo(tmp_path, **big), max_epochs=4)
        fit(dpo(tmp_path, nll_weight=1.0, **big), max_epochs=4)


def test_a_fall_within_noise_is_no_displacement(tmp_path):
    """Ascent on the likelihood term lowers both sides; tiny steps do so by less than 0.01 nats a completion."""

    def ascend(lr: float) -> tuple[float, float]:
        up = dpo(
            tmp_path,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, maximize=True),
            beta=0.01,
            nll_weight=1.0,
        )
        metrics = fit(up, max_epochs=1).callback_metrics
        chosen, rejected = (float(metrics[f"train/rewards/{side}"]) / 0.01 for side in ("chosen", "rejected"))
        return chosen, rejected

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*likelihood displacement.*")
        assert all(-0.01 < ratio < 0 for ratio in ascend(1e-7))
    with pytest.warns(UserWarning, match="likelihood displacement"):
        assert all(ratio < -0.1 for ratio in ascend(1e-4))


def test_displacement_needs_a_reference(tmp_path):
    trainer = fit(dpo(tmp_path, objective=SimPO()), max_epochs=1)
    assert (
        "train/rewards/margins" in trainer.callback_metrics
        and "train/likelihood_displacement" not in trainer.callback_metrics
    )


def test_kto_learns_from_labels(tmp_path):
    module = dpo(tmp_path, objective=KTO())
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, callbacks=[PreferenceAudit()])
    with pytest.warns(
        UserWarning, match=r"length bias are unknown; desirable completions have train/rewards/chosen -?\d"
    ):
        trainer.fit(module, PreferenceDataModule(module.tokenizer, Labels(), batch_size=4))
    assert {"train/rewards/chosen", "train/rewards/rejected", "train/kl"} <= set(trainer.callback_metrics)
    assert "train/rewards/accuracies" not in trainer.callback_metrics


class LookAtKl(Callback):
    """Keeps the KL of each optimiser step, and the policy and the completions of the last one."""

    def __init__(self):
        self.kl, self.policy, self.rows = [], {}, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.policy, self.rows = {name: x.clone() for name, x in module.policy.state_dict().items()}, []
        self.rows += batch["row"][batch["rank"] >= 0].tolist()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.kl.append(float(module.kl))


def fit_kto(folder: Path, batch_size: int, accumulate: int, **settings) -> dict:
    """Take three steps of 8, 8 and 6 examples; save what ``LookAtKl`` has seen, the weights and the metrics."""
    look, module = LookAtKl(), dpo(folder, lr=0.03, objective=KTO(1.5, 0.5), beta=0.5)
    settings |= {"callbacks": [look], "max_epochs": 1, "accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    trainer = Trainer(**QUIET | {"enable_checkpointing": False} | settings)
    data = PreferenceDataModule(module.tokenizer, Labels(11), val=Labels(5, held_out=True), batch_size=batch_size)
    trainer.fit(module, data)
    metrics = {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "train/kl", "val/loss", "val/kl")}
    seen = {"kl": look.kl, "policy": look.policy, "rows": look.rows, "after": weights(module), "metrics": metrics}
    torch.save(seen, folder / f"rank{trainer.global_rank}.pt")
    return seen


KTO_RANKS = """
import sys
from pathlib import Path
from tests.methods.test_dpo import fit_kto

if __name__ == "__main__":
    fit_kto(Path("."), int(sys.argv[1]), int(sys.argv[2]), devices=2, strategy="ddp")
"""


def test_every_slicing_of_a_kto_run_is_the_same_run(tmp_path):
    """z0 is the mean over the completions of the step, each after the next other prompt, row by row without padding."""
    whole = fit_kto(tmp_path, 8, 1)
    others = [fit_kto(tmp_path, *slicing) for slicing in [(4, 2), (2, 4), (1, 8)]]
    (tmp_path / "ranks.py").write_text(KTO_RANKS)
    for slicing in [(4, 1), (2, 2), (1, 4)]:
        run_ranks("ranks.py", *map(str, slicing), folder=tmp_path)
        others += [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert len(whole["kl"]) == 3 and whole["kl"][0] == 0 < min(whole["kl"][1:])
    for other in others:
        assert other["kl"] == pytest.approx(whole["kl"], abs=1e-6)
        assert other["metrics"] == pytest.approx(whole["metrics"], abs=1e-6)
        torch.testing.assert_close(other["after"], whole["after"], atol=1e-6, rtol=0)

    module = dpo(tmp_path)
    policy, start = module.policy.eval(), dpo(tmp_path).policy.eval()

    def log_ratio(prompt: list[int], completion: list[int]) -> float:
        ids = torch.tensor([prompt + completion])
        keep = torch.arange(ids.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            return float((policy.token_scores(ids, keep).logprobs - start.token_scores(ids, keep).logprobs).sum())

    data = PreferenceDataModule(module.tokenizer, Labels(11), val=Labels(5, held_out=True))
    data.setup("fit")
    for rows, stage in ((data.train_rows, "train"), (data.val_rows, "val")):
        if stage == "train":
            policy.load_state_dict(whole["policy"])
        else:
            torch.nn.utils.vector_to_parameters(whole["after"], policy.parameters())
        limit = max(row.longest for row in rows)
        matched, mismatched = {}, {}
        for place in whole["rows"] if stage == "train" else range(len(rows)):
            (completion,), prompt = rows[place].completions, rows[place].prompt
            other = next(row.prompt for row in rows[place + 1 :] + rows if row.prompt != prompt)
            matched[place] = log_ratio(prompt, completion)
            mismatched[place] = log_ratio(other[-(limit - len(completion)) :], completion)
        kl = max(0.0, sum(mismatched.values()) / len(mismatched))
        gaps = [(0.5 * (ratio - kl), rows[place].ranks == [0]) for place, ratio in matched.items()]
        losses = [1.5 / (1 + math.exp(gap)) if good else 0.5 / (1 + math.exp(-gap)) for gap, good in gaps]
        assert whole["metrics"][f"{stage}/kl"] == pytest.approx(kl, abs=1e-4) and kl > 1e-3
        assert whole["metrics"][f"{stage}/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert len(whole["rows"]) == 22 - 2 * 8


def test_held_out_rows_of_one_prompt_take_the_kl_of_the_last_step(tmp_path):
    module = dpo(tmp_path, lr=0.03, objective=KTO())
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(module, PreferenceDataModule(module.tokenizer, Labels(4), val=Labels(1, held_out=True), batch_size=4))
    assert float(trainer.callback_metrics["val/kl"]) == float(trainer.callback_metrics["train/kl"]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "batch_size", "source", "message"),
    [
        ({}, 4, Labels(), "Sigmoid compares completions, but these rows hold one labelled completion each: use KTO"),
        ({"objective": KTO()}, 4, Labels(1), "all training rows have the same prompt"),
        ({"beta": 0.0}, 4, None, "DPOModule: beta must be > 0"),
        ({"beta": math.nan}, 4, None, "DPOModule: beta must be finite and > 0"),
        ({"nll_weight": math.inf}, 4, None, "DPOModule: nll_weight must be finite and >= 0"),
        ({"objective": KTO(), "reference_free": True}, 4, None, "KTO measures the KL to a reference"),
        ({"objective": KTO(), "nll_weight": 1.0}, 4, Labels(), "nll_weight raises chosen completions"),
    ],
)
def test_impossible_runs_are_refused(tmp_path, settings, batch_size, source, message):
    with pytest.raises(ValueError, match=message):
        fit(dpo(tmp_path, **settings), batch_size=batch_size, train=source)


class Foreign(LightningDataModule):
    """Somebody's DataModule."""

    val = None

    def train_dataloader(self):
        return DataLoader([0])


class ForeignLabels(Foreign):
    """Gives labelled completions without completions after other prompts."""

    kind = "labels"

    def in_order(self, stage):
        return [{}]


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        (Sigmoid(), Foreign(), "Foreign has no in_order.* derive it from PreferenceDataModule, or set reference_free"),
        (KTO(), ForeignLabels(), "the batches of ForeignLabels have no 'mismatched': use PreferenceDataModule"),
    ],
)
def test_a_data_module_that_gives_too_little_is_refused(tmp_path, objective, data, message):
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(dpo(tmp_path, objective=objective), datamodule=data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sigmoid(0.5),
        lambda: LengthMargin(-1),
        lambda: LengthDesensitized(2),
        lambda: SimPO(-1),
        lambda: KTO(-1.0),
        lambda: KTO(1.0, math.nan),
        lambda: LengthMargin(math.inf),
        lambda: Lora(r=0),
    ],
)
def test_objectives_refuse_values_out_of_range(make):
    with pytest.raises(ValueError, match="must"):
        make()
