"""What a GPU's data sheet says of its memory: the limit that a streaming kernel is held against."""

from __future__ import annotations

import torch

# Bytes a second. The first name that the device's name contains decides, so special forms stand before the usual one.
DATA_SHEETS = (
    ("A100-SXM4-40GB", 1.555e12),
    ("A100-PCIE-40GB", 1.555e12),
    ("A100 80GB PCIe", 1.935e12),
    ("A100", 2.039e12),
    ("H100 PCIe", 2.0e12),
    ("H100 NVL", 3.9e12),
    ("H100", 3.35e12),
    ("GH200", 4.0e12),
    ("H200", 4.8e12),
    ("B200", 8.0e12),
    ("L40S", 0.864e12),
    ("RTX 4090", 1.008e12),
)


def data_sheet_bandwidth(name: str) -> float | None:
    """Bytes a second of the GPU that PyTorch calls `name`, or None where it is not listed."""
    return next((bandwidth for part, bandwidth in DATA_SHEETS if part in name), None)


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
