"""Runnable examples: ``python -m examples.digits`` and ``python -m examples.mnist``."""
