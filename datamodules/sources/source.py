"""A source hands over raw rows; everything later refers to a row by its origin."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Row:
    """One raw record."""

    columns: dict[str, Any]  # as the source names them
    origin: str  # "file:line" or "name#index": what error messages and uids say
    source: str  # the data set, for per-source metrics
    plain: bool = False  # its texts are read as they stand, also where there is a chat template


class Source(ABC):
    """Where rows come from. The order is the same at every call."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """All rows, at least one. Raises ValueError with one sentence on anything unreadable."""


def optional_import(module: str, extra: str) -> ModuleType:
    """Imports an optional library late; ImportError names the extra that brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed: pip install 'lightning-align[{extra}]'"
        ) from error
