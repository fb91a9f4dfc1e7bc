"""Which right answers are no good data: thoughts that conclude otherwise, by hand, and words of held-out questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from callbacks import VerifiedSamples
from callbacks.measures.sample_filters import contradicts_thought, find_runs
from callbacks.writers.sample_writer import JudgedSample
from datamodules import VerifiableDataModule
from modules import GRPOModule
from modules.generation import Validation
from modules.rewards import ExactMatch, RegexFormat
from modules.rollout import Sampling

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.parametrize(
    ("thought", "final", "contradicts"),
    [
        ("3 + 4 = 7, so the answer is 7.", "The answer is 8.", True),
        ("3 + 4 = 7, so the answer is 7.", "Seven and no more: 7.0", False),
        ("So \\boxed{3}.", "Thus x = 4", True),
        ("So \\boxed{3}.", "It is \\boxed{4}. I also thought of 3", True),
        ("Answer: 1/2", "0.5", False),
        ("The final answer should be -3", "3", True),
        ("The answer is 12? Wait, no: 3*5 = 15. So 15.", "**15**", False),  # taken back
        ("The answer is 12? Wait, no: 3*5 = 15, and not 16", "**15**", False),
        ("The answer is 12. Wait, 15! The answer is 12.", "15", True),
        ("12*3 = 36\n36", "It is 35.", True),
        ("12*3 = 36\nCheck: 36/3 = 12", "36", False),  # a check is no conclusion
        ("The answer must be B.", "(B) Paris", False),
        ("The answer must be B.", "C", True),
        ("Answer: Paris", "The capital is Paris.", False),
        ("Answer: Paris", "Rome", True),
        ("The answer is what I said at the beginning", "Rome", False),
        ("The answer is twelve", "12", False),  # not of one kind
        ("no", "5", False),
        ("", "5", False),
        ("The answer is 5.", " ", False),
    ],
)
def test_an_answer_against_its_thought(thought: str, final: str, contradicts: bool) -> None:
    for opened in ("<think>", ""):  # the prompt may open it
        assert contradicts_thought(f"{opened}{thought}</think>\n\n{final}") is contradicts
    assert not contradicts_thought(f"{thought}\n{final}")


def test_runs_of_words() -> None:
    assert find_runs("A b, c A b!", 2) == {("a", "b"), ("b", "c"), ("c", "a")}
    assert find_runs("A b", 3) == set()


def test_a_contradiction_is_left_out_and_counted() -> None:
    samples = [JudgedSample(f"<think>answer: {n}</think>2", 9, True, True, {}) for n in (1, 2)]
    found = VerifiedSamples(consistent=True).choose(samples)
    assert [row["completion"] for row in found.columns] == ["<think>answer: 2</think>2"]
    assert found.counts == {"contradicts its thought": 1, "kept": 1}
    assert len(VerifiedSamples().choose(samples).columns) == 2


def write(path: Path, questions: list[str], chat: bool) -> str:
    """Write prompts, as texts or as conversations that all begin alike."""
    prompts = [ask(text) for text in questions] if chat else questions
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return str(path)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Of two and three"}, {"role": "user", "content": text}]


def test_what_is_like_held_out_rows_is_left_out(tmp_path: Path) -> None:
    train = ["7+*=", "7~=", "Sum of two and three, please.", "How much is two and four?"]
    everything = RegexFormat(r"[\s\S]*", name="all")
    settings = {"num_generations": 64, "seed": 0, "sampling": Sampling(max_completion_length=60)}
    for chat in (False, True):  # the words of the system's message are nobody's question
        val = write(tmp_path / "val.jsonl", ["7+*=", "the sum of two and three"], chat)
        data = VerifiableDataModule(train=write(tmp_path / "train.jsonl", train, chat), val=val, chat=chat)
        module = GRPOModule("tiny", ExactMatch(), validation=Validation(accuracy=everything), **settings)
        callbacks = [VerifiedSamples(unlike_held_out=3)]
        Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **QUIET).predict(module, data)
        file = tmp_path / ("verified-2.jsonl" if chat else "verified.jsonl")
        written = [json.loads(line)["prompt"] for line in file.read_text().split("\n")[:-1]]
        assert {str(prompt) for prompt in written} == {str(ask(text) if chat else text) for text in train[1::2]}
        report = json.loads((tmp_path / f"{file.name}.report.json").read_text())
        assert report["sampled/like held-out rows"] > 0
    data = VerifiableDataModule(train=str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match=r"unlike_held_out compares with the rows of data\.val: set data\.val"):
        Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **QUIET).predict(module, data)
    with pytest.raises(ValueError, match="unlike_held_out must be at least 1, got 0"):
        VerifiedSamples(unlike_held_out=0)
