"""Where a model comes from: the built-in tiny one, a Hugging Face folder or hub id, a GGUF file; and what is
refused.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from jinja2 import TemplateSyntaxError
from torch import nn
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

disable_progress_bar()  # of weight loading: the Trainer's bar is the one to watch

SCALED_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
MOVING_ROPE = ("dynamic", "longrope")  # frequencies that change with the length of the padded batch


def load(path: str, role: str = "policy") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fp32 model and the tokenizer behind ``path`` (see ``Policy``); ValueError, in the name of ``role``, when
    there is none.
    """
    if path in BUILT_IN:
        return tiny_model(path), tiny_tokenizer()
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise ValueError(f"{role}: no GGUF file at '{path}'")
        return load_gguf(local)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(f"{role}: '{path}' is a folder without config.json; name a Hugging Face model folder")
    source = str(local) if local.is_dir() else path
    try:
        with (
            silent() if is_classifier(AutoConfig.from_pretrained(source)) else nullcontext()
        ):  # its backbone is asked for
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{role}: '{path}' is not 'tiny', 'tiny-addition', a Hugging Face model folder, a .gguf file or a hub id that can be read "
            f"({reason})"
        ) from error


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether it is of a sequence classifier, such as a reward model."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def lacks_output_head(model: PreTrainedModel) -> bool:
    """Whether a language model was made of a classifier's backbone, so that its output head, where it has one of its
    own, is random.
    """
    return (
        is_classifier(model.config) and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    )


@contextmanager
def silent() -> Iterator[None]:
    """Inside, transformers does not list the weights that a model has too many or too few."""
    level = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(level)


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a GGUF file, rebuilt from a clean config: with a quantization entry it would refuse to
    be saved.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "policy: reading a GGUF file needs the package gguf: pip install 'lightning-align[gguf]'"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    fields = {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(source.config)(**fields), dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    return model, tokenizer


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate to zero: dropout modules, and the rates that attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The eos tokens of tokenizer and generation config, and the token that ends an assistant turn in the chat
    template.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed: Iterable[int | None] = configured if isinstance(configured, list) else [configured]
    found = (*listed, tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    return frozenset(int(i) for i in found if i is not None and i < model.config.vocab_size)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that the model has positions for; None in architectures whose positions are neither learned nor rotary."""
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions: int | None = config.to_dict().get(name)
    return positions


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """First special token after an assistant's words in the chat template; None without a template or such a token."""
    if tokenizer.chat_template is None:
        return None
    words = "end-of-turn probe"
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": words}]
    try:
        tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(words)[2]
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template is broken (line {error.lineno}): {error.message}; mend chat_template.jinja"
        ) from error
    marked = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *marked}
    return next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)


def check_supported(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a model whose log-probabilities would come out wrong."""
    config = model.config.to_dict()
    if len(tokenizer) > config["vocab_size"]:
        raise ValueError(
            f"policy: the tokenizer of '{path}' has {len(tokenizer)} tokens, its model only {config['vocab_size']}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"policy: the tokenizer of '{path}' has no eos token, so nothing could end a completion")
    for name in SCALED_LOGITS:
        if config.get(name) not in (None, 1.0):
            raise ValueError(
                f"policy: '{path}' ({config['model_type']}) transforms its logits by {name}, which is not supported yet"
            )
    moving = [kind for kind in MOVING_ROPE if f"'rope_type': '{kind}'" in str(config.get("rope_parameters"))]
    if moving:
        raise ValueError(
            f"policy: '{path}' ({config['model_type']}) has {moving[0]} rotary positions, which depend on padding: not "
            "supported yet"
        )
