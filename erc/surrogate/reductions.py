"""Reductions: how per-token losses become one number, as one weight per token that is known before any kernel runs.

`token-mean` is DAPO's (arXiv 2503.14476): the mean over active tokens. `seq-mean-token-mean` is GRPO's: the mean over
sequences of each one's mean. `seq-mean-token-sum` takes each one's sum, and `seq-mean-token-sum-norm` (Dr. GRPO, arXiv
2503.20783) that sum divided by a constant length. `token-sum` divides by nothing, `none` returns the losses per token.
A mask weighs a token in numerator and denominator; a sequence without active tokens does not count; no active token at
all gives weight 0 everywhere, not NaN. A `normalizer` replaces the count of tokens, or of sequences.

The weights themselves are computed with the rest of the token table: `erc.surrogate.token_table`.
"""

from __future__ import annotations

from erc.constants import Reduction

REDUCTIONS = tuple(reduction.name.lower().replace("_", "-") for reduction in Reduction)
"""Accepted values of `Objective.reduction`."""

SEQUENCE_REDUCTIONS = (Reduction.SEQ_MEAN_TOKEN_MEAN, Reduction.SEQ_MEAN_TOKEN_SUM, Reduction.SEQ_MEAN_TOKEN_SUM_NORM)


def reduction_id(name: str) -> Reduction:
    """The reduction's number in the kernels."""
    return Reduction(REDUCTIONS.index(name))
