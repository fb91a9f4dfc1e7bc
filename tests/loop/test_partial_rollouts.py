"""Partial rollouts in a real Trainer: whole budgets, no learning, segments of several policies, refusals, resumes."""

from pathlib import Path
from typing import Any

import pytest
import resumes
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from programs import run_ranks

from datamodules import Addition, VerifiableDataModule
from modules import DistillModule, GRPOModule, OnlineDPOModule, PPOModule
from modules.losses import Clipped
from modules.rewards import RegexFormat
from modules.rollout import Environment, InProcessEngine, PartialRollouts, RolloutEngine, Sampling, Thinking
from modules.rollout.calculator import Calculator
from modules.rollout.phases.dynamic_sampling import DynamicSampling

ASCII = RegexFormat(r"[\x00-\x7f].*")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LENGTH, GENERATIONS = 12, 4


class Seen(Callback):
    """Keeps the record and the batches of each phase, and the weights at its end."""

    def __init__(self) -> None:
        self.rollouts: list[list[Any]] = []
        self.carried: list[list[Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.batches: list[list[dict[str, torch.Tensor]]] = []
        self.weights: list[list[torch.Tensor]] = []
        self.steps: list[int] = []  # updates before the phase

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            record = pl_module.record
            self.rollouts.append(list(record.rollouts))
            self.carried.append(list(record.carried))
            self.metrics.append(dict(record.metrics))
            self.batches.append([])
            self.steps.append(trainer.global_step)
        self.batches[-1].append(dict(batch))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.weights.append([weight.detach().clone() for weight in pl_module.parameters()])


class Watched(Clipped):
    """Keeps the micro-batches that it is called with, which have the log-probs that the ratios start from."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []

    def __call__(self, logprobs, batch):
        self.batches.append(dict(batch))
        return super().__call__(logprobs, batch)


def fit(kind: type, partial: PartialRollouts | None, lr: float, phases: int = 5, **settings: Any) -> Seen:
    """Phases of eight prompts and an update of one micro-batch."""
    seed_everything(0)
    seen = Seen()
    sampling = Sampling(settings.pop("temperature", 1.0), max_completion_length=LENGTH, partial=partial)
    settings = {"reward": ASCII, "num_generations": GENERATIONS} | settings
    module = kind(
        "tiny-small", sampling=sampling, optimizer=lambda weights: torch.optim.SGD(weights, lr=lr), **settings
    )
    data = VerifiableDataModule(module.tokenizer, Addition(40), prompts_per_phase=8)
    Trainer(**QUIET, accelerator="cpu", max_epochs=phases, callbacks=[seen]).fit(module, data)
    return seen


def test_a_budget_of_whole_completions_is_the_ordinary_run_bit_for_bit():
    ordinary, whole = (fit(GRPOModule, partial, lr=0.1, beta=0.01) for partial in (None, PartialRollouts(LENGTH)))
    assert whole.rollouts == ordinary.rollouts and not any(whole.carried)
    for before, after in zip(ordinary.weights, whole.weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(ordinary.weights[0][0], ordinary.weights[-1][0])


def test_without_learning_the_completions_are_those_of_the_ordinary_run_and_none_is_lost():
    ordinary, parts = (fit(GRPOModule, partial, lr=0.0) for partial in (None, PartialRollouts(5)))
    expected = [rollout for phase in ordinary.rollouts for rollout in phase]
    trained = [rollout for phase in parts.rollouts for rollout in phase]
    found = {(rollout.uid, number % GENERATIONS): rollout for number, rollout in enumerate(trained + parts.carried[-1])}
    assert len(found) == len(expected) == 5 * 8 * GENERATIONS
    compared = 0
    for number, whole in enumerate(expected):
        mine = found[whole.uid, number % GENERATIONS]
        size = len(mine.completion.token_ids)
        assert mine.completion.token_ids == whole.completion.token_ids[:size]
        assert mine.completion.logprobs == pytest.approx(whole.completion.logprobs[:size], abs=1e-5)
        if mine.seed is None:
            assert (mine.completion.text, mine.completion.finish) == (whole.completion.text, whole.completion.finish)
            compared += size > 5
        if mine.rewards:
            assert mine.reward == whole.reward
    assert compared > 20
    order = list(dict.fromkeys(rollout.uid for rollout in expected))
    for phase, begun in zip(parts.rollouts, range(8, 48, 8), strict=True):
        places = [order.index(uid) for uid in dict.fromkeys(rollout.uid for rollout in phase)]
        assert places == sorted(places) and 1 <= len(places) <= 8 and places[-1] < begun
    assert any(rollout.seed is not None for rollout in parts.carried[-1])


def test_each_segment_keeps_the_policy_that_it_was_drawn_from():
    watched = Watched()
    seen = fit(GRPOModule, PartialRollouts(5), lr=0.5, beta=0.01, objective=watched)  # beta: no completion is left out
    kinds = set()
    for phase, batch, step, metrics in zip(seen.rollouts, watched.batches, seen.steps, seen.metrics, strict=True):
        behind = []
        for row, rollout in enumerate(phase):
            versions = torch.tensor(rollout.completion.token_versions)
            drawn, old = torch.tensor(rollout.completion.logprobs), batch["old_logprobs"][row, : len(versions)]
            assert torch.equal(old[versions < step], drawn[versions < step])
            torch.testing.assert_close(old[versions == step], drawn[versions == step], atol=1e-5, rtol=0)
            assert versions.tolist() == sorted(versions) and versions.max() <= step
            kinds.add(len(versions.unique()))
            behind += (step - versions).tolist()
        assert metrics["staleness/mean"] == pytest.approx(sum(behind) / len(behind))
        assert metrics["staleness/max"] == max(behind)
    assert kinds == {1, 2, 3}
    # Other weights give the tokens of earlier segments other probabilities, so that the two would be told apart.
    newest = fit(GRPOModule, PartialRollouts(5, learn_earlier=False), lr=0.5, beta=0.01)
    for phase, (batch,), step in zip(newest.rollouts, newest.batches, newest.steps, strict=True):
        news = [[version == step for version in rollout.completion.token_versions] for rollout in phase]
        for row, new in enumerate(filter(any, news)):
            assert batch["completion_mask"][row, : len(new)].tolist() == new
            assert batch["attended"][row].sum() == len(new)
        assert batch["denominator"] == sum(map(sum, news))


def test_a_completion_that_repeats_itself_ends_as_cut_off():
    seen = fit(GRPOModule, PartialRollouts(4, max_repeats=2), lr=0.0, temperature=0.2)
    ordinary = fit(GRPOModule, None, lr=0.0, temperature=0.2)
    whole = {(each.uid, place % 4): each for phase in ordinary.rollouts for place, each in enumerate(phase)}
    ended = 0
    for phase in seen.rollouts:
        for place, rollout in enumerate(phase):
            ids = rollout.completion.token_ids
            if len(ids) < len(whole[rollout.uid, place % 4].completion.token_ids):
                assert ids[-1] == ids[-2] or ids[-2:] == ids[-4:-2]
                assert rollout.completion.finish == "length" and len(ids) in (4, 8)
                ended += 1
    assert ended > 0


def test_held_out_prompts_are_answered_without_a_break():
    def validate(partial: PartialRollouts | None) -> list[Any]:
        module = GRPOModule("tiny", ASCII, sampling=Sampling(max_completion_length=LENGTH, partial=partial), seed=0)
        data = VerifiableDataModule(module.tokenizer, Addition(40), val=Addition(8, held_out=True))
        Trainer(**QUIET, accelerator="cpu").validate(module, data, verbose=False)
        return module.record.held_out or []

    answers = validate(PartialRollouts(4))
    assert answers == validate(None) and max(len(each.completion.token_ids) for each in answers) > 4


METHODS = {
    "ppo": (PPOModule, {}),
    "online_dpo": (OnlineDPOModule, {}),
    "distill": (DistillModule, {"teacher": "tiny-addition", "num_generations": 1}),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_learn_from_segments(name):
    kind, settings = METHODS[name]
    seen = fit(kind, PartialRollouts(5), lr=0.1, phases=4, **settings)
    assert max(metrics["staleness/max"] for metrics in seen.metrics) >= 2
    uids = [uid for phase in seen.rollouts for uid in dict.fromkeys(rollout.uid for rollout in phase)]
    assert len(uids) == len(set(uids)) and not torch.equal(seen.weights[0][0], seen.weights[-1][0])


class Plain(RolloutEngine):
    """An engine that begins every completion anew."""

    def sync_weights(self, policy, version):
        raise NotImplementedError

    def generate(self, prompts, num_generations, sampling, seeds):
        raise NotImplementedError


PARTIAL = PartialRollouts(4)


@pytest.mark.parametrize(
    ("kind", "partial", "settings", "problem"),
    [
        (GRPOModule, PARTIAL, {"engine": Plain()}, "Plain.generate takes no beginnings .started."),
        (GRPOModule, PARTIAL, {"environment": Environment(Calculator)}, "its environment is not kept"),
        (GRPOModule, PARTIAL, {"dynamic_sampling": DynamicSampling()}, "dynamic_sampling needs whole completions"),
        (OnlineDPOModule, PartialRollouts(4, learn_earlier=False), {}, "OnlineDPOModule learns from whole completions"),
        (DistillModule, PARTIAL, {"teacher": "tiny", "on_policy": 0.5}, "sampling.partial trains in a phase on the pr"),
        (DistillModule, PARTIAL, {"condition": "{prompt} {answer}"}, "neither a row's completion nor a condition"),
    ],
)
def test_what_cannot_be_combined_is_refused(kind, partial, settings, problem):
    with pytest.raises(ValueError, match=problem):
        kind("tiny", reward=ASCII, sampling=Sampling(max_completion_length=LENGTH, partial=partial), **settings)


def test_thinking_budgets_are_refused():
    sampling = Sampling(max_completion_length=200, partial=PARTIAL, thinking=Thinking(budget=4))
    with pytest.raises(ValueError, match="a thinking budget cannot be kept in a completion that goes on"):
        GRPOModule("tiny-chains", ASCII, sampling=sampling, engine=InProcessEngine())


def test_a_run_without_parts_tells_what_it_leaves_out(tmp_path):
    settings = ["--data.prompts_per_phase=8", "--model.sampling.partial.tokens_per_phase=2"]
    resumes.fixed_runs.fit("grpo", tmp_path / "parts", *settings)
    middle = str(tmp_path / "parts/checkpoints/step4.ckpt")
    with pytest.warns(UserWarning, match=r"\d+ completions that the checkpoint carried over .* are left out"):
        resumes.fixed_runs.fit("grpo", tmp_path / "whole", "--data.prompts_per_phase=8", "--ckpt_path", middle)


RESUMED = ["--data.prompts_per_phase=8", "--model.sampling.partial.tokens_per_phase=2"]


def require_parts(folder: Path) -> None:
    """Fail unless every checkpoint of the run in ``folder`` holds completions that go on."""
    for step in range(1, 6):
        saved = torch.load(folder / f"checkpoints/step{step}.ckpt", weights_only=True)["VerifiableDataModule"]
        for rank in saved["phase_loader"]["ranks"]:
            assert any(rollout["seed"] is not None for rollout in rank["carried"])


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_run_goes_on_bit_for_bit(tmp_path, name):
    stops = [resumes.stop_inside_a_validation] if name == "grpo" else []
    resumes.check_resumes(name, tmp_path, *RESUMED, stops=[*resumes.FEW_STOPS, *stops])
    require_parts(tmp_path / "whole")


def test_two_ranks_go_on_bit_for_bit(tmp_path):
    run_ranks(resumes.__file__, str(tmp_path), "grpo", *RESUMED, folder=tmp_path, timeout=300)
    require_parts(tmp_path / "grpo/whole")
