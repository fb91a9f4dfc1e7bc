"""Reuse of rollouts: exact by counts on a small vocabulary, whatever the weights, the buckets and the settings."""

import math
import os
import time
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from modules.networks.policy import Policy
from modules.rollout import InProcessEngine, Reuse, Sampling
from modules.rollout.phases.reuse import Drafts
from modules.rollout.scoring import make_batch, make_rollouts, score_in_chunks
from modules.types import Completion, PromptBatch

SIZE, EOS, LENGTH = 9, 2, 3
PROMPTS = [[3, 4, 5], [6]]
STOP, STOP_IDS = "a b", (3, 4)
COUNT = 3000  # completions of a prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a random model that knows nine words."""
    path = tmp_path_factory.mktemp("small")
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": EOS} | {word: 3 + i for i, word in enumerate("abcdef")}))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def move(policy: Policy, size: float = 0.15) -> None:
    """Change the weights as an update would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))


class Phases:
    """Samples phases of the prompts as a module does, each with seeds of its own."""

    def __init__(
        self, policy: Policy, num_generations: int, sampling: Sampling, prompts: list[list[int]] = PROMPTS
    ) -> None:
        self.policy, self.count, self.sampling, self.prompts = policy, num_generations, sampling, prompts
        self.engine, self.drafts, self.phase = InProcessEngine(), Drafts(policy, sampling), 0

    def run(self) -> list[list[Completion]]:
        self.engine.sync_weights(self.policy, self.phase)
        seeds = [10**9 * self.phase + 10**7 * i for i in range(len(self.prompts))]
        with torch.no_grad():
            found = self.drafts.generate(self.engine, self.prompts, self.count, seeds, self.phase)
            self.phase += 1
            names = [str(i) for i in range(len(self.prompts))]
            prompts = PromptBatch(
                uid=names, prompt=names, prompt_ids=self.prompts, answer=names, source=names, info=[{}] * len(names)
            )
            rollouts = make_rollouts(prompts, found, None)
            batch = make_batch(rollouts, torch.device("cpu"))
            score = self.drafts.noting(
                lambda part: (self.policy.completion_scores(part, self.sampling.temperature).logprobs,)
            )
            _, *noted = score_in_chunks(self.policy, score, batch)
        self.metrics = self.drafts.remember(rollouts, *noted)
        return found


def probabilities(policy: Policy, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Enumerate all completions with their probabilities, by plain forwards and a plain cut of the distribution."""
    done: dict[tuple[int, ...], float] = {}
    going = {(): 1.0}
    for step in range(LENGTH):
        rows = list(going)
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + list(row) for row in rows])).logits[:, -1].double()
        chances = (logits / sampling.temperature).softmax(-1)
        after: dict[tuple[int, ...], float] = {}
        for row, chance in zip(rows, chances.tolist(), strict=True):
            kept = sorted(range(SIZE), key=lambda token: -chance[token])[: sampling.top_k or SIZE]
            total = sum(chance[token] for token in kept)
            for token in kept:
                ends = token == EOS or bool(sampling.stop) and (*row, token)[-2:] == STOP_IDS
                whole = ends or step == LENGTH - 1
                (done if whole else after)[(*row, token)] = going[row] * chance[token] / total
        going = after
    return done


def sigmas(found: list[Completion], expected: dict[tuple[int, ...], float]) -> float:
    """Return by how many standard deviations the chi-square of the counts is too large; rare completions are pooled."""
    counts = Counter(tuple(each.token_ids) for each in found)
    if not set(counts) <= set(expected):
        return math.inf
    cells = [(counts[key], len(found) * chance) for key, chance in expected.items()]
    rare = [cell for cell in cells if cell[1] < 10]
    cells = [cell for cell in cells if cell[1] >= 10]
    pooled = (sum(count for count, _ in rare), sum(mean for _, mean in rare))
    cells += [pooled] if pooled[1] >= 10 else []
    chi = sum((count - mean) ** 2 / mean for count, mean in cells)
    return (chi - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def settings(reuse: Reuse, **values: Any) -> Sampling:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sampling(max_completion_length=LENGTH, reuse=reuse, **values)


def check_metrics(
    found: dict[str, float], drafts: list[Completion], after: list[Completion], seconds: float, later: float
) -> None:
    """Compare a phase's metrics with counts of equal tokens, and with the test's own clock of both phases."""
    pairs = [(old.token_ids, new.token_ids) for old, new in zip(drafts, after, strict=True)]
    kept = [len(os.path.commonprefix([old, new])) for old, new in pairs]
    tokens = sum(len(new) for _, new in pairs)
    assert found["reuse/tokens"] == sum(kept) / tokens and 0.2 < sum(kept) / tokens < 0.95
    assert found["reuse/prefix_length"] == sum(kept) / len(kept)
    assert found["reuse/whole"] == sum(old == new for old, new in pairs) / len(pairs)
    # The drafts took at most ``seconds``, and so would as many tokens; the phase with drafts took at most ``later``.
    assert 0 < found["reuse/verification_time"] < later
    assert -later < found["reuse/saved_time"] < seconds * tokens / sum(len(old) for old, _ in pairs)


CASES: list[tuple[Reuse, dict[str, Any]]] = [
    (Reuse(buckets=1), {}),
    (Reuse(buckets=3), {"temperature": 0.7}),
    (Reuse(buckets=32), {"stop": (STOP,)}),
    (Reuse(lenience=0.6, buckets=3), {}),
    (Reuse(buckets=2), {"top_k": 5}),
]


@pytest.mark.parametrize(("reuse", "values"), CASES, ids=str)
def test_completions_are_distributed_as_without_reuse(folder: Path, reuse: Reuse, values: dict[str, Any]) -> None:
    policy, sampling = Policy(str(folder), dropout=False), settings(reuse, **values)
    phases = Phases(policy, COUNT, sampling)
    clock = [time.perf_counter()]
    drafts = phases.run()
    clock.append(time.perf_counter())
    olds = [probabilities(policy, prompt, sampling) for prompt in PROMPTS]
    move(policy)
    clock.append(time.perf_counter())
    found = phases.run()
    clock.append(time.perf_counter())
    check_metrics(phases.metrics, [*chain(*drafts)], [*chain(*found)], clock[1] - clock[0], clock[3] - clock[2])
    for prompt, old, group in zip(PROMPTS, olds, found, strict=True):
        expected = probabilities(policy, prompt, sampling)
        assert sigmas(group, expected) < 5
        assert sigmas(group, old) > 50  # the counts tell the weights of the second phase from those of the first
        for each in group:
            assert each.token_versions == [1] * len(each.token_ids) and each.versions is None
            ends = each.token_ids[-1] == EOS or bool(sampling.stop) and tuple(each.token_ids[-2:]) == STOP_IDS
            assert each.finish == ("stop" if ends else "length")
            if each.finish == "stop":  # log-probs are those of the weights now, of accepted tokens too
                assert sum(each.logprobs) == pytest.approx(math.log(expected[tuple(each.token_ids)]), abs=1e-3)


def test_equal_weights_and_a_large_lenience_keep_everything(folder: Path) -> None:
    policy = Policy(str(folder), dropout=False)
    phases = Phases(policy, 50, settings(Reuse(lenience=1e9)))
    first = phases.run()
    for changes in (False, True):
        if changes:
            move(policy, 0.5)
        found = phases.run()
        assert [[each.token_ids for each in group] for group in found] == [
            [each.token_ids for each in group] for group in first
        ]
        assert phases.metrics["reuse/tokens"] == phases.metrics["reuse/whole"] == 1.0
        assert (
            phases.metrics["reuse/prefix_length"] == sum(len(each.token_ids) for group in first for each in group) / 100
        )
    equal = Phases(policy, 50, settings(Reuse(buckets=1)))  # a token that is not compared by itself stays as well
    assert equal.run() != found
    equal.run()
    assert equal.metrics["reuse/whole"] == 1.0


def test_a_lenience_below_one_draws_tokens_anew_though_the_weights_stay(folder: Path) -> None:
    phases = Phases(Policy(str(folder), dropout=False), COUNT, settings(Reuse(lenience=0.7)))
    drafts = [each for group in phases.run() for each in group]
    phases.run()
    # a token stays if it is accepted, or drawn once more
    kept = [math.prod(0.7 + 0.3 * math.exp(x) for x in each.logprobs) for each in drafts]
    mean = sum(kept) / len(kept)
    assert abs(phases.metrics["reuse/whole"] - mean) < 5 * math.sqrt(mean * (1 - mean) / len(kept))
    assert mean < 0.9


def test_a_draft_makes_one_completion(folder: Path) -> None:
    """A prompt that is drawn twice in a phase has drafts for one of its two instances."""
    policy = Policy(str(folder), dropout=False)
    phases = Phases(policy, 20, settings(Reuse()), [[3, 4, 5], [3, 4, 5]])
    phases.run()
    phases.run()
    assert phases.metrics["reuse/prefix_length"] > 1
    assert 0.3 < phases.metrics["reuse/whole"] < 0.7
