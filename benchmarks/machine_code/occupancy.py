"""How many blocks of a kernel a multiprocessor holds at a time: by threads, by registers, by shared memory."""

from __future__ import annotations

from dataclasses import dataclass

_REGISTERS = 65_536
_THREADS = 2_048
_BLOCKS = 32
_RESERVED = 1_024  # bytes of shared memory that the system takes of every block; cubins from sm_90 on count them
_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Occupancy:
    """`blocks` at a time; `limit` is what there would have to be more of."""

    blocks: int
    limit: str

    @classmethod
    def of(cls, arch: str, threads: int, registers: int, static_shared: int, dynamic_shared: int) -> Occupancy:
        """`static_shared` as the cubin states it. Registers are given to a warp in units of 256, shared memory in
        units of 128 bytes."""
        warps = -(-threads // 32)
        per_block = warps * (-(-registers * 32 // 256) * 256)
        shared = static_shared + dynamic_shared + (_RESERVED if arch == "sm_80" else 0)
        limits = {
            "registers": _REGISTERS // per_block,
            "shared memory": _SHARED[arch] // (-(-max(shared, _RESERVED) // 128) * 128),
            "threads": _THREADS // (warps * 32),
            "blocks": _BLOCKS,
        }
        limit = min(limits, key=lambda name: limits[name])
        return cls(limits[limit], limit)
