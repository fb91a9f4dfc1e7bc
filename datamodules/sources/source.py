"""The base class of sources, which give raw rows. Later code names a row by its origin."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Row:
    """One raw row."""

    columns: dict[str, Any]  # as the source names them
    origin: str  # "file:line" or "name#index": what error messages and uids say
    source: str  # name of the data set, for per-source metrics
    plain: bool = False  # True = its texts are used as they are, even where there is a chat template


class Source(ABC):
    """Gives rows. Their order is the same at every call."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Return all rows, at least one. Raises ValueError with one sentence when something cannot be read."""


def optional_import(module: str, extra: str) -> ModuleType:
    """Import an optional library late. Raises ImportError with the extra to install when it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed: pip install 'lightning-align[{extra}]'"
        ) from error
