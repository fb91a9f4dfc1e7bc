"""Where raw rows come from; imported together so that YAML files may use the short class names."""

from datamodules.sources.addition import Addition
from datamodules.sources.base import Row, Source
from datamodules.sources.files import Files
from datamodules.sources.reasoning_gym import ReasoningGym

__all__ = ["Addition", "Files", "ReasoningGym", "Row", "Source"]
