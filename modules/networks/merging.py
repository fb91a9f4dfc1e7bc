"""Averages the weights of several models: model merging, which Kimi k1.5 uses to shorten chains of thought."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modules.networks.loading import is_classifier
from modules.networks.policy import Policy

# Settings of a config that say nothing about what its weights compute.
BESIDE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def average_models(paths: Sequence[str], weights: Sequence[float] | None = None) -> Policy:
    """Average the weights of models: theta = sum of w_i theta_i (Kimi k1.5, arXiv 2501.12599, section 2.4: w_i = 1/2).

    The sum is computed in 64 bits and rounded to 32 bits once, so that models with equal weights give these, bit for
    bit.

    Args:
        paths: at least two models of the same architecture and tokenizer, each as ``Policy`` takes it.
        weights: one per model, above 0; they are divided by their sum. None = all the same.

    Returns:
        the first policy, with the averaged weights.

    Raises:
        ValueError: the number of models or weights is wrong, a model cannot be loaded, or two models differ; the
            message names the first difference.
    """
    if len(paths) < 2:
        raise ValueError(f"merge needs at least two models, got {len(paths)}: name them with --models A B")
    shares = [1.0] * len(paths) if weights is None else list(weights)
    if len(shares) != len(paths):
        raise ValueError(f"merge got {len(shares)} weights for {len(paths)} models; give one per model")
    if not all(share > 0 and math.isfinite(share) for share in shares):
        raise ValueError(f"merge: weights must be above 0 and finite, got {shares}")
    policies = [load_part(path) for path in paths]
    first, *others = policies
    for other in others:
        difference = find_difference(first, other)
        if difference is not None:
            raise ValueError(f"merge: '{first.path}' and '{other.path}' cannot be averaged: {difference}")
    states = [policy.model.state_dict() for policy in policies]
    done: set[int] = set()  # tied weights have two names
    with torch.no_grad():
        for name, mine in states[0].items():
            if mine.is_floating_point() and mine.data_ptr() not in done:
                done.add(mine.data_ptr())
                parts = [
                    share / sum(shares) * state[name].double() for share, state in zip(shares, states, strict=True)
                ]
                mine.copy_(torch.stack(parts).sum(0))
    return first


def load_part(path: str) -> Policy:
    """Load a model to average. Raises ValueError for adapters alone and for a reward model."""
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"merge: '{path}' holds adapters without their model; name the export of the run, in which they are added "
            "into the weights"
        )
    policy = Policy(path, role="models")
    if is_classifier(policy.model.config):
        raise ValueError(f"merge: '{path}' is a classifier (a reward model?); name language models only")
    return policy


def find_difference(first: Policy, other: Policy) -> str | None:
    """Return the first difference that forbids averaging two policies; None = there is none.

    It looks at architectures, shapes, settings that change what the weights compute, tokens and chat templates.
    """
    kinds = [type(policy.model).__name__ for policy in (first, other)]
    if kinds[0] != kinds[1]:
        return f"the architecture is {kinds[0]} in one and {kinds[1]} in the other"
    shapes, theirs = (
        {name: tuple(weight.shape) for name, weight in policy.model.state_dict().items()} for policy in (first, other)
    )
    for name in [*shapes, *(name for name in theirs if name not in shapes)]:
        if shapes.get(name) != theirs.get(name):
            return f"{name} is {write_shape(shapes.get(name))} in one and {write_shape(theirs.get(name))} in the other"
    settings, others = (read_settings_of(policy) for policy in (first, other))
    for name in [*settings, *(name for name in others if name not in settings)]:
        if settings.get(name) != others.get(name):
            return f"{name} of the config is {settings.get(name)!r} in one and {others.get(name)!r} in the other"
    tokens, known = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    for token in [*tokens, *(token for token in known if token not in tokens)]:
        if tokens.get(token) != known.get(token):
            return (
                f"token {token!r} has number {tokens.get(token)} in one tokenizer and {known.get(token)} in the other"
            )
    if first.tokenizer.chat_template != other.tokenizer.chat_template:
        return "their chat templates differ"
    return None


def read_settings_of(policy: Policy) -> dict[str, Any]:
    """Return the settings of a policy's config that change what its weights compute."""
    return {name: value for name, value in policy.model.config.to_dict().items() if name not in BESIDE}


def write_shape(shape: tuple[int, ...] | None) -> str:
    """Write a shape for a message."""
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"
