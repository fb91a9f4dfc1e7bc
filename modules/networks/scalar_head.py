"""Numbers read off hidden states: the head of reward and value models, and its form as a Hugging Face sequence
classifier.
"""

import copy
from collections.abc import Set
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from modules.networks.loading import is_classifier
from modules.networks.tiny import BUILT_IN

HEADS_FILE = (
    "reward_heads.safetensors"  # beside a sequence classifier that is the mean of several heads: weight [heads, H]
)


class ScalarHead(nn.Module):
    """Linear without bias, in fp32 also under autocast: a 16-bit score has too few digits to rank by.

    Weights start normal with standard deviation 1 / sqrt(hidden + 1) (arXiv 2009.01325): scores of normalised states
    start at about unit size.

    Args:
        hidden: H, width of the hidden states.
        num_heads: independent outputs.
    """

    def __init__(self, hidden: int, num_heads: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_heads, hidden) * (hidden + 1) ** -0.5)  # [heads, H]

    def forward(self, states: Tensor) -> Tensor:
        """Hidden states [..., H] -> [..., heads], fp32."""
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight)


def sequence_classifier(model: PreTrainedModel, weight: Tensor, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A copy of the backbone of a causal language model under a score of its last token, as
    ``AutoModelForSequenceClassification`` loads it.

    Transformers reads the score at the last token that is not the pad token, so ``tokenizer`` must come from
    ``with_scoring_pad``.

    Args:
        model: the language model; its output head is left behind.
        weight: [H], the head.
        tokenizer: the one to be saved with it; the embeddings grow where it has more tokens.
    """
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, None  # the pad token may be beyond the embeddings until they grow
    with torch.random.fork_rng(devices=[]):  # its random weights, all replaced, cost the run no random numbers
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        classifier.base_model.load_state_dict(model.base_model.state_dict())
        if len(tokenizer) > config.vocab_size:
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.score.weight.data.copy_(weight[None])
    return classifier.eval()


def with_scoring_pad(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Set[int]) -> PreTrainedTokenizerBase:
    """A copy that pads on the right with a token that ends no completion.

    That is the pad token, else unk, else bos, else another special token, whichever comes first that is not in
    ``stop_token_ids``, else a new token ``<|pad|>``.
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
    """Head [1, H] of the sequence classifier at ``path``, and mean and deviation of its scores (0 and 1 where none are
    stored).

    Of several heads it is their mean, each divided by its own deviation, as ``LearnedReward`` takes it.

    No head (None, 0, 1) where ``path`` is not a sequence classifier with one label on a causal backbone.
    """
    if path in BUILT_IN or path.endswith(".gguf"):
        return None, 0.0, 1.0
    config = AutoConfig.from_pretrained(path)
    if not is_classifier(config) or config.num_labels != 1:
        return None, 0.0, 1.0
    heads = Path(path) / HEADS_FILE
    if heads.is_file():
        means, stds = torch.tensor(config.reward_head_means), torch.tensor(config.reward_head_stds)
        return (load_file(heads)["weight"] / stds[:, None]).mean(0, keepdim=True), float((means / stds).mean()), 1.0
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    head = dict(model.named_modules()).get("score")
    if not isinstance(head, nn.Linear):
        return None, 0.0, 1.0
    return head.weight.detach().clone(), getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
