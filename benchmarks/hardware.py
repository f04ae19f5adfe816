"""GPUs by their data sheets: the one list that the roofline, the models and the measured share of the peak read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """A data sheet. Rates are thread-level operations a clock and multiprocessor.

    `clock` is the sustained boost clock in Hz, `bandwidth` in bytes/s, `flops` those of dense bfloat16 products a
    second, `cache_bandwidth` that of the L2 cache, of which `cache_bytes` are there; clusters of eight blocks find room
    on `clustered` of the multiprocessors.
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
    flops: float = 0.0
    alu: int = 64
    mufu: int = 16
    issue: int = 128
    shared: int = 32

    def elements_per_clock(self, bytes_per_element: float) -> float:
        """Elements that pass a multiprocessor every clock at full bandwidth."""
        return self.bandwidth / bytes_per_element / self.multiprocessors / self.clock

    def shares(self, per_element: Mapping[str, float], bytes_per_element: float) -> dict[str, float]:
        """For each resource, the share of peak bandwidth at which it is full. `per_element`: operations by pipe.

        A multiprocessor issues a limited number of instructions a clock, and each pipe executes a limited number of
        them. Uniform instructions serve a whole warp and only take an issue slot.
        """
        rate = self.elements_per_clock(bytes_per_element)
        limits = {"issue": self.issue, "fma": self.fma, "alu": self.alu, "mufu": self.mufu, "shared": self.shared}
        demand = {**per_element, "issue": sum(per_element.values())}
        return {pipe: limit / (demand[pipe] * rate) for pipe, limit in limits.items() if demand.get(pipe)}

    def reachable(self, per_element: Mapping[str, float], bytes_per_element: float) -> Reachable:
        """What is left of peak bandwidth, by the resource that fills up first. Reachable, not reached: no latency is
        modelled."""
        pipe, share = min(self.shares(per_element, bytes_per_element).items(), key=lambda item: item[1])
        return Reachable(min(share, 1.0), pipe, share)


@dataclass(frozen=True)
class Reachable:
    """`share` of peak bandwidth; `resource` fills up first, at `headroom` times the elements of peak bandwidth."""

    share: float
    resource: str
    headroom: float


# SM counts, boost clocks, caches, flops and bandwidths of NVIDIA's data sheets (SXM parts); pipe widths of the tuning
# guides. An A100 executes 64 float32 operations a clock, half of what its issue slots suggest. Bandwidths of the L2
# cache are assumptions: about what chipsandcheese.com measured on A100 and H100, and for a B200 in proportion to its
# memory's. A GPC of 16 or 18 multiprocessors holds two clusters side by side.
GPUS = (
    GPU("A100", "sm_80", 108, 1.41e9, 2.039e12, fma=64, cache_bandwidth=4.4e12, cache_bytes=40 << 20, flops=312e12),
    GPU(
        "H100", "sm_90", 132, 1.83e9, 3.35e12, fma=128, cache_bandwidth=5.6e12, cache_bytes=50 << 20,
        clustered=128, flops=989e12,
    ),
    GPU(
        "H200", "sm_90", 132, 1.83e9, 4.8e12, fma=128, cache_bandwidth=5.6e12, cache_bytes=50 << 20,
        clustered=128, flops=989e12,
    ),
    GPU(
        "B200", "sm_100", 148, 1.85e9, 8.0e12, fma=128, cache_bandwidth=10e12, cache_bytes=126 << 20,
        clustered=144, flops=2.25e15,
    ),
)  # fmt: skip

# Bytes per second of other boards. The first name that a device's name contains decides, so these come before the GPUs.
_OTHER_BOARDS = {
    "A100-SXM4-40GB": 1.555e12,
    "A100-PCIE-40GB": 1.555e12,
    "A100 80GB PCIe": 1.935e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "GH200": 4.0e12,
    "L40S": 0.864e12,
    "RTX 4090": 1.008e12,
}


def data_sheet_bandwidth(name: str) -> float | None:
    """Bytes per second of the GPU that PyTorch calls `name`, or None where it is not listed."""
    boards = _OTHER_BOARDS | {gpu.name: gpu.bandwidth for gpu in GPUS}
    return next((bandwidth for part, bandwidth in boards.items() if part in name), None)


def gpu() -> dict[str, object]:
    """Name and peak bandwidth of this machine's GPU, as a results file keeps them; both None without one.

    For a GPU that is not listed the driver's memory clock and bus width stand in: two transfers a clock.
    """
    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_peak_gbps": None}
    properties = torch.cuda.get_device_properties(0)
    peak = data_sheet_bandwidth(properties.name)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    if peak is None and clock_khz and bus_bits:
        peak = 2 * clock_khz * 1e3 * bus_bits / 8
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return {
        "gpu": f"{properties.name}, {properties.multi_processor_count} SMs, {memory}",
        "gpu_peak_gbps": peak and peak / 1e9,
    }
