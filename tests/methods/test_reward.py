"""The reward model: its loss by hand, scores that do not depend on padding or batch, exact steps, and an export that
scores the same.
"""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from programs import run_ranks
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from callbacks import Export
from callbacks.writers.prediction_writer import write_line
from datamodules.preference import PreferenceDataModule
from modules.losses.preference import Pairs, find_pairs
from modules.networks.lora import Lora
from modules.networks.tiny import tiny_tokenizer
from modules.reward import RewardModule, measure_moments
from modules.rewards.learned import LearnedReward
from modules.types import Completion, Rollout

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
WORDS = ["red", "green", "blue", "seven", "a longer answer", "no", "maybe so", "yes"]


def write_rows(folder: Path, name: str, count: int, margin: bool = False) -> str:
    """Write pairs, and in every third row a ranked list of three, with prompts and answers of many lengths."""
    rows = []
    for i in range(count):
        answers = [f"{WORDS[(i + 3 * k) % 8]} {i * (k + 1)}" for k in range(3 if i % 3 == 2 else 2)]
        row = {"prompt": "Q" * (i % 5 + 1) + f"{i}?", "completions": answers} | ({"margin": 0.1 * i} if margin else {})
        rows.append(json.dumps(row))
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return str(file)


def reward_module(policy: str = "tiny", lr: float = 0.1, **settings) -> RewardModule:
    torch.manual_seed(3)
    return RewardModule(policy, **({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr)} | settings))


def ragged_batch(tokenizer: PreTrainedTokenizerFast | None = None) -> dict[str, Tensor]:
    """Make two prompts with three and two ranked completions; each completion ends in eos."""
    tokenizer = tokenizer or tiny_tokenizer()
    prompts, groups = ["ab", "abcdef"], [["x", "yyyy", "zz"], ["long answer", "n"]]
    encoded = [torch.tensor(tokenizer(text).input_ids) for text in prompts]
    completions = [
        torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for group in groups for text in group
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "prompt_ids": pad(encoded, batch_first=True),
        "prompt_mask": pad([torch.ones(len(row), dtype=torch.bool) for row in encoded], batch_first=True),
        "completion_ids": pad(completions, batch_first=True),
        "completion_mask": pad([torch.ones(len(row), dtype=torch.bool) for row in completions], batch_first=True),
        "prompt_index": torch.tensor([0, 0, 0, 1, 1]),
        "rank": torch.tensor([0, 1, 2, 1, 0]),
        "row": torch.arange(5),
        "denominator": torch.tensor(2.0),
        "margin": torch.tensor([0.5, 0.0]),
    }


def one_example(scores: list[float], margin: float | None = None) -> tuple[Tensor, Pairs]:
    batch = {"prompt_index": torch.zeros(len(scores), dtype=torch.long), "rank": torch.arange(len(scores))}
    if margin is not None:
        batch["margin"] = torch.tensor([margin])
    return torch.tensor(scores)[:, None], find_pairs(batch)


@pytest.mark.parametrize(
    ("scores", "margin", "centering", "loss"),
    [
        ([1.0, 0.0], None, 0.0, 0.313262),  # log(1 + e^-1)
        ([4.0, 4.0], None, 0.0, 0.693147),  # log 2
        ([1.0, 0.0], 1 / 3, 0.0, 0.414370),  # log(1 + e^(1/3 - 1))
        ([2.0, 1.0, 0.0], None, 0.0, 0.251150),  # (0.313262 + 0.126928 + 0.313262) / 3
        ([7.0, 6.0, 5.0], None, 0.0, 0.251150),  # a constant changes nothing
        ([2.0, 1.0], None, 0.01, 0.403262),  # 0.313262 + 0.01 x 3^2
    ],
)
def test_loss_of_one_example(scores, margin, centering, loss):
    sums = reward_module(centering=centering).sums(*one_example(scores, margin))
    assert sums["loss"].item() == pytest.approx(loss, abs=1e-6)


def test_metrics_of_two_examples_and_two_heads():
    # example 1, mean scores 3, 1, 2 in rank order: leads 2 (right), 1 (right), -1 (wrong), each 1/3; example 2, means 5
    # and 5: a tie is not right
    batch = {"prompt_index": torch.tensor([0, 0, 0, 1, 1]), "rank": torch.tensor([0, 1, 2, 0, 1])}
    scores = torch.tensor([[2.0, 4.0], [1.0, 1.0], [2.0, 2.0], [5.0, 5.0], [6.0, 4.0]])
    sums = reward_module(num_heads=2).sums(scores, find_pairs(batch))
    softplus = torch.nn.functional.softplus
    first = softplus(-torch.tensor([1.0, 0.0, -1.0])).mean()  # leads of head 1: 2-1, 2-2, 1-2
    second = softplus(-torch.tensor([3.0, 2.0, -1.0])).mean()  # of head 2: 4-1, 4-2, 1-2
    other = softplus(-torch.tensor([-1.0, 1.0])).mean()  # 5-6 and 5-4
    assert sums["loss"].item() == pytest.approx(float((first + second) / 2 + other), abs=1e-6)
    expected = {
        "accuracy": 2 / 3,
        "margin": 2 / 3,
        "mean_reward": 2 + 5,
        "rewards/chosen": (3 + 3 + 1) / 3 + 5,
        "rewards/rejected": (1 + 2 + 2) / 3 + 5,
    }
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, abs=1e-6), name
    of_mean_scores = softplus(-torch.tensor([2.0, 1.0, -1.0])).mean() + softplus(torch.tensor(0.0))
    assert sums["loss"].item() != pytest.approx(float(of_mean_scores), abs=1e-3)


def test_margins_may_stay_out_of_the_loss():
    scores, pairs = one_example([1.0, 0.0], margin=1 / 3)
    assert reward_module(use_margins=False).sums(scores, pairs)["loss"].item() == pytest.approx(
        0.313262, abs=1e-6
    )  # log(1 + e^-1)
    assert reward_module().sums(scores, pairs)["loss"].item() == pytest.approx(0.414370, abs=1e-6)
    assert (
        reward_module(use_margins=False).score_pairs(ragged_batch())[0].margin == 0.5
    )  # the audit still tells them apart


def test_scores_know_nothing_of_padding_company_and_sharing():
    module, batch = reward_module(num_heads=2), ragged_batch()
    with torch.no_grad():
        together = module.head_scores(batch)
        wider = {
            **batch,
            **{
                name: torch.nn.functional.pad(batch[name], (0, 7), value=9) for name in ("prompt_ids", "completion_ids")
            },
            **{
                name: torch.nn.functional.pad(batch[name], (0, 7), value=False)
                for name in ("prompt_mask", "completion_mask")
            },
        }
        separate = {**batch, "prompt_index": torch.arange(5)}
        separate |= {name: batch[name][batch["prompt_index"]] for name in ("prompt_ids", "prompt_mask")}
        for other in (wider, separate):
            torch.testing.assert_close(module.head_scores(other), together, atol=1e-5, rtol=1e-5)
        for i in range(5):
            p = batch["prompt_index"][i]
            row = torch.cat(
                [
                    batch["prompt_ids"][p][batch["prompt_mask"][p]],
                    batch["completion_ids"][i][batch["completion_mask"][i]],
                ]
            )[None]
            hidden = module.policy.model.base_model(input_ids=row).last_hidden_state[0]
            torch.testing.assert_close(hidden[-1] @ module.head.weight.T, together[i], atol=1e-5, rtol=1e-5)
            assert (
                hidden[-2] @ module.head.weight.T - together[i]
            ).abs().max() > 1e-3  # the token before the end token


def test_pairs_are_described():
    module, batch = reward_module(), ragged_batch()
    scores = module.head_scores(batch)[:, 0].tolist()
    pairs = module.score_pairs(batch)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("x", "yyyy"),
        ("x", "zz"),
        ("yyyy", "zz"),
        ("n", "long answer"),
    ]
    last = pairs[-1]
    assert (last.prompt, last.prompt_length, last.chosen_length, last.rejected_length, last.margin) == (
        "abcdef",
        6,
        2,
        12,
        0.0,
    )
    assert (last.chosen_score, last.rejected_score) == pytest.approx((scores[4], scores[3]))
    assert pairs[0].margin == 0.5
    filler = {**batch, "rank": torch.full((5,), -1)}
    assert module.score_pairs(filler) == []
    sums = module.sums(module.head_scores(filler), find_pairs(filler))
    assert sums["loss"].item() == 0
    sums["loss"].backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def fitted(
    folder: Path,
    module: RewardModule,
    batch_size: int = 12,
    accumulate: int = 1,
    callbacks=(),
    val: int = 0,
    resume=None,
    calibration=None,
    **settings,
) -> Trainer:
    """Fit on pairs and triples with margins, 12 examples a step."""
    held_out = write_rows(folder, "val", val) if val else None
    train = write_rows(folder, "train", 30, margin=True)
    data = PreferenceDataModule(module.tokenizer, train, held_out, calibration, batch_size=batch_size, chat=False)
    options = (
        QUIET
        | {
            "max_epochs": 1,
            "accumulate_grad_batches": accumulate,
            "callbacks": list(callbacks),
            "num_sanity_val_steps": 0,
        }
        | settings
    )
    trainer = Trainer(**options)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: RewardModule) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def test_accumulation_changes_no_result(tmp_path):
    whole, cut = reward_module(centering=0.01), reward_module(centering=0.01)
    metrics = [fitted(tmp_path, module, size, n).callback_metrics for module, size, n in ((whole, 12, 1), (cut, 3, 4))]
    for mine, theirs, start in zip(weights(whole), weights(cut), weights(reward_module()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        assert not torch.equal(mine, start)
    for name in (
        "loss",
        "accuracy",
        "margin",
        "mean_reward",
        "min_reward",
        "max_reward",
        "rewards/chosen",
        "rewards/rejected",
        "num_tokens",
    ):
        assert metrics[0][f"train/{name}"].item() == pytest.approx(metrics[1][f"train/{name}"].item(), abs=1e-5), name


SCRIPT = """
import sys
from pathlib import Path
import torch
from test_reward import fitted, reward_module
from callbacks import Export
if __name__ == "__main__":
    folder = Path(sys.argv[1]) / sys.argv[2]
    folder.mkdir(exist_ok=True)
    module = reward_module(num_heads=2)
    trainer = fitted(folder, module, 5, callbacks=[Export(str(folder / "model"))], val=3, devices=2, strategy="ddp", max_epochs=1)
    if trainer.is_global_zero:
        torch.save([module.state_dict(), dict(trainer.callback_metrics)], folder / "end.pt")
"""


def test_two_ranks_equal_one(tmp_path):
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    (tmp_path / "two").mkdir()
    run_ranks("two_ranks.py", ".", "two", folder=tmp_path, path=[Path(__file__).parent])
    state, metrics = torch.load(tmp_path / "two" / "end.pt", weights_only=True)
    module = reward_module(num_heads=2)
    alone = fitted(tmp_path, module, 10, callbacks=[Export(str(tmp_path / "model"))], val=3).callback_metrics
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-5)
    shown = ("loss", "accuracy", "mean_reward", "min_reward", "max_reward")
    for name in (
        "train/num_tokens",
        "val/margin",
        *(f"{stage}/{name}" for stage in ("train", "val") for name in shown),
    ):
        assert metrics[name].item() == pytest.approx(alone[name].item(), abs=1e-5), name
    mine, theirs = (
        json.loads((folder / "model" / "config.json").read_text()) for folder in (tmp_path, tmp_path / "two")
    )
    for name in ("reward_mean", "reward_std", "reward_head_means", "reward_head_stds"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_validation_is_the_mean_over_examples(tmp_path):
    module = reward_module()
    data = PreferenceDataModule(
        module.tokenizer, write_rows(tmp_path, "train", 7), write_rows(tmp_path, "val", 7), batch_size=3
    )
    (found,) = Trainer(**QUIET).validate(module, data, verbose=False)
    examples: dict[str, list[float]] = {}
    for batch in data.in_order("val"):
        for pair in module.score_pairs(batch):
            examples.setdefault(pair.prompt, []).append(
                torch.nn.functional.softplus(torch.tensor(pair.rejected_score - pair.chosen_score)).item()
            )
    assert [len(losses) for losses in examples.values()].count(3) == 2
    mean = sum(sum(losses) / len(losses) for losses in examples.values()) / len(examples)
    assert found["val/loss"] == pytest.approx(mean, abs=1e-5)
    every = [loss for losses in examples.values() for loss in losses]
    assert found["val/loss"] != pytest.approx(sum(every) / len(every), abs=1e-5)
    assert len(module.record.pairs) > 0
    raw = torch.cat([module.head_scores(batch) for batch in data.in_order("val")])
    assert (found["val/min_reward"], found["val/max_reward"]) == pytest.approx(
        (raw.min().item(), raw.max().item()), abs=1e-6
    )


class Keep(Callback):
    """Keeps the raw scores of every micro-batch."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.scores.append(pl_module.head_scores(batch).detach())


def test_the_range_of_a_step_is_that_of_all_its_completions(tmp_path):
    keep = Keep()
    metrics = fitted(tmp_path, reward_module(lr=0.0), 4, 3, [keep]).callback_metrics
    found = [metrics[f"train/{name}_reward"].item() for name in ("min", "max")]
    last = torch.cat(keep.scores[6:])  # 30 examples in steps of 12: the third step has 6, in micro-batches of 4 and 2
    assert found == pytest.approx([last.min().item(), last.max().item()], abs=1e-6)
    for other in (torch.cat(keep.scores), keep.scores[-1]):  # not of the epoch, nor of the last micro-batch
        assert found != pytest.approx([other.min().item(), other.max().item()], abs=1e-3)


def test_resume_is_bitwise(tmp_path):
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = reward_module()
    fitted(tmp_path, straight, 4, 3, [every_step], enable_checkpointing=True, max_epochs=2)
    for step in (2, 3, 4):  # inside an epoch, at its end, inside the next
        checkpoint = tmp_path / f"step={step}.ckpt"
        torch.manual_seed(99)
        resumed = RewardModule("tiny", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        fitted(tmp_path, resumed, 4, 3, resume=checkpoint, max_epochs=2)
        middle = torch.load(checkpoint, weights_only=True)["state_dict"]
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)
            assert not torch.equal(value, middle[name]), name
    with pytest.raises(ValueError, match="num_heads 1 there, 2 here"):
        fitted(tmp_path, reward_module(num_heads=2), 4, 3, resume=checkpoint)


def bytes_tokenizer(special: list[str], **roles) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte after the special ones."""
    vocabulary = {token: i for i, token in enumerate((*special, *bytes_to_unicode().values()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def make_policy(name: str, folder: Path) -> str:
    """Write a model folder whose pad token is its eos token, as with GPT-2 and some fine-tuned Qwen models."""
    torch.manual_seed(1)
    if name == "tiny":
        return "tiny"
    end, chat = "<|endoftext|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if name == "gpt2":
        tokenizer = bytes_tokenizer([end], bos_token=end, eos_token=end, unk_token=end, pad_token=end)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        )
    else:
        tokenizer = bytes_tokenizer(chat, eos_token=chat[2], pad_token=chat[2], extra_special_tokens=chat)
        small = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        model = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=272, tie_word_embeddings=False, eos_token_id=[0, 2], pad_token_id=2, **small)
        )
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def sided(rows: list[list[int]], pad: int, side: str) -> dict[str, Tensor]:
    """Return padded rows with their mask, and positions that count from each row's first token."""
    width = max(map(len, rows))
    spare = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor(
        [row + extra if side == "right" else extra + row for row, extra in zip(rows, spare, strict=True)]
    )
    kept = torch.tensor(
        [
            [1] * len(row) + [0] * len(extra) if side == "right" else [0] * len(extra) + [1] * len(row)
            for row, extra in zip(rows, spare, strict=True)
        ]
    )
    return {"input_ids": ids, "attention_mask": kept, "position_ids": (kept.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", ["tiny", "gpt2", "qwen2"])
@pytest.mark.parametrize("lora", [None, Lora(r=2, target_modules=("c_attn", "q_proj"))], ids=["full", "lora"])
def test_an_export_scores_the_same_in_transformers(tmp_path, name, lora):
    module = reward_module(make_policy(name, tmp_path), lora=lora, lr=1.0)
    fitted(tmp_path, module, callbacks=[Export(str(tmp_path / "out"))], val=5)
    batch = ragged_batch(module.tokenizer)
    with torch.no_grad():
        expected = module.head_scores(batch)[:, 0]
    assert len(set(expected.tolist())) == 5
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id not in module.policy.stop_token_ids
    prompts = [ids[mask].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    rows = [
        prompts[p] + ids[mask].tolist()
        for p, ids, mask in zip(
            batch["prompt_index"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True
        )
    ]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    with torch.no_grad():
        for side in ("right", "left"):
            scores = model(**sided(rows, tokenizer.pad_token_id, side)).logits[:, 0]
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
        texts = tokenizer(["abx", "abyyyy"], padding=True, return_tensors="pt")  # as a user would: without an end token
        model(**{key: value for key, value in texts.items() if key != "token_type_ids"})
        model.config.pad_token_id = tokenizer.eos_token_id  # the trap: the token before eos is pooled
        trapped = model(**sided(rows, tokenizer.eos_token_id, "right")).logits[:, 0]
    assert (trapped - expected).abs().max() > 1e-4


def rollouts_of(module: RewardModule, data: PreferenceDataModule) -> list[Rollout]:
    """Return the held-out completions as if they had been sampled."""
    found = []
    for batch in data.in_order("val"):
        for i, p in enumerate(batch["prompt_index"].tolist()):
            prompt = batch["prompt_ids"][p][batch["prompt_mask"][p]].tolist()
            ids = batch["completion_ids"][i][batch["completion_mask"][i]].tolist()
            text = module.tokenizer.decode(ids, skip_special_tokens=True)
            found.append(
                Rollout(
                    "u",
                    module.tokenizer.decode(prompt),
                    prompt,
                    None,
                    Completion(ids, [0.0] * len(ids), text, "stop"),
                    p,
                    {},
                    None,
                )
            )
    return found


@pytest.mark.parametrize("num_heads", [1, 3])
def test_exported_scores_are_normalised_on_held_out_completions(tmp_path, num_heads):
    module = reward_module(num_heads=num_heads)
    trainer = fitted(tmp_path, module, callbacks=[Export(str(tmp_path / "out"), every_n_epochs=1)], val=20)
    rollouts = rollouts_of(module, trainer.datamodule)
    assert len(rollouts) == 14 * 2 + 6 * 3
    reward = LearnedReward(str(tmp_path / "out"))
    members = reward.members(rollouts)
    assert members.shape == (46, num_heads)
    torch.testing.assert_close(members.mean(0), torch.zeros(num_heads, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        members.std(0, correction=0), torch.ones(num_heads, dtype=torch.float64), atol=1e-5, rtol=0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert abs(config["reward_mean"]) > 1e-3
    assert (tmp_path / "out" / "reward_heads.safetensors").exists() == (num_heads > 1)
    # the one label is the mean of the heads
    raw = torch.cat([module.head_scores(batch) for batch in trainer.datamodule.in_order("val")]).mean(1)
    assert config["reward_mean"] == pytest.approx(raw.mean().item(), abs=1e-5)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_an_export_of_adapters_scores_the_same_on_a_policys_backbone(tmp_path, num_heads):
    """The module, its export, and the export beside the other adapters of a policy give the same scores."""
    module = reward_module(num_heads=num_heads, lora=Lora(r=2))
    trainer = fitted(tmp_path, module, callbacks=[Export(str(tmp_path / "out"))], val=5)
    rollouts = rollouts_of(module, trainer.datamodule)
    with torch.no_grad():
        raw = torch.cat([module.head_scores(batch) for batch in trainer.datamodule.in_order("val")]).double()
    shared, merged = LearnedReward(str(tmp_path / "out")), LearnedReward(str(tmp_path / "out"))
    policy = RewardModule("tiny", lora=Lora(r=3)).policy
    assert shared.share_backbone(policy) == [str(tmp_path / "out")]
    mean, std = module.moments[
        1:
    ].T  # scores spread by 0.01 around 9 here, so normalised they have lost two of seven digits
    found = shared.members(rollouts) * std + mean
    torch.testing.assert_close(found, merged.members(rollouts) * std + mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, raw, atol=1e-5, rtol=0)
    assert float(found.std(0).min()) > 0.01
    names = {file.name for file in (tmp_path / "out" / "adapters").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"}


SAMPLES = [
    ("ab", "yes", "stop"),
    ("ab", "no way", "stop"),
    ("cdefg", "maybe, but I do", "length"),
    ("cdefg", "", "stop"),
    ("h", "x", "stop"),
]


def sampled(tokenizer, chat: bool) -> list[Rollout]:
    """Make completions as a policy samples them; the third is cut off by the budget, the fourth is an end token."""
    found = []
    for i, (text, answer, finish) in enumerate(SAMPLES):
        prompt = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            if chat
            else text
        )
        end = (
            [tokenizer.convert_tokens_to_ids("<|im_end|>") if chat else tokenizer.eos_token_id]
            if finish == "stop"
            else []
        )
        ids = [*tokenizer(answer).input_ids, *end]
        found.append(
            Rollout(
                f"u{i}",
                prompt,
                tokenizer(prompt).input_ids,
                None,
                Completion(ids, [0.0] * len(ids), answer, finish),
                i,
                {},
                0.5,
            )
        )
    return found


@pytest.mark.parametrize(("num_heads", "chat"), [(1, False), (1, True), (3, False)])
def test_scores_are_normalised_on_samples_that_are_named(tmp_path, num_heads, chat):
    """Scores have mean 0 and standard deviation 1 on the lines that ``predict`` wrote, and on no other set."""
    module = reward_module(num_heads=num_heads)
    rollouts = sampled(module.tokenizer, chat)
    (tmp_path / "predictions.jsonl").write_text("".join(write_line(rollout) for rollout in rollouts))
    trainer = fitted(
        tmp_path,
        module,
        2,
        callbacks=[Export(str(tmp_path / "out"))],
        val=20,
        calibration=str(tmp_path / "predictions.jsonl"),
    )
    reward, kept = LearnedReward(str(tmp_path / "out")), [rollout for rollout in rollouts if rollout.completion.text]
    members = reward.members(kept)
    assert members.shape == (4, num_heads)
    torch.testing.assert_close(members.mean(0), torch.zeros(num_heads, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        members.std(0, correction=0), torch.ones(num_heads, dtype=torch.float64), atol=1e-5, rtol=0
    )
    held_out = reward.members(rollouts_of(module, trainer.datamodule))
    assert ((held_out.std(0, correction=0) - 1).abs() > 0.05).all()


def test_an_unnormalised_export_forgets_the_numbers_of_its_start(tmp_path):
    fitted(tmp_path, reward_module(), callbacks=[Export(str(tmp_path / "first"))])
    assert "reward_mean" in json.loads((tmp_path / "first" / "config.json").read_text())  # of training rows
    assert not (tmp_path / "first" / "adapters").exists()
    again = reward_module(str(tmp_path / "first"), normalize=False)
    fitted(tmp_path, again, callbacks=[Export(str(tmp_path / "second"))])
    assert "reward_mean" not in json.loads((tmp_path / "second" / "config.json").read_text())


def test_moments_by_hand():
    # mean over heads: 2, 4 -> 3 and 1; head 1: 1, 1 -> 1 and, having no spread, 1; head 2: 3, 7 -> 5 and 2
    assert measure_moments(torch.tensor([[1.0, 3.0], [1.0, 7.0]])).tolist() == [[3.0, 1.0], [1.0, 1.0], [5.0, 2.0]]


def test_lora_trains_adapters_and_head_alone():
    module = reward_module(lora=Lora(r=2))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert "head.weight" in trained
    assert all("lora_" in name for name in trained - {"head.weight"})


def test_an_output_head_of_its_own_is_not_trained(tmp_path):
    module = reward_module(make_policy("qwen2", tmp_path))
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == [
        "policy.model.lm_head.weight"
    ]


class Plain(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([ragged_batch()], batch_size=None)


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="normalised on the DataModule's rows"):
        Trainer(max_steps=1, **QUIET).fit(reward_module(), Plain())
    Trainer(max_steps=1, **QUIET).fit(reward_module(normalize=False), Plain())
    (tmp_path / "labels.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    module = reward_module()
    with pytest.raises(ValueError, match="one labelled completion each"):
        Trainer(max_steps=1, **QUIET).fit(
            module, PreferenceDataModule(module.tokenizer, str(tmp_path / "labels.jsonl"))
        )
    for settings, sentence in (
        ({"centering": -1.0}, "centering must be >= 0"),
        ({"num_heads": 2, "normalize": False}, "needs normalize: true"),
    ):
        with pytest.raises(ValueError, match=sentence):
            reward_module(**settings)


def test_an_architecture_that_cannot_be_exported_is_refused(tmp_path):
    CodeGenForCausalLM(CodeGenConfig(vocab_size=261, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no form for sequence classification"):
        RewardModule(str(tmp_path))
