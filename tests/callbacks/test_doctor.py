"""The doctor names the cause of planted faults, says nothing of healthy runs, and changes no run."""

import os
import random
import shlex
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from doctor_cases import HEALTHY, ILL, examine, make
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from programs import Program, run_program, run_ranks

from callbacks import Doctor
from callbacks.measures.examination import find_mark
from callbacks.measures.prognosis import bound_share, expect_distinct, expect_equal, measure_reach, run_sign_test
from datamodules import InstructionDataModule
from modules import PPOModule, SFTModule
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.types import Completion

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ILL)
def test_the_cause_of_a_planted_fault_is_named_first(name: str, tmp_path: Path) -> None:
    cause, build = ILL[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doctor = examine(build(0, tmp_path))
    assert doctor.findings is not None
    assert [finding.cause for finding in doctor.findings] == [cause]
    assert [str(said.message) for said in caught if str(said.message).startswith("doctor: ")] == [
        f"doctor: {finding.words}" for finding in doctor.findings
    ]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_alarmed(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        doctor = examine(HEALTHY[name](0, tmp_path))
    assert doctor.findings == []
    assert [said for said in caught if "doctor" in str(said.message)] == []


def by_chance(completions: list[str], **columns: Any) -> list[float]:
    """Score with all random states that a run has."""
    return [random.random() + numpy.random.random() + torch.rand(()).item() for _ in completions]


@pytest.mark.parametrize("options", [{}, {"method": PPOModule, "data": {"updates_per_phase": 2}}], ids=["GRPO", "PPO"])
def test_a_fit_with_the_doctor_gives_the_same_weights(options: dict[str, Any]) -> None:
    found = []
    for callbacks in ([], [Doctor(num_prompts=4)]):
        seed_everything(3, verbose=False)
        module, rows, trainer = make(3, reward=by_chance, trainer={"max_epochs": 2}, **options)
        trainer.callbacks += callbacks  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=rows)
        found.append({key: weight.clone() for key, weight in module.state_dict().items()})
    plain, examined = found
    assert all(torch.equal(weight, examined[key]) for key, weight in plain.items())
    assert callbacks[0].findings is not None
    start = type(module)("tiny-addition", by_chance).state_dict()
    assert any(not torch.equal(weight, start[key]) for key, weight in plain.items())


def test_a_fault_in_a_fit_is_told_before_its_first_phase() -> None:
    module, rows, trainer = make(0, temperature=0.1, trainer={"max_epochs": 2})
    told: list[list[str]] = []

    class Watch(Doctor):
        def on_train_batch_start(self, *args: Any) -> None:
            told.append([finding.cause for finding in self.findings or ()])

    trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="doctor: At temperature 0.1 the entropy is .* set model.sampling.temperature"):
        trainer.fit(module, datamodule=rows)
    assert told == [["temperature"], ["temperature"]]


SLOW = """
import time

def score(completions, answers, **columns):
    if len(completions) == 16 * 8:  # the doctor's 16 prompts; a phase has 32
        print("examined", flush=True)
        time.sleep(2)
    return [float(text == answer) for text, answer in zip(completions, answers)]
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_doctor_looks_ends_the_run_with_a_command_that_goes_on(
    tmp_path: Path, number: int, status: int
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ["fit", "--config", str(ROOT / "configs/tiny/grpo.yaml"), "--trainer.accelerator=cpu", "--out=runs/one"]
    arguments += ["--model.reward=slow.score", "--data.val=null", "--trainer.max_epochs=2"]
    with Program("-m", "modules", *arguments, folder=tmp_path) as run:
        limit = time.monotonic() + 120
        while "examined" not in run.said()[0] and run.process.is_alive() and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(run.process.pid or 0, number)
        run.process.join(60)
        output, errors = run.said()
    assert run.process.exitcode == status, errors
    assert "doctor: " in errors and "stopped after step 1; " in errors
    (line,) = [line for line in output.splitlines() if line.startswith("go on: ")]
    command = shlex.split(line.removeprefix("go on: "))
    assert command[1:3] == ["-m", "modules"]
    end = run_program(*command[1:], folder=tmp_path)
    assert end.returncode == 0, end.stderr
    assert "examined" not in end.stdout  # a run that goes on is not examined again
    ended = torch.load(tmp_path / "runs/one/checkpoints/last.ckpt", weights_only=True)
    assert ended["global_step"] == 2


def test_two_ranks_find_what_one_rank_finds(tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(ROOT / "configs/tiny/grpo.yaml"), "--trainer.max_epochs=1"]
    arguments += ["--trainer.accelerator=cpu", "--data.train.num_examples=64", "--data.val=null"]
    arguments += ["--model.sampling.temperature=0.1", "--trainer.enable_progress_bar=false"]
    said = []
    for run, devices in ((run_program, 1), (run_ranks, 2)):
        end = run(
            "-m", "modules", *arguments, f"--trainer.devices={devices}", "--out", f"runs/{devices}", folder=tmp_path
        )
        assert end.returncode == 0, end.stderr
        lines = (end.stdout + end.stderr).splitlines()
        said.append([line.split(" in ")[0] for line in lines if "doctor: " in line and " take" not in line])
    assert len(said[0]) == 5 and said[0] == said[1]


def test_other_methods_are_refused() -> None:
    data: LightningDataModule = InstructionDataModule(train="x.jsonl")
    data.setup = lambda stage: None  # type: ignore[method-assign]
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[Doctor()], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="Doctor looks at methods that learn from their own samples.*SFTModule"):
        trainer.fit(SFTModule("tiny"), datamodule=data)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        Doctor(0)


def test_the_arithmetic_by_hand() -> None:
    # Wilson for 0 of n ends at z^2 / (n + z^2) = 3.8415 / 19.8415.
    assert bound_share(0, 16) == pytest.approx((0.0, 0.19361), abs=1e-4)
    assert bound_share(14, 16)[0] > 0.5 > bound_share(11, 16)[0]
    # 7 wins in 7 pairs are 2^-7 = 0.0078, and 6 in 7 are (7 + 1) / 128.
    assert run_sign_test([1] * 7 + [0], [0] * 8) == 1 / 128
    assert run_sign_test([1] * 6 + [0], [0] * 6 + [1]) == 8 / 128
    # Of (1, 1, 1, 0) two are equal in C(3, 2) = 3 of C(4, 2) = 6 draws.
    assert expect_equal([1.0, 1.0, 1.0, 0.0], 2) == 0.5
    assert expect_equal([1.0, 0.0], 2) == 0.0 and expect_equal([None, None], 2) == 1.0
    # 2 of (a, a, b, b): two different ones in 4 of 6 draws, so 1 + 4 / 6.
    assert expect_distinct("aabb", 2) == pytest.approx(10 / 6)
    assert expect_distinct(range(10), 4) == pytest.approx(4)


def test_the_reach_of_a_learning_rate_by_hand() -> None:
    model = Policy("tiny").model
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            torch.nn.init.constant_(module.weight, 0.1)
    # Of 7 matrices a layer 6 have 128 inputs, one 384: the median is sqrt(128) / 0.1, times 4 layers.
    assert measure_reach(model, None) == pytest.approx(4 * 128**0.5 / 0.1, rel=1e-5)
    adapted = Policy("tiny", lora=Lora(r=4, alpha=8)).model
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.constant_(module.base_layer.weight, 0.1)
            torch.nn.init.constant_(module.lora_A["default"].weight, 0.05)
    # scale 2, rank 4: 2 x 4 x 0.05 / 0.1 a layer
    assert measure_reach(adapted, 2.0) == pytest.approx(4 * 2 * 4 * 0.05 / 0.1, rel=1e-5)


def test_marks_that_end_an_answer() -> None:
    special = {5: "<|im_end|>", 6: "<think>", 7: "<|eot_id|>"}
    ids = Completion([9, 6, 5, 9], [0.0] * 4, "4", "length")
    assert find_mark(ids, special, frozenset()) == "<|im_end|>"
    assert find_mark(ids, special, frozenset({5})) is None
    assert find_mark(Completion([9], [0.0], "4</s>5", "length"), special, frozenset()) == "</s>"
    assert (
        find_mark(Completion([9], [0.0], "a < b, <answer>3</answer> <weekend>", "length"), special, frozenset()) is None
    )
