"""Loads a model and refuses those that are not supported.

A model is a built-in tiny one, a Hugging Face folder, a hub id, or a GGUF file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path

import torch
from jinja2 import TemplateSyntaxError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from modules.networks.tiny import BUILT_IN, tiny_model, tiny_tokenizer
from modules.trainer.modes import evaluating

disable_progress_bar()  # the bar of weight loading would stand above the Trainer's

SCALED_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
PACKED_PROBE = (
    (3, 1, 4, 1, 5),
    (10, 8, 11, 8, 12),
    (9, 2, 6),
)  # two alternative first documents, and the second document
MOVING_ROPE = ("dynamic", "longrope")  # rotary frequencies that change with the length of the padded batch


def load(path: str, role: str = "policy") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the fp32 model and the tokenizer at ``path``.

    Args:
        path: see ``Policy``.
        role: name of the option that asks for the model, for error messages.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    if path in BUILT_IN:
        return tiny_model(path), tiny_tokenizer()
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"{role}: there is no GGUF file at '{path}'; check the path")
        return load_gguf(local, role)
    if local.is_dir() and not (local / "config.json").is_file():
        if (local / "adapter_config.json").is_file():
            raise ValueError(
                f"{role}: '{path}' holds adapters without their model; name the export of the run, in which they are "
                "added into the weights, or save what PEFT's merge_and_unload() returns"
            )
        inside = local / "export"
        told = f"its model is {inside}" if (inside / "config.json").is_file() else "name a Hugging Face model folder"
        raise ValueError(f"{role}: '{path}' is a folder without config.json; {told}")
    source = str(local) if local.is_dir() else path
    try:
        # A classifier's head is left out on purpose, so transformers need not warn about it.
        with (
            silencing() if is_classifier(AutoConfig.from_pretrained(source, trust_remote_code=False)) else nullcontext()
        ):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        near = "".join(f"; did you mean {name}?" for name in get_close_matches(path, BUILT_IN, n=1, cutoff=0.7))
        raise ValueError(
            f"{role}: '{path}' is not {', '.join(map(repr, BUILT_IN))}, a Hugging Face model folder, a .gguf file or a "
            f"hub id that can be read ({reason}){near}"
        ) from error


def is_classifier(config: PreTrainedConfig) -> bool:
    """Return whether the config is that of a sequence classifier, such as a reward model."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def lacks_output_head(model: PreTrainedModel) -> bool:
    """Return whether the output head of the model is random.

    That is so when a language model was loaded from a sequence classifier and does not tie its output head to its
    embeddings.
    """
    return (
        is_classifier(model.config) and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    )


@contextmanager
def silencing() -> Iterator[None]:
    """Silence transformers' list of missing and unexpected weights inside the ``with`` block."""
    level = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(level)


def load_gguf(file: Path, role: str = "policy") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a GGUF file.

    The model is built again from a config without ``quantization_config``, because ``save_pretrained`` refuses a model
    with one.

    Raises:
        ValueError: the package gguf is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{role}: reading a GGUF file needs the package gguf; install it with: pip install 'lightning-align[gguf]'"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    fields = {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(source.config)(**fields), dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    return model, tokenizer


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate of the model to zero, also those that attention layers keep as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def find_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a completion.

    They are the eos tokens of tokenizer and generation config, and the end-of-turn token of the chat template. Ids
    beyond the model's vocabulary are left out.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    found = (*listed, tokenizer.eos_token_id, find_end_of_turn(tokenizer))
    return frozenset(int(i) for i in found if i is not None and i < model.config.vocab_size)


def read_max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model has positions for; None when its config sets no such limit."""
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions: int | None = config.to_dict().get(name)
    return positions


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first special token after the assistant's words in the chat template.

    Returns:
        the token id; None without a chat template or without such a token.

    Raises:
        ValueError: the chat template is not valid Jinja.
    """
    if tokenizer.chat_template is None:
        return None
    words = "end-of-turn probe"
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": words}]
    try:
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(words)[2]
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template is broken (line {error.lineno}): {error.message}; correct "
            "chat_template.jinja"
        ) from error
    marked = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *marked}
    return next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)


def check_supported(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose log-probabilities would come out wrong.

    Args:
        name: the option and its model, as messages begin.
        model: the loaded model.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the tokenizer has more tokens than the model or no eos token; the model scales or caps its logits;
            or its rotary positions change with the length of the batch.
    """
    config = model.config.to_dict()
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model only "
            f"{config['vocab_size']}; name a folder in which the two belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name}: the tokenizer has no eos token, so no completion could end; set eos_token in "
            "tokenizer_config.json"
        )
    for setting in SCALED_LOGITS:
        if config.get(setting) not in (None, 1.0):
            raise ValueError(
                f"{name} ({config['model_type']}) transforms its logits by {setting}, which is not supported; "
                "use another model"
            )
    moving = [kind for kind in MOVING_ROPE if f"'rope_type': '{kind}'" in str(config.get("rope_parameters"))]
    if moving:
        raise ValueError(
            f"{name} ({config['model_type']}) has {moving[0]} rotary positions, which depend on padding and "
            "are not supported; use another model"
        )


def flattens(model: PreTrainedModel) -> bool:
    """Return whether packed rows must be joined into one long row.

    Flash attention kernels keep documents apart in a single row only.
    """
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def check_packing(name: str, model: PreTrainedModel, logprobs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Refuse a model that mixes the documents of a packed row.

    State-space and convolution layers mix them, and so do positions that are counted by column. The log-probabilities
    of a document may move by at most 1e-5 nats when another document of the same length stands before it. They may move
    by at most 1e-3 when it stands alone (0.1 with a flash attention kernel, which computes in 16 bits).

    Args:
        name: the option and its model, as messages begin.
        model: the model.
        logprobs: ids and position ids, int [1, T] -> log-probabilities [1, T] of all tokens.

    Raises:
        ValueError: the log-probabilities move by more.
    """
    first, other, second = PACKED_PROBE
    with evaluating(model), torch.autocast(model.device.type, enabled=flattens(model)):
        found = [
            logprobs(*_pack_row(documents, model))[0, -len(second) :]
            for documents in ((first, second), (other, second), (second,))
        ]
    leak, shift = (float((found[0] - moved).abs().max()) for moved in found[1:])
    if not (leak <= 1e-5 and shift <= (0.1 if flattens(model) else 1e-3)):
        raise ValueError(
            f"{name} ({model.config.model_type}) mixes the documents of a packed row: their "
            f"log-probabilities are off by {max(leak, shift):.2g} nats; turn packing off or use another model"
        )


def _pack_row(documents: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = [token % model.config.vocab_size for document in documents for token in document]
    positions = [place for document in documents for place in range(len(document))]
    return torch.tensor([ids], device=model.device), torch.tensor([positions], device=model.device)
