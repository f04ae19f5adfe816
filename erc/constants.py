"""The numbers that Python, C++, CUDA and Triton share. This file is their one source.

Triton imports them; `python -m erc.constants` prints `csrc/common/constants.h`, and a test holds the file to it. A new
per-token input, rule, metric or parameter starts here: docs/architecture.md.
"""

from __future__ import annotations

from enum import IntEnum

ABSENT_LABEL = -(2**63)
"""The label of a row whose labelled column lies in another vocabulary shard."""

CUT_LABEL = ABSENT_LABEL + 1
"""The label, in a backward, of a row that a sampling support cut: `support_backward_` makes its log-prob's gradient."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this; outside, their derivative is 0."""

RATIO_EPS = 1e-8
"""What keeps the ratio of two entropies finite where no gate says otherwise."""

COUNT_RUN = 4096
"""Tokens that are counted together where a batch has no sequences: sums over tokens are sums over such runs."""


INVALID_VALUE = "erc: a value is not valid"
"""What a token table raises on the CPU; `erc.call` then finds which one, and names the argument."""


class Param(IntEnum):
    """Positions in the `params` tensor: everything of a call that is a number, and may change from step to step."""

    TEMPERATURE = 0
    SOFTCAP = 1  # 0: none
    LOGIT_SCALE = 2
    RULE = 3  # four numbers whose meaning the ratio rule defines
    BETA_LOW = 7
    BETA_HIGH = 8
    GATE_EPS = 9
    KL_COEF = 10
    KL_CLAMP = 11
    RULE_ID = 12  # a RuleId
    KL_ID = 13  # a KLKind, plus IMPORTANCE_WEIGHTED_KL
    GATE_ID = 14  # a Gate
    PRESENT = 15  # a Present
    REDUCTION = 16  # a Reduction
    MAX_LENGTH = 17  # of SEQ_MEAN_TOKEN_SUM_NORM
    SEQUENCE_LENGTH = 18  # tokens of a padded sequence; 0: packed, or none
    ADVANTAGE_LENGTH = 19  # tokens that share an advantage; 0: those of a packed sequence
    ENTROPY_COEF = 20
    NLL_COEF = 21
    ENTROPY_SHARES = 22  # 1: the entropy term has the loss's own weights
    NORMALIZER = 23  # 0: counted, or given as a tensor; so are the next three
    ENTROPY_NORMALIZER = 24
    NLL_NORMALIZER = 25
    GRAD_SCALE = 26


class Column(IntEnum):
    """Columns of the token table, what is known of a token before its logits are read: one 32-byte load in float32."""

    WEIGHT = 0  # in the reduction; NaN marks a token with a NaN input, whose loss and gradient are NaN
    ADVANTAGE = 1
    OLD_LOGPROB = 2
    OLD_ENTROPY = 3
    REF_LOGPROB = 4
    POLICY_WEIGHT = 5
    ENTROPY_WEIGHT = 6
    LOGPROB_WEIGHT = 7


class Present(IntEnum):
    """Which optional columns the caller gave: an absent one is neither NaN nor a default; and of log-probs over a
    sampling support, which terms take those over the full vocabulary instead."""

    OLD_LOGPROB = 1
    OLD_ENTROPY = 2
    REF_LOGPROB = 4
    POLICY_WEIGHT = 8
    KL_OVER_FULL = 16
    NLL_OVER_FULL = 32


class RuleId(IntEnum):
    """Ratio rules, and what their four numbers are."""

    PPO_CLIP = 0  # eps_low, eps_high, dual_clip (inf: none), delta (inf: none)
    GPPO = 1  # eps_low, eps_high, dual_clip
    CEGPPO = 2  # eps_low, eps_high, beta1, beta2
    CISPO = 3  # ratio_min, ratio_max
    SAPO = 4  # tau_pos, tau_neg
    DPPO_TV = 5  # low, high, ratio_max
    DPPO_KL = 6  # low, high, ratio_max
    REINFORCE = 7
    DRO = 8  # beta
    NO_CLIP = 9
    IPO = 10  # eps, tau
    TOPR = 11


class KLKind(IntEnum):
    """Estimators of the KL penalty."""

    NONE = 0
    K1 = 1
    K2 = 2
    K3 = 3
    ABS = 4
    K3_PLUS = 5


IMPORTANCE_WEIGHTED_KL = 16
"""Added to the estimator: multiply it by the importance ratio, gradient through both."""


class Gate(IntEnum):
    """The entropy-ratio gate, by what it leaves of a dropped token's loss value."""

    NONE = 0
    KEEP_VALUE = 1
    ZERO_VALUE = 2


class Reduction(IntEnum):
    """How per-token losses become one number; `erc.surrogate.reductions` has their names."""

    TOKEN_MEAN = 0
    TOKEN_SUM = 1
    SEQ_MEAN_TOKEN_MEAN = 2
    SEQ_MEAN_TOKEN_SUM = 3
    SEQ_MEAN_TOKEN_SUM_NORM = 4
    NONE = 5


class TokenFlag(IntEnum):
    """Bits of a token's `flags`: what happened to it. FILTERED is of filters that run two-phase; no kernel sets it."""

    CLIP_LOW = 1
    CLIP_HIGH = 2
    ERC_LOW = 4
    ERC_HIGH = 8
    ERC_DROPPED = 16
    FILTERED = 32


class Metric(IntEnum):
    """Positions in the summary of the tokens: the loss, then the metrics by their public names in lower case."""

    LOSS = 0
    CLIP_FRACTION = 1
    CLIP_FRACTION_LOW = 2
    CLIP_FRACTION_HIGH = 3
    ERC_FRACTION_LOW = 4
    ERC_FRACTION_HIGH = 5
    ERC_FRACTION = 6
    FILTERED_FRACTION = 7
    ENTROPY = 8
    OLD_ENTROPY = 9
    ENTROPY_RATIO = 10
    APPROX_KL = 11
    KL = 12
    ENTROPY_RATIO_MIN = 13
    ENTROPY_RATIO_MAX = 14
    RATIO_MAX = 15
    NAN_INPUTS = 16
    KEPT_MASS = 17  # 1 without a sampling support


PAIRED_OUTPUTS = ("ratio", "entropy", "old_entropy", "kl_new_old", "kl_old_new", "total_variation")
"""Rows of `paired_forward`'s statistics."""

PAIRED_SAVED = 8
"""Rows of what its backward needs: (row_max, sum_rest, weighted_sum) of new and of old, KL(new||old), E_p[sign]."""


_ACRONYMS = {"PPO", "GPPO", "CEGPPO", "CISPO", "SAPO", "DPPO", "TV", "KL", "DRO", "IPO", "TOPR"}


def _constant(name: str) -> str:
    """`PPO_CLIP` as C++ writes it: `kPPOClip`."""
    return "k" + "".join(part if part in _ACRONYMS else part.capitalize() for part in name.split("_"))


def header() -> str:
    """The text of `csrc/common/constants.h`."""
    lines = [
        "// Generated by `python -m erc.constants` from erc/constants.py, which says what each of them means.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace erc {",
        "",
        "constexpr int64_t kAbsentLabel = INT64_MIN;",
        "constexpr int64_t kCutLabel = kAbsentLabel + 1;",
        f"constexpr double kMaxLogRatio = {MAX_LOG_RATIO:g};",
        f"constexpr double kRatioEps = {RATIO_EPS:g};",
        f"constexpr int64_t kCountRun = {COUNT_RUN};",
        f"constexpr int kImportanceWeightedKL = {IMPORTANCE_WEIGHTED_KL};",
        f'constexpr const char* kInvalidValue = "{INVALID_VALUE}";',
        f"constexpr int kPairedOutputs = {len(PAIRED_OUTPUTS)};",
        f"constexpr int kPairedSaved = {PAIRED_SAVED};",
        f"constexpr int kNumColumns = {len(Column)};",
    ]
    kinds: tuple[type[IntEnum], ...] = (RuleId, KLKind, Gate, Reduction)
    for enum in kinds:  # scoped
        lines += ["", f"enum class {enum.__name__} : int {{", *_members(enum), "};"]
    places: tuple[type[IntEnum], ...] = (Param, Present, TokenFlag, Metric)
    for enum in places:  # positions and bits: plain integers under a name
        lines += ["", f"struct {enum.__name__} {{", "  enum : int {", *_members(enum, "    "), "  };"]
        count = max(enum) + 1
        lines += [f"  static constexpr int kCount = {count};"] if enum in (Param, Metric) else []
        lines += ["};"]
    return "\n".join([*lines, "", "}  // namespace erc", ""])


def _members(enum: type[IntEnum], indent: str = "  ") -> list[str]:
    return [f"{indent}{_constant(member.name)} = {member.value}," for member in enum]


NUM_PARAMS = max(Param) + 1
"""The length of the `params` tensor."""


if __name__ == "__main__":
    print(header(), end="")
