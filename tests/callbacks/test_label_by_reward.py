"""Labels from rewards: a rule, a rubric and a learned reward score each candidate once, and ranks follow the scores."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from callbacks.writers.preference_writer import PreferenceWriter
from datamodules.formats.preference_shapes import preference_example
from datamodules.formats.reading import Reading
from datamodules.predict.candidates import CandidatesDataModule
from datamodules.sources import Files
from modules import RewardModule
from modules.networks.tiny import tiny_tokenizer
from modules.predict.label import LabelModule, describe_judge
from modules.rewards import ExactMatch, HttpChat, LearnedReward, RubricJudge, WeightedSum
from modules.types import Completion, Reward, Rollout

ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "completions": ["3", "2.", "2"], "answer": "2"},
    {"prompt": "2+2=", "completions": ["1", "2"], "answer": "4", "label": 2},
    {"prompt": "3+3=", "completions": ["6", "7"], "answer": None, "label": 1},
    {"prompt": "4+4=", "completions": ["8", "9"], "answer": "8", "label": 1},
]
GOLD = ExactMatch(r"(\d+)\.*")


def label(
    file: Path, judge: Reward, rows: list[dict[str, Any]] = ROWS, batch_size: int = 3
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    (file.parent / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = CandidatesDataModule(str(file.parent / "in.jsonl"), batch_size=batch_size)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", devices=1, callbacks=[PreferenceWriter(str(file))], **quiet).predict(
        LabelModule(judge), data
    )
    report = json.loads(file.with_name(f"{file.name}.report.json").read_text())
    return [json.loads(line) for line in file.read_text().splitlines()], report


def test_a_rule_ranks(tmp_path: Path) -> None:
    rows, report = label(tmp_path / "out.jsonl", GOLD)
    # wrong, right, right: one is better than the first, none than the others; the third row has no answer to check
    assert [(row["prompt"], row["ranks"], row["scores"]) for row in rows] == [
        ("1+1=", [2, 0, 0], [0.0, 1.0, 1.0]),
        ("2+2=", [0, 0], [0.0, 0.0]),
        ("4+4=", [0, 1], [1.0, 0.0]),
    ]
    # of the given labels 2 and 1 the second is found again
    assert report == {"comparisons": 0, "invalid": 1, "ties": 1, "rows": 3, "given": 2, "agreement": 0.5}
    examples = [preference_example(row, Reading("preference")) for row in Files(str(tmp_path / "out.jsonl")).rows()]
    assert [example and example.ranks for example in examples] == [[1, 0, 0], None, [0, 1]]


def test_a_rubric_asks_once_a_candidate(tmp_path: Path, chat_server: Any) -> None:
    server = chat_server(
        lambda question: (
            "Score: 10"
            if re.search(r"\[Answer \w+\]\n2\n", question)
            else "hm"
            if re.search(r"\[Answer \w+\]\n7\n", question)
            else "Score: 4"
        )
    )
    rows, report = label(tmp_path / "out.jsonl", RubricJudge(HttpChat(server.url, "m"), "right?"))
    assert len(server.requests) == 9  # 3 + 2 + 2 + 2
    assert [row["scores"] for row in rows] == [
        pytest.approx([1 / 3, 1 / 3, 1.0]),
        pytest.approx([1 / 3, 1.0]),
        pytest.approx([1 / 3, 1 / 3]),
    ]
    assert [row["ranks"] for row in rows] == [[1, 1, 0], [1, 0], [0, 0]]
    assert (report["invalid"], report["requests"], report["prompt_tokens"]) == (1, 9, 900)


def test_a_learned_reward_scores_what_a_policy_would_get(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    RewardModule("tiny").save_pretrained(tmp_path / "reward")
    learned = LearnedReward(str(tmp_path / "reward"))
    rows, _ = label(tmp_path / "out.jsonl", learned, ROWS[:1])
    tokenizer = tiny_tokenizer()
    completions = [
        Completion([*tokenizer(text).input_ids, tokenizer.eos_token_id], [], text, "stop")
        for text in ROWS[0]["completions"]
    ]
    expected = learned(
        [Rollout("u", "1+1=", tokenizer("1+1=").input_ids, None, completion, 0, {}, None) for completion in completions]
    )
    assert rows[0]["scores"] == pytest.approx(expected)
    assert len(set(expected)) == 3


def test_a_stopped_run_goes_on_with_the_same_rule_alone(tmp_path: Path) -> None:
    label(tmp_path / "out.jsonl", GOLD)
    written = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "in.jsonl").unlink()

    class Stops(ExactMatch):
        calls = 0

        def __call__(self, rollouts: Any) -> Any:
            Stops.calls += 1
            if Stops.calls == 2:
                raise RuntimeError("stopped")
            return super().__call__(rollouts)

    with pytest.raises(ValueError, match="reward .* failed at .* RuntimeError: stopped"):
        label(tmp_path / "again.jsonl", Stops(r"(\d+)\.*"), batch_size=1)
    with pytest.raises(ValueError, match="was started with another judge or other rows"):
        label(tmp_path / "again.jsonl", GOLD)
    label(tmp_path / "again.jsonl", Stops(r"(\d+)\.*"))
    assert (tmp_path / "again.jsonl").read_bytes() == written
    assert Stops.calls == 4  # the first row, the stop; then the second and third, and the fourth


def test_a_reward_is_described_by_what_it_was_made_with() -> None:
    assert describe_judge(GOLD) == r"ExactMatch(name='exact_match', pattern=(\d+)\.*)"
    both = [WeightedSum([GOLD], [weight]) for weight in (0.5, 1.0)]
    assert (
        describe_judge(both[0]) == f"WeightedSum(name='weighted_sum', rewards=[{describe_judge(GOLD)}], weights=[0.5])"
    )
    judges = [RubricJudge(HttpChat("http://127.0.0.1:9/v1", "m"), rubric) for rubric in ("short", "kind", "short")]
    judges[2].counts["scored"] += 1
    assert describe_judge(judges[0]) == describe_judge(judges[2]) != describe_judge(judges[1])
