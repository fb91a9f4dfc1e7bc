"""The contract of a client that answers conversations."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

Conversation = list[dict[str, str]]  # messages, each with a role and a content


class ChatClient(ABC):
    """Answers conversations.

    Attributes:
        identity: a text that names all that determines the answers.
        counts: counts so far: ``requests``, ``failed`` (conversations without an answer), ``prompt_tokens``,
            ``completion_tokens`` and more.
    """

    identity: str

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def complete(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Return the assistant's next message in each conversation, in order; None = no answer."""

    def report(self) -> dict[str, float]:
        """Return the counts, and the cost where prices are known."""
        return {name: float(count) for name, count in self.counts.items()}
