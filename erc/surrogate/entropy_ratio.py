"""The entropy-ratio gate (arXiv 2512.05591)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from erc.surrogate.validation import check_band, is_number, require


def entropy_ratio_of(entropy: Tensor, old_entropy: Tensor, eps: float) -> Tensor:
    """`(H + eps) / (H_old + eps)`."""
    return (entropy + eps) / (old_entropy + eps)


@dataclass(frozen=True)
class EntropyRatioClip:
    """The entropy-ratio gate (ERC, arXiv 2512.05591): a soft trust region over the whole distribution.

    With `rho = (H + eps) / (H_old + eps)` a token keeps its policy gradient iff `1 - beta_low < rho < 1 + beta_high`,
    strictly; a NaN rho drops it, both entropies zero keep it. A dropped token stays in the denominator. `value="kept"`
    leaves its loss value as a constant (the authors' code), `value="zero"` reports 0 (the paper's formula). No gradient
    flows through rho. It composes with every ratio rule and never touches the KL and entropy terms.
    """

    beta_low: float = 0.05
    beta_high: float = 0.05
    eps: float = 1e-8
    value: str = "kept"

    def __post_init__(self) -> None:
        check_band(self, "beta_low", "beta_high")
        require(is_number(self.eps) and self.eps > 0, "eps", "a number > 0", self.eps)
        require(self.value in ("kept", "zero"), "value", '"kept" or "zero"', self.value)

    @property
    def gate_id(self) -> int:
        """The gate's number in the kernels (csrc/common/params.h)."""
        return 1 if self.value == "kept" else 2

    def dropped(self, entropy: Tensor, old_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens lose their gradient, and which of them fell below and above the band; bool `[N]` each."""
        rho = entropy_ratio_of(entropy, old_entropy, self.eps)
        keep = ((rho > 1 - self.beta_low) & (rho < 1 + self.beta_high)) | ((entropy == 0) & (old_entropy == 0))
        return ~keep, ~keep & (rho <= 1 - self.beta_low), ~keep & (rho >= 1 + self.beta_high)
