"""A whole PPO phase on a vocabulary of three tokens, against plain loops in float64.

The KL that it logs is compared with a sum over all completions.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from datamodules import PtxStream, VerifiableDataModule
from datamodules.sources.source import Row, Source
from modules import PPOModule
from modules.functional.kl import k2
from modules.losses import GAE, KL, Clip, Incentives, MissingEos
from modules.networks.critic import Value
from modules.rollout.engine import RolloutEngine
from modules.rollout.sampling import Sampling
from modules.types import Completion, Reward, Rollout

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
A, B, EOS = 0, 1, 2
PROMPTS = ("ab", "b", "bba", "aab")
TEXTS = ("abab", "bb", "babbab")
MOMENTS = {"reward_mean": 0.3, "reward_std": 2.0}  # of the value model
CLOSE, MOVED = (
    1e-5,
    1e-3,
)  # largest difference of a weight from the float64 one; smallest change that the largest change has


class Rule(Reward):
    """A reward: 1 for an "a", -1/2 for a "b"; a completion that ends at once cannot be scored."""

    name = "rule"

    def __call__(self, rollouts):
        return [
            r.completion.text.count("a") - 0.5 * r.completion.text.count("b") if r.completion.text else None
            for r in rollouts
        ]


class Prompts(Source):
    """Prompts without a file, because samples also depend on the path of a file."""

    def rows(self) -> list[Row]:
        return [Row({"prompt": prompt}, f"prompts#{number}", "prompts") for number, prompt in enumerate(PROMPTS)]


def letters() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(vocab={"a": A, "b": B, "</s>": EOS}, unk_token="a"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def llama(kind: type[PreTrainedModel], seed: int, folder: Path, **settings: Any) -> None:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 3,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": None, "eos_token_id": EOS}
    kind(LlamaConfig(**shape, max_position_embeddings=16, initializer_range=0.4, **ends, **settings)).save_pretrained(
        folder
    )
    letters().save_pretrained(folder)


@dataclass(frozen=True)
class Settings:
    """The settings of both computations, by TRL's names; the last three say how they split the phase."""

    lr: float = 0.1
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.02
    dual_clip: float | None = None
    cliprange_value: float | None = 0.02
    vf_coef: float = 0.5
    value_lr: float | None = None
    kl_coef: float = 0.3
    kl_in_loss: bool = False
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    replace_missing_eos: bool = False
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    whitened_over: str = "update"  # or "micro-batch", "phase": errors
    denominator: str = "update"  # or "micro-batch": an error


SHARED = Settings(
    lr=0.4,
    gamma=0.9,
    lam=0.8,
    dual_clip=1.025,
    whiten_rewards=True,
    missing_eos_penalty=0.5,
    entropy_coef=0.1,
    ptx_coef=0.3,
)
SEPARATE = Settings(temperature=0.7, value_lr=0.3, kl_in_loss=True, missing_eos_penalty=0.8, replace_missing_eos=True)


@dataclass
class Fit:
    """A phase of PPOModule, and what it started from."""

    module: PPOModule
    policy: str
    reference: str
    value: str | None
    settings: Settings
    head: Tensor  # of the critic at the start
    logged: dict[str, float]
    plan: list[list[list[int]]]  # update -> micro-batch -> rollouts


@dataclass
class Plan(Callback):
    """Keeps which rollouts each micro-batch of each update held."""

    updates: list[list[list[int]]] = field(default_factory=list)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.updates.append([])
        taken = {place for micro_batch in self.updates[-1] for place in micro_batch}
        places: list[int] = []
        for group, ids, mask in zip(
            batch["group"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            wanted = (group, ids[mask].tolist())
            free = (
                i
                for i, r in enumerate(pl_module.record.rollouts)
                if (r.group, r.completion.token_ids) == wanted and i not in {*taken, *places}
            )
            places.append(next(free))
        self.updates[-1].append(places)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the models ``start`` and ``value``, and the texts."""
    root = tmp_path_factory.mktemp("letters")
    llama(LlamaForCausalLM, 4, root / "start")
    llama(LlamaForSequenceClassification, 1, root / "value", num_labels=1, **MOMENTS)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return root


def fit(
    folder: Path, s: Settings, policy: str = "start", reference: str | None = None, value: str | None = None
) -> Fit:
    seed_everything(1)
    module = PPOModule(
        str(folder / policy),
        Rule(),
        num_generations=3,
        sampling=Sampling(temperature=s.temperature, max_completion_length=3),
        gae=GAE(s.gamma, s.lam, s.whiten_rewards),
        clip=Clip(s.cliprange, s.dual_clip, s.cliprange_value),
        kl=KL(s.kl_coef, loss=k2 if s.kl_in_loss else None, reference=reference and str(folder / reference)),
        value=Value(value and str(folder / value), s.value_lr, coef=s.vf_coef),
        incentives=Incentives(
            None if s.missing_eos_penalty is None else MissingEos(s.missing_eos_penalty, s.replace_missing_eos),
            s.entropy_coef,
            s.ptx_coef,
        ),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=s.lr),
    )
    if value is None:
        module.critic.head.weight.data.copy_(torch.linspace(-0.5, 0.5, 8))
    head, plan = module.critic.head.weight.detach().clone(), Plan()
    ptx = (
        PtxStream(str(folder / "texts.jsonl"), rows_per_update=2, max_length=8) if s.ptx_coef else None
    )  # the 3 texts make 2 rows
    data = VerifiableDataModule(
        module.tokenizer, Prompts(), prompts_per_phase=4, updates_per_phase=4, inner_epochs=2, ptx=ptx
    )
    trainer = Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, enable_checkpointing=False, callbacks=[plan])
    trainer.fit(module, data)
    logged = {name: float(number) for name, number in trainer.callback_metrics.items()}
    return Fit(
        module,
        str(folder / policy),
        str(folder / (reference or policy)),
        value and str(folder / value),
        s,
        head,
        logged,
        plan.updates,
    )


class Exact:
    """Computes the same phase in float64, one row and one token at a time."""

    def __init__(self, done: Fit) -> None:
        self.rollouts, self.head = done.module.record.rollouts, nn.Parameter(done.head.double()[0])
        self.policy = AutoModelForCausalLM.from_pretrained(done.policy, dtype=torch.float64)
        self.reference = AutoModelForCausalLM.from_pretrained(done.reference, dtype=torch.float64)
        self.value = (
            AutoModelForSequenceClassification.from_pretrained(done.value, dtype=torch.float64) if done.value else None
        )
        self.reference_logprobs = [self.of_reference(rollout, done.settings.temperature) for rollout in self.rollouts]

    def logprobs(self, model: nn.Module, row: list[int], first: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probs [V] that each token from ``first`` on was chosen by, and the hidden states there [H]."""
        out = model(torch.tensor([row]), output_hidden_states=True)
        return (out.logits[0, first - 1 : -1] / temperature).log_softmax(-1), out.hidden_states[-1][0, first - 1 : -1]

    def read(self, rollout: Rollout, temperature: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return log-prob, entropy and value of each token."""
        row, first = [*rollout.prompt_ids, *rollout.completion.token_ids], len(rollout.prompt_ids)
        tables, states = self.logprobs(self.policy, row, first, temperature)
        if self.value is None:
            values = states @ self.head
        else:
            states = self.value.base_model(torch.tensor([row])).last_hidden_state[0, first - 1 : -1]
            values = (states @ self.value.score.weight[0] - MOMENTS["reward_mean"]) / MOMENTS["reward_std"]
        return (
            [table[token] for table, token in zip(tables, row[first:], strict=True)],
            [-(table.exp() * table).sum() for table in tables],
            list(values),
        )

    @torch.no_grad()
    def of_reference(self, rollout: Rollout, temperature: float) -> list[float]:
        row, first = [*rollout.prompt_ids, *rollout.completion.token_ids], len(rollout.prompt_ids)
        tables, _ = self.logprobs(self.reference, row, first, temperature)
        return [float(table[token]) for table, token in zip(tables, row[first:], strict=True)]

    def text_loss(self) -> Tensor:
        """Return the mean of -log p over the tokens of the texts, without the first token of each."""
        rows = [[*("ab".index(letter) for letter in text), EOS] for text in TEXTS]
        lost = [
            -table[token]
            for row in rows
            for table, token in zip(self.logprobs(self.policy, row, 1, 1.0)[0], row[1:], strict=True)
        ]
        return torch.stack(lost).mean()

    def train(self, plan: list[list[list[int]]], s: Settings) -> None:
        with torch.no_grad():
            start = {i: self.read(r, s.temperature) for i, r in enumerate(self.rollouts) if r.reward is not None}
            rewards = {i: self.token_rewards(i, logprobs, s) for i, (logprobs, _, _) in start.items()}
        if s.whiten_rewards:
            mean, deviation = moments([x for row in rewards.values() for x in row])
            rewards = {i: [(x - mean) / deviation + mean for x in row] for i, row in rewards.items()}
        values = {i: [float(x) for x in found[2]] for i, found in start.items()}
        plain = {i: advantages(rewards[i], values[i], s.gamma * s.lam, s.gamma) for i in start}
        returns = {i: [a + v for a, v in zip(plain[i], values[i], strict=True)] for i in start}
        white = dict(self.whitened(plain, plan, s.whitened_over))
        old = {i: [float(x) for x in found[0]] for i, found in start.items()}
        weights = [*self.policy.parameters()]
        critic = [self.head] if self.value is None else [*self.value.parameters()]
        for update in plan:
            tokens = sum(len(old[i]) for part in update for i in part)
            loss = s.ptx_coef * self.text_loss() if s.ptx_coef else torch.zeros((), dtype=torch.float64)
            for part in update:
                counted = tokens if s.denominator == "update" else len(update) * sum(len(old[i]) for i in part)
                for i in part:
                    loss = loss + self.row_loss(i, old[i], values[i], white[i], returns[i], s) / counted
            for lr, group in ((s.lr, weights), (s.value_lr or s.lr, critic)):
                gradients = torch.autograd.grad(loss, group, allow_unused=True, retain_graph=True)
                for weight, gradient in zip(group, gradients, strict=True):
                    weight.data -= lr * (0.0 if gradient is None else gradient)

    def token_rewards(self, i: int, logprobs: list[Tensor], s: Settings) -> list[float]:
        score = self.rollouts[i].reward
        if s.missing_eos_penalty is not None and self.rollouts[i].completion.token_ids[-1] != EOS:
            score = -s.missing_eos_penalty if s.replace_missing_eos else score - s.missing_eos_penalty
        coef = 0.0 if s.kl_in_loss else s.kl_coef
        rewards = [
            -coef * (float(mine) - theirs) for mine, theirs in zip(logprobs, self.reference_logprobs[i], strict=True)
        ]
        return [*rewards[:-1], rewards[-1] + score]

    def whitened(
        self, plain: dict[int, list[float]], plan: list[list[list[int]]], over: str
    ) -> Iterator[tuple[int, list[float]]]:
        parts = {
            "update": [[i for part in update for i in part] for update in plan],
            "micro-batch": [part for update in plan for part in update],
            "phase": [list(plain)],
        }[over]
        for part in parts:
            mean, deviation = moments([x for i in part for x in plain[i]])
            yield from ((i, [(x - mean) / deviation for x in plain[i]]) for i in part)

    def row_loss(
        self, i: int, old: list[float], old_values: list[float], white: list[float], returns: list[float], s: Settings
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for t, (logprob, entropy, value) in enumerate(zip(*self.read(self.rollouts[i], s.temperature), strict=True)):
            ratio, a = (logprob - old[t]).exp(), white[t]
            surrogate = torch.minimum(ratio * a, ratio.clamp(1 - s.cliprange, 1 + s.cliprange) * a)
            if s.dual_clip is not None and a < 0:
                surrogate = surrogate.clamp(min=s.dual_clip * a)
            error = (value - returns[t]) ** 2
            if s.cliprange_value is not None:
                near = value.clamp(old_values[t] - s.cliprange_value, old_values[t] + s.cliprange_value)
                error = torch.maximum(error, (near - returns[t]) ** 2)
            total = total - surrogate + s.vf_coef * error / 2 - s.entropy_coef * entropy
            if s.kl_in_loss:
                total = total + s.kl_coef * (logprob - self.reference_logprobs[i][t]) ** 2 / 2
        return total

    def weights(self) -> dict[str, Tensor]:
        critic = {"head": self.head} if self.value is None else {"head": self.value.score.weight[0]}
        inside = (
            {}
            if self.value is None
            else {f"value.{name}": weight for name, weight in self.value.base_model.named_parameters()}
        )
        return {**dict(self.policy.named_parameters()), **critic, **inside}


def moments(numbers: list[float]) -> tuple[float, float]:
    mean = sum(numbers) / len(numbers)
    return mean, (sum((x - mean) ** 2 for x in numbers) / len(numbers) + 1e-8) ** 0.5


def advantages(rewards: list[float], values: list[float], decay: float, gamma: float) -> list[float]:
    """Compute the sum over k >= t of decay^(k - t) delta_k."""
    ahead = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, ahead, strict=True)]
    return [sum(decay ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def trained(done: Fit) -> dict[str, Tensor]:
    critic = done.module.critic
    inside = (
        {}
        if critic.backbone is None
        else {f"value.{name}": w for name, w in critic.backbone.model.base_model.named_parameters()}
    )
    return {**dict(done.module.policy.model.named_parameters()), "head": critic.head.weight[0], **inside}


def difference(done: Fit, s: Settings) -> dict[str, float]:
    """Return, for each weight, how far the module is from the computation with ``s``.

    Every weight moves far enough to see.
    """
    exact = Exact(done)
    before = {name: weight.detach().clone() for name, weight in exact.weights().items()}
    exact.train(done.plan, s)
    after, found = exact.weights(), trained(done)
    assert set(after) == set(found)
    assert (
        max(float((after[name].detach() - before[name]).abs().max()) for name in after if not name.startswith("value."))
        > MOVED
    )
    return {name: float((after[name] - weight).detach().abs().max()) for name, weight in found.items()}


@pytest.fixture(scope="module")
def first(folder) -> Fit:
    """Run a phase from the start, and save its policy to the folder ``moved``."""
    done = fit(folder, replace(SHARED, lr=0.6))
    done.module.policy.save_pretrained(folder / "moved")
    return done


@pytest.fixture(scope="module")
def shared(folder, first) -> Fit:
    return fit(folder, SHARED, "moved", reference="start")


@pytest.fixture(scope="module")
def separate(folder, first) -> Fit:
    return fit(folder, SEPARATE, "moved", reference="start", value="value")


@pytest.mark.parametrize("which", ["first", "shared", "separate"])
def test_a_phase_is_what_plain_loops_make_of_it(which, request):
    done = request.getfixturevalue(which)
    scored = [i for i, rollout in enumerate(done.module.record.rollouts) if rollout.reward is not None]
    assert 5 < len(scored) < 12, [r.completion.text for r in done.module.record.rollouts]
    assert {rollout.completion.finish for rollout in done.module.record.rollouts} == {"stop", "length"}
    passes = [sorted(i for update in done.plan[start : start + 2] for part in update for i in part) for start in (0, 2)]
    assert passes == [scored, scored] and all(len(update) == 2 for update in done.plan)
    assert max(difference(done, done.settings).values()) < CLOSE


ERRORS: dict[str, dict[str, dict[str, Any]]] = {
    "shared": {
        "values that are not clipped": {"cliprange_value": None},
        "a ratio that is hardly clipped": {"cliprange": 0.5},
        "no dual clip": {"dual_clip": None},
        "advantages whitened by micro-batch": {"whitened_over": "micro-batch"},
        "advantages whitened over the phase": {"whitened_over": "phase"},
        "a mean of means of micro-batches": {"denominator": "micro-batch"},
        "rewards of another scale": {"whiten_rewards": False},
        "no KL": {"kl_coef": 0.0},
        "no penalty for a missing end": {"missing_eos_penalty": None},
        "another discount": {"gamma": 0.91},
        "no entropy bonus": {"entropy_coef": 0.0},
        "no texts": {"ptx_coef": 0.0},
    },
    "separate": {
        "KL in the reward": {"kl_in_loss": False},
        "a penalty for a missing end that is subtracted": {"replace_missing_eos": False},
        "one learning rate": {"value_lr": None},
        "another lambda": {"lam": 0.94},
        "another temperature": {"temperature": 0.71},
    },
}


@pytest.mark.parametrize("which", ERRORS)
def test_errors_would_be_seen(which, request):
    done = request.getfixturevalue(which)
    found = {
        error: max(difference(done, replace(done.settings, **change)).values())
        for error, change in ERRORS[which].items()
    }
    assert {error: largest for error, largest in found.items() if largest < 10 * CLOSE} == {}


def test_the_kl_is_0_before_the_first_step_and_not_after(first, shared):
    assert [rollout.kl for rollout in first.module.record.rollouts] == [0.0] * 12
    sums = [rollout.kl for rollout in shared.module.record.rollouts]
    assert sum(map(abs, sums)) / 12 > 0.01
    assert shared.logged["train/sequence_kl"] == pytest.approx(sum(sums) / 12, abs=1e-6)


class One(Reward):
    name = "one"

    def __call__(self, rollouts):
        return [1.0] * len(rollouts)


class Every(RolloutEngine):
    """An engine that gives every completion of at most three tokens, each once."""

    ROWS = [
        ids
        for n in (1, 2, 3)
        for ids in product((A, B, EOS), repeat=n)
        if EOS not in ids[:-1] and (ids[-1] == EOS or n == 3)
    ]

    def sync_weights(self, policy, version):
        """Do nothing: nothing is sampled."""

    def generate(self, prompts, num_generations, sampling, seeds):
        return [
            [Completion(list(row), [0.0] * len(row), "", "stop" if row[-1] == EOS else "length") for row in self.ROWS]
            for _ in prompts
        ]


def test_the_kl_and_the_entropy_are_those_of_the_distribution_of_completions(folder, shared):
    """Over all completions, E[sum of k1] is the KL of whole completions, and E[sum of entropies] is their entropy."""
    sampling = Sampling(temperature=0.7, max_completion_length=3)
    module = PPOModule(shared.policy, One(), len(Every.ROWS), sampling, Every(), kl=KL(reference=shared.reference))
    prompt = [A, B]
    batch: Any = {
        "uid": ["0"],
        "prompt": ["ab"],
        "prompt_ids": [prompt],
        "answer": [None],
        "source": [""],
        "info": [{}],
    }
    with torch.no_grad():
        module.collect(batch)
    exact = Exact(shared)
    exact.policy.requires_grad_(False)
    kl = entropy = mine_kl = mine_entropy = total = 0.0
    for rollout in module.record.rollouts:
        ids = rollout.completion.token_ids
        ours, theirs = (
            sum(
                float(table[token])
                for table, token in zip(exact.logprobs(model, [*prompt, *ids], 2, 0.7)[0], ids, strict=True)
            )
            for model in (exact.policy, exact.reference)
        )
        probability = torch.tensor(ours, dtype=torch.float64).exp().item()
        total += probability
        kl += probability * (ours - theirs)
        entropy -= probability * ours
        mine_kl += probability * rollout.kl
        mine_entropy += probability * rollout.entropy * len(ids)
    assert len(module.record.rollouts) == 15 and total == pytest.approx(1.0, abs=1e-6)
    assert kl > 0.01
    assert mine_kl == pytest.approx(kl, abs=1e-6)
    assert mine_entropy == pytest.approx(entropy, abs=1e-6)
