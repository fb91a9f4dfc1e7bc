"""The engine that a YAML names samples in every command, gives its memory back, and tells its numbers."""

from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules import Addition, Facts, FactsDataModule, InstructionDataModule, VerifiableDataModule
from modules import DistillModule, GRPOModule, KnowledgeModule, OnlineDPOModule, PPOModule, SFTModule
from modules.rewards import ExactMatch
from modules.rollout import InProcessEngine, Sampling
from modules.rollout.phases.dynamic_sampling import DynamicSampling

QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
}


class Watched(InProcessEngine):
    """Notes what is asked of it, and counts calls in ``last_stats``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def sync_weights(self, *arguments: Any) -> None:
        self.calls.append("sync")
        super().sync_weights(*arguments)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        assert self.calls[-1] in ("sync", "generate")  # not after release or close
        self.calls.append("generate")
        found = super().generate(*arguments, **named)
        self.last_stats = {"calls": 1.0, "tokens_per_second": -1.0, "tail_seconds": 0.5}
        return found

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None:
        self.calls.append("close")


def sums(module: Any) -> VerifiableDataModule:
    return VerifiableDataModule(module.tokenizer, Addition(64), val=Addition(4, held_out=True), prompts_per_phase=4)


SAMPLING = Sampling(max_completion_length=5)
MAKE = {
    "GRPO": lambda engine: GRPOModule("tiny-addition", ExactMatch(), 2, SAMPLING, engine),
    "PPO": lambda engine: PPOModule("tiny-addition", ExactMatch(), 2, SAMPLING, engine),
    "online DPO": lambda engine: OnlineDPOModule("tiny-addition", ExactMatch(), sampling=SAMPLING, engine=engine),
    "distillation": lambda engine: DistillModule(
        "tiny-addition", "tiny-addition", reward=ExactMatch(), sampling=SAMPLING, engine=engine
    ),
    "SFT": lambda engine: SFTModule("tiny", sampling=SAMPLING, engine=engine),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_every_command_uses_the_engine(name: str, command: str) -> None:
    if (name, command) == ("SFT", "predict"):  # it has none
        return
    engine = Watched()
    module = MAKE[name](engine)
    data: Any = sums(module)
    if name == "SFT":
        data = InstructionDataModule(module.tokenizer, Addition(4), val=Addition(4, held_out=True), batch_size=4)
    getattr(Trainer(**QUIET), command)(module, datamodule=data)
    assert "generate" in engine.calls and engine.calls[-2:] == ["release", "close"]


def test_knowledge_is_measured_by_the_engine() -> None:
    engine = Watched()
    module = KnowledgeModule("tiny", num_samples=2, max_completion_length=4, engine=engine)
    data = FactsDataModule(module.tokenizer, Facts(40), num_prompts=2, num_shots=1)
    Trainer(**QUIET).predict(module, data)
    assert engine.calls[:3] == ["sync", "generate", "generate"] and engine.calls[-2:] == ["release", "close"]


def test_an_engine_without_answers_to_sample_is_refused() -> None:
    with pytest.raises(
        ValueError, match="engine samples answers to held-out rows, and there are none: set sampling or"
    ):
        SFTModule("tiny", engine=InProcessEngine())


@pytest.mark.parametrize("rounds", [None, DynamicSampling(max_rounds=3)])
def test_the_numbers_of_a_phase_are_those_of_its_calls(rounds: DynamicSampling | None) -> None:
    engine = Watched()
    module = GRPOModule("tiny", ExactMatch(), 2, SAMPLING, engine, dynamic_sampling=rounds)  # it never answers right
    trainer = Trainer(**QUIET, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=sums(module))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    calls = 1 if rounds is None else 3
    assert engine.calls == ["sync", "generate"] * calls + ["release", "close"]
    assert found["train/engine/calls"] == calls and found["train/engine/tail_seconds"] == 0.5 * calls
    tokens = sum(rollout.completion.length for rollout in module.record.rollouts)
    assert found["train/engine/tokens"] == tokens
    seconds = found["train/time/sampling"] - found["train/engine/sync_seconds"]
    assert 0 < found["train/engine/sync_seconds"] < found["train/time/sampling"]
    assert found["train/engine/tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)
