"""A plain Python function as a reward."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from modules.types import Reward, Rollout

ANSWERS = ("answers", "answer", "ground_truth", "solution")  # names under which a function asks for the gold answers

Reward.register(FunctionType)  # so that the dotted path of a function is accepted wherever a configuration asks for one


class FunctionReward(Reward):
    """Calls a function with lists, one entry per completion, and takes the list of scores that it returns.

    The function gets by name what its parameters name: ``prompts``, ``completions`` (texts), ``completion_ids``
    (tokens), ``answers`` (also ``answer``, ``ground_truth`` or ``solution``), and the other columns of the rows; with
    ``**columns`` it gets all columns that are left. A row that lacks a column has None there.

    Args:
        function: such as ``def short(completions, **columns): return [-len(text) for text in completions]``. Its name
            labels the metric.

    Raises:
        ValueError: a function that asks for no completions; at a call, one that asks for a column that no row has, or
            that returns no list.
    """

    def __init__(self, function: Callable[..., list[float | None]]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [parameter for parameter in parameters if parameter.kind not in (2, 4)]  # without *args, **columns
        self._asked = {parameter.name: parameter.default is parameter.empty for parameter in named}  # name -> needed
        if not {"completions", "completion_ids"} & set(self._asked):
            raise ValueError(
                f"reward {self.name}{inspect.signature(function)}: a plain function as a reward is called by the names "
                "of its parameters and must ask for completions: (prompts, completions, answers, **columns)"
            )
        self._call = partial(function)  # a bare function among the attributes would count as a reward of its own

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """What the function returns."""
        if not rollouts:
            return []
        given = self.lists(rollouts)
        missing = [name for name, needed in self._asked.items() if needed and name not in given]
        if missing:
            raise ValueError(
                f"reward {self.name} asks for {', '.join(missing)}; the rows have "
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
        """Everything that a function can ask for, by name; a column of the rows comes before a name of ours for the
        answers.
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
    """A plain function as a reward; anything else as it is, also inside a list or a dict."""
    if isinstance(reward, FunctionType):
        return FunctionReward(reward)
    if isinstance(reward, list):
        return [as_reward(part) for part in reward]
    if isinstance(reward, dict):
        return {name: as_reward(part) for name, part in reward.items()}
    return reward
