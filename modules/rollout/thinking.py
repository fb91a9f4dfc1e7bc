"""Thinking budgets: a thought that has used up its tokens is ended by a stop text, and the answer follows."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modules.functional.thoughts import CLOSE_TAG, OPEN_TAG
from modules.types import OPENED_THOUGHT

# Qwen3's, as its documentation's code has it (docs/source/getting_started/quickstart.md).
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)
WINDOW = 16  # tokens, at least one byte each, that hold a tag and a character cut in front of it
BUDGETS = 1  # number of the random stream that draws budgets


@dataclass(frozen=True)
class Thinking:
    """Ends a thought after ``budget`` tokens by a stop text, behind which the policy answers (Qwen3, 2505.09388, 4.4).

    The budget counts the tokens behind ``<think>``, wherever a completion or the end of its prompt opens it. All thoughts
    of a completion share it. A thought that closes itself within the budget gets no stop text, and a completion that
    opens none is not touched. Where ``</think>`` is several tokens, a closing tag that began within the budget may end.

    The stop text takes tokens of ``max_completion_length``. Nobody sampled it, so it is no part of loss, KL or lengths.

    Raises:
        ValueError: a value is out of range.
    """

    # >= 0, tokens. Several: one of them is drawn for each prompt of each phase, so that completions are compared at equal
    # budget (budget-relative optimisation, BRPO, 2505.13438); name one twice to draw it twice as often. None = no limit.
    budget: int | tuple[int, ...] | None = None
    stop_text: str = STOP_TEXT  # holds </think> once

    def __post_init__(self) -> None:
        if self.budget is not None and (not self.budgets or min(self.budgets) < 0):
            raise ValueError(f"sampling.thinking: budget must be a number >= 0, or several, got {self.budget!r}")
        if self.stop_text.count(CLOSE_TAG) != 1 or OPEN_TAG in self.stop_text:
            raise ValueError(
                f"sampling.thinking: stop_text must close the thought by one </think>, got {self.stop_text!r}"
            )

    @property
    def budgets(self) -> tuple[int, ...]:
        """All budgets that may be drawn; none without a limit."""
        return () if self.budget is None else (self.budget,) if isinstance(self.budget, int) else tuple(self.budget)

    def draw(self, seed: int) -> int | None:
        """Return the budget of a prompt, which depends on its seed alone; None = no limit."""
        if len(self.budgets) < 2:
            return next(iter(self.budgets), None)
        return self.budgets[int(np.random.default_rng([seed, BUDGETS]).integers(len(self.budgets)))]


class ThoughtWatch:
    """Follows the thoughts of R requests by their tokens, and tells which have used up their budget.

    A text is decoded only where a token may complete a tag; what a token may do is looked up once.

    Args:
        thinking: the settings.
        tokenizer: of the policy.
        prompts: tokens of the prompt of each request.
        budgets: of each request; None = no limit.
        size: tokens of the model's vocabulary.
        device: of the tokens.
    """

    def __init__(
        self,
        thinking: Thinking,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        budgets: Sequence[int | None],
        size: int,
        device: torch.device,
    ) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = plain_ids(tokenizer, thinking.stop_text)
        self._is_one_token = len(plain_ids(tokenizer, CLOSE_TAG)) == 1
        opened = [opens_thought(tokenizer, prompt) for prompt in prompts]
        self._open = torch.tensor([*opened, False], device=device)  # the last entry is that of slots without a request
        self._left = torch.tensor(
            [torch.iinfo(torch.long).max if each is None else each for each in [*budgets, None]], device=device
        )
        self._may_end_tag = torch.full((size,), -1, device=device)  # by token; -1 = not looked up yet

    def used_up(self) -> list[int]:
        """Return the requests whose prompts open a thought that has no tokens."""
        return (self._open & (self._left <= 0)).nonzero()[:, 0].tolist()

    def count_left(self, request: int) -> int | None:
        """Return how many tokens the open thought of a request has left; None = none is open, or it has no limit."""
        left = int(self._left[request])
        return left if bool(self._open[request]) and left < torch.iinfo(torch.long).max else None

    def open_turn(self, request: int, ids: list[int]) -> bool:
        """Tell whether a new turn, which begins behind these tokens, opens a thought that has no tokens left."""
        self._open[request] = opens_thought(self._tokenizer, ids)
        return bool(self._open[request]) and int(self._left[request]) <= 0

    def close(self, request: int, stopped: bool) -> None:
        """Take note that the stop text follows, or that there is no room for it, so that the thought goes on."""
        if stopped:
            self._open[request] = False
        else:
            self._left[request] = torch.iinfo(torch.long).max

    def follow(
        self, tokens: Tensor, requests: Tensor, drawn: Tensor, read: Callable[[int, int], list[int]]
    ) -> list[int]:
        """Take note of new tokens, and return the places whose thought has used up its budget.

        Args:
            tokens: int [N], the new tokens.
            requests: int [N].
            drawn: bool [N], True where the policy drew the token and goes on.
            read: (place, n) -> the last n tokens of its request, the new one included.
        """
        self._left[requests] -= (self._open[requests] & drawn).long()
        for token in tokens[self._may_end_tag[tokens] < 0].unique().tolist():
            text = self._tokenizer.decode([token])
            self._may_end_tag[token] = ">" in text or "\ufffd" in text
        for place in (drawn & (self._may_end_tag[tokens] == 1)).nonzero()[:, 0].tolist():
            ids = read(place, WINDOW)
            before, after = str(self._tokenizer.decode(ids[:-1])), str(self._tokenizer.decode(ids))
            new = [tag for tag in (OPEN_TAG, CLOSE_TAG) if after.count(tag) > before.count(tag)]
            if new:
                self._open[requests[place]] = max(new, key=after.rfind) == OPEN_TAG
        spent = drawn & self._open[requests] & (self._left[requests] <= 0)
        places: list[int] = spent.nonzero()[:, 0].tolist()
        if self._is_one_token:
            return places
        return [
            place for place in places if not self._is_closing(-int(self._left[requests[place]]), read(place, WINDOW))
        ]

    def _is_closing(self, beyond: int, ids: list[int]) -> bool:
        """Tell whether the text ends in the beginning of a closing tag that was longer than the tokens ``beyond`` the
        budget.
        """
        text = str(self._tokenizer.decode(ids))
        return any(text.endswith(CLOSE_TAG[:size]) for size in range(beyond + 1, len(CLOSE_TAG)))


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def opens_thought(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    """Tell whether tokens end inside a thought that they open, as the prompts of some chat templates do."""
    return OPENED_THOUGHT.search(str(tokenizer.decode(ids[-WINDOW:]))) is not None


def check_thinking(
    thinking: Thinking,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Collection[int],
    max_completion_length: int,
    stop: Collection[str],
    opened: bool = True,
) -> None:
    """Refuse budgets after which there is no room for an answer, and stop strings that end the stop text.

    Args:
        thinking: the settings.
        tokenizer: of the policy.
        budgets: that may come.
        max_completion_length: tokens of a completion.
        stop: strings that end a completion.
        opened: whether prompts open the thought, or else completions have to write the tag.

    Raises:
        ValueError: it is refused; the message says what to change.
    """
    cut = [each for each in stop if each in thinking.stop_text]
    if budgets and cut:
        raise ValueError(
            f"sampling.thinking: the stop text holds {cut[0]!r}, which is in sampling.stop and would end the completion "
            "before its answer: leave it out there"
        )
    tags = 0 if opened else len(plain_ids(tokenizer, OPEN_TAG))
    stop_ids = len(plain_ids(tokenizer, thinking.stop_text))
    if budgets and tags + max(budgets) + stop_ids >= max_completion_length:
        tag = f" behind <think> ({tags})" if tags else ""
        raise ValueError(
            f"sampling.thinking: a thought of {max(budgets)} tokens{tag} and the stop text ({stop_ids}) leave no room for "
            f"an answer in max_completion_length {max_completion_length}: raise it, or lower the budget"
        )
