"""Pure maths: tensors in, tensors out. No network, Trainer, configuration or logging."""
