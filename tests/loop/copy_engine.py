"""An engine with a copy of the weights in this process, which may sample while the policy trains."""

import copy
import threading
import time

import torch

from modules.rollout import InProcessEngine


class CopyEngine(InProcessEngine):
    """``InProcessEngine`` on a copy of the policy.

    Args:
        max_staleness: phases.
        delay: seconds that each ``generate`` beside the training takes longer.
        fails_at: version of the weights with which it does not sample; None = none.
    """

    copies_weights = True

    def __init__(self, max_staleness: int = 0, delay: float = 0.0, fails_at: int | None = None) -> None:
        super().__init__()
        self.max_staleness, self.delay, self.fails_at = max_staleness, delay, fails_at
        self.own = None
        self.calls: list[tuple[str, int]] = []  # thread and version of each ``generate``
        self._busy = threading.Lock()

    def sync_weights(self, policy, version):
        assert self._busy.acquire(blocking=False), "synced while it samples"
        with torch.no_grad():
            if self.own is None:
                self.own = copy.deepcopy(policy)
            self.own.load_state_dict(policy.state_dict())
        super().sync_weights(self.own, version)
        self._busy.release()

    def generate(self, prompts, num_generations, sampling, seeds, replies=None, started=None):
        assert self._busy.acquire(blocking=False), "asked while it samples"
        try:
            self.calls.append((threading.current_thread().name, self._version))
            if threading.current_thread() is not threading.main_thread():
                time.sleep(self.delay)
            if self._version == self.fails_at:
                raise RuntimeError("CopyEngine: the sampler is gone")
            return super().generate(prompts, num_generations, sampling, seeds, replies, started)
        finally:
            self._busy.release()
