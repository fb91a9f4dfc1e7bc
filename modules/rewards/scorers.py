"""Loads reward models and makes the rows of tokens that they read."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modules.networks.loading import find_end_of_turn
from modules.networks.lora import ADAPTERS, HEAD_FILE, OtherBackbone, list_adapters, load_adapters, read_digest, using
from modules.networks.policy import Policy
from modules.networks.scalar_head import HEADS_FILE
from modules.types import Rollout


@dataclass(frozen=True)
class Scorer:
    """A loaded reward model: a backbone of its own, or adapters on the policy's backbone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weight: Tensor  # [heads, H], on the CPU like the next two
    mean: Tensor  # [heads], float64, mean of each head's raw scores; 0 if it was not measured
    std: Tensor  # [heads], float64, standard deviation of the same; 1 if it was not measured
    adapters: str | None = None  # name of the adapters to compute with; None = the model as it is


def read_config(path: str) -> PreTrainedConfig:
    """Read the config of a sequence classifier with one label.

    Raises:
        ValueError: ``path`` holds no model, or one with another number of labels.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"LearnedReward: '{path}' is not a model folder or a hub id that can be read; export a RewardModule there "
            "first"
        ) from error
    if config.num_labels != 1:
        raise ValueError(
            f"LearnedReward: '{path}' has {config.num_labels} labels and a reward model has one; export a "
            "RewardModule, not a policy"
        )
    return config


def load_scorer(path: str) -> Scorer:
    """Load a reward model, its heads and the moments of their scores: in fp32, frozen, on the GPU if there is one.

    Raises:
        ValueError: the model does not score hidden states by a linear layer.
    """
    model = (
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        .requires_grad_(False)
        .eval()
    )
    head, heads = dict(model.named_modules()).get("score"), Path(path) / HEADS_FILE
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"LearnedReward: '{path}' ({model.config.model_type}) has no linear 'score' without bias on a causal "
            "backbone; name another reward model"
        )
    weight = load_file(heads)["weight"] if heads.is_file() else head.weight.clone()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = read_moments(model.config, len(weight))
    return Scorer(model, AutoTokenizer.from_pretrained(path, trust_remote_code=False), weight, mean, std)


def load_shared_scorer(path: str, policy: Policy) -> Scorer | None:
    """Load the export at ``path`` as adapters beside the policy's own; None if it has no adapters of the policy's
    backbone.

    The policy may be in training mode: its dropout is off in reinforcement learning, and loaded adapters have none.
    """
    folder = Path(path) / ADAPTERS
    if not policy.has_adapters or read_digest(folder) is None:
        return None
    name = next(name for i in count() if (name := f"reward{i}") not in list_adapters(policy.model))
    try:
        load_adapters(policy.model, folder, name, trainable=False)
    except OtherBackbone:
        return None
    weight = load_file(folder / HEAD_FILE)["weight"]
    mean, std = read_moments(read_config(path), len(weight))
    return Scorer(policy.model, AutoTokenizer.from_pretrained(path, trust_remote_code=False), weight, mean, std, name)


def read_moments(config: PreTrainedConfig, heads: int) -> Tensor:
    """Return mean and standard deviation [2, heads] of each head's scores, float64; 0 and 1 if a single head has none
    stored.
    """
    if heads > 1:
        return torch.tensor([config.reward_head_means, config.reward_head_stds], dtype=torch.float64)
    return torch.tensor(
        [[getattr(config, "reward_mean", 0.0)], [getattr(config, "reward_std", 1.0)]], dtype=torch.float64
    )


def compute_last_states(scorer: Scorer, rows: list[tuple[int, ...]]) -> Tensor:
    """Return the hidden state [N, H] at the last token of each row.

    Transformers' own pooling would take a closing eos for padding if the pad token is eos.
    """
    device = scorer.model.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)  # [N, T]
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    with nullcontext() if scorer.adapters is None else using(scorer.model, scorer.adapters):
        hidden: Tensor = scorer.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(rows), device=device), lengths - 1]


def make_row(scorer: Scorer, rollout: Rollout) -> tuple[int, ...]:
    """Return the tokens of prompt and completion in the reward model's vocabulary."""
    tokenizer, completion = scorer.tokenizer, rollout.completion
    if reads(scorer, rollout.prompt_ids, rollout.prompt, prompt=True):
        if (
            completion.token_ids
            and completion.sampled is None
            and reads(scorer, completion.token_ids, completion.text, cut=completion.finish == "stop")
        ):
            return (*rollout.prompt_ids, *completion.token_ids)
        prompt = rollout.prompt_ids
    else:
        prompt = add_bos(tokenizer, rollout.prompt)
    ids = tokenizer(completion.text, add_special_tokens=False, verbose=False).input_ids
    return (*prompt, *ids, *([find_end_id(tokenizer, prompt)] if completion.finish == "stop" else []))


def reads(scorer: Scorer, ids: list[int], text: str, prompt: bool = False, cut: bool = False) -> bool:
    """Return whether the tokens mean ``text`` to the reward model.

    Args:
        scorer: the reward model.
        ids: the tokens.
        text: what the policy's tokenizer decoded them to.
        prompt: True = a BOS in front and white space at the ends do not count.
        cut: True = the tokens may decode to more text, because an end token or a stop string was cut off.
    """
    if ids and max(ids) >= scorer.model.config.vocab_size:
        return False
    found = str(scorer.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if prompt:
        bos = str(scorer.tokenizer.bos_token or "")
        return found.removeprefix(bos).strip() == text.removeprefix(bos).strip()
    return found == text or (cut and found.startswith(text))


def add_bos(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a prompt, with one BOS in front if the tokenizer itself adds one."""
    ids, bos = list(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids), tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def find_end_id(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> int:
    """Return the token that ends a completion of this prompt: the end-of-turn token of a chat, else eos."""
    turn = find_end_of_turn(tokenizer)
    return turn if turn is not None and turn in prompt else int(tokenizer.eos_token_id)  # type: ignore[arg-type]
