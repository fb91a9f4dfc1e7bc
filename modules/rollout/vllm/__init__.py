"""An engine that asks a vLLM server in an environment of its own."""

from modules.rollout.vllm.vllm_engine import VLLMEngine

__all__ = ["VLLMEngine"]
