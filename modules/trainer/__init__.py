"""How the methods sit inside Lightning's Trainer: ranks, seeds, modes, stopping and resuming."""
