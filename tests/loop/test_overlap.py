"""Sampling beside the training in a real Trainer: the versions of each phase, errors, signals, refusals, resumes."""

import os
import signal
import threading
from typing import Any

import pytest
import resumes
import torch
from copy_engine import CopyEngine
from fixed_runs import same
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from programs import run_ranks
from test_partial_rollouts import ASCII, QUIET, Seen

from datamodules import Addition, MoPPS, VerifiableDataModule
from modules import DistillModule, GRPOModule, OnlineDPOModule, PPOModule
from modules.rollout import Environment, InProcessEngine, PartialRollouts, RolloutEngine, Sampling, WorkerEngine
from modules.rollout.calculator import Calculator
from modules.rollout.phases.dynamic_sampling import DynamicSampling


def fit(
    engine: RolloutEngine | None, kind: type = GRPOModule, phases: int = 3, validates: bool = False, **settings: Any
) -> Seen:
    """Phases of four prompts and two updates, with a validation behind each where ``validates``."""
    seed_everything(0)
    seen = Seen()
    settings = {"reward": ASCII, "num_generations": 4, "optimizer": lambda w: torch.optim.SGD(w, lr=0.1)} | settings
    callbacks, order = settings.pop("callbacks", []), settings.pop("order", None)
    module = kind("tiny-small", sampling=Sampling(max_completion_length=5), engine=engine, **settings)
    rows = {"prompts_per_phase": 4, "updates_per_phase": 2, "order": order}
    val = Addition(4, held_out=True) if validates else None
    data = VerifiableDataModule(module.tokenizer, Addition(40), val=val, **rows)
    quiet = QUIET | {"num_sanity_val_steps": 0, "max_epochs": phases}
    Trainer(**quiet, accelerator="cpu", callbacks=[seen, *callbacks]).fit(module, data)
    return seen


def equal(a: Seen, b: Seen) -> bool:
    return a.rollouts == b.rollouts and same(a.weights, b.weights)


def test_without_staleness_a_copy_is_the_ordinary_run_bit_for_bit():
    assert equal(fit(CopyEngine(), importance=False), fit(None, importance=False))


@pytest.mark.parametrize(("bound", "beta"), [(1, 0.0), (2, 0.01)])
def test_each_phase_has_the_weights_of_the_phase_before_by_the_bound(bound, beta):
    engine = CopyEngine(bound, delay=0.3)  # still busy when the validation begins
    seen = fit(engine, beta=beta, phases=5, validates=True)
    for phase, (rollouts, metrics) in enumerate(zip(seen.rollouts, seen.metrics, strict=True)):
        version = 2 * max(0, phase - bound)  # two updates a phase
        assert {each for rollout in rollouts for each in rollout.completion.token_versions} == {version}
        assert metrics["staleness/mean"] == metrics["staleness/max"] == 2 * phase - version
        assert 0 <= metrics["overlap/time_waited"] <= metrics["time/sampling"]
    own, main = "sampling ahead", threading.current_thread().name
    training = [version for thread, version in engine.calls if thread == own]
    assert training == [0] * (bound + 1) + [2, 4, 6, 8]  # the phases behind the last are for a checkpoint
    validations = [version for thread, version in engine.calls if thread == main]
    assert validations == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]  # sampled and greedy, with the weights of the phase's end
    # The same prompts and seeds as without staleness: in the first phase, where the weights are too, the same samples.
    ordinary = fit(None, beta=beta, phases=5)
    assert seen.rollouts[0] == ordinary.rollouts[0] and seen.rollouts[1] != ordinary.rollouts[1]
    order = [[rollout.uid for rollout in phase] for phase in seen.rollouts]
    assert order == [[rollout.uid for rollout in phase] for phase in ordinary.rollouts]


def test_what_is_sampled_depends_on_no_clock():
    assert equal(fit(CopyEngine(2), phases=4), fit(CopyEngine(2, delay=0.6), phases=4))


def test_the_policy_trains_while_the_next_phase_is_sampled():
    class Slow(Callback):
        """Notes whether the engine samples while a step is made."""

        busy = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.busy += pl_module.engine._busy.locked()

    slow = Slow()
    seen = fit(CopyEngine(1, delay=0.3), callbacks=[slow], phases=2)
    assert slow.busy >= 2 and seen.metrics[0]["overlap/time_waited"] >= 0.3


def test_without_learning_the_completions_are_those_of_the_ordinary_run():
    still = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=0.0)}
    for stale, fresh in zip(fit(CopyEngine(1), **still).rollouts, fit(None, **still).rollouts, strict=True):
        assert [each.completion.token_ids for each in stale] == [each.completion.token_ids for each in fresh]
        assert [each.reward for each in stale] == [each.reward for each in fresh]


def test_the_ratio_starts_from_the_policy_and_the_kl_is_that_of_what_was_drawn():
    seen = fit(CopyEngine(1), beta=0.01, importance=None)
    for rollouts, batches in zip(seen.rollouts[1:], seen.batches[1:], strict=True):
        gap = (batches[0]["old_logprobs"] - batches[0]["sampler_logprobs"]).abs().max()
        assert gap > 1e-3  # of the trainer now and of the sampler then
        batch = batches[0]
        for row in range(len(batch["completion_ids"])):
            size = int(batch["completion_mask"][row].sum())
            ids = batch["completion_ids"][row, :size].tolist()
            logprobs = batch["sampler_logprobs"][row, :size]
            kl = float((logprobs - batch["ref_logprobs"][row, :size]).sum())
            same_ids = [each.kl for each in rollouts if each.completion.token_ids == ids]
            assert any(each == pytest.approx(kl, abs=1e-4) for each in same_ids)


OTHERS = {
    "ppo": (PPOModule, {}),
    "online_dpo": (OnlineDPOModule, {}),
    "distill": (DistillModule, {"teacher": "tiny-addition", "num_generations": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_learn_from_earlier_samples(name):
    kind, settings = OTHERS[name]
    seen = fit(CopyEngine(1), kind, **settings)
    assert [metrics["staleness/max"] for metrics in seen.metrics] == [0, 2, 2]
    assert not same(seen.weights[0], seen.weights[-1])


@pytest.mark.parametrize(("version", "phases"), [(0, 1), (2, 3)])
def test_what_the_sampler_raises_ends_the_run_with_its_sentence(version, phases):
    with pytest.raises(RuntimeError, match="CopyEngine: the sampler is gone"):
        fit(CopyEngine(1, fails_at=version), phases=phases)


def test_an_error_that_nothing_needs_ends_no_run():
    """The phase behind the last is sampled for a checkpoint, and this run writes none."""
    fit(CopyEngine(1, fails_at=2), phases=2)  # version 2 begins phase 1 and samples phase 2


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_the_run_waits_ends_it(tmp_path, signals):
    """The first lets the run finish its step, the second does not."""
    engine = CopyEngine(1, delay=1.0)
    waits = threading.Event()

    class Waits(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            waits.set()

    def send() -> None:
        waits.wait()
        for _ in range(signals):
            threading.Event().wait(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    before = signal.getsignal(signal.SIGINT)
    sender.start()
    try:
        with pytest.raises(SIGTERMException) as stop:
            fit(engine, callbacks=[Waits()])
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 128 + signal.SIGINT


class Shared(InProcessEngine):
    """Samples from the policy itself, and is told to sample ahead."""

    max_staleness = 1


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        (GRPOModule, {"engine": Shared()}, "Shared: max_staleness is 1, and it samples from the policy's own weights"),
        (GRPOModule, {"environment": Environment(Calculator)}, "completions with tools are not sampled ahead"),
        (
            GRPOModule,
            {"dynamic_sampling": DynamicSampling()},
            "dynamic_sampling draws as many prompts as a phase turns",
        ),
        (GRPOModule, {"partial": PartialRollouts(2)}, "CopyEngine samples ahead .max_staleness 1., before it is known"),
        (
            DistillModule,
            {"teacher": "tiny", "on_policy": 0.5},
            "max_staleness of the engine is 1, and only whole phases",
        ),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(kind, settings, problem):
    settings = {"engine": CopyEngine(1), "reward": ASCII} | settings
    sampling = Sampling(max_completion_length=5, partial=settings.pop("partial", None))
    with pytest.raises(ValueError, match=problem):
        kind("tiny", sampling=sampling, **settings)


def test_an_order_that_learns_is_refused():
    with pytest.raises(ValueError, match="data.order MoPPS learns from a phase before it draws the next, and max_stal"):
        fit(CopyEngine(1), order=MoPPS())


def ahead(bound: int) -> list[str]:
    return ["--model.engine=copy_engine.CopyEngine", f"--model.engine.max_staleness={bound}"]


@pytest.mark.parametrize(("name", "bound"), [("grpo", 1), ("ppo", 2)])
def test_a_run_goes_on_bit_for_bit(tmp_path, name, bound):
    stops = [resumes.stop_inside_a_validation] if name == "grpo" else []
    resumes.check_resumes(name, tmp_path, *ahead(bound), stops=[*resumes.FEW_STOPS, *stops])
    for step in range(1, 7):
        saved = torch.load(tmp_path / f"whole/checkpoints/step{step}.ckpt", weights_only=True)["VerifiableDataModule"]
        (rank,) = saved["phase_loader"]["ranks"]
        later = [(each["phase"], each["weights"]) for each in rank["ahead"]]
        phase = (step - 1) // 2
        assert later == [(phase + more, max(0, phase + more - bound)) for more in range(1, bound + 1)]


def test_two_ranks_go_on_bit_for_bit(tmp_path):
    run_ranks(resumes.__file__, str(tmp_path), "grpo", *ahead(1), folder=tmp_path, timeout=300)


def test_a_smaller_bound_samples_anew_what_is_too_old(tmp_path):
    resumes.fixed_runs.fit("grpo", tmp_path / "run", *ahead(2))
    middle = str(tmp_path / "run/checkpoints/step4.ckpt")
    with pytest.warns(UserWarning, match=r"what the checkpoint has of phases \[2, 3\] is older than max_staleness 1"):
        resumes.fixed_runs.fit("grpo", tmp_path / "one", *ahead(1), "--ckpt_path", middle)
    with pytest.warns(UserWarning, match=r"of phases \[2, 3\] is sampled anew, because this engine has no max_stal"):
        resumes.fixed_runs.fit("grpo", tmp_path / "none", *ahead(0), "--ckpt_path", middle)


def test_worker_processes_sample_ahead():
    engine = WorkerEngine(workers=1, max_staleness=1)
    mine, theirs = fit(CopyEngine(1), phases=2), fit(engine, phases=2)
    assert mine.rollouts[0][0].completion.token_ids == theirs.rollouts[0][0].completion.token_ids
    assert [metrics["staleness/max"] for metrics in theirs.metrics] == [0, 2]
