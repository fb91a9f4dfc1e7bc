"""Loads a second model that reads the policy's tokens: a reference or a critic."""

from modules.networks.lora import Lora
from modules.networks.policy import Policy


def companion(policy: Policy, path: str, role: str, lora: Lora | None = None, may_know_more: bool = False) -> Policy:
    """Load the model at ``path``, without dropout, as a partner of the policy.

    Args:
        policy: the partner must read its tokens.
        path: see ``Policy``.
        role: name of the option that asks for the model, for error messages.
        lora: adapters to train on the model; None = none.
        may_know_more: accept a model with more tokens than the policy. Log-probs would then not compare, but values do.

    Raises:
        ValueError: the model cannot be loaded, or it reads other tokens than the policy.
    """
    other = Policy(path, dropout=False, lora=lora, role=role)
    mine, theirs = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if (
        not may_know_more
        and len(theirs) > len(mine)
        or any(theirs.get(token) != number for token, number in mine.items())
    ):
        raise ValueError(
            f"{role}: the tokens of '{path}' are not those of '{policy.path}'; name a model with the same tokenizer"
        )
    return other
