"""Keeps to thinking budgets with a server that knows none: what a thought has too much is cut off, and the stop text follows."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from modules.rollout.thinking import ThoughtWatch
from modules.types import Completion

# Requests, their beginnings, and how many tokens each may get at most -> the completions with these beginnings.
Ask = Callable[[Sequence[int], Sequence[Completion], Sequence[int]], list[Completion]]


def sample_thoughts(watch: ThoughtWatch, number: int, length: int, ask: Ask) -> list[Completion]:
    """Sample completions whose thoughts end within their budgets, in as many rounds as it takes.

    While a thought is open, no more is asked for than its budget has left.

    Args:
        watch: follows the thoughts.
        number: of completions.
        length: tokens of a completion, >= 1.
        ask: samples.

    Returns:
        the completions; the tokens of stop texts have log-prob 0 and are not ``sampled``.
    """
    found = [Completion([], [], "", "length")] * number
    for request in watch.used_up():
        found[request] = _stop_thought(watch, request, found[request], 0, length) or found[request]
    going = list(range(number))
    while going:
        left = [watch.count_left(each) for each in going]
        limits = [length if each is None else max(1, each) for each in left]
        answers = ask(going, [found[each] for each in going], limits)
        asked, going = going, []
        for request, answer in zip(asked, answers, strict=True):
            begun = found[request]
            flags = begun.sampled or [True] * len(begun.token_ids)
            found[request] = replace(
                answer, sampled=flags + [True] * (len(answer.token_ids) - len(flags)), versions=None
            )
            cut = _find_cut(watch, request, found[request], len(flags), length)
            found[request] = cut or found[request]
            if cut is not None or (answer.finish == "length" and len(answer.token_ids) < length):
                going.append(request)
    return [replace(each, sampled=None) if all(each.sampled or ()) else each for each in found]


def _find_cut(watch: ThoughtWatch, request: int, completion: Completion, begun: int, length: int) -> Completion | None:
    """Return the part of a completion up to its stop text; None = it needs none behind its first ``begun`` tokens."""
    tokens = completion.token_ids
    for count in range(begun + 1, len(tokens) + 1):
        if count == length or (count == len(tokens) and completion.finish == "stop"):
            break
        spent = watch.follow(
            torch.tensor([tokens[count - 1]]),
            torch.tensor([request]),
            torch.tensor([True]),
            lambda _, size, end=count: tokens[max(0, end - size) : end],  # type: ignore[misc]
        )
        cut = _stop_thought(watch, request, completion, count, length) if spent else None
        if cut is not None:
            return cut
    return None


def _stop_thought(
    watch: ThoughtWatch, request: int, completion: Completion, count: int, length: int
) -> Completion | None:
    """Return the first ``count`` tokens and the stop text behind them; None = there is no room for it."""
    given = watch.stop_ids if count + len(watch.stop_ids) < length else []
    watch.close(request, bool(given))
    if not given:
        return None
    return replace(
        completion,
        token_ids=completion.token_ids[:count] + given,
        logprobs=completion.logprobs[:count] + [0.0] * len(given),
        sampled=(completion.sampled or [True] * count)[:count] + [False] * len(given),
        finish="length",
    )
