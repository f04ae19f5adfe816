"""An entropy coefficient that follows a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import check_value


@dataclass
class AdaptiveEntropyCoef:
    """The adaptive entropy bonus of Skywork-OR1 (arXiv 2505.22312): the coefficient rises by `step` while the policy's
    entropy is below `target` nats and falls while it is above, never below 0 nor above `maximum`; above the target no
    bonus is paid at all.

    State is the one number `coef`; `vars(controller)` saves it. The coefficient is a runtime value: changing it from
    step to step compiles nothing.

    >>> import erc
    >>> controller = erc.AdaptiveEntropyCoef(target=0.2, step=0.005)
    >>> for entropy in (0.1, 0.1, 0.1, 0.5):
    ...     print(controller.update(entropy))
    0.0
    0.005
    0.01
    0.0
    """

    target: float = 0.2
    step: float = 0.005
    coef: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        check_value("target", self.target, self.target >= 0, "a number of nats >= 0")
        check_value("step", self.step, self.step > 0, "a number > 0")
        check_value("coef", self.coef, 0 <= self.coef <= self.maximum, "in [0, maximum]")

    def update(self, entropy: float | Tensor) -> float:
        """The coefficient for a step whose rollouts have this mean entropy; a tensor on a GPU is read, which
        synchronises."""
        value = float(entropy)
        current = self.coef if value <= self.target else 0.0
        moved = self.coef + (self.step if value < self.target else -self.step if value > self.target else 0.0)
        self.coef = min(max(moved, 0.0), self.maximum)
        return current

    def objective(self, objective: Objective, entropy: float | Tensor) -> Objective:
        """`objective` with the coefficient of `update(entropy)`."""
        return replace(objective, entropy_coef=self.update(entropy))
