"""An engine of processes that share one copy of the weights."""

from modules.rollout.workers.worker_engine import WorkerEngine

__all__ = ["WorkerEngine"]
