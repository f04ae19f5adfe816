"""Every Triton kernel and feature combination, compiled ahead of time: no GPU and no driver takes part."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine_code.emulator.machine import Launch
from benchmarks.machine_code.ordinary_row import NUMBERS, SOFTCAP, TEMPERATURE, VOCABULARY, OrdinaryRow, Work
from erc.constants import RuleId
from erc.triton_kernels import params, tuning
from erc.triton_kernels.launch import sweep_lanes_kernel
from erc.triton_kernels.paired import paired_backward_kernel, paired_forward_kernel
from erc.triton_kernels.policy_loss import policy_loss_kernel
from erc.triton_kernels.rows import Layout
from erc.triton_kernels.scale import scale_rows_kernel
from erc.triton_kernels.stats import partial_stats_kernel, stats_backward_kernel, stats_forward_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_LOGITS = {"logits", "old_logits", "out"}
_INT64 = {"labels", "row_index"}
_INT32 = {"flags"}


@dataclass(frozen=True)
class Variant:
    """A kernel with its feature flags. `absent` pointers are None: a feature is on because its pointer is there."""

    name: str
    kernel: Any
    dtype: torch.dtype
    absent: frozenset[str] = frozenset()
    constants: dict[str, Any] = field(default_factory=dict)
    softcap: bool = False
    aligned: bool = True
    per_row: bool = False

    def layout(self) -> Layout:
        return params.make_layout(self.dtype, aligned=self.aligned, softcap=self.softcap, per_row=self.per_row)

    def source(self) -> ASTSource:
        layout = self.layout()
        segment = params.columns_per_segment(layout)
        constants = {"L": params.compiled_layout(layout), "SEGMENT": segment, **self.constants}
        absent = self.absent | {"row_index"} | (frozenset() if self.per_row else {"temperature"})
        signature, constexprs = {}, {}
        for parameter in self.kernel.params:
            name = parameter.name
            tensor = name.removesuffix("_ptr")
            if parameter.is_constexpr:
                signature[name], constexprs[name] = "constexpr", constants[name]
            elif tensor in absent:
                signature[name], constexprs[name] = "constexpr", None
            else:
                signature[name] = parameter.annotation_type or self._pointer(tensor)
        return ASTSource(self.kernel, signature, constexprs)

    def _pointer(self, name: str) -> str:
        if name in _LOGITS:
            return "*" + _TYPES[self.dtype]
        if name in _INT64:
            return "*i64"
        return "*i32" if name in _INT32 else "*" + _TYPES[params.stats_dtype(self.dtype)]

    def compile(self, arch: str) -> triton.compiler.CompiledKernel:
        """The compiled kernel, with the options that `launch` passes."""
        target = TARGETS[arch]
        options = tuning.compile_options(self.kernel.__name__, arch, target.warp_size, self.dtype, self.layout())
        return triton.compile(self.source(), target=target, options=options)

    def work(self, launch: Launch, row: OrdinaryRow) -> Work:
        """What the first program does with the ordinary row."""
        segment = params.columns_per_segment(params.make_layout(self.dtype))
        whole = self.kernel in (stats_forward_kernel, policy_loss_kernel, partial_stats_kernel)
        known = self._arguments(row)
        packed = bytearray()
        for name, kind in self.source().signature.items():
            if kind == "constexpr":
                continue
            form, value = _FORMATS.get(kind, "Q"), known[name.removesuffix("_ptr")]
            packed += b"\0" * (-len(packed) % struct.calcsize(form)) + struct.pack("<" + form, value)
        packed += b"\0" * (-len(packed) % 8) + bytes(16)  # two scratch buffers that nobody uses
        there = {name.removesuffix("_ptr") for name, kind in self.source().signature.items() if kind != "constexpr"}
        outputs = sorted(there & {"logprob", "entropy"})
        if "out" in there:
            has_entropy = self.constants.get("ENTROPY", "grad_entropy" in there)
            outputs.append("gradient" if has_entropy else "gradient without entropy")
        return Work(bytes(packed), launch, VOCABULARY if whole else segment, tuple(outputs))

    def _arguments(self, row: OrdinaryRow) -> dict[str, float]:
        """Every argument by name: a tensor's address, a size, a stride, a number of the objective."""
        scratch = row.memory.put(np.zeros(3 * 8 * tuning.LANES, np.float32))
        softcap = SOFTCAP if self.softcap else 0.0
        numbers = torch.tensor([TEMPERATURE, softcap, 1.0], dtype=torch.float64)
        sizes = {"V": VOCABULARY, "segments": 5, "ignore_index": -100, "first_token": 0, "first_column": 0}
        sizes.update(dict.fromkeys(("N", "num_rows", "programs", "inner"), 1))
        strides = (f"{of}stride_{which}" for of in ("", "out_") for which in ("outer", "inner"))
        values = {**row.address, **NUMBERS, **params.read_scaling(numbers)._asdict(), **sizes}
        values.update(dict.fromkeys(strides, VOCABULARY), out=row.address["gradient"], state=scratch, lanes=scratch)
        return values


_FORMATS = {"i32": "i", "i64": "q", "fp64": "d"}


_LOSS_ONLY_SHARED = frozenset({"saved", "grad_logprob", "grad_entropy"})
_OVER_SUPPORT = frozenset({"over_support", "logprob_full", "grad_over_support"})
_OFF_POLICY = {"OFF_POLICY": True, "CORRECTED": False, "NLL": False, "KL_OVER_FULL": False, "NLL_OVER_FULL": False}
_SCALE = {"ONE": False}


def policy_variant(
    name: str, dtype: torch.dtype, *, rule: int, kl: int, gate: int, entropy: bool, grad: bool = True, **kw
) -> Variant:
    """The fused loss with what an objective of these features needs."""
    absent = {"lanes"} | _LOSS_ONLY_SHARED | _OVER_SUPPORT | (set() if grad else {"out"})
    constants = {"RULE": rule, "KL": kl, "GATE": gate, "ENTROPY": entropy, **_OFF_POLICY}
    return Variant(name, policy_loss_kernel, dtype, frozenset(absent), constants, **kw)


def main_variants(dtype: torch.dtype = torch.bfloat16) -> list[Variant]:
    """The kernels that the machine-code report is about."""
    no_lanes = frozenset({"lanes"})
    return [
        Variant("stats_forward", stats_forward_kernel, dtype, no_lanes),
        Variant("stats_backward", stats_backward_kernel, dtype, frozenset({"grad_entropy", "grad_logsumexp"})),
        Variant("stats_backward+entropy", stats_backward_kernel, dtype),
        policy_variant("policy_loss erc-dapo", dtype, rule=0, kl=0, gate=1, entropy=False),
        policy_variant("policy_loss erc-dapo+entropy", dtype, rule=0, kl=0, gate=1, entropy=True),
        Variant("partial_stats", partial_stats_kernel, dtype, no_lanes),
        Variant("sweep_lanes", sweep_lanes_kernel, dtype),
    ]


def all_variants() -> list[Variant]:
    """Every kernel with every feature on and off at least once, in every dtype."""
    variants = []
    for dtype in _TYPES:
        label = _TYPES[dtype]
        variants += [Variant(f"{v.name} {label}", v.kernel, dtype, v.absent, v.constants) for v in main_variants(dtype)]
        variants += [
            Variant(f"scale_rows {label}", scale_rows_kernel, dtype, constants={"IN_PLACE": False, **_SCALE}),
            Variant(f"paired_forward {label}", paired_forward_kernel, dtype, frozenset({"states"})),
            Variant(f"paired_backward {label}", paired_backward_kernel, dtype),
        ]
    bf16 = torch.bfloat16
    no_lanes = frozenset({"lanes"})
    everything = {"RULE": 0, "KL": 3, "GATE": 1, "ENTROPY": True, **_OFF_POLICY, "CORRECTED": True, "NLL": True}
    for softcap, aligned, per_row in ((True, True, False), (False, False, False), (False, True, True)):
        flags = {"softcap": softcap, "aligned": aligned, "per_row": per_row}
        label = "softcap" if softcap else "unaligned" if not aligned else "temperature per row"
        variants += [
            Variant(f"stats_forward {label}", stats_forward_kernel, bf16, no_lanes, **flags),
            Variant(f"stats_backward {label}", stats_backward_kernel, bf16, **flags),
            policy_variant(f"policy_loss {label}", bf16, rule=0, kl=0, gate=1, entropy=True, **flags),
            Variant(f"paired_forward {label}", paired_forward_kernel, bf16, frozenset({"states"}), **flags),
            Variant(f"paired_backward {label}", paired_backward_kernel, bf16, **flags),
        ]
    variants += [
        policy_variant(f"policy_loss rule {rule}", bf16, rule=rule, kl=0, gate=0, entropy=False) for rule in RuleId
    ]
    variants += [
        policy_variant(f"policy_loss kl {kl}", bf16, rule=0, kl=kl, gate=2, entropy=True) for kl in (1, 2, 3, 4, 5, 19)
    ]
    variants += [
        policy_variant("policy_loss without gradient", bf16, rule=0, kl=0, gate=1, entropy=False, grad=False),
        Variant("scale_rows in place", scale_rows_kernel, bf16, constants={"IN_PLACE": True, **_SCALE}),
        Variant("stats_forward without labels", stats_forward_kernel, bf16, frozenset({"lanes", "labels"})),
        Variant("stats_forward of shared rows", stats_forward_kernel, bf16),
        Variant("policy_loss of shared rows", policy_loss_kernel, bf16, _OVER_SUPPORT | {"out"}, everything),
        Variant(
            "policy_loss over a support", policy_loss_kernel, bf16, no_lanes,
            everything | {"KL": 19, "KL_OVER_FULL": True, "NLL_OVER_FULL": True},
        ),
    ]  # fmt: skip
    return variants
