"""Scores from learned reward models: one, or an ensemble (Coste et al., arXiv 2310.02743)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modules.networks.loading import end_of_turn_id
from modules.networks.scalar_head import HEADS_FILE
from modules.types import Reward, Rollout

Ensemble = Literal["mean", "worst", "uncertainty"]


@dataclass(frozen=True)
class Scorer:
    """A loaded reward model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weight: Tensor  # [heads, H]
    mean: Tensor  # [heads], of the raw scores where they were measured
    std: Tensor  # [heads]


class LearnedReward(Reward):
    """The score of a reward model, normalised by the mean and deviation stored with it; of several, a cautious summary.

    Every head of a model with ``reward_heads.safetensors`` is a member of the ensemble. A score is read at the last token of prompt and
    completion, in fp32, on the GPU where there is one. Tokens are the rollout's own where the model's tokenizer decodes them to the rollout's
    text, as it does when policy and reward model have one vocabulary. Otherwise the text is tokenised anew, with an end token where the
    completion ended by itself: the end-of-turn token if the prompt has one, else eos. Completions that were cut off are scored as they are.

    Args:
        paths: folder or hub id of a sequence classifier with one label on a causal backbone, such as an exported ``RewardModule``, or several.
        ensemble: ``mean`` of the members, the ``worst`` of them, or ``uncertainty``: mean - ``uncertainty_weight`` x their population variance.
        uncertainty_weight: >= 0.
        batch_tokens: tokens of one forward, padding included, but at least one completion.
        name: label of the metric.

    Raises:
        ValueError: a path without a sequence classifier of one label, values out of range; at the first call, a model without a linear ``score``,
            or a member of an ensemble without ``reward_mean`` in its config: on scales of their own, the worst would always be the same one.
    """

    def __init__(
        self,
        paths: str | list[str],
        ensemble: Ensemble = "mean",
        uncertainty_weight: float = 0.1,
        batch_tokens: int = 16384,
        name: str = "learned",
    ) -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        if not self.paths or ensemble not in ("mean", "worst", "uncertainty") or uncertainty_weight < 0 or batch_tokens < 1:
            raise ValueError(
                "LearnedReward needs at least one path, ensemble mean, worst or uncertainty, uncertainty_weight >= 0 and batch_tokens >= 1, "
                f"got {self.paths}, {ensemble!r}, {uncertainty_weight} and {batch_tokens}"
            )
        for path in self.paths:
            read_config(path)
        self.name = name
        self.ensemble: Ensemble = ensemble
        self.uncertainty_weight, self.batch_tokens = uncertainty_weight, batch_tokens
        self._scorers: list[Scorer] = []

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """A score per rollout."""
        if not rollouts:
            return []
        return list(combine(self.members(rollouts), self.ensemble, self.uncertainty_weight).tolist())

    def members(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Normalised scores [N, members], float64."""
        if not self._scorers:
            self._scorers = load_scorers(self.paths)
        return torch.cat([self._score(scorer, [row_of(scorer, rollout) for rollout in rollouts]) for scorer in self._scorers], 1)

    @torch.no_grad()
    def _score(self, scorer: Scorer, rows: list[tuple[int, ...]]) -> Tensor:
        """Normalised scores [N, heads] of rows of tokens, each distinct row computed once."""
        distinct = sorted(dict.fromkeys(rows), key=len)
        positions = getattr(scorer.model.config, "max_position_embeddings", None)
        if positions is not None and len(distinct[-1]) > positions:
            raise ValueError(f"LearnedReward: a row of {len(distinct[-1])} tokens is longer than the {positions} positions of its model")
        with torch.autocast(scorer.weight.device.type, enabled=False):
            states = torch.cat([last_states(scorer, chunk) for chunk in chunked(distinct, self.batch_tokens)])
            raw = nn.functional.linear(states, scorer.weight).double()  # [distinct rows, heads]
        place = {row: i for i, row in enumerate(distinct)}
        return ((raw - scorer.mean) / scorer.std)[[place[row] for row in rows]].cpu()


def last_states(scorer: Scorer, rows: list[tuple[int, ...]]) -> Tensor:
    """Hidden state [N, H] at the last token of each row. Transformers' own pooling would take a closing eos for padding where pad is eos."""
    device = scorer.weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)  # [N, T]
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    hidden: Tensor = scorer.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(rows), device=device), lengths - 1]


def combine(scores: Tensor, ensemble: Ensemble, uncertainty_weight: float) -> Tensor:
    """Scores [N, members] -> [N]. Members 1, 2, 6 give 3 as ``mean``, 1 as ``worst``, 3 - 0.1 x 14/3 as ``uncertainty`` with weight 0.1."""
    if ensemble == "worst":
        return scores.amin(1)
    mean = scores.mean(1)
    return mean if ensemble == "mean" else mean - uncertainty_weight * scores.var(1, correction=0)


def row_of(scorer: Scorer, rollout: Rollout) -> tuple[int, ...]:
    """The tokens of prompt and completion in the reward model's vocabulary."""
    tokenizer, completion = scorer.tokenizer, rollout.completion
    if reads(scorer, rollout.prompt_ids, rollout.prompt, special=True):
        if completion.token_ids and reads(scorer, completion.token_ids, completion.text, cut=completion.finish == "stop"):
            return (*rollout.prompt_ids, *completion.token_ids)
        prompt = rollout.prompt_ids
    else:
        prompt = with_bos(tokenizer, rollout.prompt)
    ids = tokenizer(completion.text, add_special_tokens=False, verbose=False).input_ids
    return (*prompt, *ids, *([end_id(tokenizer, prompt)] if completion.finish == "stop" else []))


def reads(scorer: Scorer, ids: list[int], text: str, special: bool = False, cut: bool = False) -> bool:
    """Whether the tokens mean ``text`` to the reward model; with ``special`` tokens but for a BOS in front; ``cut`` = a stop string may follow."""
    if ids and max(ids) >= scorer.model.config.vocab_size:
        return False
    found = str(scorer.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))
    if special:
        bos = str(scorer.tokenizer.bos_token or "")
        return found.removeprefix(bos).strip() == text.removeprefix(bos).strip()
    return found == text or (cut and found.startswith(text))


def with_bos(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens of a prompt, behind one BOS where the tokenizer itself adds one."""
    ids, bos = list(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids), tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def end_id(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> int:
    """What ends a completion of this prompt: the end-of-turn token of a chat, else eos."""
    turn = end_of_turn_id(tokenizer)
    return turn if turn is not None and turn in prompt else int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def chunked(rows: Iterable[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows, in rising length, of at most ``batch_tokens`` together when padded, but at least one."""
    chunk: list[tuple[int, ...]] = []
    for row in rows:
        if chunk and len(row) * (len(chunk) + 1) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def read_config(path: str) -> PreTrainedConfig:
    """The config of a sequence classifier with one label; ValueError where there is none."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"LearnedReward: '{path}' is not a model folder or a hub id that can be read; export a RewardModule there first") from error
    if config.num_labels != 1:
        raise ValueError(f"LearnedReward: '{path}' has {config.num_labels} labels and a reward model has one; export a RewardModule, not a policy")
    return config


def load_scorers(paths: list[str]) -> list[Scorer]:
    """The models behind ``paths``, fp32, frozen, on the GPU where there is one."""
    scorers = [load_scorer(path, torch.device("cuda" if torch.cuda.is_available() else "cpu")) for path in paths]
    unmeasured = [path for path, scorer in zip(paths, scorers, strict=True) if "reward_mean" not in scorer.model.config.to_dict()]
    if len(paths) > 1 and unmeasured:
        raise ValueError(f"LearnedReward: {', '.join(unmeasured)} without reward_mean in config.json cannot join an ensemble: normalise it at export")
    return scorers


def load_scorer(path: str, device: torch.device) -> Scorer:
    """One model with its heads and their moments. ValueError for one that does not score hidden states linearly."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).requires_grad_(False).eval().to(device)
    head = dict(model.named_modules()).get("score")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"LearnedReward: '{path}' ({model.config.model_type}) has no linear 'score' on a causal backbone, which is all that is read")
    config, heads = model.config, Path(path) / HEADS_FILE
    if heads.is_file():
        weight, mean, std = load_file(heads)["weight"].to(device), config.reward_head_means, config.reward_head_stds
    else:
        weight, mean, std = head.weight, [getattr(config, "reward_mean", 0.0)], [getattr(config, "reward_std", 1.0)]
    moments = torch.tensor([mean, std], dtype=torch.float64, device=device)
    return Scorer(model, AutoTokenizer.from_pretrained(path), weight, moments[0], moments[1])
