"""Models beside the policy that read the same tokens: a reference, a critic."""

from modules.networks.lora import Lora
from modules.networks.policy import Policy


def companion(policy: Policy, path: str, role: str, lora: Lora | None = None, may_know_more: bool = False) -> Policy:
    """The model at ``path`` without dropout. ValueError, in the name of ``role``, when it reads other tokens than the
    policy.

    Args:
        policy: whose tokens it must read.
        path: see ``Policy``.
        role: the option that names it.
        lora: adapters for it to train.
        may_know_more: allow it tokens beyond the policy's; log-probs would not compare, values do.
    """
    other = Policy(path, dropout=False, lora=lora, role=role)
    mine, theirs = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if (
        not may_know_more
        and len(theirs) > len(mine)
        or any(theirs.get(token) != number for token, number in mine.items())
    ):
        raise ValueError(f"{role}: the tokens of '{path}' are not those of '{policy.path}', so the two do not compare")
    return other
