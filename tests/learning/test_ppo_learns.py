"""PPO learns what is rewarded, and fast enough; its critic learns, an adaptive KL holds its target, and ptx texts keep
what the model knew.
"""

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from callbacks import Forgetting
from datamodules import Addition, NumberTexts, PretrainingDataModule, PtxStream, VerifiableDataModule
from modules import GRPOModule, PPOModule, SFTModule
from modules.generation import Validation
from modules.losses import KL, AdaptiveKL, Clip, Incentives
from modules.networks.critic import Value
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling
from modules.types import Reward, Rollout

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
QUIET |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0}
ASCII = RegexFormat(r"[\x00-\x7f]*", name="ascii")  # about one in five completions of the untrained model


class Rule(Reward):
    """A reward that is a function of the rollout."""

    def __init__(self, name: str, rule: Callable[[Rollout], float]) -> None:
        self.name, self.rule = name, rule

    def __call__(self, rollouts):
        return [self.rule(rollout) for rollout in rollouts]


class Shuffled(Reward):
    """Gives the same scores to the wrong completions, so nothing can be learned from them."""

    name = "shuffled"

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, rollouts):
        scores = ASCII(rollouts)
        self.random.shuffle(scores)
        return scores


class Phases(Callback):
    """Keeps the metrics of each phase."""

    def __init__(self) -> None:
        self.kl: list[float] = []  # nats per completion
        self.explained: list[float] = []
        self.rewards: list[float] = []
        self.solved: dict[int, float] = {}  # pass@1 on held-out prompts, by phases so far

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.kl.append(mean([rollout.kl or 0.0 for rollout in pl_module.record.rollouts]))
        self.rewards.append(mean([rollout.reward for rollout in pl_module.record.rollouts]))
        self.explained.append(pl_module.record.metrics.get("explained_variance", 0.0))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.solved[trainer.current_epoch + 1] = float(trainer.callback_metrics["val/pass@1"])


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def solved(
    method: type[GRPOModule] | type[PPOModule], reward: Reward, lr: float, phases: int, every: int
) -> dict[int, float]:
    """Return pass@1 of plain ASCII on held-out prompts, measured every few phases of 8 prompts x 8 completions."""
    seed_everything(0)
    settings: dict[str, Any] = {
        "num_generations": 8,
        "validation": Validation(ASCII, generations=8),
        "sampling": Sampling(max_completion_length=4),
    }
    settings |= {"kl": KL(0.05)} if method is PPOModule else {}
    module = method("tiny", reward, optimizer=partial(torch.optim.AdamW, lr=lr), **settings)
    data = VerifiableDataModule(module.tokenizer, Addition(200), val=Addition(16, held_out=True), prompts_per_phase=8)
    found = Phases()
    Trainer(max_epochs=phases, check_val_every_n_epoch=every, callbacks=[found], **QUIET).fit(module, data)
    return found.solved


@pytest.fixture(scope="module")
def ppo_solved() -> dict[int, float]:
    return solved(PPOModule, ASCII, lr=3e-3, phases=20, every=10)


def test_ppo_learns_as_much_as_grpo_from_twice_the_samples(ppo_solved):
    grpo = solved(GRPOModule, ASCII, lr=3e-3, phases=10, every=5)
    assert grpo[10] > grpo[5] > 0  # it is learning, and not done
    assert ppo_solved[10] > grpo[5]
    assert ppo_solved[20] > grpo[10]
    assert ppo_solved[20] > 0.9


@pytest.mark.parametrize(("reward", "lr"), [(Shuffled(), 3e-3), (ASCII, 0.0)], ids=["shuffled", "lr0"])
def test_ppo_learns_nothing_without_rewards_that_mean_something(ppo_solved, reward, lr):
    assert solved(PPOModule, reward, lr, phases=20, every=20)[20] < ppo_solved[20] - 0.4


@pytest.mark.parametrize("model", [None, "tiny"], ids=["head", "model"])
def test_the_critic_learns_what_a_prompt_is_worth(model):
    """The prompt alone decides the reward, 0 or 1. A perfect critic explains all of it, and a constant one nothing."""
    seed_everything(0)
    module = PPOModule(
        "tiny",
        Rule("large", lambda rollout: float(rollout.prompt[0] >= "5")),
        sampling=Sampling(max_completion_length=2),
        kl=KL(0.0),
        value=Value(model=model, lr=3e-3 if model else 1e-2, coef=1.0),
        clip=Clip(value=None),
        optimizer=partial(torch.optim.AdamW, lr=1e-5),
    )
    found = Phases()
    data = VerifiableDataModule(module.tokenizer, Addition(80, digits=1), prompts_per_phase=64, updates_per_phase=4)
    Trainer(max_epochs=10, callbacks=[found], **QUIET).fit(module, data)
    assert found.explained[0] == pytest.approx(0.0, abs=0.01)  # every value is 0
    assert mean(found.explained[-3:]) > 0.7


def count_ascii(text: str) -> float:
    """Count the ASCII characters of four tokens, special ones left out: 0 to 4."""
    return float(sum(character < "\x80" for character in re.sub(r"<\|\w+\|>", "", text)))


COUNT = Rule("count", lambda rollout: count_ascii(rollout.completion.text))


def last_kl(kl_coef: float, phases: int, adaptive: AdaptiveKL | None, seed: int = 0) -> float:
    """Return the KL to the start in nats per completion, as the mean of the last ten phases of 128 completions."""
    seed_everything(seed)
    module = PPOModule(
        "tiny",
        COUNT,
        num_generations=16,
        sampling=Sampling(max_completion_length=4),
        kl=KL(kl_coef, adaptive),
        optimizer=partial(
            torch.optim.AdamW, lr=3e-3, betas=(0.5, 0.95)
        ),  # little momentum, whose lag makes the KL swing
        seed=seed,
    )
    found = Phases()
    data = VerifiableDataModule(module.tokenizer, Addition(200), prompts_per_phase=8, updates_per_phase=4, seed=seed)
    Trainer(max_epochs=phases, callbacks=[found], **QUIET).fit(module, data)
    return mean(found.kl[-10:])


@pytest.mark.parametrize(("kl_coef", "phases"), [(0.2, 30), (1.8, 20)], ids=["too-low", "too-high"])
def test_an_adaptive_kl_holds_its_target(kl_coef, phases):
    """The weight starts three times too low or too high for 1 nat; a fixed weight would stay there."""
    assert last_kl(kl_coef, phases, AdaptiveKL(target=1.0, gain=0.5)) == pytest.approx(1.0, rel=0.2)
    assert last_kl(kl_coef, 14, None) != pytest.approx(1.0, rel=0.4)


def forgotten(policy: str, ptx_coef: float) -> tuple[float, float]:
    """Return how much of counting was forgotten, in nats per token, and the mean reward of the last phases."""
    seed_everything(0)
    module = PPOModule(
        policy,
        Rule("nines", lambda rollout: rollout.completion.text.count("9") / 4),
        num_generations=8,
        sampling=Sampling(max_completion_length=4),
        incentives=Incentives(ptx=ptx_coef),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
    )
    ptx = PtxStream(
        NumberTexts(200, "counting"), rows_per_update=4, max_length=64, val=NumberTexts(10, "counting", seed=1)
    )
    data = VerifiableDataModule(module.tokenizer, Addition(200), prompts_per_phase=8, ptx=ptx)
    found, forgetting = Phases(), Forgetting()
    Trainer(max_epochs=35, callbacks=[found, forgetting], **QUIET).fit(module, data)
    return forgetting.history[-1]["val"] - forgetting.start["val"], mean(found.rewards[-5:])


def test_texts_keep_what_was_learned_before(tmp_path):
    seed_everything(0)
    before = SFTModule("tiny", optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0))
    texts = PretrainingDataModule(before.tokenizer, NumberTexts(200, "counting"), max_length=160, batch_size=4)
    Trainer(max_steps=60, max_epochs=-1, **QUIET).fit(before, texts)
    before.policy.save_pretrained(tmp_path)
    without, reward_without = forgotten(str(tmp_path), 0.0)
    with_texts, reward_with = forgotten(str(tmp_path), 1.0)
    assert without > 1.0  # nats per token
    assert with_texts < without / 10
    assert min(reward_without, reward_with) > 0.5  # from about 0.05
    assert reward_with > 0.75 * reward_without
