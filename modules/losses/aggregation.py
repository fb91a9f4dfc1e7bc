"""How token losses become one number, which a YAML names by class."""

from abc import ABC, abstractmethod

from torch import Tensor

from modules.functional.ranges import check_numbers


class Aggregation(ABC):
    """Makes one number of token losses: their weighted sum over rows of an optimiser step / sum of ``row_count``."""

    @abstractmethod
    def row_count(self, mask: Tensor) -> Tensor:
        """Return what each row adds to the denominator, [N], from the keep-mask [N, Tc]; 0 for an empty row."""

    def weights(self, mask: Tensor) -> Tensor:
        """Return the weight of each token loss, [N, Tc], zero where the mask is False."""
        return mask.float()


class TokenMean(Aggregation):
    """Every token of the step counts the same (DAPO, arXiv 2503.14476)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.sum(1).float()


class SequenceMean(Aggregation):
    """Mean over completions of their mean token loss (GRPO as published; short completions weigh more per token)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.any(1).float()

    def weights(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True).clamp(min=1)


class SequenceSum(Aggregation):
    """Mean over completions of the sum of their token losses: the policy gradient (REINFORCE, Williams 1992)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.any(1).float()


class ConstantNorm(Aggregation):
    """Sum over tokens / (completions x max_length), a constant, so length has no bias (Dr. GRPO, arXiv 2503.20783).

    Args:
        max_length: the completion budget in tokens.
    """

    def __init__(self, max_length: int) -> None:
        check_numbers("ConstantNorm", max_length=(max_length, "[1, inf)"))
        self.max_length = max_length

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.any(1) * float(self.max_length)
