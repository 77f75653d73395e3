"""Base model, adapter stack, training, scoring and sampling: the only package that imports torch."""
