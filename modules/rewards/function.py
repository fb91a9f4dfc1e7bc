"""Wraps a plain Python function as a reward."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from modules.types import Reward, Rollout

ANSWERS = ("answers", "answer", "ground_truth", "solution")  # parameter names that mean the gold answers

Reward.register(FunctionType)  # a configuration may then name a function wherever it may name a reward


class FunctionReward(Reward):
    """Calls a function with lists, one entry per completion, and takes the list of scores that it returns.

    The function gets what the names of its parameters ask for: ``prompts``, ``completions`` (texts), ``completion_ids``
    (tokens), ``answers`` (also ``answer``, ``ground_truth`` or ``solution``), and the other columns of the rows. With
    ``**columns`` it gets all columns that are left. A row that lacks a column has None in its place.

    Args:
        function: for example ``def short(completions, **columns): return [-len(text) for text in completions]``. Its
            name labels the metric.

    Raises:
        ValueError: the function asks for no completions. When called: it asks for a column that no row has, or it does
            not return a list.
    """

    def __init__(self, function: Callable[..., list[float | None]]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [parameter for parameter in parameters if parameter.kind not in (2, 4)]  # without *args, **columns
        self._asked = {parameter.name: parameter.default is parameter.empty for parameter in named}  # name -> needed
        if not {"completions", "completion_ids"} & set(self._asked):
            raise ValueError(
                f"reward {self.name}{inspect.signature(function)}: a reward function gets what the names of its "
                "parameters ask for, and must ask for completions: (prompts, completions, answers, **columns)"
            )
        self._call = partial(function)  # a bare function among the attributes would count as another reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Call the function and return its scores."""
        if not rollouts:
            return []
        given = self.lists(rollouts)
        missing = [name for name, needed in self._asked.items() if needed and name not in given]
        if missing:
            raise ValueError(
                f"reward {self.name} asks for {', '.join(missing)}, which no row has; it can ask for "
                f"{', '.join(name for name in given if name not in ANSWERS)} and answers"
            )
        wanted = {name: given[name] for name in given if name in self._asked or self._takes_all}
        scores = self._call(**wanted)
        if hasattr(scores, "tolist"):  # a tensor or an array
            scores = scores.tolist()
        if not isinstance(scores, list | tuple):
            raise ValueError(
                f"reward {self.name} returned {type(scores).__name__}; return a list with a number or None for each "
                f"of the {len(rollouts)} completions"
            )
        return list(scores)

    @staticmethod
    def lists(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        """Return every list that a function can ask for, by name.

        If the rows have a column called ``answer``, ``ground_truth`` or ``solution``, that column is taken.
        """
        names = dict.fromkeys(name for rollout in rollouts for name in rollout.info or {})
        answers = [rollout.answer for rollout in rollouts]
        return (
            dict.fromkeys(ANSWERS, answers)
            | {name: [(rollout.info or {}).get(name) for rollout in rollouts] for name in names}
            | {
                "prompts": [rollout.prompt for rollout in rollouts],
                "completions": [rollout.completion.text for rollout in rollouts],
                "completion_ids": [rollout.completion.token_ids for rollout in rollouts],
                "answers": answers,
            }
        )


def as_reward(reward: Any) -> Any:
    """Turn a plain function into a reward, also inside a list or a dict; return anything else as it is."""
    if isinstance(reward, FunctionType):
        return FunctionReward(reward)
    if isinstance(reward, list):
        return [as_reward(part) for part in reward]
    if isinstance(reward, dict):
        return {name: as_reward(part) for name, part in reward.items()}
    return reward
