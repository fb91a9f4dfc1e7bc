"""Supervised fine-tuning in a real Trainer: label smoothing, noise, answers to held-out rows and to questions."""

import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import Samples
from datamodules import Addition, InstructionDataModule
from modules import SFTModule
from modules.rewards import ExactMatch
from modules.rollout.last_answers import find_last_answers
from modules.rollout.sampling import Sampling
from modules.sft import count_document_tokens, noisy_embeddings
from modules.types import ALPACA_PROMPT, InstructionBatch

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batch_of(rows: list[list[int]], supervised: list[list[int]], **more) -> InstructionBatch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[index < len(row) for index in range(width)] for row in rows])
    loss = torch.tensor([[index in kept for index in range(width)] for kept in supervised])
    return InstructionBatch(input_ids=ids, attention_mask=mask, loss_mask=loss, denominator=loss.sum().float(), **more)


def fit(module: SFTModule, epochs: int = 1, rows: int = 16, **settings) -> Trainer:
    trainer = Trainer(**(QUIET | {"max_epochs": epochs, "enable_checkpointing": False} | settings))
    data = InstructionDataModule(module.tokenizer, Addition(rows), val=Addition(8, held_out=True), batch_size=8)
    trainer.fit(module, data)
    return trainer


def test_smoothing_is_the_cross_entropy_of_torch():
    seed_everything(0)
    plain = SFTModule("tiny")
    batch = batch_of([[5, 6, 7, 8, 9], [10, 11, 12]], [[2, 3, 4], [2]])
    logits = plain.policy.model(batch["input_ids"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:].masked_fill(~batch["loss_mask"][:, 1:], -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    scores = plain.scores(batch, means=True)
    loss = (-0.9 * scores.logprobs - 0.1 * scores.means).sum() / batch["denominator"]
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert float(-scores.logprobs.sum() / 4) != pytest.approx(float(expected), abs=1e-3)
    assert plain.scores(batch).means is None


def test_smoothing_trains_to_a_flatter_distribution():
    entropies = []
    for smoothing in (0.0, 0.3):
        seed_everything(0)
        module = SFTModule(
            "tiny", label_smoothing=smoothing, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
        )
        entropies.append(float(fit(module, epochs=15).callback_metrics["val/entropy"]))
    assert entropies[1] > entropies[0] + 0.3


def test_noise_is_uniform_in_its_bound_and_gone_afterwards():
    module = SFTModule("tiny")
    batch = batch_of([[5] * 40, [6] * 10], [[1], [1]])
    embed = module.policy.model.get_input_embeddings()
    before = embed(batch["input_ids"])
    width = before.shape[-1]
    with noisy_embeddings(module.policy.model, batch, 5.0, torch.Generator().manual_seed(1)):
        noise = embed(batch["input_ids"]) - before
    with noisy_embeddings(module.policy.model, batch, 5.0, torch.Generator().manual_seed(1)):
        assert torch.equal(embed(batch["input_ids"]) - before, noise)
    for row, length in ((0, 40), (1, 10)):
        bound = 5.0 / math.sqrt(length * width)
        drawn = noise[row, :length]
        assert float(drawn.abs().max()) <= bound * 1.0001 and float(drawn.abs().max()) > 0.98 * bound
        assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert float(noise[1, 10:].abs().max()) == 0  # padding
    assert torch.equal(embed(batch["input_ids"]), before)


def test_noise_knows_the_documents_of_a_packed_row():
    batch = batch_of(
        [[5] * 6, [5] * 3], [[1], [1]], position_ids=torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]])
    )
    assert count_document_tokens(batch).tolist() == [[2, 2, 4, 4, 4, 4], [3, 3, 3, 0, 0, 0]]


def test_noise_changes_training_and_the_same_run_draws_the_same():
    def weights(alpha):
        seed_everything(0)
        module = SFTModule("tiny", neftune_noise_alpha=alpha)
        fit(module)
        return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])

    assert torch.equal(weights(5.0), weights(5.0))
    assert not torch.equal(weights(5.0), weights(None))


def test_the_last_answer_of_a_row_is_asked_for():
    policy = SFTModule("tiny").policy
    tokenizer = policy.tokenizer
    ids = tokenizer("ab c", add_special_tokens=False).input_ids
    batch = batch_of([[1, *ids, 2], [7, 8, 9], [3, 4, 5, 6]], [[2, 5], [], [1, 2, 3]])
    prompts = find_last_answers(batch, policy)
    assert prompts["prompt_ids"] == [[1, *ids]]  # the second row is a filler, the third a text without a prompt
    assert prompts["answer"] == [tokenizer.decode([2], skip_special_tokens=True)]


def test_a_reward_chooses_the_checkpoint_and_samples_are_shown(tmp_path):
    seed_everything(0)
    module = SFTModule(
        "tiny",
        reward=ExactMatch(),
        sampling=Sampling(temperature=0.0, max_completion_length=8),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    keeper = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = fit(
        module,
        epochs=2,
        logger=logger,
        callbacks=[keeper, Samples(num_samples=1)],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    metrics = trainer.callback_metrics
    assert keeper.best_model_path and float(keeper.best_model_score) == max(
        float(metrics["val/reward"]), float(keeper.best_model_score)
    )
    data = InstructionDataModule(module.tokenizer, Addition(16), val=Addition(8, held_out=True), batch_size=8)
    data.setup("validate")
    prompts = [row.ids[: row.supervised.index(True)] for row in data.val_rows]
    module.engine.sync_weights(module.policy, 0)
    answers = [group[0].text for group in module.engine.generate(prompts, 1, module.sampling, [0] * 8)]
    right = sum(
        row.columns["completion"] == answer
        for row, answer in zip(Addition(8, held_out=True).rows(), answers, strict=True)
    )
    assert float(metrics["val/reward"]) == pytest.approx(right / 8)
    assert float(metrics["val/completions/mean_length"]) > 0
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert "val/samples/text_summary" in events.Tags()["tensors"]


def test_without_reward_and_sampling_nothing_is_sampled():
    module = SFTModule("tiny")
    trainer = fit(module)
    assert module.record.held_out is None and "val/reward" not in trainer.callback_metrics
    assert 0 < float(trainer.callback_metrics["train/supervised_fraction"]) < 1


def test_answers_depend_on_the_question_alone():
    seed_everything(0)
    module = SFTModule("tiny")
    fit(module, epochs=2)
    questions = [[{"role": "user", "content": text}] for text in ("12+34=", "1+1=")]
    both = module.respond(questions, 6)
    assert both == [module.respond([question], 6)[0] for question in questions]
    assert module.policy.model.training


def test_an_answer_begins_with_the_thought_that_the_template_opens():
    module = SFTModule("tiny")
    plain = module.respond([[{"role": "user", "content": "1+1="}]], 4)
    module.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    (opened,) = module.respond([[{"role": "user", "content": "1+1="}]], 4)
    assert opened.startswith("<think>\n") and not plain[0].startswith("<think>")


def test_a_base_model_is_asked_in_alpacas_words():
    module = SFTModule("tiny")
    module.tokenizer.chat_template = None
    ids = module.policy.prompt_ids([{"role": "user", "content": "Say hi."}])
    assert ids == list(module.tokenizer(ALPACA_PROMPT.format(instruction="Say hi.")).input_ids)
    with pytest.raises(ValueError, match="no chat template"):
        module.respond([[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]])


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"neftune_noise_alpha": -1.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be in"):
        SFTModule("tiny", **wrong)


def test_a_run_says_what_memory_it_needs(capsys, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch")
    module = SFTModule("tiny")
    fit(module)
    said = capsys.readouterr().out + capsys.readouterr().err + caplog.text
    parameters = sum(parameter.numel() for parameter in module.policy.parameters())
    assert f"weights {parameters * 4 / 1e6:,.0f} MB" in said and "memory: about" in said


def test_noise_and_packing_go_together():
    seed_everything(0)
    module = SFTModule("tiny", neftune_noise_alpha=5.0)
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(
        module, InstructionDataModule(module.tokenizer, Addition(64), packing=True, max_length=64, batch_size=2)
    )
    assert trainer.global_step == 2


def test_packed_held_out_rows_are_asked_one_by_one():
    policy = SFTModule("tiny").policy
    batch = batch_of([[5, 6, 7, 8, 9, 10, 11]], [[2, 5, 6]], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    assert find_last_answers(batch, policy)["prompt_ids"] == [[5, 6], [8, 9]]
