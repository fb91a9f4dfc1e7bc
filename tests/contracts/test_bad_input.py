"""Bad input through the real command line: one clear sentence, before the first step."""

import json
from pathlib import Path

import pytest
import torch

from modules.__main__ import main

ROOT = Path(__file__).parents[2]
GRPO, SFT = (str(ROOT / f"configs/{name}.yaml") for name in ("grpo", "sft"))
QUIET = ["--config", str(ROOT / "configs/overlays/cpu_tiny.yaml"), "--trainer.enable_progress_bar", "false"]
LONG = '{"prompt": "' + "a" * 600 + '", "answer": "b"}'
GOOD = '{"prompt": "1+1=", "answer": "2"}'

FILES = [
    ("empty.jsonl", "", GRPO, "empty.jsonl: the file holds no rows"),
    ("broken.jsonl", f'{GOOD}\n{{"prompt": \n', GRPO, "broken.jsonl:2: not valid JSON"),
    ("columns.jsonl", '{"text_a": 1, "text_b": 2}\n', GRPO, "columns.jsonl:1: found the columns text_a, text_b; looked for prompt + answer"),
    ("columns.jsonl", '{"text_a": 1, "text_b": 2}\n', SFT, "columns.jsonl:1: found the columns text_a, text_b; looked for messages"),
    ("silent.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n', SFT, "silent.jsonl:1: no supervised token"),
    ("long.jsonl", f"{GOOD}\n{LONG}\n", GRPO, "long.jsonl:2: 600 tokens and the limit is 512"),
]


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """The sentence that ends the run: a sys.exit message, or what the parser wrote last."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *QUIET, "--trainer.default_root_dir", str(tmp_path)])
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("name", "text", "config", "sentence"), FILES, ids=[f"{name}-{Path(config).stem}" for name, _, config, _ in FILES])
def test_bad_files(tmp_path, capsys, name, text, config, sentence):
    file = tmp_path / name
    file.write_text(text)
    assert sentence in refusal(capsys, tmp_path, "--config", config, "--data.train", str(file), "--data.val", "null", "--data.drop_long", "false")


def test_long_prompts_are_dropped_and_counted_by_default(tmp_path, caplog):
    file = tmp_path / "long.jsonl"
    file.write_text(f"{GOOD}\n{LONG}\n" + GOOD.replace("1+1", "1+2"))
    few = ["--data.prompts_per_phase", "2", "--model.num_generations", "2", "--trainer.default_root_dir", str(tmp_path)]
    main(["fit", "--config", GRPO, "--data.train", str(file), "--data.val", "null", *QUIET, *few])
    assert "1 dropped as too long" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.train", "absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["--model.policy", "absent.gguf"], "no GGUF file at 'absent.gguf'"),
        (["--model.policy", "./nowhere"], "'./nowhere' is not 'tiny', a Hugging Face model folder"),
        (["--model.num_generation", "4"], "GRPOModule': Option 'num_generation' is not accepted"),
        (["--trainer.max_epoch", "4"], "unrecognized arguments: --trainer.max_epoch 4; did you mean --trainer.max_epochs"),
        (["--trainer.precision", "bf16-true"], "precision 'bf16-true' rounds"),
        (["--model.num_generations", "1"], "num_generations is 1: a group needs at least 2"),
        (["--model.reward", "ExactMtch"], "there is no class 'ExactMtch'; did you mean ExactMatch?"),
        (["--model.sampling.temperature", "0"], "sampling.temperature is 0.0: greedy completions"),
        (["--trainer.accumulate_grad_batches", "300"], "cannot make 1 updates of 300 micro-batches"),
        (["--data.prompts_per_phase", "0"], "prompts_per_phase"),
        (["--ckpt_path", "absent.ckpt"], "absent.ckpt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sentence in refusal(capsys, tmp_path, "--config", GRPO, *arguments)


def test_misspelt_yaml_key_names_the_key(tmp_path, capsys):
    file = tmp_path / "more.yaml"
    file.write_text("trainer:\n  max_epoch: 3\n")
    assert "'trainer.max_epoch'" in refusal(capsys, tmp_path, "--config", GRPO, "--config", str(file))


def test_checkpoint_of_another_model_or_method_is_refused(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    from modules.networks.tiny import tiny_tokenizer

    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "every_n_train_steps": 1}}
    saved = ["--trainer.enable_checkpointing", "true", "--trainer.callbacks", json.dumps([checkpoint])]
    small = ["--data.prompts_per_phase", "2", "--model.num_generations", "2", "--trainer.default_root_dir", str(tmp_path)]
    main(["fit", "--config", GRPO, *QUIET, *saved, *small])
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["alignment"]["method"] == "GRPOModule"
    other = tmp_path / "other"
    config = LlamaConfig(vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    said = refusal(capsys, tmp_path, "--config", GRPO, "--model.policy", str(other), "--ckpt_path", str(checkpoint))
    assert "the checkpoint is of another model: parameters 886528 there" in said
    assert "method 'GRPOModule' there, 'SFTModule' here" in refusal(capsys, tmp_path, "--config", SFT, "--ckpt_path", str(checkpoint))
