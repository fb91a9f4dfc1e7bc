"""A reward for each kind of prompt, for runs on several tasks at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from modules.types import Reward, Rollout, as_reward, score


class Dispatch(Reward):
    """Scores each completion by the reward of its task, as runs on several tasks need (Qwen3, 2505.09388, section 4.4).

    Each reward is called with the completions of its task alone, and keeps its own scale. That is enough for
    advantages that compare the completions of one prompt. The mean score of each task is logged under the task's name.

    Args:
        rewards: task -> its reward, such as
            ``{gsm8k: {class_path: MathVerify}, chat: {class_path: LearnedReward, ...}}``. null = its completions get no
            score, as in an accuracy for some of the tasks.
        column: the column of the rows that names the task; None = the name of the data set, which is the file without
            its ending (``gsm8k``), with or without its folder (``data/gsm8k``), or a source's own name (``addition``).

    Raises:
        ValueError: there is no reward; at the start of a fit, or when it scores, a prompt's task is not among them.
    """

    name = "dispatch"

    def __init__(self, rewards: dict[str, Reward | None], column: str | None = None) -> None:
        if not any(reward is not None for reward in rewards.values()):
            raise ValueError("Dispatch needs a reward for at least one task, got none")
        self.tasks, self.column = [str(task) for task in rewards], column
        scored = {str(task): as_reward(reward) for task, reward in rewards.items() if reward is not None}
        self.scored, self.rewards = list(scored), list(scored.values())
        if all(reward.checks_answer for reward in self.rewards):
            self.checks_answer = True

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the score of each rollout by its task's reward, None where that gives None."""
        return [self.add_parts(parts) for parts in self.score_parts(rollouts)]

    def score_parts(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        """Return the score of each rollout under the name of its task, and None under those of the others."""
        tasks = [self.find_task(rollout.uid, rollout.source, rollout.info) for rollout in rollouts]
        parts: list[dict[str, float | None]] = [dict.fromkeys(self.tasks) for _ in rollouts]
        for task, reward in zip(self.scored, self.rewards, strict=True):
            mine = [row for row, each in enumerate(tasks) if each == task]
            for row, value in zip(mine, score(reward, [rollouts[row] for row in mine]), strict=True):
                parts[row][task] = value
        return parts

    def add_parts(self, parts: Mapping[str, float | None]) -> float | None:
        """Return the only score there is, None without one."""
        return next((value for value in parts.values() if value is not None), None)

    def list_parts(self) -> list[Reward]:
        """Return no reward, as the scores have the names of the tasks."""
        return []

    def name_parts(self) -> list[str]:
        """Return the tasks."""
        return self.tasks

    def scores(self, rollout: Rollout) -> bool:
        """Tell whether the task of a rollout has a reward."""
        return self.find_task(rollout.uid, rollout.source, rollout.info) in self.scored

    def find_task(self, name: str, source: str, info: Mapping[str, Any] | None) -> str:
        """Return the task of a prompt.

        Args:
            name: name of the prompt, for the error message.
            source: its data set.
            info: its other columns.

        Raises:
            ValueError: no reward is named for the task.
        """
        task = source if self.column is None else str((info or {}).get(self.column))
        if self.column is None and task not in self.tasks:
            task = task.rpartition("/")[2]
        if task not in self.tasks:
            where = "is of the data set" if self.column is None else f"has in its column {self.column}"
            task = source if self.column is None else task
            raise ValueError(
                f"{name}: this prompt {where} {task!r}, for which Dispatch has no reward, only for "
                f"{', '.join(self.tasks)}: name one in its rewards, or null for none"
            )
        return task
