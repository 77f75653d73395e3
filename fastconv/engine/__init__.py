"""Base model, stack, training, scoring, sampling: the only package that knows torch."""
