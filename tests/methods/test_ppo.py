"""PPO: where the reward lands, what the KL is, what learns in the warm-up, what is logged, and what changes nothing."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from datamodules import Addition, PtxStream, VerifiableDataModule
from modules import PPOModule
from modules.generation import Validation
from modules.losses import GAE, KL, AdaptiveKL, Clip, Incentives, MissingEos
from modules.networks.critic import Value
from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.networks.tiny import tiny_tokenizer
from modules.reward import RewardModule
from modules.rewards import LearnedReward, RegexFormat
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.sampling import Sampling
from modules.types import Completion, Reward

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ASCII = RegexFormat(r"[\x00-\x7f]*", name="ascii")  # about one in five completions of the untrained model
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ppo(policy: str = "tiny", reward: Reward = ASCII, **settings: Any) -> PPOModule:
    seed_everything(0)
    settings = {"num_generations": 2, "sampling": Sampling(max_completion_length=4)} | settings
    settings = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)} | settings
    return PPOModule(policy, reward, **settings)


def fit(
    module: PPOModule,
    phases: int = 1,
    prompts: int = 4,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    **settings,
) -> Trainer:
    kept = {name: settings.pop(name) for name in ("updates_per_phase", "inner_epochs", "ptx") if name in settings}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(**QUIET, max_epochs=phases, enable_checkpointing=saves, callbacks=list(callbacks), **settings)
    trainer.fit(
        module,
        VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=prompts, **kept),
        ckpt_path=resume,
        weights_only=True,
    )
    return trainer


def weights(module: PPOModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> str:
    """Move the tiny model away from its start, so that its KL to ``tiny`` is not 0."""
    policy, folder = Policy("tiny", dropout=False), tmp_path_factory.mktemp("moved")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    policy.save_pretrained(folder)
    return str(folder)


class Scripted(RolloutEngine):
    """An engine that gives the same completions in every phase: one list per prompt."""

    def __init__(self, *texts: list[tuple[list[int], str]]) -> None:
        self.texts = texts

    def sync_weights(self, policy, version):
        """Do nothing: nothing is sampled."""

    def generate(self, prompts, num_generations, sampling, seeds):
        decode = TOKENIZER.decode
        return [
            [
                Completion(ids, [-1.0] * len(ids), decode(ids, skip_special_tokens=True), finish)
                for ids, finish in self.texts[i % len(self.texts)]
            ]
            for i in range(len(prompts))
        ]


class Scores(Reward):
    """A reward that gives one score after another; None = unscorable."""

    name = "scores"

    def __init__(self, *scores: float | None) -> None:
        self.scores = scores

    def __call__(self, rollouts):
        return [self.scores[i % len(self.scores)] for i in range(len(rollouts))]


def collected(module: PPOModule, prompts: list[str]) -> dict[str, Tensor]:
    """Return the batch of a phase."""
    ids = [TOKENIZER(prompt).input_ids for prompt in prompts]
    rows: Any = {
        "uid": [*map(str, range(len(ids)))],
        "prompt": prompts,
        "prompt_ids": ids,
        "answer": [None] * len(ids),
        "source": [""] * len(ids),
    }
    with torch.no_grad():
        return dict(module.collect({**rows, "info": [{}] * len(ids)}))


A, B = TOKENIZER("ab").input_ids
ROWS = [([A, B, EOS], "stop"), ([A], "length")], [([EOS], "stop"), ([A, A, B, B], "length")]
SCORED = Scores(1.0, 2.0, 3.0, 4.0)


def test_the_reward_lands_on_the_last_kept_token():
    """With lam 0, values 0 and no KL, the return and the unwhitened advantage are the token's own reward."""
    module = ppo(reward=SCORED, engine=Scripted(*ROWS), gae=GAE(gamma=1.0, lam=0.0))
    module.tokenizer.pad_token = module.tokenizer.eos_token
    returns = collected(module, ["a", "a much longer prompt"])["returns"]
    assert returns.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 4]]


def test_a_penalty_for_the_kl_is_on_every_token(moved):
    module = ppo(moved, SCORED, engine=Scripted(*ROWS), gae=GAE(lam=0.0), kl=KL(0.5, reference="tiny"))
    batch = collected(module, ["a", "a much longer prompt"])
    expected = -0.5 * (batch["old_logprobs"] - batch["ref_logprobs"])
    for row, (last, score) in enumerate([(2, 1.0), (0, 2.0), (0, 3.0), (3, 4.0)]):
        expected[row, last] += score
    torch.testing.assert_close(batch["returns"], expected, atol=1e-6, rtol=0)
    assert float((batch["old_logprobs"] - batch["ref_logprobs"]).abs().max()) > 0.01


@pytest.mark.parametrize(("replaced", "expected"), [(False, [1.0, 1.5, 3.0, 3.5]), (True, [1.0, -0.5, 3.0, -0.5])])
def test_a_missing_end_is_penalised(replaced, expected):
    missing = MissingEos(0.5, replaced)
    module = ppo(reward=SCORED, engine=Scripted(*ROWS), gae=GAE(lam=0.0), incentives=Incentives(missing))
    assert collected(module, ["a", "b"])["returns"].sum(1).tolist() == expected


def test_a_stop_string_is_an_end_of_its_own():
    """Real samples: a completion that ends with the stop string keeps its score, one cut off by the budget does not."""
    sampling = Sampling(max_completion_length=3, stop=tuple("abcdefghijklmnopqrstuvwxyz0123456789 "))
    settings: dict[str, Any] = {"gae": GAE(lam=0.0), "incentives": Incentives(MissingEos(0.25))}
    module = ppo(reward=Scores(1.0), num_generations=24, sampling=sampling, **settings)
    totals = collected(module, ["a"])["returns"].sum(1).tolist()
    finishes = [rollout.completion.finish for rollout in module.record.rollouts]
    assert (
        any(r.completion.finish == "stop" and r.completion.token_ids[-1] != EOS for r in module.record.rollouts)
        and "length" in finishes
    )
    assert totals == [1.0 if finish == "stop" else 0.75 for finish in finishes]


def test_the_kl_is_exactly_0_before_the_first_step():
    module = ppo()
    found = {}

    class Start(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.setdefault("kl", [rollout.kl for rollout in pl_module.record.rollouts])

    trainer = fit(module, callbacks=(Start(),))
    assert found["kl"] == [0.0] * 8
    assert trainer.callback_metrics["train/kl"] == 0.0 and trainer.callback_metrics["train/sequence_kl"] == 0.0


class Greedy(InProcessEngine):
    """An engine that always takes the most likely token."""

    def generate(self, prompts, num_generations, sampling, seeds):
        return super().generate(prompts, num_generations, replace(sampling, temperature=0.0), seeds)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_negative_kl_is_warned_of(moved, greedy):
    """The reference is surer of what the policy likes best, so it gives greedy completions more probability than the
    policy.
    """
    module = ppo(moved, engine=Greedy() if greedy else None, num_generations=4, kl=KL(reference="tiny"))
    sharpen(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collected(module, [f"{i}+{i}=" for i in range(16)])
        module.phase_metrics()
    assert any("the KL to the start is" in str(warning.message) for warning in caught) == greedy


def sharpen(module: PPOModule) -> None:
    """Double the logits of the reference, so that the policy is a flatter version of it."""
    assert module.reference is not None
    with torch.no_grad():
        for weight in (module.policy.model.model.norm.weight, module.reference.policy.model.model.norm.weight):
            weight.copy_(torch.ones_like(weight))
        for mine, theirs in zip(module.policy.parameters(), module.reference.policy.parameters(), strict=True):
            theirs.copy_(mine)
        module.reference.policy.model.model.norm.weight.mul_(2.0)


def test_unscorable_completions_have_no_part():
    """The update is the same with or without the completions that have no score."""
    rows = [([A, B, EOS], "stop"), ([A, A], "length"), ([B, 200, 201], "length")]
    kept = [rows[0], rows[2]]
    settings: dict[str, Any] = {
        "gae": GAE(whiten_rewards=True),
        "incentives": Incentives(MissingEos(1.0), entropy=0.01),
        "kl": KL(0.1),
    }
    with_them = ppo(reward=Scores(1.0, None, 0.5), engine=Scripted(rows), num_generations=3, **settings)
    without = ppo(reward=Scores(1.0, 0.5), engine=Scripted(kept), num_generations=2, **settings)
    start = weights(without)
    for module in (with_them, without):
        fit(module, prompts=2, accumulate_grad_batches=2, updates_per_phase=2, inner_epochs=2)
    torch.testing.assert_close(weights(with_them), weights(without), atol=1e-7, rtol=0)
    torch.testing.assert_close(with_them.critic.head.weight, without.critic.head.weight, atol=1e-7, rtol=0)
    assert float((weights(without) - start).abs().max()) > 1e-4


def test_an_update_without_a_score_changes_nothing():
    module = ppo(reward=Scores(1.0, None), num_generations=1, engine=Scripted([([A, EOS], "stop")]))
    trainer = fit(module, prompts=2, updates_per_phase=2)
    once = ppo(reward=Scores(1.0), num_generations=1, engine=Scripted([([A, EOS], "stop")]))
    fit(once, prompts=1)
    assert trainer.global_step == 2
    torch.testing.assert_close(weights(module), weights(once), atol=1e-6, rtol=0)


class Course(Callback):
    """Keeps policy and head after each phase."""

    def __init__(self) -> None:
        self.policy: list[Tensor] = []
        self.head: list[Tensor] = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.policy.append(weights(pl_module))
        self.head.append(pl_module.critic.head.weight.detach().clone())


@pytest.mark.parametrize("shared", [True, False])
def test_in_the_warm_up_the_critic_learns_alone(shared):
    course, value = Course(), Value(None if shared else "tiny", warmup_phases=2)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)  # noqa: E731
    fit(ppo(value=value, optimizer=optimizer), phases=3, callbacks=(course,), gradient_clip_val=1.0)
    assert torch.equal(course.policy[0], course.policy[1]) and torch.equal(course.policy[0], course.policy[2])
    assert not torch.equal(course.policy[2], course.policy[3])
    assert all(not torch.equal(a, b) for a, b in zip(course.head, course.head[1:], strict=False))


WRONG = [{"entropy": math.nan}, {"ptx": -1.0}, {"ptx": math.inf}]


@pytest.mark.parametrize("settings", WRONG, ids=" ".join)
def test_incentives_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"incentives: {next(iter(settings))} must be") as error:
        Incentives(**settings)
    assert "\n" not in str(error.value)


def test_no_completions_are_refused():
    with pytest.raises(ValueError, match="num_generations is 0, expected at least 1"):
        ppo(num_generations=0)
    with pytest.raises(ValueError, match="validation: generations must be >= 1, got 0"):
        Validation(generations=0)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": math.nan}, {"warmup_phases": -1}, {"coef": -1.0}])
def test_values_of_the_critic_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"value: {next(iter(settings))} must be"):
        Value(**settings)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_phases is 2 of 2 phases"):
        fit(ppo(value=Value(warmup_phases=2)), phases=2)


def test_a_reward_on_the_backbone_is_no_part_of_the_checkpoint(tmp_path):
    """A run may therefore be validated or continued with another reward."""
    judge = RewardModule("tiny", lora=Lora(r=2))
    judge.save_pretrained(tmp_path)
    reward = LearnedReward(str(tmp_path))
    learned, ruled = ppo(lora=Lora(r=2), reward=reward), ppo(lora=Lora(r=2))
    assert reward.share_backbone(learned.policy) == [str(tmp_path)]
    assert learned.identity() == ruled.identity()
    assert learned.state_dict().keys() == ruled.state_dict().keys()


def test_a_reward_model_as_policy_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a classifier .* without an output head: name the language model"):
        ppo(str(tmp_path))


def test_the_policy_itself_as_reference_is_the_start():
    assert ppo(kl=KL(reference="tiny")).own_reference


def test_texts_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"incentives.ptx is 0.5 and there are no texts.*data\.ptx"):
        fit(ppo(incentives=Incentives(ptx=0.5)))


def test_a_weight_of_0_is_no_texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "some words to keep"}\n' * 4)
    stream = PtxStream(str(tmp_path / "texts.jsonl"), rows_per_update=2, max_length=20)
    without, of_weight_0, of_weight_1 = ppo(), ppo(incentives=Incentives(ptx=0.0)), ppo(incentives=Incentives(ptx=1.0))
    fit(without, phases=2)
    fit(of_weight_0, phases=2, ptx=stream)
    fit(of_weight_1, phases=2, ptx=stream)
    assert torch.equal(weights(without), weights(of_weight_0))
    assert not torch.allclose(weights(without), weights(of_weight_1), atol=1e-4)


def test_the_critic_has_its_own_learning_rate():
    module = ppo(value=Value("tiny", lr=0.025))
    trainer = fit(module)
    policy, critic = trainer.optimizers[0].param_groups
    assert (policy["lr"], critic["lr"]) == (0.1, 0.025)
    assert sum(p.numel() for p in policy["params"]) == sum(p.numel() for p in module.policy.parameters())
    assert sum(p.numel() for p in critic["params"]) == sum(
        p.numel() for p in module.critic.parameters() if p.requires_grad
    )
    assert [group["lr"] for group in fit(ppo()).optimizers[0].param_groups] == [0.1, 0.1]


LOGGED = """
grad_norm grad_norm/policy grad_norm/value clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean value_clip_ratio ratio/mean ratio/var
ratio/deviation approx_kl kl kl_coef sequence_kl rlhf_reward reward explained_variance value_loss policy_loss entropy
"""


def test_what_is_logged(moved):
    """One phase has two passes, and the KL that lowered the reward is logged."""
    module = ppo(moved, kl=KL(0.3, reference="tiny"), clip=Clip(value=0.01))
    trainer = fit(module, updates_per_phase=2, inner_epochs=2, accumulate_grad_batches=2)
    logged = {name: float(number) for name, number in trainer.callback_metrics.items()}
    assert {f"train/{name}" for name in LOGGED.split()} <= set(logged)
    assert [name for name, number in logged.items() if not math.isfinite(number)] == []
    sums = [rollout.kl for rollout in module.record.rollouts]
    assert logged["train/kl_coef"] == pytest.approx(0.3)
    assert logged["train/sequence_kl"] == pytest.approx(sum(sums) / 8, abs=1e-5)
    objective = [rollout.reward - 0.3 * kl for rollout, kl in zip(module.record.rollouts, sums, strict=True)]
    assert logged["train/rlhf_reward"] == pytest.approx(sum(objective) / 8, abs=1e-5)
    norms = logged["train/grad_norm/policy"] ** 2 + logged["train/grad_norm/value"] ** 2
    assert norms > 0 and logged["train/grad_norm"] ** 2 == pytest.approx(norms, rel=1e-4)
    assert logged["train/ratio/var"] >= 0 and logged["train/ratio/deviation"] > 0 and "train/ratio/square" not in logged


def test_micro_batches_change_nothing():
    found = []
    for accumulate in (1, 4):
        module = ppo(incentives=Incentives(entropy=0.01), gae=GAE(whiten_rewards=True))
        fit(module, phases=2, accumulate_grad_batches=accumulate, updates_per_phase=2, inner_epochs=2)
        found.append(torch.cat([weights(module), module.critic.head.weight.detach().flatten()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_an_adapted_weight_travels_in_the_checkpoint(tmp_path):
    def adaptive() -> PPOModule:
        return ppo(kl=KL(0.2, AdaptiveKL(target=1e3)))  # never reached: 2 % less after each phase

    whole, resumed = adaptive(), adaptive()
    fit(
        whole,
        phases=3,
        callbacks=(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),),
    )
    trainer = fit(resumed, phases=3, resume=tmp_path / "epoch=1.ckpt", callbacks=(ModelCheckpoint(tmp_path / "again"),))
    assert float(trainer.callback_metrics["train/kl_coef"]) == pytest.approx(
        0.2 * 0.98**2, abs=1e-6
    )  # that the third phase was made with
    assert resumed.kl_coef == whole.kl_coef == pytest.approx(0.2 * 0.98**3, abs=1e-9)
    assert torch.equal(weights(resumed), weights(whole))
