"""Phases of one update, which measure the log-probs that they start from in their own forward pass: the same numbers."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from test_grpo import ASCII, QUIET, Gradients
from test_ppo import EOS, A, B, Scores, Scripted
from test_tools import Numbered, Traces

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule, OnlineDPOModule
from modules.generation import Validation
from modules.losses import CISPO, GSPO, Advantage, MirrorDescent
from modules.networks import memory
from modules.rewards import RegexFormat
from modules.rollout import InProcessEngine, PartialRollouts, Sampling
from modules.rollout.phases.dynamic_sampling import DynamicSampling


class CopyEngine(InProcessEngine):
    """Samples each phase but the first from a copy of the weights with which the phase before began."""

    copies_weights, max_staleness = True, 1

    def sync_weights(self, policy, version):
        self.own = copy.deepcopy(policy)
        super().sync_weights(self.own, version)


CLOCKS = ("time", "second", "engine/")  # in the names of metrics that depend on the clock


class Logged(Logger):
    """Keeps every number that is logged, by step."""

    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics, step=None) -> None:
        kept = {name: value for name, value in metrics.items() if not any(clock in name for clock in CLOCKS)}
        self.found |= {(name, step): value for name, value in kept.items()}

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


class Seen(Callback):
    """Keeps the micro-batches, and the record of each phase at its end."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.records: list[list[Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(dict(batch))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.records.append(list(pl_module.record.rollouts))


def fit(module: Any, *callbacks: Callback, phases: int = 3, prompts: int = 4, **settings: Any) -> Logged:
    logged, data = Logged(), {name: settings.pop(name) for name in ("updates_per_phase", "chat") if name in settings}
    quiet = QUIET | {"logger": logged, "log_every_n_steps": 1} | settings
    rows = VerifiableDataModule(module.tokenizer, Addition(400), prompts_per_phase=prompts, **data)
    Trainer(**quiet, max_epochs=phases, callbacks=list(callbacks)).fit(module, rows)
    return logged


def make(kind: type, beforehand: bool, **settings: Any) -> Any:
    """Make a module whose phases score all completions ``beforehand``, or leave that to the update."""
    seed_everything(0)
    kind = type(kind.__name__, (kind,), {"prepares_from_scores": lambda self: True}) if beforehand else kind
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=6)} | settings
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}
    return kind("tiny", **{"reward": RegexFormat(r"[\x00-\x7f].*")} | optimizer | settings)


PARTS = Sampling(max_completion_length=8, partial=PartialRollouts(3))
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "clipped": (GRPOModule, {"measure_kl": True}),
    "kl_loss": (GRPOModule, {"beta": 0.1, "objective": CISPO()}),
    "entropy": (GRPOModule, {"entropy": 0.01, "objective": GSPO()}),
    "mirror_descent": (GRPOModule, {"objective": MirrorDescent(), "measure_kl": True}),
    "mask_truncated": (GRPOModule, {"mask_truncated": True, "measure_kl": True}),
    "refreshed": (GRPOModule, {"beta": 0.1, "refresh_every": 1}),
    "dynamic_sampling": (
        GRPOModule,
        {
            "dynamic_sampling": DynamicSampling(),
            "validation": Validation(accuracy=ASCII),
            "reward": ASCII,
            "measure_kl": True,
        },
    ),
    "partial": (GRPOModule, {"sampling": PARTS, "beta": 0.05}),
    "partial_without_kl": (GRPOModule, {"sampling": PARTS}),
    "staleness": (GRPOModule, {"engine": CopyEngine(), "importance": False, "measure_kl": True}),
    "tools": (GRPOModule, {"engine": Traces(), "reward": Numbered(), "measure_kl": True}),
    "online_dpo": (OnlineDPOModule, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_update_measures_what_a_pass_before_it_does(case, monkeypatch):
    """Weights, metrics and record are those of a run that scores each phase beforehand, in two micro-batches of pieces."""
    kind, settings = CASES[case]
    runs = []
    for beforehand in (False, True):
        if case == "staleness":
            settings = settings | {"engine": CopyEngine()}
        module, seen = make(kind, beforehand, **settings), Seen()
        of_token = memory.count_activation_bytes(module.policy.model.config)
        monkeypatch.setattr(memory, "PIECE_BYTES", (1000 if beforehand else 40) * of_token)
        start = [weight.detach().clone() for weight in module.parameters()]
        logged = fit(module, seen, accumulate_grad_batches=1 if beforehand else 2, chat=case == "tools" or None)
        assert all(("old_logprobs" in batch) == beforehand for batch in seen.batches)
        runs.append((list(module.parameters()), logged.found, seen.records))
    (mine, metrics, records), (weights, expected, known) = runs
    for one, other in zip(mine, weights, strict=True):
        torch.testing.assert_close(one.data, other.data, atol=2e-6, rtol=0)
    assert any(not torch.equal(before, one.data) for before, one in zip(start, mine, strict=True))
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        if name[0] != "train/num_tokens":  # a prompt whose completions two micro-batches share is computed in both
            assert value == pytest.approx(expected[name], abs=2e-4, nan_ok=True), name
    for one, other in zip(sum(records, []), sum(known, []), strict=True):
        assert one.completion.token_ids == other.completion.token_ids and one.trainer_version == other.trainer_version
        for name in ("entropy", "kl", "k3", "trainer_logprobs"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=2e-4), name
        assert one.entropy is not None and len(one.trainer_logprobs) == len(one.completion.token_ids)


class Heads(Callback):
    """Counts the tokens that the policy scores, with and without gradient."""

    def __init__(self) -> None:
        self.counts = {True: 0, False: 0}

    def on_fit_start(self, trainer, pl_module) -> None:
        def count(head, inputs):
            self.counts[torch.is_grad_enabled()] += inputs[0].shape[0]

        pl_module.policy.model.get_output_embeddings().register_forward_pre_hook(count)


ROWS = [([A, B, EOS], "stop"), ([A, B, EOS], "stop"), ([A, A], "length"), ([B, A, A, EOS], "stop")]


def test_each_completion_is_computed_once():
    """Of two prompts one has a signal: its completions are computed with gradient, the other's without; equal ones once."""
    heads = Heads()
    scores = Scores(1.0, 0.0, 0.75, 0.5, *[0.3] * 4)
    module = make(GRPOModule, False, engine=Scripted(ROWS), reward=scores)
    fit(module, heads, phases=1, prompts=2)
    assert heads.counts == {True: 3 + 2 + 4, False: 3 + 2 + 4}
    assert all(rollout.entropy is not None for rollout in module.record.rollouts)


def test_equal_completions_teach_what_they_teach_one_by_one():
    """The gradient is that of a plain sum over all four completions, two of which are equal and have other advantages."""
    module, seen = make(GRPOModule, False, engine=Scripted(ROWS), reward=Scores(1.0, 0.0, 0.5, 0.25)), Gradients()
    start = {name: value.clone() for name, value in module.policy.state_dict().items()}
    fit(module, seen, phases=1, prompts=1)
    ((batch, _, found),) = seen.steps
    module.policy.load_state_dict(start)
    module.policy.zero_grad()
    prompt, loss = batch["prompt_ids"][0].tolist(), torch.zeros(())
    for (ids, _), advantage in zip(ROWS, batch["advantages"][:, 0].tolist(), strict=True):
        logits = module.policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * logits[range(len(ids)), torch.tensor(ids)].sum() / (3 + 3 + 2 + 4)
    loss.backward()
    by_loop = torch.cat([parameter.grad.flatten() for parameter in module.policy.parameters()])
    torch.testing.assert_close(found, by_loop, atol=2e-6, rtol=1e-3)
    assert float(found.abs().max()) > 1e-3


class Reader(Advantage):
    """An advantage of one's own that reads the log-probs of the phase."""

    def __call__(self, batch):
        return batch["old_logprobs"].sum(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": Reader()},
        {"importance": True},
        {"beta": 0.1, "kl_loss": None},
        {"updates_per_phase": 2},
        {"sampling": Sampling(max_completion_length=8, partial=PartialRollouts(3, learn_earlier=False))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_needs_the_log_probs_before_the_update_has_them(settings):
    updates, seen = settings.pop("updates_per_phase", 1), Seen()
    module = make(GRPOModule, False, **settings)
    fit(module, seen, phases=1, updates_per_phase=updates)
    assert all("old_logprobs" in batch and "row" not in batch for batch in seen.batches)


def test_a_reference_that_is_not_the_policy_is_refused_before_the_update():
    module = make(GRPOModule, False, beta=0.1)
    with torch.no_grad():
        module.reference.weights["model.model.norm.weight"] += 0.5
    with pytest.raises(ValueError, match="policy and reference differ before the first update"):
        fit(module)
