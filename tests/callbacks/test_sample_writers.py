"""VerifiedSamples and LongToShortPairs: choices by hand, and real runs whose files are counted again and trained on."""

import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from programs import Program, run_program, run_ranks

from callbacks import LongToShortPairs, PassRates, PredictionWriter, VerifiedSamples
from callbacks.writers.sample_writer import JudgedSample
from datamodules import Addition, Files, InstructionDataModule, PreferenceDataModule, VerifiableDataModule
from modules import GRPOModule, SFTModule
from modules.generation import Validation
from modules.networks.tiny import tiny_tokenizer
from modules.rewards import ExactMatch, NumericMatch, RegexFormat, WeightedSum
from modules.rollout.engine import InProcessEngine
from modules.rollout.environment import Environment
from modules.rollout.sampling import Sampling
from modules.rollout.thinking import Thinking

ROOT = Path(__file__).parents[2]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def sample(text: str, length: int, right: bool | None = True, stopped: bool = True, **rewards: Any) -> JudgedSample:
    return JudgedSample(text, length, stopped, right, rewards)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Fails(InProcessEngine):
    """The real engine, which fails before its call number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at, self.prompts = 0, at, 0

    def generate(self, prompts: Any, *arguments: Any) -> Any:
        self.calls, self.prompts = self.calls + 1, self.prompts + len(prompts)
        if self.calls == self.at:
            raise ValueError("gave up")
        return super().generate(prompts, *arguments)


def predict(folder: Path, callbacks: list[Any], train: Any = None, **options: Any) -> GRPOModule:
    """Sample 8 answers of each of 48 sums, hot enough for wrong, long and unfinished ones."""
    settings = {"num_generations": 8, "engine": options.pop("engine", None), "seed": options.pop("seed", 0)}
    reward = options.pop("reward", None) or WeightedSum([NumericMatch(), RegexFormat(r"\d*[02468]", name="even")])
    accuracy = Validation(accuracy=options.pop("accuracy", None) or ExactMatch())
    sampling = Sampling(temperature=1.8, max_completion_length=12)
    module = GRPOModule("tiny-addition", reward, sampling=sampling, validation=accuracy, **settings)
    data = VerifiableDataModule(train=train or Addition(48, seed=0), val_batch_size=10, seed=0)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=folder, **QUIET | options)
    trainer.predict(module, data)
    return module


def test_what_is_kept_by_hand() -> None:
    drawn = [
        sample("long", 9, even=1.0),
        sample("cut", 6, stopped=False, even=1.0),
        sample("bad", 3, right=False, even=1.0),
        sample("what", 3, right=None, even=1.0),
        sample(" ", 1, even=1.0),
        sample("<think>\n", 1, even=1.0),  # the prompt opened it, and nothing followed
        sample("odd", 4, even=0.0),
        sample("none", 4, even=None),
        sample("short", 5, even=1.0),
        sample("long", 9, even=1.0),
        sample("middle", 7, even=1.0),
        JudgedSample("by budget", 2, True, True, {"even": 1.0}, limited=True),
    ]
    kept = VerifiedSamples({"even": 1.0}, per_prompt=2).choose(drawn)
    assert [row["completion"] for row in kept.columns] == ["long", "short"]
    expected = {"unfinished": 1, "wrong": 1, "not judged": 1, "empty": 2, "below even": 2, "repeated": 1}
    expected |= {"thought ended by its budget": 1, "kept": 2, "surplus": 1}
    assert kept.counts == Counter(expected) and kept.counts.total() == 12
    kept = VerifiedSamples({"even": 1.0}, per_prompt=2, shortest=True).choose(drawn)
    assert [row["completion"] for row in kept.columns] == ["short", "middle"]
    assert [row["completion"] for row in VerifiedSamples().choose(drawn).columns] == [
        *("long", "odd", "none", "short", "middle")
    ]
    assert VerifiedSamples().choose(drawn[1:4]).columns == []


def test_pairs_by_hand() -> None:
    """Kimi k1.5, section 2.4: right ones of 100, 140 and 160 tokens, wrong ones of 120 and 90."""
    drawn = [sample("r140", 140), sample("w120", 120, False), sample("r100", 100), sample("w90", 90, False)]
    drawn += [sample("r160", 160)]
    made = LongToShortPairs().choose(drawn)
    assert made.columns == [{"chosen": "r100", "rejected": text} for text in ("w120", "r160")]
    assert made.counts == Counter({"chosen": 1, "rejected": 2, "right and not long": 1, "wrong and not longer": 1})
    assert [row["rejected"] for row in LongToShortPairs(factor=1.3).choose(drawn).columns] == ["r140", "w120", "r160"]
    assert [row["rejected"] for row in LongToShortPairs(per_prompt=1).choose(drawn).columns] == ["w120"]
    at_bound = [sample("r100", 100), sample("r150", 150), sample("w100", 100, False), sample("w100", 101, False)]
    made = LongToShortPairs().choose([*at_bound, sample("cut", 200, False, stopped=False)])
    assert made.columns == [] and made.counts["without a longer one"] == 1 and made.counts.total() == 5
    assert LongToShortPairs().choose(drawn[1:2]).counts == Counter({"without a right one": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run with all writers."""
    folder = tmp_path_factory.mktemp("run")
    shortest = VerifiedSamples(per_prompt=1, shortest=True, path=str(folder / "shortest.jsonl"))
    even = VerifiedSamples({"even": 1.0}, path=str(folder / "even.jsonl"))
    predict(folder, [PredictionWriter(), VerifiedSamples(per_prompt=2), shortest, even, LongToShortPairs(1.0)])
    return folder


def test_everything_that_is_kept_is_right(run: Path) -> None:
    groups = defaultdict(list)
    for line in read_rows(run / "predictions.jsonl"):
        groups[line["prompt"]].append(line)
    expected, counts = [], Counter[str]()
    for prompt, lines in groups.items():
        a, b = map(int, re.findall(r"\d+", prompt))
        gold = f"{a + b:03d}"[::-1]
        right = [line["completion"] for line in lines if line["finish"] == "stop" and line["completion"] == gold]
        expected += [{"prompt": prompt, "answer": gold, "completion": text} for text in right[:1]]  # all are equal
        counts += Counter(kept=len(right[:1]), repeated=max(0, len(right) - 1))
        ended = [line["completion"] for line in lines if line["finish"] == "stop"]
        counts += Counter(unfinished=8 - len(ended), empty=sum(not text.strip() for text in ended))
    counts["wrong"] = 48 * 8 - counts.total()
    found = read_rows(run / "verified.jsonl")
    assert found == expected and 0 < len(found) < 48  # the policy is right now and then
    report = json.loads((run / "verified.jsonl.report.json").read_text())
    assert report == {
        "prompts": 48,
        "prompts_without": 48 - len(found),
        "rows": len(found),
        "sampled": 384,
        **{f"sampled/{what}": count for what, count in counts.items() if count},
    }
    assert all(counts[what] for what in ("repeated", "unfinished", "wrong"))
    assert read_rows(run / "shortest.jsonl") == found
    assert read_rows(run / "even.jsonl") == [row for row in found if row["completion"][-1] in "02468"]
    assert hidden(run) == []


def test_the_file_is_learned_as_it_was_sampled_and_serves_rl(run: Path) -> None:
    lines = read_rows(run / "predictions.jsonl")
    data = InstructionDataModule(tiny_tokenizer(), str(run / "verified.jsonl"), chat=False)
    data.setup("fit")
    written = read_rows(run / "verified.jsonl")
    for tokens, row in zip(data.train_rows, written, strict=True):
        learned = [i for i, supervised in zip(tokens.ids, tokens.supervised, strict=True) if supervised]
        assert tiny_tokenizer().decode(tokens.ids) == f"{row['prompt']}{row['completion']}<|eos|>"
        assert tiny_tokenizer().decode(learned) == f"{row['completion']}<|eos|>"
    again = VerifiableDataModule(tiny_tokenizer(), str(run / "verified.jsonl"), chat=False)
    again.setup("fit")
    golds = {line["prompt"]: line["answer"] for line in lines}
    assert [(p.text, p.example.answer) for p in again.train_prompts] == [
        (r["prompt"], golds[r["prompt"]]) for r in written
    ]


def test_pairs_are_longer_and_are_read(run: Path) -> None:
    lengths = {(line["prompt"], line["completion"]): line for line in read_rows(run / "predictions.jsonl")}
    rows = read_rows(run / "pairs.jsonl")
    assert rows
    for row in rows:
        chosen, rejected = (lengths[row["prompt"], row[side]] for side in ("chosen", "rejected"))
        assert chosen["completion"] == row["answer"] and rejected["completion"] != row["answer"]
        assert rejected["num_tokens"] > chosen["num_tokens"] and rejected["finish"] == "stop"
    data = PreferenceDataModule(tiny_tokenizer(), str(run / "pairs.jsonl"), chat=False)
    data.setup("fit")
    assert len(data.train_rows) == len(rows)
    report = json.loads((run / "pairs.jsonl.report.json").read_text())
    assert sum(count for name, count in report.items() if name.startswith("sampled/")) == report["sampled"] == 384


def test_rows_keep_their_columns_and_lose_what_answered_them(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"{n}0+11=",
            "reasoning": "no",
            "response": "no",
            "answer": f"{n}1\n#### {n + 1}0",
            "id": n,
            "deep": [n],
        }
        for n in range(1, 6)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    everything = RegexFormat(r"[\s\S]*", name="all")
    predict(tmp_path, [VerifiedSamples(per_prompt=1)], str(tmp_path / "in.jsonl"), accuracy=everything)
    found = read_rows(tmp_path / "verified.jsonl")
    assert found
    for row in found:
        n = row["id"]
        assert row.pop("completion")
        assert row == {"question": f"{n}0+11=", "answer": f"{n + 1}0", "id": n, "deep": [n]}
    data = InstructionDataModule(tiny_tokenizer(), str(tmp_path / "verified.jsonl"))
    data.setup("fit")  # as a chat, as it was sampled
    text = tiny_tokenizer().decode(data.train_rows[0].ids)
    assert text.startswith(f"<|im_start|>user\n{found[0]['question']}<|im_end|>\n<|im_start|>assistant\n")


def test_a_thought_that_the_template_opens_is_part_of_the_completion(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "2+2=<think>", "answer": "4"}\n' * 3)
    reward = RegexFormat(r"[\s\S]*", name="all")
    for chat, start in ((True, "<think>\n"), (False, "")):
        module = GRPOModule("tiny", reward, num_generations=4, sampling=Sampling(max_completion_length=100), seed=0)
        module.tokenizer.chat_template = module.tokenizer.chat_template.replace(
            "assistant\\n", "assistant\\n<think>\\n"
        )
        data = VerifiableDataModule(train=str(tmp_path / "in.jsonl"), chat=chat)
        callbacks = [VerifiedSamples(path=str(tmp_path / f"{chat}.jsonl")), PredictionWriter()]
        Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **QUIET).predict(module, data)
        found = {row["completion"] for row in read_rows(tmp_path / f"{chat}.jsonl")}
        predictions = tmp_path / ("predictions.jsonl" if chat else "predictions-2.jsonl")
        ended = [line for line in read_rows(predictions) if line["finish"] == "stop"]
        assert found == {start + line["completion"] for line in ended if line["completion"].strip()}


def test_a_thought_that_a_budget_ended_is_no_data(tmp_path: Path) -> None:
    """Nobody sampled the stop text, and SFT would teach it."""
    prompts = [f"{n}{'+' * (1 + n % 4)}=<think>" for n in range(9)]  # thoughts of 3, 5, 7 and 9 tokens
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "4"}) + "\n" for text in prompts))
    thinking = Thinking(budget=5, stop_text="!</think>")
    sampling = Sampling(max_completion_length=60, thinking=thinking)
    module = GRPOModule(
        "tiny-chains", RegexFormat(r"[\s\S]*", name="all"), num_generations=8, sampling=sampling, seed=0
    )
    data = VerifiableDataModule(train=str(tmp_path / "in.jsonl"), chat=False)
    callbacks = [VerifiedSamples(), PredictionWriter()]
    Trainer(accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=tmp_path, **QUIET).predict(module, data)
    ended = [row for row in read_rows(tmp_path / "predictions.jsonl") if row["finish"] == "stop"]
    own = {(row["prompt"], row["completion"]) for row in ended if "!</think>" not in row["completion"]}
    found = read_rows(tmp_path / "verified.jsonl")
    assert {(row["prompt"], row["completion"]) for row in found} == {each for each in own if each[1].strip()}
    report = json.loads((tmp_path / "verified.jsonl.report.json").read_text())
    assert report["sampled/thought ended by its budget"] == sum("!</think>" in row["completion"] for row in ended) > 0


def test_a_run_that_stopped_goes_on_and_samples_nothing_twice(tmp_path: Path, caplog: Any) -> None:
    predict(tmp_path / "calm", [VerifiedSamples(), LongToShortPairs(1.0)])
    with pytest.raises(ValueError, match="gave up"):
        predict(tmp_path, [VerifiedSamples(), LongToShortPairs(1.0)], engine=Fails(at=3))
    assert hidden(tmp_path) == [".pairs.jsonl.rank0", ".verified.jsonl.rank0"]
    with (tmp_path / ".verified.jsonl.rank0").open("ab") as part:
        part.write(b'{"uid": "addi')  # as after a power cut
    (tmp_path / ".verified.jsonl.rank0").rename(tmp_path / ".verified.jsonl.rank3")  # of a run with more ranks
    lines = (tmp_path / ".pairs.jsonl.rank0").read_bytes().splitlines(keepends=True)
    (tmp_path / ".pairs.jsonl.rank0").write_bytes(b"".join(lines[:5]))  # killed between the two writers
    with pytest.raises(ValueError, match=r"an earlier run sampled \d+ prompts, which PassRates would miss; delete"):
        predict(tmp_path, [VerifiedSamples(), PassRates()])
    with pytest.raises(ValueError, match=r"rank\d was started with another model, other settings or other rows"):
        predict(tmp_path, [VerifiedSamples()], seed=1)
    engine = Fails(at=0)
    predict(tmp_path, [LongToShortPairs(1.0), VerifiedSamples()], engine=engine)
    assert "VerifiedSamples: resuming with the 19 prompts that an earlier run sampled" in caplog.text
    assert engine.prompts == 48 - 19  # two batches were done; the pairs had four of their prompts, and take the others
    for name in ("verified.jsonl", "verified.jsonl.report.json", "pairs.jsonl", "pairs.jsonl.report.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert hidden(tmp_path) == []


def test_writers_share_what_was_sampled_when_one_of_them_is_done(tmp_path: Path) -> None:
    everything = RegexFormat(r"[\s\S]*", name="all")
    predict(tmp_path / "calm", [VerifiedSamples(), LongToShortPairs(1.0)], accuracy=everything)
    with pytest.raises(ValueError, match=r"pairs.jsonl is not written; start again with other bounds to choose from"):
        predict(tmp_path, [VerifiedSamples(), LongToShortPairs(100.0)], accuracy=everything)
    assert hidden(tmp_path) == [".pairs.jsonl.rank0"] and (tmp_path / "verified.jsonl").exists()
    engine = Fails(at=0)
    predict(tmp_path, [VerifiedSamples(), LongToShortPairs(1.0)], accuracy=everything, engine=engine)
    assert engine.prompts == 0
    for name in ("verified.jsonl", "verified.jsonl.report.json", "pairs.jsonl", "pairs.jsonl.report.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    with pytest.raises(ValueError, match=r"VerifiedSamples: another writer of this run writes .*verified-2.jsonl too"):
        predict(tmp_path, [VerifiedSamples(), VerifiedSamples(per_prompt=1)], engine=engine)


def test_a_killed_process_and_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    command = ["-m", "modules", "predict", "--config", str(ROOT / "configs/tiny/grpo.yaml"), "--data.val=null"]
    command += ["--data.train.num_examples=48", "--data.val_batch_size=2", "--model.num_generations=4"]
    command += ["--trainer.callbacks={class_path: VerifiedSamples, init_args: {per_prompt: 1}}"]
    command += ["--trainer.accelerator=cpu"]
    one = ["--trainer.devices=1"]
    run_program(*command, *one, "--out=calm", folder=tmp_path)
    part = tmp_path / "killed/.verified.jsonl.rank0"
    with Program(*command, *one, "--out=killed", folder=tmp_path) as program:
        while program.process.is_alive() and not (part.is_file() and part.read_bytes().count(b'{"uid"') >= 4):
            time.sleep(0.001)
        program.process.kill()
        program.process.join()
    assert part.is_file() and not (tmp_path / "killed/verified.jsonl").exists()
    run_ranks(*command, "--trainer.devices=2", "--trainer.strategy=ddp", "--out=killed", folder=tmp_path)
    run_ranks(*command, "--trainer.devices=2", "--trainer.strategy=ddp", "--out=two", folder=tmp_path)
    for folder in ("killed", "two"):
        for name in ("verified.jsonl", "verified.jsonl.report.json"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
        assert hidden(tmp_path / folder) == []


def test_what_cannot_work_is_refused_before_sampling(tmp_path: Path) -> None:
    class Room:
        def reset(self) -> None:
            """Start."""

        def look(self) -> str:
            """Look."""
            return "dark"

    for arguments, said in (
        ({"per_prompt": 0}, "per_prompt must be at least 1, got 0"),
        ({"at_least": {"a": float("nan")}}, "at_least holds finite numbers"),
        ({"shortest": True}, "shortest chooses among the completions of a prompt; set per_prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            VerifiedSamples(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor must be at least 1, got 0.5"):
        LongToShortPairs(0.5)
    with pytest.raises(ValueError, match="per_prompt must be at least 1, got 0"):
        LongToShortPairs(per_prompt=0)
    engine = Fails(at=1)
    with pytest.raises(ValueError, match="at_least names form, and the parts of model.reward are numeric_match, even"):
        predict(tmp_path, [VerifiedSamples({"form": 1.0})], engine=engine)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        predict(tmp_path, [VerifiedSamples(path=str(tmp_path))], engine=engine)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    twice = Files(str(tmp_path / "in.jsonl"))
    twice.rows = lambda: Files(str(tmp_path / "in.jsonl")).rows() * 2  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="several training rows are called .*in.jsonl:1; read every file once"):
        predict(tmp_path, [LongToShortPairs()], twice, engine=engine)
    module = GRPOModule(
        "tiny", NumericMatch(), environment=Environment(Room), sampling=Sampling(max_completion_length=9)
    )
    trainer = Trainer(accelerator="cpu", callbacks=[VerifiedSamples()], default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="completions with calls of tools are no text that could be learned"):
        trainer.predict(module, VerifiableDataModule(train=Addition(4)))
    with pytest.raises(ValueError, match="cannot write the results of SFTModule; set model to GRPOModule"):
        VerifiedSamples().setup(trainer, SFTModule("tiny"), "predict")
    predict(tmp_path, [VerifiedSamples()], fast_dev_run=True)
    never = RegexFormat("never", name="never")
    with pytest.raises(
        ValueError, match=r"\d+ wrong.* so .*verified.jsonl is not written; start again with other bounds"
    ):
        predict(tmp_path, [VerifiedSamples()], accuracy=never, limit_predict_batches=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".verified.jsonl.rank0", "in.jsonl"]
