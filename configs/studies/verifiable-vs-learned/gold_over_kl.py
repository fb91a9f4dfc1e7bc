"""How the gold reward goes with the distance from the start, in the two arms of one seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from run_study import LATE, read_curves

GOLD, OPTIMISED, KL = "val/pass@1", "val/reward", "val/sequence_kl"


def measure(start: Path, seed: int) -> dict[str, float]:
    """Return what the samples of the start and the validations of both arms say.

    ``proxy_accuracy`` is the share of held-out pairs, right and wrong samples of the start, that the reward model puts
    in the right order, and ``start_gold`` the share of right samples.

    ``<arm>_fall`` is the gold at its peak, which may be the start, - the gold at the end. ``<arm>_rise`` is the rise of
    the optimised reward from that peak, or from the first validation, to the end, and ``<arm>_peak_kl`` the KL at the
    peak. The end is the mean over the last fifth of the validations. ``common_kl`` is the largest KL that both arms
    reach, ``<arm>_at_common_kl`` the gold of an arm where it first gets there, and ``difference`` that of the verifier
    - that of the learned reward.
    """
    lines = (start.parent / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    arms = {arm: read_curves(start.parent / arm / "metrics.csv") for arm in ("verifier", "learned")}
    found = {
        "proxy_accuracy": read_curves(start / "metrics.csv")["val/accuracy"][-1],
        "start_gold": fmean(json.loads(line)["reward"] for line in lines),
        "common_kl": min(max(curves[KL]) for curves in arms.values()),
    }
    for arm, curves in arms.items():
        gold, kl = [found["start_gold"], *curves[GOLD]], [0.0, *curves[KL]]
        found |= {f"{arm}_{name}": value for name, value in find_fall(gold, curves[OPTIMISED], kl).items()}
        found[f"{arm}_at_common_kl"] = find_first(found["common_kl"], kl, gold)
    return found | {"difference": found["verifier_at_common_kl"] - found["learned_at_common_kl"]}


def find_fall(gold: Sequence[float], optimised: Sequence[float], kl: Sequence[float]) -> dict[str, float]:
    """Return ``fall``, ``rise`` and ``peak_kl``, see ``measure``; ``gold`` and ``kl`` begin with the start."""
    peak, last = max(range(len(gold)), key=lambda place: gold[place]), max(1, len(optimised) // LATE)
    return {
        "fall": gold[peak] - fmean(gold[-last:]),
        "rise": fmean(optimised[-last:]) - optimised[max(0, peak - 1)],
        "peak_kl": kl[peak],
    }


def find_first(distance: float, kl: Sequence[float], gold: Sequence[float]) -> float:
    """Return the gold where the KL first reaches a distance > ``kl[0]``, on straight lines between validations."""
    place = next(place for place, reached in enumerate(kl) if reached >= distance)
    share = (distance - kl[place - 1]) / (kl[place] - kl[place - 1])
    return gold[place - 1] + share * (gold[place] - gold[place - 1])
