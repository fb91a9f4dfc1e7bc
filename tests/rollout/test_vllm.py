"""The engine over HTTP against a server that speaks vLLM's protocol; ``make test-vllm`` runs it against vLLM itself."""

import copy
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, Holder, build, ragged
from fakes import FakeVLLM, running_fake
from lightning.pytorch import Trainer, seed_everything
from programs import Program

from callbacks.stages.averaged_weights import AveragedWeights
from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule
from modules.networks.lora import Lora, add_adapters
from modules.rewards import NumericMatch
from modules.rollout import InProcessEngine, RolloutEngine, Sampling, VLLMEngine
from modules.rollout.phases.partial import PartialRollouts
from modules.rollout.thinking import Thinking
from modules.rollout.vllm import vllm_engine as vllm_module
from modules.rollout.vllm import weight_folder as folder_module
from modules.types import Completion

SCRIPT = """
import sys, time
from modules.networks.policy import Policy
from modules.rollout import VLLMEngine
engine = VLLMEngine(python=sys.argv[1])
engine.sync_weights(Policy("tiny-small"), 0)
print(engine._weights.path, engine._server.folder, engine._server.log, flush=True)
if sys.argv[2] == "crash":
    raise ZeroDivisionError
while True:
    time.sleep(1)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    """Give an environment of the test's own, whose servers leave their logs in the test's folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return FakeVLLM(tmp_path)


@pytest.fixture(scope="module")
def shared() -> FakeVLLM:
    """A server with tied embeddings that the tests attach to."""
    return running_fake("llama")


@pytest.fixture
def attached(shared: FakeVLLM) -> Iterator[Callable[..., VLLMEngine]]:
    """Give attached(), which makes an engine on the server that runs already."""
    shared.set_faults()
    engines: list[VLLMEngine] = []

    def attach(**settings: Any) -> VLLMEngine:
        engines.append(VLLMEngine(url=shared.url, **settings))
        return engines[-1]

    yield attach
    shared.set_faults()
    for engine in engines:
        engine.close()


@pytest.fixture
def policy() -> Holder:
    return build(FAST["llama"])


def settings(**values: Any) -> Sampling:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sampling(**values)


def in_process(policy: Holder, version: int = 3) -> InProcessEngine:
    engine = InProcessEngine()
    engine.sync_weights(policy, version)
    return engine


def perturb(policy: Holder, factor: float = 1.01) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(factor)


def same(found: list[list[Completion]], expected: list[list[Completion]]) -> bool:
    """Whether two engines gave the same, up to float noise in the log-probs."""
    pairs = [pair for groups in zip(found, expected, strict=True) for pair in zip(*groups, strict=True)]
    close = all(mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4) for mine, theirs in pairs)
    return close and all(replace(mine, logprobs=[]) == replace(theirs, logprobs=[]) for mine, theirs in pairs)


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pick_stop(policy: Holder) -> str:
    """Return a text of two tokens that some completions have."""
    free = in_process(policy).generate([[20, 21]], 30, Sampling(max_completion_length=30), [4])[0]
    pairs = [each.token_ids[at : at + 2] for each in free for at in range(5, len(each.token_ids) - 1)]
    texts = [str(policy.tokenizer.decode(pair)) for pair in pairs if all(5 <= token < 261 for token in pair)]
    return next(text for text in texts if len(text) == 2 and text.isprintable() and "\ufffd" not in text)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 7},
        {"top_p": 0.8},
        {"stop": ("never", "stop")},
        {"stop": ("<|im_start|>", "stop")},
        {"stop": ("<|im_start|>", "stop"), "keep_stop": True},
    ],
)
def test_it_gives_what_the_policy_samples(attached: Any, policy: Holder, values: dict[str, Any]) -> None:
    """The fake server samples as the in-process engine does, so whatever the way there and back changes would show."""
    policy.stop_token_ids = frozenset({2, *range(5, 300, 9)})  # several end tokens, not those of the config
    stops = tuple(pick_stop(policy) if stop == "stop" else stop for stop in values.get("stop", ()))
    sampling = settings(**values | {"stop": stops}, max_completion_length=12)
    engine, prompts, seeds = attached(), ragged(7), [10 * i + 2**29 for i in range(7)]
    engine.sync_weights(policy, 3)
    found = engine.generate(prompts, 4, sampling, seeds)
    assert same(found, in_process(policy).generate(prompts, 4, sampling, seeds))
    completions = [each for group in found for each in group]
    assert {each.finish for each in completions} == {"stop", "length"} and {
        each.policy_version for each in completions
    } == {3}
    # a greedy completion is sampled once
    sampled = sum(len(each.token_ids) for each in completions) // (1 if sampling.temperature else 4)
    assert engine.last_stats.items() >= {"requests": 7, "tokens": sampled, "restarts": 0}.items()


def test_a_sync_replaces_all_weights_once(
    attached: Any, shared: FakeVLLM, policy: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files are sent; the same request gets new samples, so that the cache was cleared; equal weights of the
    same version are not sent again.
    """
    monkeypatch.setattr(folder_module, "BUCKET", 2**16)
    engine, request = attached(), (ragged(3), 2, Sampling(max_completion_length=8), [0, 10, 20])
    engine.sync_weights(policy, 3)
    before = engine.generate(*request)
    perturb(policy)
    assert engine.generate(*request) == before  # it has a copy
    start = len(shared.calls)
    engine.sync_weights(policy, 4)
    calls = shared.calls[start:]
    files = calls.count("/update_weights")
    assert files > 3
    assert calls[: files + 6] == [
        *("/pause", "/start_weight_update", *["/update_weights"] * files, "/finish_weight_update"),
        *("/reset_prefix_cache", "/resume", "/weight_info"),
    ]
    after = engine.generate(*request)
    assert after != before and same(after, in_process(policy, 4).generate(*request))
    sent = shared.calls.count("/update_weights")
    engine.sync_weights(policy, 4)
    assert shared.calls.count("/update_weights") == sent
    engine.sync_weights(policy, 5)
    assert shared.calls.count("/update_weights") == sent + files
    assert engine.generate(*request)[0][0].policy_version == 5
    perturb(policy)  # other weights of the same version, as an average has in validation
    engine.sync_weights(policy, 5)
    assert same(engine.generate(*request), in_process(policy, 5).generate(*request))
    assert len(list(engine._weights.path.iterdir())) == files  # type: ignore[union-attr]


def test_adapters_are_merged(attached: Any, policy: Holder) -> None:
    add_adapters(policy.model, Lora(r=3))
    engine, request = attached(), (ragged(3), 2, Sampling(max_completion_length=8), [0, 10, 20])
    plain = in_process(policy).generate(*request)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    engine.sync_weights(policy, 3)
    found = engine.generate(*request)
    assert found != plain and same(found, in_process(policy).generate(*request))


def test_it_goes_on_with_beginnings(attached: Any, policy: Holder) -> None:
    """A beginning keeps its tokens, log-probs and versions; what follows depends on the seed and its length; a stop
    string may begin in it.
    """
    policy.stop_token_ids = frozenset()
    engine, prompt = attached(), [20, 21]
    engine.sync_weights(policy, 4)
    whole = Sampling(max_completion_length=12)
    begun = in_process(policy, 3).generate([prompt], 3, Sampling(max_completion_length=5), [7])[0]
    begun[1] = Completion([], [], "", "length", 3)
    found = engine.generate([prompt], 3, whole, [7], started=begun)[0]
    assert found == engine.generate([prompt], 3, whole, [7], started=begun)[0]
    assert found[1].token_ids == engine.generate([prompt], 3, whole, [7])[0][1].token_ids
    for beginning, each in zip(begun, found, strict=True):
        count = len(beginning.token_ids)
        assert len(each.token_ids) == 12 and each.token_ids[:count] == beginning.token_ids
        assert each.logprobs[:count] == beginning.logprobs and each.token_versions == [3] * count + [4] * (12 - count)
    assert found[0].token_ids[5:] != engine.generate([prompt], 1, whole, [8], started=begun[:1])[0][0].token_ids[5:]
    seam = str(policy.tokenizer.decode(found[0].token_ids[4:6]))
    stopped = engine.generate([prompt], 1, Sampling(max_completion_length=12, stop=(seam,)), [7], started=begun[:1])[0][
        0
    ]
    assert stopped.token_ids == found[0].token_ids[:6] and stopped.finish == "stop" and len(stopped.token_versions) == 6
    assert stopped.text == policy.tokenizer.decode(found[0].token_ids[:4])


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (
            {"half_update": True},
            r"the update of its weights failed \(/update_weights has status 500: .*no room on the dev",
        ),
        ({"cache_in_use": 10**9}, r"the update of its weights failed \(its prefix cache is still in use"),
        ({"version": "17"}, r"the server has weights of version 17, not 3.1: something else updates it"),
        (
            {"stale_head": True},
            r"the server computes other log-probs than the policy: the probe differs by \S+ nats, more",
        ),
    ],
)
def test_a_failed_update_ends_all_sampling(
    attached: Any,
    policy: Holder,
    monkeypatch: pytest.MonkeyPatch,
    shared: FakeVLLM,
    faults: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(folder_module, "BUCKET", 2**16)
    monkeypatch.setattr(vllm_module, "RESETS", 2)
    engine = attached()
    perturb(policy, 1 + len(faults) / len(reason))  # weights that no other test has sent
    shared.set_faults(**faults)
    with pytest.raises(RuntimeError, match=f"^VLLMEngine: {reason}") as raised:
        engine.sync_weights(policy, 3)
    assert "\n" not in str(raised.value)
    shared.set_faults()
    for act in (lambda: engine.generate([[7]], 1, Sampling(), [1]), lambda: engine.sync_weights(policy, 4)):
        with pytest.raises(RuntimeError, match=f"^VLLMEngine: nothing can be sampled any more: {reason}"):
            act()


def test_blocks_that_are_still_held_are_waited_for(attached: Any, policy: Holder, shared: FakeVLLM) -> None:
    engine = attached()
    shared.set_faults(cache_in_use=shared.calls.count("/reset_prefix_cache") + 3)
    engine.sync_weights(policy, 3)
    assert shared.calls[-9:-4].count("/reset_prefix_cache") >= 3 or shared.calls.count("/reset_prefix_cache") > 3


def test_nonsense_is_not_taken_for_an_answer(attached: Any, policy: Holder, shared: FakeVLLM) -> None:
    engine = attached()
    engine.sync_weights(policy, 3)
    shared.set_faults(at_seed=5, how="garbage")
    with pytest.raises(RuntimeError, match=r"VLLMEngine: the server is lost \(the answer lacks 'logprobs'\)"):
        engine.generate([[7], [8]], 1, Sampling(), [1, 5])


def test_a_sync_waits_for_sampling_in_another_thread(attached: Any, policy: Holder, shared: FakeVLLM) -> None:
    engine, found = attached(), []
    engine.sync_weights(policy, 3)
    request = (ragged(20), 4, Sampling(max_completion_length=20), list(range(0, 200, 10)))
    expected = in_process(policy).generate(*request)
    thread = threading.Thread(target=lambda: found.append(engine.generate(*request)))
    start = len(shared.calls)
    thread.start()
    wait_until(lambda: "/v1/completions" in shared.calls[start:])
    perturb(policy)
    engine.sync_weights(policy, 4)
    thread.join()
    assert same(found[0], expected)  # a paused server would have answered 503


def test_a_server_that_hangs_or_dies_is_replaced(fake: FakeVLLM, policy: Holder) -> None:
    """What it owes is sampled again with the same seeds and weights; ``each_phase`` ends it behind the phase."""
    engine = VLLMEngine(str(fake.python), teardown="each_phase", timeout=3.0)
    request = (ragged(6), 3, Sampling(max_completion_length=8), list(range(0, 60, 10)))
    expected = in_process(policy).generate(*request)
    engine.sync_weights(policy, 3)
    perturb(policy)  # the policy trains on
    pids = fake.pids
    for how, reason in (("hang", "it has made no progress for 3 s"), ("die", "/v1/completions: .*")):
        fake.set_faults(at_seed=30, how=how)
        with pytest.warns(
            UserWarning, match=rf"the server is lost \({reason}\); it is started again, and [1-6] of 6 re"
        ):
            assert same(engine.generate(*request), expected)
        assert engine.last_stats["restarts"] == 1 and all(map(is_gone, pids))
        pids = fake.pids
    engine.release()
    assert all(map(is_gone, pids)) and not engine._weights.files
    with pytest.raises(ValueError, match="it has given its memory back; call sync_weights before generate"):
        engine.generate(*request)
    engine.close()


def test_no_process_outlives_the_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three runs end by SIGKILL, by Ctrl-C and by an error; servers, their children and files are gone."""
    fakes = {how: FakeVLLM(tmp_path_factory.mktemp(how)) for how in ("kill", "interrupt", "crash")}
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    runs = {
        how: Program(
            str(script),
            str(each.python),
            how,
            folder=tmp_path,
            environment=os.environ | {"TMPDIR": str(tmp_path)},
        )
        for how, each in fakes.items()
    }
    try:
        for how, run in runs.items():
            wait_until(lambda run=run: run.said()[0].count("\n") == 1, 240)  # type: ignore[misc]
            if how != "crash":
                assert not any(map(is_gone, fakes[how].pids))
                os.kill(run.process.pid, signal.SIGKILL if how == "kill" else signal.SIGINT)
        for how, run in runs.items():
            files = [Path(name) for name in run.said()[0].split()]
            wait_until(lambda how=how: all(map(is_gone, fakes[how].pids)))  # type: ignore[misc]
            wait_until(lambda files=files: not any(file.exists() for file in files[:2]))  # type: ignore[misc]
    finally:
        for run in runs.values():
            with run:
                pass


def make_module(engine: RolloutEngine) -> GRPOModule:
    seed_everything(1)
    return GRPOModule(
        "tiny-addition",
        NumericMatch(),
        num_generations=4,
        engine=engine,
        importance=False,  # which only a copy of the weights has by default
        sampling=Sampling(max_completion_length=5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
    )


class Folded(InProcessEngine):
    """Draws with the seeds that the server gets."""

    def generate(self, prompts: Any, num_generations: int, sampling: Sampling, seeds: list[int]) -> Any:  # type: ignore[override]
        return super().generate(prompts, num_generations, sampling, [vllm_module.fold_seed(seed) for seed in seeds])


def fit(engine: RolloutEngine) -> list[torch.Tensor]:
    module = make_module(engine)
    trainer = Trainer(
        **{"max_epochs": 3, "logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        accelerator="cpu",
        callbacks=[AveragedWeights(0.5)],
        check_val_every_n_epoch=2,
    )
    data = VerifiableDataModule(module.tokenizer, Addition(40), Addition(6, held_out=True), prompts_per_phase=8)
    trainer.fit(module, data)
    return [weight.detach().clone() for weight in module.policy.parameters()]


def test_grpo_through_a_server_is_grpo(fake: FakeVLLM) -> None:
    """The server's samples are those of the in-process engine, so that three phases train to the same weights, also with
    averaged weights, whose copy of the module shares the engine and whose validation has weights of its own.
    """
    engine = VLLMEngine(str(fake.python))
    assert copy.deepcopy(engine) is engine
    through, inside = fit(engine), fit(Folded())
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(through, inside, strict=True))
    assert all(map(is_gone, fake.pids)) and engine._server is None
    log = fake.calls
    assert log.count("/start_weight_update") == log.count("/reset_prefix_cache") >= 4


@pytest.mark.parametrize("budget", [0, 5, (2, 9)])
def test_thinking_budgets_are_kept_as_in_process(
    attached: Callable[..., VLLMEngine], policy: Holder, budget: int | tuple[int, ...]
) -> None:
    """Greedy, behind prompts that open a thought and others: a thought is cut, and what follows is that of one process."""
    prompts = [[*prompt, *policy.tokenizer("<think>").input_ids] for prompt in ragged(6)] + ragged(3)
    sampling = Sampling(temperature=0, max_completion_length=30, thinking=Thinking(budget, "</think>"))
    engine = attached()
    engine.sync_weights(policy, 3)
    found = engine.generate(prompts, 2, sampling, list(range(0, 90, 10)))
    assert same(found, in_process(policy).generate(prompts, 2, sampling, list(range(0, 90, 10))))
    assert sum(not all(each.sampled or [True]) for group in found for each in group) >= 8


def test_a_call_samples_a_segment_of_each_completion(attached: Callable[..., VLLMEngine], policy: Holder) -> None:
    policy.stop_token_ids = frozenset()
    engine, prompts, seeds = attached(), [[5, 6, 7], [8, 9]], [3, 40]
    engine.sync_weights(policy, 3)
    sampling = Sampling(max_completion_length=11, partial=PartialRollouts(4))
    first = [each for group in engine.generate(prompts, 2, sampling, seeds) for each in group]
    assert [(len(each.token_ids), each.finish) for each in first] == [(4, "length")] * 4
    begun = [replace(each, token_ids=each.token_ids[:n], logprobs=each.logprobs[:n]) for n, each in enumerate(first)]
    begun[3] = replace(first[3], token_ids=[7] * 9, logprobs=[-1.0] * 9)
    second = [each for group in engine.generate(prompts, 2, sampling, seeds, begun) for each in group]
    assert [len(each.token_ids) for each in second] == [0 + 4, 1 + 4, 2 + 4, 11]  # and not 9 + 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"python": "nowhere/python"}, "there is no interpreter nowhere/python: run make vllm-env"),
        ({"python": sys.executable}, "the environment of .* has no vLLM: run make vllm-env"),
        ({"python": "/bin/true"}, "/bin/true is not a Python interpreter that runs: run make vllm-env"),
        ({"max_model_len": 1, "cache_gb": 0}, "max_model_len 1 must be >= 2; cache_gb 0 must be > 0"),
        ({"max_staleness": -1, "timeout": 0}, "max_staleness -1 must be >= 0; timeout 0 must be > 0 seconds"),
        ({"url": "127.0.0.1:80"}, "url '127.0.0.1:80' must be such as http://127.0.0.1:8000"),
        ({"url": "http://127.0.0.1:80", "teardown": "each_phase"}, "teardown each_phase must be at_end where url"),
        (
            {"url": "http://127.0.0.1:80", "arguments": ("--x",)},
            "arguments are those of a server that the engine starts",
        ),
        (
            {"arguments": ("--dtype=half", "--max_logprobs", "3")},
            "arguments has --dtype, --max-logprobs, which the engine",
        ),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^VLLMEngine: {message}"):
        VLLMEngine(**values)


def test_a_seed_is_folded_to_32_bits() -> None:
    fold = vllm_module.fold_seed
    seeds = [7, 2**32 + 7, 2**61 + 7, 2**61 + 2**40 + 7]
    assert len({fold(seed) for seed in seeds}) == 4 and fold(7) == 7
    assert all(0 <= fold(seed) < 2**32 and fold(seed + 3) == (fold(seed) + 3) % 2**32 for seed in seeds)


def test_impossible_requests_are_refused(attached: Any, policy: Holder) -> None:
    engine = attached(max_model_len=20)
    with pytest.raises(ValueError, match="call sync_weights"):
        engine.generate([[7]], 1, Sampling(), [1])
    engine.sync_weights(policy, 0)
    for prompt, sampling, message in (
        ([], Sampling(), "prompts .0. have no tokens"),
        ([7] * 100, Sampling(max_completion_length=30), "the model has 128 positions"),
        ([7] * 10, Sampling(max_completion_length=11), "make 21 tokens, max_model_len is 20"),
        ([7], Sampling(temperature=0.005), "no temperature between 0 and 0.01, got 0.005"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([prompt], 1, sampling, [1])
    assert len(engine.generate([[7]], 1, Sampling(max_completion_length=2), [1])[0]) == 1
    with torch.no_grad():
        policy.model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        engine.sync_weights(policy, 1)


def test_a_server_that_cannot_be_used_is_refused(
    attached: Any, shared: FakeVLLM, fake: FakeVLLM, policy: Holder
) -> None:
    shared.set_faults(config={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(RuntimeError, match="has logprobs_mode raw_logprobs, not processed_logprobs; start it with"):
        attached().sync_weights(policy, 0)
    with pytest.raises(RuntimeError, match="the server at http://127.0.0.1:9 is not there, or not set up"):
        VLLMEngine(url="http://127.0.0.1:9").sync_weights(policy, 0)
    with pytest.raises(ValueError, match="teardown sleep needs a GPU, and vLLM is built for CPUs; use each_phase"):
        VLLMEngine(str(fake.python), teardown="sleep")
    fake.set_faults(no_start=True)
    with pytest.raises(
        RuntimeError, match=r"ended before it was ready; its log \S+ says: RuntimeError: no room for the cache$"
    ):
        VLLMEngine(str(fake.python)).sync_weights(policy, 0)
