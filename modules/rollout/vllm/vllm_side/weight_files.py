"""Lets a vLLM server take weights from safetensors files, on any device.

vLLM's workers import this module by the options that ``VLLMServer`` starts a server with. It needs vLLM alone (0.32 was
run; the base classes are those of 0.33 too).
"""

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class FileStart(WeightTransferInitInfo):
    """Nothing needs to be agreed on."""


@dataclass
class FilePart(WeightTransferUpdateInfo):
    """One file of an update."""

    path: str  # a safetensors file with Hugging Face names, which every worker can read


class WeightFiles(WeightTransferEngine):
    """Loads the files of an update as vLLM loads a checkpoint, into the storages that it has."""

    init_info_cls, update_info_cls = FileStart, FilePart

    def init_transfer_engine(self, init_info: FileStart) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Make the layers ready for weights, and note which ones are to come."""
        self.missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        """Load a file; the base class would wait for an accelerator, which a CPU is not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FilePart) -> None:
        """Load the weights of a file."""
        with safe_open(update_info.path, "pt") as file:
            loaded = self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        self.missing -= loaded or self.missing

    def finish_weight_update(self) -> None:
        """Pack the weights as the device needs them, and the output head too.

        Raises:
            RuntimeError: no file held some weight of the model.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        if self.missing:
            raise RuntimeError(f"the update holds no weights for {', '.join(sorted(self.missing)[:8])}")
        if self.device.type == "cpu":
            pack_tied_heads(self.model, self.model_config.hf_text_config)


def pack_tied_heads(model: torch.nn.Module, config: object) -> None:
    """Pack output heads that are tied to the embeddings anew; vLLM 0.32 leaves the old matrix in them on CPU."""
    if getattr(config, "tie_word_embeddings", False):
        layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        embeddings = next(layer for layer in layers if not isinstance(layer, ParallelLMHead))
        for head in layers:
            if isinstance(head, ParallelLMHead):
                head.weight = embeddings.weight
                head.quant_method.process_weights_after_loading(head)


class WorkerMethods:
    """Methods that each worker gets, which the server calls by name."""

    def tell_device(self) -> str:
        """Return the kind of device that the worker computes on."""
        return str(self.device.type)  # type: ignore[attr-defined]


WeightTransferEngineFactory.register_engine("files", WeightFiles)
