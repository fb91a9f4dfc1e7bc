"""The loops that decode in this process: the fast one of the Llama family, and the one of every other model."""
