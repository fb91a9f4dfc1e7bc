"""Methods whose completions call tools: tokens of tools are attended to, no part of loss, KL, entropy or length."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_grpo import QUIET, Gradients
from torch import Tensor

from callbacks import PredictionWriter
from callbacks.samples import write_sections
from datamodules import Addition, InstructionDataModule, Products, VerifiableDataModule
from modules import GRPOModule, OnlineDPOModule, PPOModule
from modules.losses import GAE, KL, ImportanceWeights
from modules.networks.policy import Policy
from modules.on_policy import OnPolicyModule
from modules.rewards import EnvironmentReward, ExactMatch, LengthPenalty, RegexFormat
from modules.rollout import Calculator, Environment, RolloutEngine, Sampling
from modules.rollout.phases.dynamic_sampling import DynamicSampling
from modules.rollout.tool_calls import ToolFormat
from modules.types import Completion, Reward

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.role }}\n{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS, SIZES = 4, ((3, 6, 2), (1, 4, 1), (6, 0, 0), (2, 1, 3))  # tokens of a turn, of a result, of the next turn
NOT_CALLED = Environment(Calculator)


def traces() -> list[Completion]:
    """Four completions of a prompt, three of them with a tool's result between two turns."""
    draw = random.Random(3)
    found = []
    for first, result, second in SIZES:
        ids = [draw.randint(5, 260) for _ in range(first + result + second)]
        sampled = [True] * first + [False] * result + [True] * second
        logprobs = [-5.0 * keep for keep in sampled]
        found.append(Completion(ids, logprobs, "text", "length", 0, sampled if result else None))
    return found


class Traces(RolloutEngine):
    """Gives the same completions for every prompt, and keeps the prompts that it was asked."""

    def sync_weights(self, policy: Any, version: int) -> None:
        """Scripted completions need no weights."""

    def generate(self, prompts, num_generations, sampling, seeds, replies=None):
        return [traces()[:num_generations] for _ in prompts]


class Numbered(Reward):
    name = "numbered"

    def __call__(self, rollouts):
        return [(1.0, 0.0, 0.25, 0.5)[i % 4] for i in range(len(rollouts))]


def fit(module: OnPolicyModule, *callbacks: Any, **data: Any) -> Trainer:
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    rows = VerifiableDataModule(
        module.tokenizer, Addition(50, seed=1), prompts_per_phase=PROMPTS, **{"chat": True} | data
    )
    trainer.fit(module, rows)
    return trainer


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def make(kind: type = GRPOModule, reward: Reward | None = None, **settings: Any) -> Any:
    seed_everything(0)
    settings = {"num_generations": 4, "optimizer": sgd, "sampling": Sampling(max_completion_length=8)} | settings
    return kind("tiny", reward or Numbered(), **settings)


def naive_logprobs(module: Any, prompt: list[int], completion: Completion) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of what was sampled, from one plain forward of the whole row."""
    ids = torch.tensor([prompt + completion.token_ids])
    logits = module.policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    keep = [place for place in range(ids.shape[1] - len(prompt)) if (completion.sampled or [True] * 99)[place]]
    entropy = -(logits.exp() * logits).sum(-1)
    return logits[keep, torch.tensor(completion.token_ids)[keep]], entropy[keep]


@pytest.mark.parametrize("shares", [True, False])  # one forward for each prompt, or one for each completion
def test_the_gradient_is_that_of_a_loop_over_what_was_sampled(monkeypatch, shares):
    monkeypatch.setattr(Policy, "shares_prompts", shares)
    module, seen = make(engine=Traces(), beta=0.1), Gradients()
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    trainer = fit(module, seen)
    ((batch, _, found),) = seen.steps
    assert batch["attended"].sum(1).tolist() == [11, 6, 6, 6] * PROMPTS
    assert batch["completion_mask"].sum(1).tolist() == [5, 2, 6, 5] * PROMPTS
    fresh = make()
    fresh.policy.load_state_dict(start)
    advantages = torch.tensor([1.0, 0.0, 0.25, 0.5]) - 0.4375
    advantages /= advantages.square().sum().div(3).sqrt() + 1e-4
    loss, gaps = torch.zeros(()), []
    for number, rollout in enumerate(module.record.rollouts):
        logprobs, entropies = naive_logprobs(fresh, rollout.prompt_ids, rollout.completion)
        loss = loss - float(advantages[number % 4]) * logprobs.sum() / (18 * PROMPTS)  # ratio 1, KL 0 with gradient 0
        kept = batch["completion_mask"][number]
        mine = torch.tensor(rollout.trainer_logprobs)
        torch.testing.assert_close(mine[kept[: len(mine)]], logprobs.detach(), atol=1e-4, rtol=0)
        assert not mine[~kept[: len(mine)]].any() and not batch["ref_logprobs"][number][~kept].any()
        gaps += (mine[kept[: len(mine)]] + 5).abs().tolist()
        assert rollout.entropy == pytest.approx(
            float(entropies.detach().mean()), abs=1e-4
        ) and rollout.kl == pytest.approx(0.0, abs=1e-4)
    loss.backward()
    by_loop = torch.cat([parameter.grad.flatten() for parameter in fresh.policy.parameters()])
    torch.testing.assert_close(found, by_loop, atol=2e-6, rtol=1e-3)
    assert float(by_loop.abs().max()) > 1e-3
    metrics = trainer.callback_metrics
    assert float(metrics["train/sampling/sampling_logp_difference/mean"]) == pytest.approx(
        sum(gaps) / len(gaps), abs=1e-4
    )
    assert float(metrics["train/completions/mean_length"]) == 4.5


def sample_rollouts(module: Any) -> list[Any]:
    fit(module)
    return module.record.rollouts


def test_generalised_advantages_skip_the_results_of_tools():
    """They are those of the rows without the columns of the tools; whitening sees what was sampled alone."""
    settings = {"gae": GAE(gamma=0.9, lam=0.8), "kl": KL(coef=0.0)}
    module, seen = make(PPOModule, engine=Traces(), importance=ImportanceWeights("sequence"), **settings), Kept()
    torch.nn.init.normal_(module.critic.head.weight)  # it starts at 0
    fit(module, seen)
    batch = seen.batch
    assert float(batch["values"].abs().max()) > 0.1
    for row, score in enumerate([1.0, 0.0, 0.25, 0.5] * PROMPTS):
        keep = batch["completion_mask"][row]
        values = batch["values"][row][keep].tolist()
        advantages, advantage, following = [], 0.0, 0.0
        for place, value in reversed([*enumerate(values)]):
            reward = score if place == len(values) - 1 else 0.0
            advantage = reward + 0.9 * following - value + 0.9 * 0.8 * advantage
            following = value
            advantages.insert(0, advantage)
        expected = torch.tensor([a + v for a, v in zip(advantages, values, strict=True)])
        torch.testing.assert_close(batch["returns"][row][keep], expected, atol=1e-5, rtol=0)
        assert not batch["advantages"][row][~keep].any() and not batch["values"][row][~keep].any()


class Kept(Gradients):
    def on_before_optimizer_step(self, *args: Any) -> None:
        """Keep the batch alone."""


@pytest.mark.parametrize("kind", [GRPOModule, PPOModule, OnlineDPOModule])
def test_an_environment_that_is_not_called_changes_no_bit(kind):
    found = []
    for environment in (None, NOT_CALLED):
        module = make(kind, RegexFormat(r"[\x00-\x7f].*"), environment=environment)
        fit(module)
        found.append([module.record.rollouts, *module.policy.parameters()])
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


class Paid:
    """Its reward is the number of the row's answer."""

    def reset(self, answer: str) -> str:
        self.answer = answer
        return " Pay."

    def pay(self) -> str:
        """Pay."""
        return "paid"

    def get_reward(self) -> float:
        return float(len(self.answer))


def test_an_environment_gives_a_reward_and_opens_the_prompt():
    module = make(reward=LengthPenalty(EnvironmentReward(), 0.5), environment=Environment(Paid), engine=Traces())
    for rollout in sample_rollouts(module)[:4]:
        assert rollout.prompt.endswith("= Pay.<|im_end|>\n<|im_start|>assistant\n")
        assert rollout.prompt_ids == module.tokenizer(rollout.prompt, add_special_tokens=False).input_ids
        length = rollout.completion.length
        assert rollout.rewards == {"environment": 3.0, "environment_length_penalty": -0.5 * length}


class OldEngine(Traces):
    def generate(self, prompts, num_generations, sampling, seeds):  # type: ignore[override]
        return super().generate(prompts, num_generations, sampling, seeds)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": EnvironmentReward()}, "EnvironmentReward reads .* model.environment names none"),
        ({"reward": EnvironmentReward(), "environment": NOT_CALLED}, "that class has no get_reward"),
        ({"environment": Environment(Paid)}, "environment Paid has get_reward.., and no reward reads it"),
        ({"environment": NOT_CALLED, "engine": OldEngine()}, "OldEngine.generate takes no replies"),
        ({"environment": NOT_CALLED, "sampling": Sampling(stop=("x",))}, "sampling.stop .'x'. would end them"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_plain_prompts_are_refused():
    with pytest.raises(ValueError, match="addition-training#.*needs prompts that end with a user's message"):
        fit(make(environment=NOT_CALLED), chat=False)


def test_gold_answers_compare_with_the_last_turn():
    module = make(reward=ExactMatch(), environment=NOT_CALLED, engine=Traces())
    assert {rollout.text for rollout in sample_rollouts(module)} == {"text"}


def calculating(**settings: Any) -> GRPOModule:
    """A module whose completions call the calculator at half of the time."""
    seed_everything(0)
    known = {"environment": Environment(Calculator, max_turns=2), "sampling": Sampling(max_completion_length=64)}
    slow = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01), "num_generations": 4}
    return GRPOModule("tiny-calculator", ExactMatch(), **known | slow | settings)


def train(module: GRPOModule, folder: Path, resume: Path | None = None) -> list[Tensor]:
    """Train two phases of two updates, and return the weights; a checkpoint follows each step."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_epochs=2, callbacks=[saver])
    data = VerifiableDataModule(module.tokenizer, Products(50, seed=1), prompts_per_phase=4, updates_per_phase=2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return [*module.policy.parameters()]


def test_a_run_with_tools_resumes_bit_for_bit(tmp_path):
    """Also inside a phase, whose completions with calls are in the checkpoint; dynamic sampling draws some of them."""
    whole, module = tmp_path / "whole", calculating(dynamic_sampling=DynamicSampling(max_rounds=3))
    end = train(module, whole)
    state = torch.load(whole / "step=1.ckpt", weights_only=True)
    assert any(rollout["completion"]["sampled"] is not None for rollout in find_key(state, "rollouts"))
    assert any("attended" in batch for batch in find_key(state, "micro_batches"))
    for step in (1, 2):
        again = train(
            calculating(dynamic_sampling=DynamicSampling(max_rounds=3)), tmp_path / "b", whole / f"step={step}.ckpt"
        )
        assert all(torch.equal(a, b) for a, b in zip(end, again, strict=True))


def find_key(state: Any, name: str) -> Any:
    """The value of a key at any depth of a checkpoint."""
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    if isinstance(state, dict) and name in state:
        return state[name]
    return next((found for part in parts if (found := find_key(part, name)) is not None), None)


def test_predictions_and_held_out_rows_show_all_turns(tmp_path):
    """The last turn is the completion; a data set of such rows is refused."""
    module, file = calculating(), tmp_path / "predictions.jsonl"
    data = VerifiableDataModule(module.tokenizer, Products(6, seed=1), val=Products(6, held_out=True, seed=1))
    trainer = Trainer(**QUIET, callbacks=[PredictionWriter(str(file))])
    trainer.predict(module, data, return_predictions=False)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    called = [row for row in rows if "tool_turns" in row]
    assert called and len(called) < len(rows)
    result = re.compile(
        r'calculate\("(.*)"\)<\|im_end\|>\n<\|im_start\|>tool\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)'
    )
    for row in called:
        expression, said, last = result.fullmatch(row["tool_turns"]).groups()
        assert last == row["completion"] and (said == Calculator().calculate(expression) or said.startswith("error"))
    with pytest.raises(ValueError, match="column 'tool_turns' .* is not empty"):
        InstructionDataModule(module.tokenizer, str(file)).setup("fit")
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert any("tool\n" in section(rollout) for rollout in module.record.held_out)
    assert metrics["val/completions/mean_length"] == pytest.approx(
        sum(sum(each.completion.sampled or [True] * len(each.completion.token_ids)) for each in module.record.held_out)
        / len(module.record.held_out)
    )


def section(rollout: Any) -> str:
    """What ``Samples`` shows of a rollout."""
    return write_sections([rollout]).replace("\n    ", "\n")


def test_rows_with_tools_of_their_own_are_refused(tmp_path):
    module, file = make(environment=Environment(Paid), reward=EnvironmentReward()), tmp_path / "rows.jsonl"
    module.tokenizer.chat_template = HERMES
    module.tool_format = ToolFormat(module.tokenizer, Environment(Paid).tools(), module.policy.stop_token_ids)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    file.write_text((json.dumps({"prompt": "a", "answer": "b", "tools": [tool]}) + "\n") * 4)
    data = VerifiableDataModule(module.tokenizer, str(file), prompts_per_phase=4)
    with pytest.raises(ValueError, match="the row has tools, and model.environment brings its own"):
        Trainer(**QUIET, max_epochs=1).fit(module, data)
    file.write_text('{"prompt": "a", "answer": "b"}\n' * 4)
    data = VerifiableDataModule(module.tokenizer, str(file), prompts_per_phase=4)
    Trainer(**QUIET, max_epochs=1).fit(module, data)
    assert '"name": "pay"' in module.record.rollouts[0].prompt
