"""Runnable examples: `python -m examples.train_rlvr`."""
