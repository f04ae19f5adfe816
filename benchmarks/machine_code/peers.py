"""The peers' Triton kernels, compiled ahead of time from unpacked wheels; nothing of them is installed or copied.

Prepare a folder with `pip download --no-deps trl liger-kernel` and unpack both wheels into it. A kernel's file is
loaded by its path, so none of a peer's dependencies is needed. The feature flags are those of a plain GRPO step without
a KL term, the vocabulary Qwen's 151,936, launch shapes those of the peer's own launcher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.machine_code.report import CompiledKernel
from benchmarks.machine_code.triton_variants import TARGETS

VOCABULARY = 151_936


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

    def compile(self, folder: Path, arch: str) -> CompiledKernel:
        function = getattr(_load(folder / self.file), self.function)
        signature, constants, divisible = {}, {}, {}
        for position, name in enumerate(function.arg_names):
            if name in self.constants:
                signature[name], constants[name] = "constexpr", self.constants[name]
                continue
            signature[name] = "*" + self.pointers[name] if name in self.pointers else "i32"
            # What Triton's launcher finds out about addresses and strides of such logits.
            divisible[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(function, signature, constants, divisible)
        cubin = triton.compile(source, target=TARGETS[arch], options=dict(self.options)).asm["cubin"]
        return CompiledKernel(self.name, arch, cubin, elements=(None, self.elements), source="peer")


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


def peer_kernels(folder: Path, archs: Iterable[str]) -> list[CompiledKernel]:
    """Those peers whose files are in `folder`.

    Raises:
        FileNotFoundError: if none is.
    """
    found = [peer for peer in PEERS if (folder / peer.file).exists()]
    if not found:
        raise FileNotFoundError(f"--peers: none of {sorted({peer.file for peer in PEERS})} in {folder}")
    return [peer.compile(folder, arch) for peer in found for arch in archs]
