"""What answers conversations."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

Conversation = list[dict[str, str]]  # messages, each with a role and a content


class ChatClient(ABC):
    """Answers conversations.

    Attributes:
        identity: what determines the answers, in words.
        counts: ``requests``, ``failed`` (conversations without an answer), ``prompt_tokens``, ``completion_tokens`` and
            more, so far.
    """

    identity: str

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """The assistant's next message in each, in order; None = no answer."""

    def report(self) -> dict[str, float]:
        """The counts, and what they cost where it is known."""
        return {name: float(count) for name, count in self.counts.items()}
