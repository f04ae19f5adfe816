"""The peers' Triton kernels, compiled ahead of time from where they are installed; nothing of them is copied.

A kernel's file is found without importing its package and loaded by its path, so none of a peer's dependencies is
needed: `pip install --no-deps liger-kernel` is enough, or a folder of unpacked wheels. The feature flags are those of a
plain GRPO step without a KL term, the vocabulary Qwen's 151,936, launch shapes those of the peer's own launcher.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import triton
from triton.compiler import ASTSource

from benchmarks.machine_code.emulator.machine import Launch
from benchmarks.machine_code.ordinary_row import VOCABULARY, OrdinaryRow, Work
from benchmarks.machine_code.report import CompiledKernel, from_triton
from benchmarks.machine_code.triton_variants import TARGETS


@dataclass(frozen=True)
class PeerKernel:
    """A kernel of a peer: `pointers` by name to element type; what is neither pointer nor constant is an int32.

    `elements`: what a thread takes in one run of the code, for a kernel without a loop.
    """

    name: str
    file: str
    function: str
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    elements: int | None = None

    def compile(self, folder: Path | None, arch: str) -> CompiledKernel:
        function = getattr(_load(_file(self, folder)), self.function)
        signature, constants, divisible = {}, {}, {}
        for position, name in enumerate(function.arg_names):
            if name in self.constants:
                signature[name], constants[name] = "constexpr", self.constants[name]
                continue
            signature[name] = "*" + self.pointers[name] if name in self.pointers else "i32"
            # What Triton's launcher finds out about addresses and strides of such logits.
            divisible[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(function, signature, constants, divisible)
        compiled = triton.compile(source, target=TARGETS[arch], options=dict(self.options))
        return from_triton(
            self.name,
            arch,
            compiled,
            elements=(None, self.elements),
            source="peer",
            work=partial(self._work, signature),
        )

    def _work(self, signature: Mapping[str, str], launch: Launch, row: OrdinaryRow) -> Work:
        """The first program on the ordinary row. What it writes is not looked at: a peer's results are the peer's."""
        addresses = {"logits_ptr": "logits", "index_ptr": "labels", "INPUT_IDS": "labels", "LOGITS": "logits"}
        addresses |= {"grad_logits_ptr": "gradient", "DLOGITS": "gradient"}
        ones, packed = row.memory.put(np.ones(64, np.float32)), bytearray()
        for name, kind in signature.items():
            if kind == "i32":
                packed += b"\0" * (-len(packed) % 4) + struct.pack("<i", VOCABULARY if "logits" in name else 1)
            elif kind != "constexpr":
                address = row.address[addresses[name]] if name in addresses else ones
                packed += b"\0" * (-len(packed) % 8) + struct.pack("<Q", address)
        packed += b"\0" * (-len(packed) % 8) + bytes(16)
        return Work(bytes(packed), launch, self.elements * launch.threads if self.elements else VOCABULARY)


@cache
def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("peer_" + path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_TRL = "trl/kernels/logprob_entropy.py"
_TRL_POINTERS = {
    "logits_ptr": "bf16", "index_ptr": "i64", "logprobs_ptr": "fp32", "entropy_ptr": "fp32", "log_z_ptr": "fp32",
    "expected_logit_ptr": "fp32", "grad_logprobs_ptr": "fp32", "grad_entropy_ptr": "fp32", "grad_logits_ptr": "bf16",
}  # fmt: skip
_TRL_CONSTANTS = {
    "row_mask_ptr": None, "n_cols": VOCABULARY, "TEMPERATURE": 1.0, "HAS_MASK": False, "BLOCK_SIZE": 1024,
    "HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True,
}  # fmt: skip
_LIGER = "liger_kernel/ops/grpo_loss.py"
_LIGER_POINTERS = {
    "LOGITS": "bf16", "DLOGITS": "bf16", "OLD_LOGP": "fp32", "INPUT_IDS": "i64", "COMPLETION_MASK": "i32",
    "ADVANTAGES": "fp32", "LOSS": "fp32", "LSE": "fp32", "KL": "fp32", "IS_CLIPPED": "fp32", "DLOSS": "fp32",
}  # fmt: skip
_LIGER_CONSTANTS = {
    "REF_LOGP": None, "VLLM_IS_RATIO": None, "PHI_SEQ": None, "TEMPERATURE": 0.9, "BETA": 0.0, "EPS_LOW": 0.2,
    "EPS_HIGH": 0.28, "LOSS_TYPE": 0, "SAPO_TEMP_POS": 1.0, "SAPO_TEMP_NEG": 1.05, "DELTA": 0.0,
    "USE_BIAS_CORRECTION_KL": False, "L": 1024, "N": VOCABULARY,
}  # fmt: skip

PEERS = (
    PeerKernel("trl logprob_entropy forward", _TRL, "_forward_kernel", _TRL_POINTERS, _TRL_CONSTANTS, {"num_warps": 4}),
    PeerKernel(
        "trl logprob_entropy backward", _TRL, "_backward_kernel", _TRL_POINTERS, _TRL_CONSTANTS, {"num_warps": 4},
        elements=1024 // 128,
    ),
    PeerKernel(
        "liger grpo_loss forward (no entropy)", _LIGER, "_grpo_loss_fwd_kernel", _LIGER_POINTERS,
        {**_LIGER_CONSTANTS, "BLOCK_N": 2048}, {"num_warps": 1, "num_stages": 2},
    ),
    PeerKernel(
        "liger grpo_loss backward (no entropy)", _LIGER, "_grpo_loss_bwd_kernel", _LIGER_POINTERS,
        {**_LIGER_CONSTANTS, "BLOCK_N": 4096}, {"num_warps": 16, "num_stages": 1},
    ),
)  # fmt: skip


_DISTRIBUTIONS = {"trl": "trl", "liger_kernel": "liger-kernel"}


def _file(peer: PeerKernel, folder: Path | None) -> Path:
    """Where the kernel's file should be: in `folder`, else where the package is installed.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    if folder is not None:
        return folder / peer.file
    package, _, rest = peer.file.partition("/")
    spec = importlib.util.find_spec(package)  # of a top-level package, which is not imported for it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{_DISTRIBUTIONS[package]} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / rest


def why_not(peer: PeerKernel, folder: Path | None = None) -> str | None:
    """Why a peer's kernel cannot be measured, None where it can."""
    try:
        path = _file(peer, folder)
    except ModuleNotFoundError as error:
        return str(error)
    if not path.exists():
        return f"no {path}"
    return None if hasattr(_load(path), peer.function) else f"no {peer.function} in {path}"


def missing(folder: Path | None = None) -> dict[str, str]:
    """The kernels that cannot be measured, each with the reason."""
    reasons = {peer.name: why_not(peer, folder) for peer in PEERS}
    return {name: reason for name, reason in reasons.items() if reason}


def versions(folder: Path | None = None) -> dict[str, str]:
    """The versions of the peers that are there, by the names of their distributions."""
    where = {} if folder is None else {"path": [str(folder)]}
    found = {each.name.replace("_", "-"): each.version for each in metadata.distributions(**where)}
    return {name: found[name] for name in _DISTRIBUTIONS.values() if name in found}


def peer_kernels(archs: Iterable[str], folder: Path | None = None) -> list[CompiledKernel]:
    """Those kernels that are there, compiled for every architecture."""
    return [peer.compile(folder, arch) for peer in PEERS if why_not(peer, folder) is None for arch in archs]
