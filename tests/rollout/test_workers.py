"""The engine of worker processes, with real ones: what it samples, what it proves, and what is left of it."""

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GENERAL, SIZES, Holder, build, ragged
from programs import Program
from transformers import AutoTokenizer, Qwen3Config

from modules.networks.lora import Lora, add_adapters, merge_adapters
from modules.networks.tiny import tiny_tokenizer
from modules.rollout import InProcessEngine, Sampling, Thinking, WorkerEngine
from modules.rollout.workers.worker_engine import check_completion, join_stats, share_out
from modules.types import Completion

SAMPLING = Sampling(max_completion_length=20)
Groups = list[list[Completion]]


@pytest.fixture(scope="module")
def policy() -> Holder:
    """Give a model with many positions that ends few completions."""
    return build(Qwen3Config(**SIZES | {"head_dim": 32, "max_position_embeddings": 2048}))


@pytest.fixture(scope="module")
def engine(policy: Holder) -> Iterator[WorkerEngine]:
    found = WorkerEngine(workers=2, timeout=6.0)
    found.sync_weights(policy, 3)
    yield found
    found.close()


def close_to(found: Groups, expected: Groups, gap: float = 1e-4) -> bool:
    """Whether these are the same completions up to float noise of their log-probs."""
    pairs = [(a, b) for mine, theirs in zip(found, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    return all(
        replace(a, logprobs=[]) == replace(b, logprobs=[]) and a.logprobs == pytest.approx(b.logprobs, abs=gap)
        for a, b in pairs
    )


def in_process(policy: Holder, version: int, *request: Any, **more: Any) -> Groups:
    engine = InProcessEngine()
    engine.sync_weights(policy, version)
    return engine.generate(*request, **more)


def pids(engine: WorkerEngine) -> list[int]:
    return [process.child.pid for process in engine._crew.processes if process is not None]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_samples_what_the_policy_would(engine: WorkerEngine, policy: Holder) -> None:
    request = ragged(9), 3, SAMPLING, list(range(0, 90, 10))
    found = engine.generate(*request)
    assert close_to(found, in_process(policy, 3, *request))
    assert {each.policy_version for group in found for each in group} == {3}
    assert found == engine.generate(*request)
    assert engine.last_stats["replaced"] == 0 and engine.last_stats["prefill_tokens"] == sum(map(len, request[0]))
    assert engine.last_stats["tail_seconds"] >= 0 and engine.last_stats["sync_seconds"] > 0
    assert engine.generate([], 3, SAMPLING, []) == []
    assert close_to(engine.generate([[7]], 2, SAMPLING, [5]), in_process(policy, 3, [[7]], 2, SAMPLING, [5]))
    with pytest.raises(ValueError, match=r"prompts \[1\] have no tokens"):
        engine.generate([[5], []], 1, SAMPLING, [0, 1])


def test_it_goes_on_with_what_was_begun_and_keeps_budgets(engine: WorkerEngine, policy: Holder) -> None:
    request = ragged(5), 2, SAMPLING, list(range(0, 50, 10))
    whole = [each for group in engine.generate(*request) for each in group]
    cut = [
        replace(each, token_ids=each.token_ids[: i % 7], logprobs=each.logprobs[: i % 7], policy_version=1)
        for i, each in enumerate(whole)
    ]
    cut = [each if len(each.token_ids) < len(old.token_ids) else replace(each, token_ids=[], logprobs=[])
           for each, old in zip(cut, whole, strict=True)]  # fmt: skip
    found = engine.generate(*request, started=cut)
    assert close_to(found, in_process(policy, 3, *request, started=cut))
    assert [each.token_ids for group in found for each in group] == [each.token_ids for each in whole]
    thinking = replace(SAMPLING, max_completion_length=60, thinking=Thinking(budget=(4, 9), stop_text="</think>\n"))
    request = ragged(4), 2, thinking, [0, 10, 20, 30]
    assert close_to(engine.generate(*request), in_process(policy, 3, *request))


def test_new_weights_are_taken_and_proved(engine: WorkerEngine, policy: Holder) -> None:
    request = ragged(6), 2, SAMPLING, list(range(0, 60, 10))
    before, workers = engine.generate(*request), pids(engine)
    first = engine._crew.processes[0]
    assert first is not None
    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(engine.generate, *request)
        while not first.tasks and not sampling.done():
            time.sleep(0.001)
        with torch.no_grad():
            policy.model.lm_head.weight.mul_(1.5)
        with torch.inference_mode():  # as in a validation
            engine.sync_weights(policy, 4)  # waits for the thread, which samples from the copy that it began with
        assert sampling.result() == before
    found = engine.generate(*request)
    assert found != before and close_to(found, in_process(policy, 4, *request)) and pids(engine) == workers
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.9)
    engine.sync_weights(policy, 4)  # averaged weights, for example, have the same version
    assert close_to(engine.generate(*request), in_process(policy, 4, *request))
    engine.sync_weights(policy, 3)


def test_killed_and_stopped_workers_are_replaced_and_nothing_is_lost(engine: WorkerEngine, policy: Holder) -> None:
    request = ragged(8), 4, replace(SAMPLING, max_completion_length=600), list(range(0, 80, 10))
    expected, old = engine.generate(*request), pids(engine)

    def attack() -> None:
        first = engine._crew.processes[0]
        while first is not None and not first.tasks:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(old[0], signal.SIGKILL)
        os.kill(old[1], signal.SIGSTOP)

    thread = threading.Thread(target=attack)
    thread.start()
    found = engine.generate(*request)
    thread.join()
    assert engine.last_stats["replaced"] == 2 and not set(pids(engine)) & set(old)
    assert not any(map(is_alive, old)) and found == expected


def test_a_copy_is_a_new_engine_with_the_same_settings(engine: WorkerEngine) -> None:
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert (other.workers, other.timeout, other.teardown) == (2, 6.0, "at_end") and not pids(other)


def test_a_wrong_weight_stops_the_run_by_its_name(engine: WorkerEngine, policy: Holder) -> None:
    assert engine._weights is not None
    bits = engine._weights._views["model.layers.1.mlp.up_proj.weight"].view(torch.int32)
    bits[3, 5] ^= 1
    with pytest.raises(RuntimeError, match=r"another weight model.layers.1.mlp.up_proj.weight than the policy"):
        engine.sync_weights(policy, 5)
    with pytest.raises(ValueError, match="call sync_weights"):
        engine.generate([[5]], 1, SAMPLING, [0])
    bits[3, 5] ^= 1


def test_a_model_that_computes_something_else_stops_the_run(engine: WorkerEngine, policy: Holder) -> None:
    def scale(module: Any, inputs: Any, output: Any) -> Any:
        return output * 1.01

    hook = policy.model.lm_head.register_forward_hook(scale)
    with pytest.raises(RuntimeError, match=r"the probe differs by [\d.]+ nats, more than 0.0001"):
        engine.sync_weights(policy, 6)
    hook.remove()


def test_memory_is_given_back_after_each_phase(tmp_path: Path) -> None:
    """A 16-bit policy with adapters and a tokenizer of a folder; its weights take 40 MB."""
    config = copy.deepcopy(GENERAL["gpt2"])
    config.update({"vocab_size": 20000, "n_embd": 1024, "n_layer": 1, "initializer_range": 0.02})
    policy = build(config)
    add_adapters(policy.model, Lora(r=2))
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    policy.model.bfloat16()
    tiny_tokenizer().save_pretrained(tmp_path)
    policy.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    engine = WorkerEngine(workers=1, teardown="each_phase")
    before = shared_megabytes()
    engine.sync_weights(policy, 1)
    assert shared_megabytes() - before > 30
    request = ragged(4), 2, SAMPLING, [0, 10, 20, 30]
    found, workers = engine.generate(*request), pids(engine)
    plain = Holder(merge_adapters(policy.model), policy.tokenizer, policy.stop_token_ids)
    for mine, theirs in zip(found, in_process(plain, 1, *request), strict=True):
        assert mine[0].logprobs[0] == pytest.approx(theirs[0].logprobs[0], abs=0.2)
    assert len(workers) == 1 and worker_megabytes(workers[0]) > 100
    engine.release()
    assert not is_alive(workers[0]) and shared_megabytes() - before < 1
    with pytest.raises(ValueError, match="call sync_weights"):
        engine.generate(*request)
    engine.close()


def shared_megabytes() -> float:
    """Return how much memory that is shared with others this process has."""
    return read_status("self", "RssShmem")


def worker_megabytes(pid: int) -> float:
    return read_status(str(pid), "VmRSS")


def read_status(process: str, name: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


TRAINER = """
import sys
sys.path.append({tests!r})
from conftest import FAST, build, ragged
from modules.rollout import Sampling, WorkerEngine
policy = build(FAST["qwen3"])
engine = WorkerEngine(workers=1)
engine.sync_weights(policy, 0)
print(engine._crew.processes[0].child.pid, flush=True)
if "crash" in sys.argv:
    raise ZeroDivisionError
while True:
    engine.generate(ragged(64), 8, Sampling(max_completion_length=100), list(range(0, 640, 10)))
"""


def test_no_worker_and_no_memory_outlives_the_trainer(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(tests=str(Path(__file__).parent)))
    ends: Sequence[Any] = (signal.SIGKILL, signal.SIGINT, "crash")
    programs = [Program(str(script), str(end), folder=tmp_path) for end in ends]
    try:
        for end, program in zip(ends, programs, strict=True):
            limit = time.monotonic() + 120
            while not program.said()[0].endswith("\n") and time.monotonic() < limit:
                time.sleep(0.05)
            worker = int(program.said()[0])
            if end != "crash":
                assert is_alive(worker)
                maps = Path(f"/proc/{worker}/maps").read_text()
                assert (
                    "/memfd:weights (deleted)" in maps and "/dev/shm" not in maps
                )  # no file that could be left behind
                time.sleep(0.3)  # it samples
                os.kill(program.process.pid or 0, end)
            program.process.join(90)
            assert not program.process.is_alive(), program.said()[1]
            limit = time.monotonic() + 60
            while is_alive(worker) and time.monotonic() < limit:
                time.sleep(0.05)
            assert not is_alive(worker), end
    finally:
        for program in programs:
            program.__exit__()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"workers": 0}, "workers 0 must be a whole number >= 1"),
        ({"teardown": "never"}, "teardown 'never' must be at_end or each_phase"),
        ({"timeout": float("nan")}, "timeout nan must be a finite number of seconds >= 1"),
        ({"max_staleness": -1}, "max_staleness -1 must be >= 0"),
        ({"teardown": "each_phase", "max_staleness": 1}, "set one of them"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"WorkerEngine: .*{problem}"):
        WorkerEngine(**settings)


def test_prompts_are_shared_out_by_length() -> None:
    assert share_out([9, 1, 8, 2, 3], 2) == [[0, 1, 3], [2, 4]]  # 9 | 8, 8+3, 9+2, 11+1
    assert share_out([4, 4, 4, 4], 3) == [[0, 3], [1], [2]]
    assert share_out([], 2) == [[], []]


GOOD = Completion([5, 6, 7], [-1.0, -0.5, -2.0], "abc", "length", 4, versions=[2, 4, 4])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"token_ids": [5, 6], "versions": [2, 4]}, "3 log-probs for 2 tokens"),
        ({"token_ids": [5, 6, 99]}, "outside the vocabulary of 99"),
        ({"token_ids": [5, 6, -1]}, "outside the vocabulary"),
        ({"token_ids": [5, 6, 1.0]}, "no numbers"),
        ({"token_ids": [5, 6, True]}, "no numbers"),
        ({"token_ids": [4, 6, 7]}, "another beginning"),
        ({"token_ids": [5], "logprobs": [-1.0], "versions": [2]}, "1 tokens, of at most 3"),
        ({"token_ids": [5, 6, 7, 8], "logprobs": [-1.0] * 4, "versions": [2, 4, 4, 4]}, "4 tokens, of at most 3"),
        ({"logprobs": [-1.0, float("nan"), -2.0]}, "not finite"),
        ({"logprobs": [-1.0, -float("inf"), -2.0]}, "not finite"),
        ({"policy_version": 3}, "version 3, not 4"),
        ({"versions": [2, 3, 4]}, "version"),
        ({"versions": [2, 4]}, "version"),
        ({"sampled": [True]}, "a marking of 1 tokens for 3"),
        ({"finish": "abort"}, "the finish 'abort'"),
        ({"text": None}, "a text"),
    ],
)
def test_nonsense_is_seen(change: dict[str, Any], fault: str) -> None:
    check_completion(GOOD, [5], 3, 4, 99)
    with pytest.raises(ValueError, match=fault):
        check_completion(replace(GOOD, **change), [5], 3, 4, 99)


def test_numbers_of_workers_are_joined() -> None:
    numbers = [
        {"decode_steps": 5.0, "slots": 2.0, "occupancy": 0.5},
        {"decode_steps": 9.0, "slots": 3.0, "occupancy": 1.0},
    ]
    assert join_stats(numbers) == {"decode_steps": 9.0, "slots": 5.0, "occupancy": 0.75}
    assert join_stats([]) == {}
