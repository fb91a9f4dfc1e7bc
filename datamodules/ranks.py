"""One list out of the lists of all ranks, for the state of loaders."""

from typing import Any

from torch import distributed


def from_all_ranks(items: list[Any]) -> list[Any]:
    """The items of all ranks, in the order of the ranks (collective)."""
    if not distributed.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
