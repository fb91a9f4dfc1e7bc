"""The scalar head of reward and value models, and its form as a Hugging Face sequence classifier."""

import copy
from collections.abc import Set
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from modules.networks.loading import is_classifier
from modules.networks.tiny import BUILT_IN

# Lies beside a sequence classifier that is the mean of several heads: weight [heads, H].
HEADS_FILE = "reward_heads.safetensors"


class ScalarHead(nn.Module):
    """A linear layer without bias that turns a hidden state into a score.

    It computes in fp32 also under autocast, because a 16-bit score has too few digits to rank by. Weights start normal
    with standard deviation 1 / sqrt(hidden + 1) (arXiv 2009.01325), so that scores of normalised states have about unit
    size.

    Args:
        hidden: H, width of the hidden states.
        num_heads: number of independent outputs.
    """

    def __init__(self, hidden: int, num_heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_heads, hidden) * (hidden + 1) ** -0.5)  # [heads, H]

    def forward(self, states: Tensor) -> Tensor:
        """Turn hidden states [..., H] into scores [..., heads], fp32."""
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight)


def make_sequence_classifier(
    model: PreTrainedModel, weight: Tensor, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a copy of the model's backbone with a scalar head, as ``AutoModelForSequenceClassification`` loads it.

    Transformers reads the score at the last token that is not the pad token, so ``tokenizer`` must come from
    ``add_scoring_pad``.

    Args:
        model: the causal language model; its output head is left out.
        weight: [H], the scalar head.
        tokenizer: will be saved with the classifier; the embeddings grow if it has more tokens than the model.
    """
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, None  # the pad token may lie beyond the embeddings until they grow
    with torch.random.fork_rng(devices=[]):  # the new model's random weights must use up none of the run's numbers
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        classifier.base_model.load_state_dict(model.base_model.state_dict())
        if len(tokenizer) > config.vocab_size:
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.score.weight.data.copy_(weight[None])
    return classifier.eval()


def add_scoring_pad(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Set[int]) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that pads on the right with a token that ends no completion.

    It takes the first of pad, unk, bos and the other special tokens that is not in ``stop_token_ids``. If all of them
    are, it adds a new token ``<|pad|>``.
    """
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = "right"
    own = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    found = next((token for token in own if token is not None and token not in stop_token_ids), None)
    if found is None:
        padded.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        padded.pad_token = str(tokenizer.convert_ids_to_tokens(found))
    return padded


def load_head(path: str) -> tuple[Tensor | None, float, float]:
    """Load the head of the sequence classifier at ``path``, with the mean and the standard deviation of its scores.

    Of several heads it takes their mean, each divided by its own standard deviation, as ``LearnedReward`` does.

    Returns:
        head [1, H], mean and standard deviation (0 and 1 if none are stored). (None, 0, 1) if ``path`` is no sequence
        classifier with one label and a linear ``score``.
    """
    if path in BUILT_IN or path.endswith(".gguf"):
        return None, 0.0, 1.0
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not is_classifier(config) or config.num_labels != 1:
        return None, 0.0, 1.0
    heads = Path(path) / HEADS_FILE
    if heads.is_file():
        means, stds = torch.tensor(config.reward_head_means), torch.tensor(config.reward_head_stds)
        return (load_file(heads)["weight"] / stds[:, None]).mean(0, keepdim=True), float((means / stds).mean()), 1.0
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    head = dict(model.named_modules()).get("score")
    if not isinstance(head, nn.Linear):
        return None, 0.0, 1.0
    return head.weight.detach().clone(), getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
