"""Measures how fast this machine multiplies matrices of a model's shapes, in fp32 and in bf16.

Run: python tests/benchmarks/bench_rates.py MODEL_FOLDER [--seconds 2]

It prints one line of JSON: GFLOP/s by precision, and the instruction set that PyTorch uses.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

ROWS = 1024  # tokens of a micro-batch
VOCABULARY = 8192  # columns of the output head, which is computed in parts


def list_products(config: dict[str, int]) -> list[tuple[int, int, int]]:
    """Return [rows, inner, columns] of the products of one layer and of a part of the output head, by the config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    keys = width * config.get("num_key_value_heads", heads) // heads
    linear = [(width, width), (width, keys), (width, keys), (width, width)]
    linear += [(width, inner), (width, inner), (inner, width)]
    linear.append((width, min(VOCABULARY, config["vocab_size"])))
    return [(ROWS, ins, outs) for ins, outs in linear]


def measure(products: list[tuple[int, int, int]], dtype: torch.dtype, seconds: float) -> float:
    """Return GFLOP/s over the products, each as forward and both backward passes; the best of all turns."""
    operands: list[tuple[Tensor, Tensor, Tensor]] = [
        (torch.randn(rows, ins, dtype=dtype), torch.randn(outs, ins, dtype=dtype), torch.randn(rows, outs, dtype=dtype))
        for rows, ins, outs in products
    ]
    flops = sum(6 * rows * ins * outs for rows, ins, outs in products)
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        for states, weight, gradient in operands:
            states @ weight.T
            gradient @ weight
            gradient.T @ states
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    shapes = list_products(json.loads((Path(asked.model) / "config.json").read_text(encoding="utf-8")))
    rates = {name: measure(shapes, getattr(torch, name), asked.seconds) for name in ("float32", "bfloat16")}
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({**rates, "capability": capability, "threads": torch.get_num_threads()}))
