"""Runs with reuse: they go on from a stop bit for bit, also on two ranks, and only training reads the setting."""

from pathlib import Path
from typing import Any

import fixed_runs
import pytest
import resumes
import torch
from lightning.pytorch import Callback, Trainer
from programs import run_ranks
from resumes import FEW_STOPS, check_resumes, read_numbers

from datamodules import Addition, VerifiableDataModule
from modules import DistillModule, GRPOModule, SFTModule
from modules.rewards import RegexFormat
from modules.rollout import Calculator, Environment, InProcessEngine, Reuse, RolloutEngine, Sampling, Thinking
from modules.types import Rollout

# Every phase has eight of ten prompts. The untrained model finds all tokens alike, so all of them are compared.
REPEATS = ["--data.prompts_per_phase=8", "--model.sampling.reuse.lenience=0.9", "--model.sampling.reuse.buckets=1000"]


def read_reuse(folder: Path) -> list[float]:
    """Return the share of reused tokens of each phase."""
    found = {
        int(step): float(value) for (step, name), value in read_numbers(folder).items() if name == "train/reuse/tokens"
    }
    return [found[step] for step in sorted(found)]


@pytest.mark.parametrize("name", ["grpo_choices", "ppo"])  # dynamic sampling carries groups over; PPO scores values too
def test_a_run_goes_on_from_every_stop_bit_for_bit(tmp_path: Path, name: str) -> None:
    check_resumes(name, tmp_path, *REPEATS, stops=FEW_STOPS)
    first, second, third = read_reuse(tmp_path / "whole")
    assert first == 0 and 0.05 < second < 1 and 0.05 < third < 1


def test_two_ranks_share_drafts_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Ranks draw the prompts of a phase in turn, in another order each time: a prompt finds its drafts on either."""
    run_ranks(resumes.__file__, str(tmp_path), "online_dpo", *REPEATS, folder=tmp_path)
    two = read_reuse(tmp_path / "online_dpo/whole")
    fixed_runs.fit("online_dpo", tmp_path / "one", *resumes.VALIDATES, *REPEATS)
    assert two == pytest.approx(read_reuse(tmp_path / "one"), abs=0.05) and two[1] > 0.05


def grpo(reuse: Reuse | None, **settings: Any) -> GRPOModule:
    sampling = Sampling(max_completion_length=6, reuse=reuse)
    reward = RegexFormat(r"[\x00-\x7f].*")
    stays: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    return GRPOModule("tiny", reward, num_generations=4, sampling=sampling, optimizer=stays, seed=1, **settings)


class Sampled(Callback):
    """Keeps the completions of each phase and of each evaluation."""

    def __init__(self) -> None:
        self.phases: list[list[Rollout]] = []
        self.held_out: list[list[Rollout]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.phases.append(list(pl_module.record.rollouts))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        self.held_out.append(list(pl_module.record.held_out))


def test_only_training_reuses(tmp_path: Path) -> None:
    """With a learning rate of 0 a run with reuse samples its first phase, and every evaluation, as one without does."""
    seen = {}
    for name, reuse in (("with", Reuse(buckets=1000)), ("without", None)):
        module, seen[name] = grpo(reuse), Sampled()
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, callbacks=[seen[name]], logger=False, enable_checkpointing=False
        )
        data = VerifiableDataModule(module.tokenizer, Addition(4), val=Addition(4, held_out=True), prompts_per_phase=4)
        trainer.fit(module, data)
        (sampled,) = trainer.predict(module, data) or [None]
        seen[name].held_out.append(module.record.rollouts)
    assert seen["with"].held_out == seen["without"].held_out and len(seen["with"].held_out) == 4
    first, second = ([rollout.completion.token_ids for rollout in phase] for phase in seen["with"].phases)
    plain = [[rollout.completion.token_ids for rollout in phase] for phase in seen["without"].phases]
    assert first == plain[0] and second != plain[1]
    assert sorted(second) == sorted(first)  # equal weights keep every draft, in the order of the phase's prompts


def test_what_cannot_go_on_from_a_draft_is_refused() -> None:
    class Plain(RolloutEngine):
        def sync_weights(self, policy: Any, version: int) -> None:
            """Do nothing."""

        def generate(self, prompts: Any, num_generations: int, sampling: Sampling, seeds: Any) -> Any:
            return []

    class Late(InProcessEngine):
        copies_weights, max_staleness = True, 2

    reuse = Reuse()
    for settings, said in (
        (
            {"environment": Environment(Calculator)},
            "calls of tools .* leave model.environment or model.sampling.reuse out",
        ),
        ({"engine": Plain()}, r"Plain.generate takes no beginnings \(started\)"),
        ({"engine": Late()}, r"Late may sample from weights that are 2 phases older .*set it to 0"),
    ):
        with pytest.raises(ValueError, match=f"sampling.reuse: .*{said}"):
            grpo(reuse, **settings)
    thinking = Sampling(max_completion_length=90, reuse=reuse, thinking=Thinking(4, "</think>"))
    with pytest.raises(ValueError, match="sampling.reuse: a thinking budget .*leave sampling.thinking.budget"):
        GRPOModule("tiny", RegexFormat("a"), sampling=thinking)
    for make in (lambda s: SFTModule("tiny", sampling=s), lambda s: DistillModule("tiny", teacher="tiny", sampling=s)):
        with pytest.raises(ValueError, match="(SFT|Distill)Module: sampling.reuse needs .*leave it out"):
            make(Sampling(reuse=reuse))
    with pytest.raises(ValueError, match="sampling.reuse: lenience must be > 0, got 0; buckets must be >= 1, got 0"):
        Reuse(lenience=0, buckets=0)
