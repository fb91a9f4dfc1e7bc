"""One list out of the lists of all ranks."""

from typing import Any

from torch import distributed


def from_all_ranks(items: list[Any]) -> list[Any]:
    """The items [n] of all ranks, in the order of the ranks, as many as they are on each (collective); pickled, so keep them small."""
    if not distributed.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
