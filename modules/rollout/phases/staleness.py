"""How far the weights that sampled a token are behind those that train on it."""

from collections.abc import Sequence

from torch import Tensor

from modules.functional.masked import pad_rows
from modules.trainer.ranks import from_all_ranks
from modules.types import Rollout


def find_stale(rollouts: Sequence[Rollout], version: int) -> Tensor:
    """Tell which tokens, bool [N, Tc], other weights sampled than those of ``version``; False in padding."""
    versions, mask = pad_rows([rollout.completion.token_versions for rollout in rollouts])
    return mask & (versions != version)


def measure_staleness(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Measure by how many updates the sampled tokens of all ranks are behind ``version`` (collective)."""
    behind = [version - each for rollout in rollouts for each in rollout.completion.token_versions]
    found = from_all_ranks([(sum(behind), len(behind), max(behind, default=0))])
    sums, counts, largest = zip(*found, strict=True)
    return {"staleness/mean": sum(sums) / max(1, sum(counts)), "staleness/max": float(max(largest))}
