"""A reward with errors at chosen rates, to study what a verifier's errors do to training."""

import hashlib
from collections.abc import Sequence

from modules.trainer.seeds import run_seed
from modules.types import Reward, Rollout, as_reward, score


class Noisy(Reward):
    """Turns some scores of a 0/1 reward into the other one.

    Whether a score is turned is drawn from a hash of the seed, the prompt instance and the completion's tokens. So the
    same completion of a prompt always gets the same score, in any batch and on any rank. The score is None where
    ``reward`` gives None. Validation asks ``reward`` itself.

    Args:
        reward: gives 0, 1 or None.
        false_positive: probability that a 0 becomes a 1, in [0, 1].
        false_negative: probability that a 1 becomes a 0, in [0, 1].
        seed: None = the run's.

    Raises:
        ValueError: a probability is out of range. When called: ``reward`` gives another score than 0 or 1.
    """

    def __init__(
        self, reward: Reward, false_positive: float = 0.0, false_negative: float = 0.0, seed: int | None = None
    ) -> None:
        if not (0 <= false_positive <= 1 and 0 <= false_negative <= 1):
            raise ValueError(
                f"Noisy false_positive and false_negative must be in [0, 1], got {false_positive} and {false_negative}"
            )
        self.reward, self.seed = as_reward(reward), run_seed(seed)
        self.rates = {0.0: false_positive, 1.0: false_negative}
        self.name = f"noisy_{self.reward.name}"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        scores = score(self.reward, rollouts)
        other = next((value for value in scores if value not in (None, 0.0, 1.0)), None)
        if other is not None:
            raise ValueError(
                f"Noisy turns 0 into 1 and 1 into 0, but '{self.reward.name}' gave {other}; name a 0/1 reward"
            )
        return [
            value if value is None or self.draw(rollout) >= self.rates[value] else 1.0 - value
            for rollout, value in zip(rollouts, scores, strict=True)
        ]

    def draw(self, rollout: Rollout) -> float:
        """Return this completion's number, in [0, 1)."""
        tokens = rollout.completion.token_ids or rollout.completion.text
        digest = hashlib.blake2b(f"{self.seed}/{rollout.uid}/{tokens}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48
