"""Which prompts are learned from, and in which order."""
