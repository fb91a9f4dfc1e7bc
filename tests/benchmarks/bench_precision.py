"""Measures how far the log-probs of rows move when a model computes them under autocast to bf16.

Run: python tests/benchmarks/bench_precision.py MODEL_FOLDER ROWS.jsonl
"""

import json
import sys
from pathlib import Path

import torch

from modules.networks.policy import Policy

ROWS = 8


@torch.no_grad()
def measure(model: str, rows: list[dict[str, str]]) -> torch.Tensor:
    """Return the differences [tokens] of the completions' log-probs, in nats."""
    policy, gaps = Policy(model, dropout=False), []
    for row in rows:
        prompt, whole = (
            len(policy.tokenizer(text).input_ids) for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        ids = torch.tensor([policy.tokenizer(row["prompt"] + row["completion"]).input_ids])
        mask = torch.arange(whole)[None] >= prompt
        exact = policy.token_scores(ids, mask).logprobs
        with torch.autocast("cpu", torch.bfloat16):
            rounded = policy.token_scores(ids, mask).logprobs
        gaps.append((rounded.float() - exact)[mask])
    return torch.cat(gaps)


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()[:ROWS]
    gaps = measure(sys.argv[1], [json.loads(line) for line in lines]).abs()
    print(
        f"log-probs in bf16-mixed against fp32, nats per token: mean {gaps.mean():.4f}, "
        f"largest of {len(gaps)} {gaps.max():.3f}"
    )
