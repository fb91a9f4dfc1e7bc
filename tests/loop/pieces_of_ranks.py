"""As one of two ranks, trains steps of a few methods on whole micro-batches and in pieces, and resumes a run in pieces.

    python pieces_of_ranks.py FOLDER

For each method ``<method>.<rank>.pt`` holds, of both ways, the first step's gradient and the pieces of each step.
"""

import os
import sys
from pathlib import Path

import fixed_runs
import torch
from resumes import TWO_RANKS, check_resumes, stop_at_a_step
from transformers import AutoConfig

from modules.networks import memory

FEW_TOKENS = 24  # fewer than a row
# A rank has rows of 29, 28, 28, 27 and 26 tokens, the other of 29, 29, 28, 27 and 26, so that 57 make 3 and 4 pieces.
METHODS = {"sft": 57, "kto": FEW_TOKENS, "grpo": FEW_TOKENS}
SETTINGS = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=1"]
SETTINGS += ["--trainer.max_epochs=1", "--trainer.callbacks+=test_pieces.Gradients"]
MORE = {"sft": ["--data.packing=false", "--data.batch_size=5"], "kto": ["--data.batch_size=4"]}

if __name__ == "__main__":
    from test_pieces import Gradients

    folder, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
    of_a_token = memory.count_activation_bytes(AutoConfig.from_pretrained(fixed_runs.START))
    for name, few in METHODS.items():
        found = []
        for tokens in (10_000, few):
            memory.PIECE_BYTES = tokens * of_a_token
            fixed_runs.fit(name, folder / f"{name} {tokens}", *SETTINGS, *MORE.get(name, []))
            found.append((Gradients.gradients[0], list(Gradients.pieces)))
        torch.save(found, folder / f"{name}.{rank}.pt")
    check_resumes(
        "sft", folder / "resumed", *TWO_RANKS, "--data.packing=false", "--data.batch_size=3", stops=[stop_at_a_step]
    )
