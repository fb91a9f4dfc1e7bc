"""Bad input through the real command line: one clear sentence, before the first step."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks import EngineMismatch, Samples
from modules import SFTModule
from modules.cli.command import refuse_twins
from modules.cli.explain import write_sentence
from modules.cli.parser import find_repeated_key

LONG = '{"prompt": "' + "a" * 600 + '", "answer": "b"}'
GOOD = '{"prompt": "1+1=", "answer": "2"}'
NAN = '{"prompt": "1+1=", "answer": NaN}'
FEW = ["--data.prompts_per_phase", "2", "--model.num_generations", "2"]

FILES = [
    ("empty.jsonl", "", "grpo", "empty.jsonl: the file holds no rows"),
    ("broken.jsonl", f'{GOOD}\n{{"prompt": \n', "grpo", "broken.jsonl:2: not valid JSON"),
    (
        "columns.jsonl",
        '{"text_a": 1, "text_b": 2}\n',
        "grpo",
        "columns.jsonl:1: found the columns text_a, text_b; looked for prompt, question",
    ),
    (
        "columns.jsonl",
        '{"text_a": 1, "text_b": 2}\n',
        "sft",
        "columns.jsonl:1: found the columns text_a, text_b; looked for messages",
    ),
    (
        "answers.jsonl",
        '{"question": "x", "reply": "y"}\n',
        "sft",
        "such as --data.columns '{completion: reply}'",
    ),
    (
        "silent.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        "sft",
        "silent.jsonl:1: no supervised token",
    ),
    ("long.jsonl", f"{GOOD}\n{LONG}\n", "grpo", "long.jsonl:2: 619 tokens and the limit is 512"),
    (
        "scalars.jsonl",
        "1\n2\n",
        "grpo",
        "scalars.jsonl:1: a row must be an object with named columns or a text, this is a int",
    ),
    (
        "half.jsonl",
        f'{GOOD}\n{{"prompt": "a\\ud83d", "answer": "2"}}\n',
        "grpo",
        "half.jsonl:2: the text holds half of a character",
    ),
    (
        "nulls.jsonl",
        f"{NAN}\n{NAN}\n",
        "grpo",
        "numeric_match scored none of the first 256 completions, whose rows have no answer",
    ),
    (
        "twice.jsonl",
        '{"prompt": "a", "completion": "b", "completion": "c"}\n',
        "sft",
        "twice.jsonl:1: the key 'completion' stands twice in one object; keep one of them",
    ),
    (
        "digits.json",
        f'[{GOOD},\n{{"prompt": "1+1=", "answer": {"9" * 4301}}}]',
        "grpo",
        "digits.json:2: a number has more than 4300 digits; write it as text, in quotes",
    ),
    (
        "deep.csv",
        'messages\n"[{""role"": ""user"", ""content"": ' + "[" * 600 + "]" * 600 + '}]"\n',
        "sft",
        "deep.csv:2: column 'messages': lists and objects are nested more than 100 deep; flatten them",
    ),
    ("header.csv", "prompt,answer\n", "grpo", "header.csv: the file holds no rows"),
    ("cells.csv", "prompt,answer\n1+1=,2,3\n", "grpo", "cells.csv:2: the row has 3 cells and the header 2"),
    ("table.parquet", "PAR1 prompt: x", "grpo", "table.parquet: not a readable parquet file"),
    ("rows.jsonl.gz", "\x1f prompt: x", "grpo", "rows.jsonl.gz: not a complete gzip file"),
    ("notes.txt", "prompt: x\n", "grpo", "notes.txt: unknown kind of file, expected one that ends in .jsonl"),
]


@pytest.mark.parametrize(
    ("name", "text", "method", "sentence"), FILES, ids=[f"{name}-{method}" for name, _, method, _ in FILES]
)
def test_bad_files(tmp_path, refusal, name, text, method, sentence):
    file = tmp_path / name
    file.write_text(text)
    assert sentence in refusal(method, "--data.train", str(file), "--data.val", "null", "--data.drop_long", "false")


def test_long_prompts_are_dropped_and_counted_by_default(tmp_path, run, caplog):
    file = tmp_path / "long.jsonl"
    file.write_text(f"{GOOD}\n{LONG}\n" + GOOD.replace("1+1", "1+2"))
    run("grpo", "--data.train", str(file), "--data.val", "null", *FEW)
    assert "3 rows in = 2 used + 1 too long" in caplog.text


@pytest.mark.parametrize("in_yaml", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [("my.csv", "prompt,answer\n1+1=,2\n"), ("my.tsv", 'prompt\tanswer\n"1+1=\t2\n'), ("my.json", f"[{GOOD}]")],
)
def test_a_data_file_stays_a_path(tmp_path, monkeypatch, run, caplog, name, text, in_yaml):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    Path("more.yaml").write_text(f"data: {{init_args: {{train: {name}, val: null}}}}\n")
    run("grpo", *(["--config", "more.yaml"] if in_yaml else ["--data.train", name, "--data.val", "null"]), *FEW)
    assert "1 rows in = 1 used" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.train", "absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["--model.policy", "absent.gguf"], "no GGUF file at 'absent.gguf'"),
        (
            ["--model.policy", "./nowhere"],
            "'./nowhere' is not 'tiny', 'tiny-small', 'tiny-addition', 'tiny-calculator', 'tiny-chains', a Hugging Face model folder",
        ),
        (
            ["--model.num_generation", "4"],
            "GRPOModule': Option 'num_generation' is not accepted; did you mean num_generations",
        ),
        (["--data.batchsize", "4"], "Option 'batchsize' is not accepted; did you mean val_batch_size?"),
        (["--model.objectve", "Clipped"], "Option 'objectve' is not accepted; did you mean objective?"),
        (
            ["--model.sampling.temprature", "1"],
            "--model.sampling.temprature=1; did you mean --model.sampling.temperature?",
        ),
        (["--model.sampling.max", "3"], "--model.sampling.max=3; did you mean --model.sampling.max_completion_length?"),
        (["--data.train.num", "3"], "datamodules.Addition': Option 'num' is not accepted; did you mean num_examples?"),
        (
            ["--model.learning_rate", "1"],
            "GRPOModule': Option 'learning_rate' is not accepted; here this is --model.optimizer.lr",
        ),
        (["--model.loss_type", "dapo"], "Option 'loss_type' is not accepted; here this is --model.objective"),
        (["--model.batch_size", "2"], "; here this is --data.batch_size or --data.prompts_per_phase"),
        (["--data.batch_size", "2"], "Option 'batch_size' is not accepted; here this is --data.prompts_per_phase"),
        (["--data.test", "my.jsonl"], "Option 'test' is not accepted; here this is --data.val"),
        (["--seed", "2"], "unrecognized arguments: --seed 2; here this is --seed_everything"),
        (["--trainer.num_train_epochs", "2"], "num_train_epochs 2; here this is --trainer.max_epochs"),
        (["--model.policy", "tini"], "; did you mean tiny?"),
        (
            ["--model.reward", "fractions.Fraction"],
            "fractions.Fraction is no Reward: derive it from modules.types.Reward, or name a plain function",
        ),
        (["--model.optimiser.lr", "1"], "--model.optimiser.lr=1; did you mean --model.optimizer.lr?"),
        (["--model.optimizer.lrr", "1"], "\"optimizer\": Option 'lrr' is not accepted; did you mean lr?"),
        (["--model.optimizer", "AdmW"], "there is no class 'AdmW'; did you mean AdamW?"),
        (["--model.optimizer", "Zzz"], "there is no class 'Zzz'; name a class of ours, or the whole class path"),
        (
            ["--model.objective.clip_high", "0.3"],
            '"objective": name the class first, such as CISPO, Clipped, DPPO, GSPO, GSPOToken, MirrorDescent, REINFORCE, REINFORCEPlusPlus, RLOO, SAPO, and ',
        ),
        (
            ["--model.objective", "Clipped", "--model.objective.advantage", "Centered"],
            "Option 'advantage' is not accepted; advantage is an option of GRPOModule: --model.advantage",
        ),
        (
            ["--data.order.prompts_per_phase", "4"],
            "and then its options; prompts_per_phase is an option of VerifiableDataModule: --data.prompts_per_phase",
        ),
        (
            ["--data.train.num_exampls", "1"],
            "datamodules.Addition': Option 'num_exampls' is not accepted; did you mean num_examples?",
        ),
        (
            ["--trainer.accumulate_grad_batches", "0"],
            "error: trainer.accumulate_grad_batches must be at least 1, got 0",
        ),
        (["--trainer.check_val_every_n_epoch=0"], "error: trainer.check_val_every_n_epoch must be at least 1, got 0"),
        (["--trainer.log_every_n_steps=-1"], "error: trainer.log_every_n_steps must be at least 0, got -1"),
        (["--trainer.num_sanity_val_steps=-2"], "error: trainer.num_sanity_val_steps must be at least -1, got -2"),
        (["--trainer.min_steps=-1"], "error: trainer.min_steps must be at least 0, got -1"),
        (
            ["--trainer.val_check_interval=0"],
            "error: trainer.val_check_interval is 0; to validate never, set limit_val",
        ),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must be a finite number >= 0, got -1"),
        (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val must be a finite number >= 0, got nan"),
        (["--trainer.devices=-1"], "error: trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        (
            ["--trainer.max_epoch", "4"],
            "unrecognized arguments: --trainer.max_epoch 4; did you mean --trainer.max_epochs",
        ),
        (["--trainer.precision", "bf16-true"], "precision 'bf16-true' rounds"),
        (["--trainer.precision", "64-true"], "precision '64-true': log-probabilities and losses are computed in 32"),
        (["--trainer.precision", "bf17"], "transformer-engine-float16, got 'bf17'; did you mean bf16?"),
        (["--model.num_generations", "1"], "error: num_generations is 1: a group needs at least 2"),
        (["--model.beta", "-1"], "error: GRPOModule: beta must be >= 0, got -1.0"),
        (
            ["--model.objective", "Clipped", "--model.objective.clip_low", "-1"],
            "error: Clipped: clip_low must be >= 0, got -1.0",
        ),
        (["--model.reward", "ExactMtch"], "there is no class 'ExactMtch'; did you mean ExactMatch?"),
        (["--model.engine", "modules.rollout.WorkrEngine"], "no attribute 'WorkrEngine'; did you mean WorkerEngine?"),
        (
            ["--model.engine", "WorkerEngine", "--model.engine.max_cache_gb", "1"],
            "'max_cache_gb' is not accepted; max_cache_gb is an option of InProcessEngine: --model.engine.engine "
            "InProcessEngine --model.engine.engine.max_cache_gb",
        ),
        (
            ["--trainer.callbacks+=EngineMismatch", "--trainer.callbacks+=EngineMismatch"],
            "callbacks has EngineMismatch twice, and a checkpoint keeps one state",
        ),
        (["--model.objective", "CSIPO"], "there is no class 'CSIPO'; did you mean CISPO"),
        (
            ["--model.advantage", "modules.functional.advantages.group_centre"],
            "module 'modules.functional.advantages' has no attribute 'group_centre'",
        ),
        (["--model.sampling.temperature", "0"], "sampling.temperature is 0.0: greedy completions"),
        (
            ["--model.sampling.top_k", "1"],
            "error: sampling.top_k is 1: completions of a prompt from the likeliest tokens",
        ),
        (["--model.sampling.top_p", "2"], "error: sampling: top_p 2.0 must lie in (0, 1]"),
        (["--model.optimizer.lr", "fast"], "\"lr\": expected type float, got 'fast'"),
        (["--trainer.accumulate_grad_batches", "300"], "cannot make 1 updates of 300 micro-batches"),
        (["--trainer.overfit_batches", "1"], "trainer.overfit_batches replaces the samplers"),
        (
            ["--data.prompts_per_phase", "0"],
            "error: prompts_per_phase, val_batch_size and max_prompt_length must be at least 1",
        ),
        (
            ["--data.columns", "{promt: question}"],
            "error: columns maps unknown names promt (did you mean prompt?); the names on the left may be",
        ),
        (
            ["--data.train", "my.jsonl", "--data.train.split", "test"],
            "'my.jsonl' is a file, which has no options; write, for example, --data.train Files --data.train.path "
            "my.jsonl",
        ),
        (["--data.train.num_examples", "0"], "error: num_examples must be at least 1, got 0"),
        (
            ["--trainer.callbacks", "Diversity", "--trainer.callbacks.every_n_phases", "0"],
            "error: every_n_phases must be at least 1, got 0.",
        ),
        (
            ["--trainer.callbacks", "LearningRateFinder"],
            "error: trainer: callbacks: LearningRateFinder sets model.lr, which GRPOModule does not have: leave it out",
        ),
        (
            ["--trainer.callbacks", "BackboneFinetuning"],
            "error: trainer: callbacks: BackboneFinetuning trains model.backbone, which GRPOModule does not have",
        ),
        (
            ["--trainer.callbacks", "Diversty"],
            "\"trainer.callbacks\": there is no class 'Diversty'; did you mean Diversity?",
        ),
        (
            ["--model.sampling.max_completion_length", "1020"],
            "longest train row has 6 tokens and a completion up to 1020 more",
        ),
        (
            ["--ckpt_path", "absent.ckpt"],
            "error: ckpt_path: there is no file 'absent.ckpt'; name a run's folder or a .ckpt file in it",
        ),
        (["--trainer.gradient_checkpointing", "true"], "did you mean --gradient_checkpointing?"),
        (["--model.gradient_checkpointing", "true"], "did you mean --gradient_checkpointing?"),
        (
            ["--model.validation", "null"],
            "error: model.validation is null, and GRPOModule needs a value: leave it out for",
        ),
        (
            ["--model.sampling", "null"],
            "error: model.sampling is null, and GRPOModule needs a value: leave it out for the",
        ),
        (
            ["--model.optimizer", "null"],
            "error: model.optimizer is null, and GRPOModule needs a value: leave it out for",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_settings(refusal, monkeypatch, arguments, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refusal("grpo", *arguments)
    assert sentence in said
    assert "Namespace(" not in said
    assert "Subclass types" not in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("command", "method", "arguments", "sentence"),
    [
        ("predict", "sft", [], "nothing to predict; predict works with a method that samples, such as GRPOModule"),
        ("validate", "sft", ["--data.val", "null"], "there are no held-out rows to evaluate; set data.val"),
        ("test", "grpo", ["--data.val", "null"], "there are no held-out rows to evaluate; set data.val"),
        ("fit", "sft", ["--trainer.overfit_batches", "1"], "trainer.overfit_batches replaces the samplers"),
        (
            "fit",
            "grpo",
            ["--data", "InstructionDataModule"],
            "GRPOModule reads PromptBatch and InstructionDataModule gives InstructionBatch",
        ),
        (
            "fit",
            "sft",
            ["--data", "VerifiableDataModule"],
            "VerifiableDataModule gives PromptBatch; add --data InstructionDataModule",
        ),
        *(
            ("fit", "sft", [f"--trainer.callbacks={name}"], f"error: {name} reads what a method samples, and SFTModule")
            for name in ("Diversity", "LengthBias", "Samples")
        ),
        (
            "fit",
            "dpo",
            ["--trainer.callbacks=TokenBudget", "--trainer.callbacks.tokens=9"],
            "and DPOModule samples nothing: remove the callback",
        ),
        ("fit", "sft", ["--on_unscored", "stop"], "on_unscored: SFTModule scores no samples; leave it out"),
        ("predict", "grpo", ["--on_nonfinite", "skip"], "on_nonfinite: predict takes no steps; leave it out"),
        ("validate", "sft", ["--torch_compile", "true"], "torch_compile: validate takes no steps; leave it out"),
    ],
)
def test_combinations_that_cannot_run(refusal, command, method, arguments, sentence):
    assert sentence in refusal(method, *arguments, command=command)


def test_two_callbacks_with_one_state_are_refused():
    with pytest.raises(ValueError, match="callbacks has EngineMismatch twice, and a checkpoint keeps one state of it"):
        refuse_twins([EngineMismatch(), Samples(), EngineMismatch(max_kl=1.0)])
    refuse_twins([EngineMismatch(), Samples(), ModelCheckpoint(), ModelCheckpoint(every_n_epochs=2)])


def test_a_wrong_choice_inside_a_class_is_told_without_the_other_types_of_the_option(refusal):
    """``importance`` may also be true or false."""
    assert refusal("grpo", "--model.importance.level", "word").endswith('"level": expected one of sequence, token')


def test_a_value_that_an_option_does_not_take_is_told_without_the_parsers_words():
    message = 'Parser key "model": Problem with given class_path \'modules.SFTModule\':\n- Parser key "sampling"'
    assert write_sentence(message, []).endswith(
        "': sampling does not take the value that it has; leave it out, or set another"
    )


def test_only_classes_that_can_be_made_are_suggested(refusal):
    said = refusal("grpo", "--model.reward", "xyzxyz")
    assert "there is no class 'xyzxyz'; name a class of ours, or the whole class path of another" in said
    assert "did you mean" not in refusal("grpo", "--model.reward", "breakdow")  # a function
    assert "MirrorDescent" in refusal("grpo", "--model.objective.clip_hgh", "0.3")


def test_rows_beyond_the_models_positions_are_named_before_the_first_step(tmp_path, refusal):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 1100, "completion": "b"}))
    said = refusal(
        "sft", "--data.train", str(file), "--data.val", "null", "--data.max_length", "2048", "--data.chat", "false"
    )
    assert "the longest train row has 1102 tokens, but the model has only 1024 positions: lower data.max_length" in said


def test_an_optional_package_that_is_missing_is_named(refusal, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "math_verify" else found(name, package)
    )
    assert "pip install 'lightning-align[math]'" in refusal("grpo", "--model.reward", "MathVerify")


def test_misspelt_yaml_key_names_the_key(tmp_path, refusal):
    file = tmp_path / "more.yaml"
    file.write_text("trainer:\n  max_epoch: 3\n")
    assert "option 'trainer.max_epoch'; did you mean trainer.max_epochs" in refusal("grpo", "--config", str(file))
    file.write_text("data:\n  init_args: {prompt_per_phase: 3}\n")
    assert "did you mean prompts_per_phase" in refusal("grpo", "--config", str(file))
    file.write_text("model: true\ndata: [1]\n")
    said = refusal("grpo", "--config", str(file), "--data.train=x")
    assert said == "error: model does not take the value that it has; leave it out, or set another"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\n  init_args: {}\nseed_everything: 1\nmodel:\n  init_args: {}\n", "4: the key 'model'"),
        ("model:\n  init_args:\n    temperature: 1.0\n    temperature: 2.0\n", "4: the key 'temperature'"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_keys_that_stand_twice_in_a_configuration_are_refused(tmp_path, refusal, text, place, joined):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    said = refusal("grpo", *([f"--config={file}"] if joined else ["--config", str(file)]))
    assert said == f"error: {file}:{place} stands twice in one mapping; keep one of them"


def test_keys_that_stand_twice_in_an_option_are_refused(refusal):
    said = refusal("grpo", "--data.columns", "{prompt: a, prompt: b}")
    assert said == "error: --data.columns: the key 'prompt' stands twice in one mapping; keep one of them"
    assert "--data.columns: the key 'prompt'" in refusal("grpo", "--data.columns={prompt: a, prompt: b}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\nb: {c: 1,\n  c: 2}\n", (3, "c")),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: {<<: [*x, *x]}\ne: *x\n", None),
        ('1: a\n"1": b\n', None),
        ("a:\n- {b: 1}\n- {b: 1}\n", None),
        ("", None),
    ],
)
def test_repeated_keys_of_yaml(text, found):
    assert find_repeated_key(text) == found


def test_anchors_and_merge_keys_of_a_configuration_work(tmp_path, run):
    file = tmp_path / "merged.yaml"
    file.write_text("trainer: &few {max_epochs: 1}\nseed_everything: 1\n")
    run("grpo", "--config", str(file), *FEW)
    file.write_text("trainer:\n  <<: &few {max_epochs: 7}\n  max_epochs: 1\n")
    run("grpo", "--config", str(file), *FEW)


def test_the_tip_is_a_command_that_works(capsys, run):
    with pytest.raises(SystemExit):
        run("grpo", "--model.reward", "ExactMtch")
    assert "tip: For details of accepted options run: python -m modules fit --help" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path, run) -> Path:
    """Make a checkpoint after two epochs of GRPO on the tiny model."""
    when = {"every_n_epochs": 2, "save_on_train_epoch_end": True}
    callback = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "filename": "good", **when}}
    saved = [
        "--trainer.enable_checkpointing",
        "true",
        "--trainer.callbacks",
        json.dumps([callback]),
        "--trainer.max_epochs",
        "2",
    ]
    run("grpo", *saved, *FEW)
    return tmp_path / "good.ckpt"


def test_checkpoint_of_another_model_or_method_is_refused(tmp_path, refusal, checkpoint):
    from transformers import LlamaConfig, LlamaForCausalLM

    from modules.networks.tiny import tiny_tokenizer

    assert torch.load(checkpoint, weights_only=True)["alignment"]["method"] == "GRPOModule"
    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    said = refusal("grpo", "--model.policy", str(other), "--ckpt_path", str(checkpoint))
    assert "the checkpoint is of another model: parameters 886528 there" in said
    assert "method 'GRPOModule' there, 'SFTModule' here" in refusal("sft", "--ckpt_path", str(checkpoint))


def test_files_that_are_no_checkpoint_are_refused(tmp_path, refusal, checkpoint):
    whole = torch.load(checkpoint, weights_only=True)
    contents = {
        "cut.ckpt": checkpoint.read_bytes()[:50_000],
        "text.ckpt": b"hello",
        "damaged.ckpt": checkpoint.read_bytes().replace(b"state_dict", b"\xff" * 10),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    torch.save(
        {key: value for key, value in whole.items() if key not in ("loops", "optimizer_states")},
        tmp_path / "weights.ckpt",
    )
    for name, sentence in (
        ("cut.ckpt", "is damaged, or no checkpoint: its checksums do not fit"),
        ("text.ckpt", "is damaged, or no checkpoint: its checksums do not fit"),
        ("damaged.ckpt", "is damaged, or no checkpoint: its checksums do not fit"),
        (
            "bare.ckpt",
            "is not a checkpoint of a training run: it holds no loops, optimizer_states, pytorch-lightning_version",
        ),
        ("weights.ckpt", "is not a checkpoint of a training run: it holds no loops, optimizer_states"),
        (".", "is a folder; name the .ckpt file in it"),
        ("empty", "is a folder without a checkpoint; to begin anew, leave it out"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        said = refusal("grpo", "--ckpt_path", str(tmp_path / name))
        assert f"'{tmp_path / name}' {sentence}" in said


def test_resuming_with_fewer_epochs_is_refused(refusal, checkpoint):
    said = refusal("grpo", "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "1", "--trainer.max_steps=-1")
    assert "checkpoint with current_epoch=2, but you have set Trainer(max_epochs=1)" in said


def test_a_strategy_that_shards_weights_is_refused():
    module = SFTModule("tiny")
    module.trainer = Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(ValueError, match="ModelParallelStrategy shards the weights, .* use ddp"):
        module.setup("fit")
