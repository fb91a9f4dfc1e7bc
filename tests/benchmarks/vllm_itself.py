"""The engine against vLLM itself, in the environment that ``make vllm-env`` makes.

    make test-vllm        or: python -m pytest tests/benchmarks/vllm_itself.py

A server takes half a minute to start and 3 GB of memory, so that CI runs ``tests/rollout/test_vllm.py`` instead, against
a server that speaks the same protocol. The last test trains configs/tiny/grpo.yaml twice and prints what both runs reach.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from modules.networks.lora import Lora
from modules.networks.policy import Policy
from modules.rollout import InProcessEngine, Sampling, VLLMEngine
from modules.rollout.vllm import vllm_server as server_module
from modules.types import Completion

ROOT = Path(__file__).parents[2]
PYTHON = str(ROOT / ".venv-vllm/bin/python")
SCRIPT = """
import sys, time
from modules.networks.policy import Policy
from modules.rollout import VLLMEngine
engine = VLLMEngine(sys.argv[1], cache_gb=0.25)
engine.sync_weights(Policy("tiny"), 0)
print(engine._server.watcher.pid, engine._weights.path, engine._server.folder, flush=True)
time.sleep(1000)
"""
PROMPTS = [[53 + i, 48, 53 + i % 7, 66] for i in range(20)]
SEEDS = [100 * i for i in range(20)]


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(PYTHON, cache_gb=0.25)
    yield engine
    engine.close()


def make_policy(name: str = "tiny-addition", noise: float = 0.0, lora: Lora | None = None) -> Policy:
    policy = Policy(name, dropout=False, lora=lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(noise * torch.randn_like(weight))
    return policy


def find_gap(
    policy: Policy, prompts: list[list[int]], groups: list[list[Completion]], temperature: float = 1.0
) -> float:
    """Return by how many nats the log-probs of completions differ at most from a plain forward of the policy."""
    gap = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for each in group:
            ids = torch.tensor([prompt + each.token_ids])
            with torch.no_grad():
                logits = policy.model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(each.token_ids)[:, None])[:, 0]
            gap = max(gap, float((expected - torch.tensor(each.logprobs)).abs().max()))
    return gap


def descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [each for child in found for each in descendants(child)]


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_weights_arrive_again_and_again(engine: VLLMEngine) -> None:
    """From random weights to the policy's, to perturbed ones and back, with log-probs and greedy tokens that agree."""
    for version, noise in enumerate((0.0, 0.02, 0.0)):
        policy = make_policy(noise=noise)
        engine.sync_weights(policy, version)
        groups = engine.generate(PROMPTS, 4, Sampling(max_completion_length=20), SEEDS)
        gap = find_gap(policy, PROMPTS, groups)
        assert gap < 1e-4 and {each.policy_version for group in groups for each in group} == {version}
        warm = engine.generate(PROMPTS, 2, Sampling(temperature=0.7, max_completion_length=20), SEEDS)
        assert find_gap(policy, PROMPTS, warm, 0.7) < 1e-4
        inside = InProcessEngine()
        inside.sync_weights(policy, version)
        greedy = Sampling(temperature=0, max_completion_length=20)
        mine, theirs = engine.generate(PROMPTS, 1, greedy, SEEDS), inside.generate(PROMPTS, 1, greedy, SEEDS)
        assert [group[0].token_ids for group in mine] == [group[0].token_ids for group in theirs]
        assert [group[0].text for group in mine] == [group[0].text for group in theirs]
        print(f"log-probs of samples differ by at most {gap:.2g} nats")


def test_seeds_decide(engine: VLLMEngine) -> None:
    engine.sync_weights(make_policy(), 0)
    sampling = Sampling(max_completion_length=8)
    groups = engine.generate(PROMPTS, 4, sampling, SEEDS)
    assert engine.generate(PROMPTS, 4, sampling, SEEDS) == groups
    assert engine.generate(PROMPTS[5:6], 1, sampling, [SEEDS[5] + 2])[0][0].token_ids == groups[5][2].token_ids
    assert len({tuple(each.token_ids) for group in groups for each in group}) > 40


def test_completions_end_where_the_policy_says(engine: VLLMEngine) -> None:
    """Several end tokens, none of them that of the config, and stop strings; up to there a free run is the same."""
    policy = make_policy(noise=0.03)
    policy.stop_token_ids = frozenset()
    engine.sync_weights(policy, 0)
    sampling = Sampling(max_completion_length=30)
    free = engine.generate(PROMPTS, 4, sampling, SEEDS)
    assert {len(each.token_ids) for group in free for each in group} == {30}
    policy.stop_token_ids = frozenset({54, 60})
    ended = engine.generate(PROMPTS, 4, sampling, SEEDS)
    policy.stop_token_ids = frozenset()
    stop = str(policy.tokenizer.decode(free[0][0].token_ids[10:12]))
    stopped = engine.generate(PROMPTS, 4, Sampling(max_completion_length=30, stop=(stop,)), SEEDS)
    for places in ((group, each) for group in range(20) for each in range(4)):
        whole, end, cut = (groups[places[0]][places[1]] for groups in (free, ended, stopped))
        first = next((at for at, token in enumerate(whole.token_ids) if token in (54, 60)), None)
        assert end.token_ids == whole.token_ids[: None if first is None else first + 1]
        assert end.finish == ("length" if first is None else "stop")
        ends = [n for n in range(1, 31) if stop in policy.tokenizer.decode(whole.token_ids[:n])]
        assert cut.token_ids == whole.token_ids[: ends[0] if ends else None]
        assert cut.text == str(policy.tokenizer.decode(whole.token_ids)).split(stop)[0]
    assert stopped[0][0].finish == "stop"


def test_a_prompt_of_older_weights_is_not_kept(engine: VLLMEngine) -> None:
    """Prompts of several blocks of the prefix cache, sampled before and after a sync."""
    prompts = [[5 + (i * 7 + k) % 250 for i in range(400)] for k in range(3)]
    for version, noise in enumerate((0.0, 0.03)):
        policy = make_policy(noise=noise)
        engine.sync_weights(policy, version)
        for _ in range(2):
            groups = engine.generate(prompts, 2, Sampling(max_completion_length=4), [0, 10, 20])
            assert find_gap(policy, prompts, groups) < 1e-4


def test_many_long_prompts_at_a_time(engine: VLLMEngine) -> None:
    """More prompt tokens than the server reads in one step."""
    policy = make_policy()
    engine.sync_weights(policy, 0)
    prompts = [[5 + (i * 7 + k * k) % 250 for i in range(400 + k)] for k in range(12)]
    groups = engine.generate(prompts, 2, Sampling(max_completion_length=4), [10 * k for k in range(12)])
    assert find_gap(policy, prompts, groups) < 1e-4 and engine.last_stats["restarts"] == 0


def test_adapters_are_merged(engine: VLLMEngine) -> None:
    policy = make_policy(noise=0.1, lora=Lora(r=4))
    plain = make_policy()
    engine.sync_weights(policy, 0)
    groups = engine.generate(PROMPTS, 2, Sampling(max_completion_length=8), SEEDS)
    assert find_gap(policy, PROMPTS, groups) < 1e-4 and find_gap(plain, PROMPTS, groups) > 0.1


def test_it_goes_on_with_beginnings(engine: VLLMEngine) -> None:
    policy = make_policy(noise=0.03)
    policy.stop_token_ids = frozenset()
    engine.sync_weights(policy, 0)
    begun = [each for group in engine.generate(PROMPTS, 2, Sampling(max_completion_length=4), SEEDS) for each in group]
    engine.sync_weights(policy, 1)
    groups = engine.generate(PROMPTS, 2, Sampling(max_completion_length=9), SEEDS, started=begun)
    assert find_gap(policy, PROMPTS, groups) < 1e-4
    for beginning, each in zip(begun, (each for group in groups for each in group), strict=True):
        assert each.token_ids[:4] == beginning.token_ids and each.token_versions == [0] * 4 + [1] * 5


def test_a_server_that_is_killed_is_replaced(engine: VLLMEngine) -> None:
    """First its worker is killed, then the process that answers; the same seeds give the same samples."""
    policy = make_policy()
    engine.sync_weights(policy, 2)
    request: tuple[Any, ...] = (PROMPTS, 4, Sampling(max_completion_length=30), SEEDS)
    expected = engine.generate(*request)
    for place in (-1, 0):
        assert engine._server is not None
        pids = descendants(engine._server.watcher.pid)
        os.kill(pids[place], signal.SIGKILL)
        with pytest.warns(UserWarning, match="the server is lost .* it is started again, and 20 of 20 requests"):
            assert engine.generate(*request) == expected
        assert len(pids) >= 3 and all(map(is_gone, pids))
    pids = descendants(engine._server.watcher.pid)
    engine.close()
    assert len(pids) >= 3 and all(map(is_gone, pids))


def test_nothing_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    before = {path.name for path in Path("/dev/shm").glob("psm_*")}
    run = subprocess.Popen(
        [sys.executable, str(script), PYTHON],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.stdout is not None
    watcher, *folders = run.stdout.readline().split()
    pids = [int(watcher), *descendants(int(watcher))]
    run.kill()
    run.wait()
    wait_until(lambda: all(map(is_gone, pids)), 30)
    assert len(pids) >= 4 and not any(Path(folder).exists() for folder in folders)
    assert {path.name for path in Path("/dev/shm").glob("psm_*")} <= before


@pytest.mark.parametrize("tied", [True, False])
def test_another_architecture(tied: bool, tmp_path: Path) -> None:
    config = Qwen3Config(
        **{"vocab_size": 261, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied},
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    Policy("tiny").tokenizer.save_pretrained(tmp_path)
    policy = make_policy(str(tmp_path), noise=0.01)
    engine = VLLMEngine(PYTHON, cache_gb=0.25)
    try:
        engine.sync_weights(policy, 0)
        groups = engine.generate(PROMPTS, 2, Sampling(max_completion_length=8), SEEDS)
        assert find_gap(policy, PROMPTS, groups) < 1e-4
    finally:
        engine.close()


def test_without_the_repair_the_run_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM 0.32 leaves the old output head of a tied model in place on CPU; the probe tells."""
    shutil.copytree(server_module.SIDE, tmp_path / "side")
    module = tmp_path / "side/weight_files.py"
    repaired = module.read_text()
    module.write_text(
        repaired.replace(
            "            pack_tied_heads(self.model, self.model_config.hf_text_config)", "            pass"
        )
    )
    assert module.read_text() != repaired
    monkeypatch.setattr(server_module, "SIDE", tmp_path / "side")
    engine = VLLMEngine(PYTHON, cache_gb=0.25)
    with pytest.raises(
        RuntimeError, match="the server computes other log-probs than the policy: the probe differs by"
    ) as raised:
        engine.sync_weights(make_policy(), 0)
    print(raised.value)
    engine.close()


def test_grpo_reaches_what_the_in_process_engine_reaches(tmp_path: Path) -> None:
    reached, rewards, seconds = {}, {}, {}
    for name, options in (
        ("in process", []),
        ("vllm", ["--model.engine=VLLMEngine", f"--model.engine.python={PYTHON}", "--model.engine.cache_gb=0.25"]),
    ):
        start = time.monotonic()
        fit = ["-m", "modules", "fit", "--config", str(ROOT / "configs/tiny/grpo.yaml"), "--logger=csv"]
        fit += [f"--out={tmp_path / name.replace(' ', '-')}", "--trainer.enable_progress_bar=false", *options]
        subprocess.run([sys.executable, *fit], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
        seconds[name] = time.monotonic() - start
        (file,) = (tmp_path / name.replace(" ", "-")).rglob("metrics.csv")
        rows = list(csv.DictReader(file.open()))
        reached[name] = [round(float(row["val/pass@1"]), 3) for row in rows if row.get("val/pass@1")]
        rewards[name] = [round(float(row["train/reward"]), 3) for row in rows if row.get("train/reward")]
        print(f"{name}: val/pass@1 {reached[name]}, train/reward {rewards[name]}")
    print({name: round(value) for name, value in seconds.items()})
    early, late = (sum(values) / len(values) for values in (rewards["vllm"][:5], rewards["vllm"][-10:]))
    assert late - early > 0.1 and abs(late - sum(rewards["in process"][-10:]) / 10) < 0.08
