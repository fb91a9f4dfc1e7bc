"""Distillation in a real Trainer: who answers, what the teacher reads, what teaches, the cache, resume and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file

from callbacks import Doctor
from datamodules import Addition, MoPPS, Prioritised, VerifiableDataModule
from modules import DistillModule
from modules.losses import JSD, ForwardKL, ReverseKL
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.rewards import ExactMatch
from modules.rollout import Calculator, Environment, RolloutEngine, Sampling
from modules.types import Completion

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
TEACHER = "tiny-addition"
DEMONSTRATED = "{prompt}{completion}\n{prompt}"


class Batches(Callback):
    """Keeps the micro-batches of the run."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(batch)


def distill(student: str = "tiny-small", lr: float = 1e-3, kind: Any = torch.optim.AdamW, **settings) -> DistillModule:
    seed_everything(0)
    settings = {"sampling": Sampling(max_completion_length=5)} | settings
    if "condition" not in settings:
        settings = {"teacher": TEACHER} | settings
    return DistillModule(student, optimizer=lambda parameters: kind(parameters, lr=lr), **settings)


def fit(module: DistillModule, phases: int = 2, callbacks=(), resume=None, rows: Any = None, **settings) -> Trainer:
    data = {"prompts_per_phase": 8, "updates_per_phase": 2} | settings.pop("data", {})
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(**QUIET, max_epochs=phases, enable_checkpointing=saves, callbacks=list(callbacks), **settings)
    rows = rows or Addition(200)
    val = Addition(16, held_out=True) if isinstance(rows, Addition) else None
    trainer.fit(module, VerifiableDataModule(None, rows, val, **data), ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: DistillModule) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


def teacher_weights(module: DistillModule) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in module.teacher.weights.values()])


def texts(batch: Any, name: str = "completion") -> list[str]:
    """The bytes of each row; a random student's are no text."""
    ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
    return [
        bytes(token - 5 for token in row[keep].tolist() if token >= 5).decode(errors="replace")
        for row, keep in zip(ids, mask, strict=True)
    ]


def teacher_logprobs(text: str, prompt: int) -> torch.Tensor:
    """Log-probs [T, V] of the teacher at the tokens of a text behind its prompt, and at the end token."""
    policy = Policy(TEACHER, dropout=False)
    ids = torch.tensor([policy.tokenizer(text).input_ids])
    with torch.no_grad():
        return policy.model(ids).logits[0, prompt - 1 :].log_softmax(-1)


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), JSD(0.5)], ids=lambda each: type(each).__name__)
def test_the_first_loss_is_that_of_two_whole_models(objective):
    """Off-policy, the rows' sums with their end tokens: the models' own logits, one row at a time."""
    module, batches = distill(objective=objective, on_policy=0.0), Batches()
    losses = []
    module.log_step = lambda metrics, *a, **k: losses.append(float(metrics["loss"].detach()))
    student = Policy("tiny-small", dropout=False)
    with pytest.raises(KeyError, match="tokens"):  # the step's metrics were taken away
        fit(module, callbacks=[batches], data={"prompts_per_phase": 4, "updates_per_phase": 1})
    total, count = 0.0, 0
    for prompt, completion in zip(texts(batches.seen[0], "prompt"), texts(batches.seen[0]), strict=True):
        assert len(completion) == 3 and int(completion[::-1]) == sum(map(int, prompt[:-1].split("+")))
        ids = torch.tensor([student.tokenizer(prompt + completion).input_ids])
        with torch.no_grad():
            mine = student.model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
        total += float(objective(mine, teacher_logprobs(prompt + completion, len(prompt))).sum())
        count += 4  # three digits and the end
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_student_answers_its_share(share):
    module, batches = distill(on_policy=share), Batches()
    fit(module, phases=4, callbacks=[batches], data={"prompts_per_phase": 16})
    sums = [
        completion == f"{sum(map(int, prompt[:-1].split('+'))):03d}"[::-1]
        for batch in batches.seen
        for prompt, completion in zip(texts(batch, "prompt"), texts(batch), strict=True)
    ]
    assert len(sums) == 64
    # The random student never guesses a sum. 32 of 64 have a standard error of 4.
    assert sum(sums) == {0.0: 64, 1.0: 0}.get(share, pytest.approx(32, abs=16))
    assert len(module.record.rollouts) == 16 - sum(sums[-16:])  # those of the last phase that it sampled


@pytest.mark.parametrize(("lr", "learns"), [(3e-3, True), (0.0, False)])
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_the_student_comes_near_to_the_teacher(on_policy, lr, learns):
    module = distill(lr=lr, on_policy=on_policy, objective=ForwardKL())
    data = VerifiableDataModule(
        None, Addition(400), Addition(40, held_out=True), prompts_per_phase=32, updates_per_phase=4
    )
    trainer = Trainer(**QUIET, max_epochs=8, enable_checkpointing=False, check_val_every_n_epoch=8)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    after = float(trainer.callback_metrics["val/loss"])
    assert after < 0.7 * before["val/loss"] if learns else after == pytest.approx(before["val/loss"], rel=0.05)


def test_at_the_teacher_itself_the_loss_is_zero_and_nothing_moves():
    module = distill(TEACHER, kind=torch.optim.SGD, lr=0.1)
    start = weights(module)
    trainer = fit(module)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(weights(module), start, atol=1e-4, rtol=0)  # rounding


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"condition": DEMONSTRATED, "ema": 0.0}, {"first_tokens": 0.5}])
def test_splits_change_nothing(settings):
    found = []
    for accumulate in (1, 4):
        module = distill(kind=torch.optim.SGD, lr=0.1, on_policy=0.5, num_generations=2, **settings)
        fit(module, accumulate_grad_batches=accumulate, limit_val_batches=0)
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert not torch.allclose(found[0], weights(distill(on_policy=0.5, **settings)), atol=1e-4)


def test_a_conditioned_teacher_reads_more_than_the_student():
    """The teacher is the start policy behind the demonstration; the loss is computed here from its own forward."""
    module, batches = distill(TEACHER, lr=0.0, condition=DEMONSTRATED, on_policy=0.0), Batches()
    trainer = fit(module, phases=1, callbacks=[batches], data={"prompts_per_phase": 4, "updates_per_phase": 1})
    (batch,) = batches.seen
    total = 0.0
    read = (texts(batch, name) for name in ("prompt", "teacher_prompt", "completion"))
    for prompt, seen, completion in zip(*read, strict=True):
        assert seen == f"{prompt}{completion}\n{prompt}"
        mine = teacher_logprobs(prompt + completion, len(prompt))
        total += float(ReverseKL()(mine, teacher_logprobs(seen + completion, len(seen))).sum())
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(total / 16, rel=1e-4)
    assert total / 16 > 0.01


def test_the_condition_is_written_into_the_last_user_message(tmp_path):
    rows = tmp_path / "rows.jsonl"
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and {two}?"}]
    rows.write_text(json.dumps({"prompt": asked, "answer": "4", "feedback": "Not {five}."}) + "\n")
    module, batches = distill(TEACHER, condition="{feedback} {prompt}"), Batches()
    fit(module, 1, [batches], rows=str(rows), data={"prompts_per_phase": 1, "updates_per_phase": 1})
    (student,), (teacher,) = (texts(batches.seen[0], name) for name in ("prompt", "teacher_prompt"))
    assert "Two and {two}?" in student and "five" not in student
    assert teacher == student.replace("Two and {two}?", "Not {five}. Two and {two}?")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_own_teacher_follows_by_its_share(share):
    module = distill("tiny", lr=1e-2, condition=DEMONSTRATED, ema=share)
    expected, steps = teacher_weights(module), []

    class Follows(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            steps.append(weights(pl_module))

    fit(module, phases=1, callbacks=[Follows()], limit_val_batches=0)
    assert len(steps) == 2 and not torch.equal(steps[0], steps[1])
    for after in steps:
        expected = share * after + (1 - share) * expected
    torch.testing.assert_close(teacher_weights(module), expected, atol=1e-7, rtol=1e-6)


class Traces(RolloutEngine):
    """Gives a completion with a tool's words, or forced ones, in its middle."""

    def sync_weights(self, policy, version) -> None:
        """Scripted completions need no weights."""

    def generate(self, prompts, num_generations, sampling, seeds, replies=None):
        ids, sampled = [53, 54, 60, 61, 62, 55], [True, True, False, False, False, True]
        return [[Completion(ids, [-1.0 * one for one in sampled], "x", "length", 0, sampled)] for _ in prompts]


@pytest.mark.parametrize(
    ("first", "teach", "read"), [(None, [0, 1, 5], 6), (2, [0, 1], 2), (0.9, [0, 1, 5], 6), (0.3, [0], 1)]
)
def test_words_that_were_not_sampled_carry_no_loss_and_first_tokens_alone_are_computed(first, teach, read):
    module, batches = distill(engine=Traces(), first_tokens=first), Batches()
    fit(module, 1, [batches], limit_val_batches=0, data={"prompts_per_phase": 4, "updates_per_phase": 1})
    (batch,) = batches.seen
    assert all(keep.nonzero()[:, 0].tolist() == teach for keep in batch["completion_mask"])
    assert batch["completion_ids"].shape[1] == read and float(batch["denominator"]) == 4 * len(teach)
    if first is None:  # the tools' words are read all the same
        states = module.policy.token_states(batch)
        assert not torch.equal(
            states, module.policy.token_states({**batch, "completion_ids": batch["completion_ids"] + 1})
        )


@pytest.mark.parametrize("settings", [{"on_policy": 0.5}, {"condition": DEMONSTRATED, "on_policy": 0.5, "top_k": 4}])
def test_resume_is_bitwise(tmp_path, settings):
    whole, every = (
        distill("tiny", **settings),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1),
    )
    fit(whole, phases=3, callbacks=[every])
    for step in (3, 4):  # inside a phase and at its end
        resumed = distill("tiny", **settings)
        fit(resumed, phases=3, resume=tmp_path / f"step={step}.ckpt", callbacks=[ModelCheckpoint(tmp_path / "again")])
        assert torch.equal(weights(resumed), weights(whole))
        assert torch.equal(teacher_weights(resumed), teacher_weights(whole))


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A folder with the teacher's export."""
    Policy(TEACHER).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


OFF = {"on_policy": 0.0, "top_k": 6, "objective": ForwardKL()}


def test_the_cache_gives_the_same_run_without_a_teacher(tmp_path, teacher):
    live = distill(teacher=str(teacher), **OFF)
    trainer = fit(live)
    folder = tmp_path / "cache"
    first = distill(teacher=str(teacher), teacher_cache=str(folder), **OFF)
    fit(first)
    assert first.teacher is None
    torch.testing.assert_close(weights(first), weights(live), atol=1e-5, rtol=0)
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(files) == 4  # 216 lessons, 64 to a file
    lost = next(iter(files))
    content = load_file(lost)
    lost.unlink()
    fit(distill(teacher=str(teacher), teacher_cache=str(folder), **OFF))  # goes on where it was
    assert all(torch.equal(value, content[name]) for name, value in load_file(lost).items())
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir() if file != lost} == {
        file: time for file, time in files.items() if file != lost
    }
    teacher.rename(tmp_path / "gone")
    alone = distill(teacher=str(teacher), teacher_cache=str(folder), **OFF)
    again = fit(alone)
    assert torch.equal(weights(alone), weights(first))
    assert float(again.callback_metrics["val/loss"]) == pytest.approx(
        float(trainer.callback_metrics["val/loss"]), rel=1e-4
    )


def test_the_cache_of_a_teacher_that_was_trained_further_is_refused(tmp_path, teacher):
    settings = {"teacher": str(teacher), "teacher_cache": str(tmp_path / "cache")} | OFF
    fit(distill(**settings), phases=1)
    further = Policy(str(teacher))
    with torch.no_grad():
        for parameter in further.parameters():
            parameter.mul_(1.001)
    further.save_pretrained(teacher)
    with pytest.raises(ValueError, match="before its weights changed; remove the folder"):
        fit(distill(**settings), phases=1)


def test_adapters_have_the_own_start_as_their_teacher():
    module = distill(TEACHER, condition=DEMONSTRATED, ema=0.0, lora=Lora(r=2, alpha=4.0, dropout=0.0), lr=1e-2)
    kept = teacher_weights(module)
    trainer = fit(module)
    assert torch.equal(teacher_weights(module), kept) and float(trainer.callback_metrics["train/loss"]) > 0.01


def test_a_reward_and_no_reward():
    module = distill(TEACHER, reward=ExactMatch(), num_generations=2)
    found = fit(module).callback_metrics
    assert 0 < float(found["train/reward"]) <= 1 and "val/greedy_accuracy" in found and "val/reward" in found
    without = fit(distill(TEACHER)).callback_metrics
    assert not [name for name in without if "reward" in name or "pass@" in name or "unscorable" in name]
    assert {"train/completions/mean_length", "val/completions/mean_length", "val/loss"} <= set(without)


@pytest.mark.parametrize("order", [Prioritised, MoPPS])
def test_an_order_that_learns_needs_sampled_answers(order):
    with pytest.raises(
        ValueError, match=f"data.order {order.__name__} learns from .* with model.on_policy 0 it samples"
    ):
        fit(distill(on_policy=0.0, reward=ExactMatch()), data={"order": order()})
    learns = order()  # every row starts alike
    fit(distill(TEACHER, on_policy=0.5, reward=ExactMatch(), lr=0.0), data={"order": learns})
    assert all(table.unique().numel() > 1 for table in learns.tables().values())


def test_the_doctor_asks_for_a_reward():
    with pytest.raises(
        ValueError, match="Doctor looks at what a reward teaches, and model.reward of DistillModule is null"
    ):
        fit(distill(), callbacks=[Doctor()])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"teacher": None}, "teacher is null and so is condition.*name a teacher, or a condition"),
    ({"condition": "{prompt}"}, r"condition is '{prompt}': it needs {prompt}.* and the name of a column"),
    ({"condition": "{answer}"}, "it needs {prompt}, where the question goes"),
    ({"ema": 0.1}, "ema moves a teacher that is the policy itself, and teacher is 'tiny-addition'"),
    ({"condition": DEMONSTRATED, "teacher": None, "lora": Lora(r=2)}, "averaged adapters .* set ema to 0 or 1"),
    ({"environment": Environment(Calculator), "on_policy": 0.5}, "environment opens each prompt anew"),
    ({"teacher_cache": "cache", "top_k": 4}, "teacher_cache keeps .*on_policy to 0"),
    ({"teacher_cache": "cache", "on_policy": 0.0}, "teacher_cache keeps .*set teacher, top_k"),
    ({"top_k": 261}, "top_k must be >= 1 and <= 260, got 261"),
    ({"on_policy": 1.5}, "on_policy"),
    ({"first_tokens": 2.5}, "first_tokens is 2.5: give a share below 1, or a whole number"),
    ({"lora": Lora(r=2, target_modules=("q_proj", "lm_head"))}, "names the output head"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[re.sub(r"\W+", " ", words)[:30] for _, words in REFUSED])
def test_what_contradicts_itself_is_refused(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        distill(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("late", [False, True])
def test_a_teacher_with_other_tokens_is_refused_before_the_first_step(tmp_path, teacher, late):
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"teacher_cache": str(tmp_path / "cache")} | OFF if late else {}
    with pytest.raises(ValueError, match="^teacher: the tokens of .* name a model with the same tokenizer$"):
        fit(distill(teacher=str(teacher), **settings))


def test_padding_of_a_vocabulary_is_no_token(tmp_path, teacher):
    """A teacher whose vocabulary is padded, with rows that would win every softmax, teaches the same."""
    padded = Policy(TEACHER)
    padded.model.resize_token_embeddings(300)
    with torch.no_grad():
        padded.model.get_input_embeddings().weight[261:] = 5.0
    padded.save_pretrained(tmp_path / "padded")
    found = []
    for path in (teacher, tmp_path / "padded"):
        module = distill(teacher=str(path), on_policy=0.0, kind=torch.optim.SGD, lr=0.1)
        trainer = fit(module)
        found.append((weights(module), float(trainer.callback_metrics["val/loss"])))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


ROWS = [
    ({"prompt": "1+1=", "answer": "2"}, {"on_policy": 0.0}, "names the column 'completion', which holds no text"),
    ({"prompt": "1+1=", "answer": "2"}, {"condition": "{prompt}{hint}"}, "names {hint}, and the row has no text there"),
    (
        {"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "hint": "2"},
        {"condition": "{prompt}{hint}"},
        "last message, which must be the user's",
    ),
]


@pytest.mark.parametrize(("row", "settings", "words"), ROWS)
def test_rows_without_what_is_read_are_refused_with_their_place(tmp_path, row, settings, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=words) as error:
        fit(distill(**settings), rows=str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl:1" in str(error.value)
