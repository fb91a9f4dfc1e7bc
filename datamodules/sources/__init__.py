"""Where raw rows come from; imported together so that YAML files may use the short class names."""

from datamodules.sources.addition import Addition, AdditionPairs
from datamodules.sources.base import Row, Source
from datamodules.sources.files import Files
from datamodules.sources.oasst import OasstTrees
from datamodules.sources.reasoning_gym import ReasoningGym
from datamodules.sources.scored import Scored

__all__ = ["Addition", "AdditionPairs", "Files", "OasstTrees", "ReasoningGym", "Row", "Scored", "Source"]
