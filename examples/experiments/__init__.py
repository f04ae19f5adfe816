"""Experiments on what the two papers' methods do: `python -m examples.experiments.erc_drift`, and the others here."""
