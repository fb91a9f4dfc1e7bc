"""What every on-policy method does around a phase: refuse one without scores, judge answers once, time itself."""

import csv
import time
import warnings

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from test_grpo import QUIET, fit, grpo
from test_ppo import EOS, TOKENIZER, A, B, Scores, Scripted

from datamodules import Addition, VerifiableDataModule
from modules.generation import Validation
from modules.rewards import (
    LearnedReward,
    LengthPenalty,
    NumericMatch,
    RegexFormat,
    Repetition,
    ThinkAnswerFormat,
    WeightedSum,
)
from modules.rewards.verifier import Verifier
from modules.types import Reward

ROWS = [([A, B, EOS], "stop"), ([A, A], "length"), ([B, 200, 201], "length")]


class Counted(Reward):
    """Right where the completion ends by itself."""

    checks_answer = True

    def __init__(self, name: str = "counted") -> None:
        self.name, self.calls = name, 0

    def __call__(self, rollouts):
        self.calls += len(rollouts)
        return [float(rollout.completion.finish == "stop") for rollout in rollouts]


def validate(module, rows: int = 6) -> dict[str, float]:
    data = VerifiableDataModule(module.tokenizer, Addition(8), val=Addition(rows, held_out=True), val_batch_size=4)
    return Trainer(**QUIET).validate(module, data, verbose=False)[0]


@pytest.mark.parametrize("shape", [lambda reward: reward, lambda reward: LengthPenalty(reward, 0.9)])
def test_right_and_wrong_come_from_the_reward_that_compares_answers(shape):
    """Of three sampled completions one is right, and the one greedy completion is; every completion is scored once."""
    counted = Counted()
    reward = shape(WeightedSum([counted, RegexFormat(".*", "form")], [0.1, 3.0]))
    module = grpo(reward=reward, engine=Scripted(ROWS), num_generations=3, validation=Validation(generations=3))
    found = validate(module)
    assert found["val/pass@1"] == pytest.approx(1 / 3) and found["val/pass@3"] == 1.0
    assert counted.calls == 6 * 3 + 6 * len(ROWS)  # the script gives as many greedily
    assert found["val/rewards/counted/mean"] == pytest.approx(1 / 3) and found["val/reward"] != found["val/pass@1"]


def test_an_accuracy_of_its_own_is_called_once_a_completion():
    counted, form = Counted(), Counted("form")
    module = grpo(reward=form, engine=Scripted(ROWS), num_generations=3, validation=Validation(accuracy=counted))
    validate(module)
    assert counted.calls == 2 * 6 * len(ROWS) and form.calls == 6 * len(ROWS)


def count_letters(completions, **columns):
    return [len(text) / 10 for text in completions]


@pytest.mark.parametrize("reward", [WeightedSum([RegexFormat(".*")]), count_letters, ThinkAnswerFormat()])
def test_scores_that_say_nothing_about_right_give_no_accuracy(reward):
    """A sum of forms, a function whose scores are not only 0 and 1, and a form."""
    module = grpo(reward=reward, engine=Scripted(ROWS), num_generations=3)
    with pytest.warns(UserWarning, match="pass@k and greedy_accuracy are left out: a score of "):
        found = validate(module)
    assert "val/reward" in found and not {"val/pass@1", "val/greedy_accuracy"} & set(found)
    assert LearnedReward.checks_answer is False


def test_a_first_phase_whose_golds_cannot_be_read_is_refused(tmp_path):
    module = grpo(reward=NumericMatch(), engine=Scripted(ROWS), num_generations=3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{i}", "answer": "(B)"}}\n' for i in range(8)))
    data = VerifiableDataModule(module.tokenizer, str(rows), prompts_per_phase=8)
    with pytest.raises(ValueError, match=r"numeric_match scored none of the first 24 .* '\(B\)': ExactMatch compares"):
        Trainer(**QUIET, max_epochs=1).fit(module, data)


class Fades(Reward):
    """Scores the first phase and none after."""

    name = "fades"

    def __init__(self) -> None:
        self.phase = 0

    def __call__(self, rollouts):
        self.phase += 1
        return [float(len(rollout.completion.token_ids)) if self.phase == 1 else None for rollout in rollouts]


def test_a_later_phase_without_any_score_is_told():
    module = grpo(reward=Fades(), engine=Scripted(ROWS), num_generations=3)
    data = VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=4)
    with pytest.warns(UserWarning, match="phase 1: fades scored none of its 12 completions") as told:
        Trainer(**QUIET, max_epochs=3).fit(module, data)
    assert any("phase 2: fades" in str(warning.message) for warning in told)
    assert not any("phase 0: fades" in str(warning.message) for warning in told)


def test_a_later_phase_without_any_score_ends_the_run_on_request():
    module = grpo(reward=Fades(), engine=Scripted(ROWS), num_generations=3)
    module.on_unscored = "stop"
    trainer = Trainer(**QUIET, max_epochs=3)
    with pytest.raises(ValueError, match="phase 1: fades scored none of its 12 completions"):
        trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=4))
    assert trainer.global_step == 1


class Scripts(Reward):
    """Gives all completions of a phase one score, or in phases of ``differ`` their lengths."""

    name = "scripts"

    def __init__(self, *differ: int) -> None:
        self.differ = differ

    def __call__(self, rollouts):
        return [float(len(rollout.completion.token_ids) * (self.phase in self.differ)) for rollout in rollouts]


@pytest.mark.parametrize(("differ", "said"), [((0,), [3]), ((2, 5), [])])
def test_phases_with_equal_scores_are_told_once(differ, said):
    module = grpo(reward=Scripts(*differ), engine=Scripted(ROWS), num_generations=3)
    data = VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Trainer(**QUIET, max_epochs=7).fit(module, data)
    texts = [str(warning.message) for warning in told if "one score" in str(warning.message)]
    begins = "phase {}: for 3 phases scripts has given all completions one score, now 0, so nothing is learned from it"
    assert [text.partition(": either")[0] for text in texts] == [begins.format(phase) for phase in said]


BROKEN = """
import time

def judge(text, answer, info):
    if text == info["hangs"]:
        time.sleep(60)
    return len(text) if text != info["fails"] else 1 / 0
"""


def test_causes_of_unscored_completions_are_metrics_of_the_phase_and_of_the_validation(tmp_path):
    """Of three completions a prompt one hangs its verifier and one breaks it: 4 each in a phase, 5 in a validation."""
    (tmp_path / "broken.py").write_text(BROKEN)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in ROWS]

    class Broken(Verifier):
        check = str(tmp_path / "broken.py")

        def describe(self, rollout):
            return {"hangs": texts[0], "fails": texts[1]}

    reward = LengthPenalty(WeightedSum([Broken("broken", timeout=0.3), Repetition()]), 0.1)
    module = grpo(reward=reward, engine=Scripted(ROWS), num_generations=3)
    data = VerifiableDataModule(module.tokenizer, Addition(50), val=Addition(5, held_out=True), prompts_per_phase=4)
    trainer = Trainer(**QUIET | {"logger": CSVLogger(tmp_path, "", "")}, max_epochs=2, num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verifier tells of each cause
        trainer.fit(module, data)
    lines = [{k: v for k, v in line.items() if v} for line in csv.DictReader((tmp_path / "metrics.csv").open())]
    for stage, count in (("train", 4), ("val", 5)):
        found = [line for line in lines if f"{stage}/unscorable" in line]
        assert len(found) == 2  # phases or validations; the second counts its own
        expected = {"timeout": count, "crash": 0, "memory": 0, "error": count}
        for line in found:
            assert {cause: float(line[f"{stage}/unscored/{cause}"]) for cause in expected} == expected
            assert float(line[f"{stage}/unscorable"]) == 2 * count


class SlowValidation(Callback):
    """Makes the validation slow, and takes the time of the micro-batches."""

    inside = 0.0

    def on_validation_start(self, trainer, pl_module):
        time.sleep(0.7)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.inside += time.perf_counter() - self.start


def test_the_training_time_leaves_out_start_up_and_validation():
    module = grpo(reward=Scores(1.0, 0.5, 0.0), engine=Scripted(ROWS), num_generations=3)
    time.sleep(0.7)  # of start-up, before the first phase
    data = VerifiableDataModule(module.tokenizer, Addition(50), val=Addition(4, held_out=True), prompts_per_phase=4)
    clock = SlowValidation()
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[clock], num_sanity_val_steps=0)
    trainer.fit(module, data)
    found = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    seconds = [found[f"time/{part}"] for part in ("sampling", "scoring", "training")]
    assert 0.5 * clock.inside < found["time/training"] < clock.inside + 0.5
    assert found["completions_per_second"] == pytest.approx(12 / sum(seconds), rel=1e-4)


def test_a_phase_of_two_updates_adds_up_its_time():
    module = grpo(reward=Scores(1.0, 0.5, 0.0), engine=Scripted(ROWS), num_generations=3)
    fit(module, accumulate=2, updates=2)
    assert module.record.metrics["time/training"] > 0
