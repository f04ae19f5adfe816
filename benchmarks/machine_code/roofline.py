"""What share of peak memory bandwidth an instruction mix leaves reachable. Reachable, not reached: no latency is
modelled.

A multiprocessor issues a limited number of instructions a clock, and each pipe executes a limited number of them. At
full bandwidth a number of elements has to pass a multiprocessor every clock; the tightest resource decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A data sheet. Rates are thread-level operations a clock and multiprocessor.

    `clock` is the sustained boost clock in Hz, `bandwidth` in bytes/s, `cache_bandwidth` that of the L2 cache, of
    which `cache_bytes` are there; clusters of eight blocks find room on `clustered` of the multiprocessors.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    fma: int
    cache_bandwidth: float
    cache_bytes: int
    clustered: int = 0
    alu: int = 64
    mufu: int = 16
    issue: int = 128
    shared: int = 32
    uniform: int = 64

    def elements_per_clock(self, bytes_per_element: float) -> float:
        """Elements that pass a multiprocessor every clock at full bandwidth."""
        return self.bandwidth / bytes_per_element / self.multiprocessors / self.clock

    def shares(self, per_element: Mapping[str, float], bytes_per_element: float) -> dict[str, float]:
        """For each resource, the share of peak bandwidth at which it is full. `per_element`: operations by pipe.

        Uniform instructions serve a whole warp and only take an issue slot.
        """
        rate = self.elements_per_clock(bytes_per_element)
        limits = {"issue": self.issue, "fma": self.fma, "alu": self.alu, "mufu": self.mufu, "shared": self.shared}
        demand = {**per_element, "issue": sum(per_element.values())}
        return {pipe: limit / (demand[pipe] * rate) for pipe, limit in limits.items() if demand.get(pipe)}

    def reachable(self, per_element: Mapping[str, float], bytes_per_element: float) -> Reachable:
        """What is left of peak bandwidth, by the resource that fills up first."""
        pipe, share = min(self.shares(per_element, bytes_per_element).items(), key=lambda item: item[1])
        return Reachable(min(share, 1.0), pipe, share)


@dataclass(frozen=True)
class Reachable:
    """`share` of peak bandwidth; `resource` fills up first, at `headroom` times the elements of peak bandwidth."""

    share: float
    resource: str
    headroom: float


# SM counts, boost clocks, caches and bandwidths of NVIDIA's data sheets (SXM parts); pipe widths of the tuning guides.
# An A100 executes 64 float32 operations a clock, half of what its issue slots suggest. Bandwidths of the L2 cache are
# assumptions: about what chipsandcheese.com measured on A100 and H100, and for a B200 in proportion to its memory's. A
# GPC of 16 or 18 multiprocessors holds two clusters side by side.
GPUS = (
    GPU("A100", "sm_80", 108, 1.41e9, 2.039e12, fma=64, cache_bandwidth=4.4e12, cache_bytes=40 << 20),
    GPU("H100", "sm_90", 132, 1.83e9, 3.35e12, fma=128, cache_bandwidth=5.6e12, cache_bytes=50 << 20, clustered=128),
    GPU("H200", "sm_90", 132, 1.83e9, 4.8e12, fma=128, cache_bandwidth=5.6e12, cache_bytes=50 << 20, clustered=128),
    GPU("B200", "sm_100", 148, 1.85e9, 8.0e12, fma=128, cache_bandwidth=10e12, cache_bytes=126 << 20, clustered=144),
)
