"""The papers' trainings as complete settings, one file for each paper and trainer, each with a `--smoke` form.

python -m examples.recipes.erc_trl --smoke
"""
