"""The arguments of the CUDA kernels on the ordinary row: the structs of csrc/cuda, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p

from benchmarks.machine_code.emulator.machine import Launch
from benchmarks.machine_code.ordinary_row import (
    NUMBERS,
    SOFTCAP,
    TEMPERATURE,
    VOCABULARY,
    OrdinaryRow,
    Work,
    segment_size,
)

SEGMENTS = 8  # of the row in bfloat16
_BFLOAT16, _IGNORE = 1, -100


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _pointers(*names: str) -> dict[str, type]:
    return dict.fromkeys(names, c_void_p)


_SIZES = dict.fromkeys(("num_rows", "vocab_size", "inner", "outer_stride", "inner_stride"), c_int64)
Rows = _struct("Rows", data=c_void_p, dtype=c_int, **_SIZES)
RowInputs = _struct(
    "RowInputs", logits=Rows, **_pointers("labels", "temperature"), temperature_value=c_double, softcap=c_double,
    logit_scale=c_double, ignore_index=c_int64, label_start=c_int64,
)  # fmt: skip
StatsForward = _struct(
    "StatsForward", rows=RowInputs, **_pointers("logprob", "entropy", "logsumexp", "saved", "label_value", "workspace")
)
StatsBackward = _struct(
    "StatsBackward", rows=RowInputs, **_pointers("saved", "grad_logprob", "grad_entropy", "grad_logsumexp"),
    grad_logits=Rows,
)  # fmt: skip
_TOKEN = (
    "weight", "advantages", "old_logprob", "old_entropy", "ref_logprob", "policy_weight", "entropy_weight",
    "logprob_weight",
)  # fmt: skip
PolicyLoss = _struct(
    "PolicyLoss", rows=RowInputs, **_pointers(*_TOKEN), rule=c_int, kl=c_int, gate=c_int,
    **dict.fromkeys(NUMBERS, c_double), **_pointers("loss", "token_loss", "logprob", "entropy", "flags"),
    grad_logits=Rows, workspace=c_void_p,
)  # fmt: skip
Partition = _struct("Partition", vocab_size=c_int64, segment_size=c_int64, segments=c_int)
Workspace = _struct("Workspace", states=c_void_p, label_values=c_void_p)


def _rows(address: int) -> ctypes.Structure:
    return Rows(address, _BFLOAT16, 1, VOCABULARY, 1, VOCABULARY, VOCABULARY)


def _inputs(row: OrdinaryRow) -> ctypes.Structure:
    softcap = SOFTCAP if row.softcap else 0.0
    return RowInputs(_rows(row.address["logits"]), row.address["labels"], None, TEMPERATURE, softcap, 1.0, _IGNORE, 0)


def _call(kind: type[ctypes.Structure], row: OrdinaryRow, *without: str) -> ctypes.Structure:
    """A call's struct with what the row has, but for the fields `without`."""
    known = {**row.address, **NUMBERS, "rows": _inputs(row), "grad_logits": _rows(row.address["gradient"]), "gate": 1}
    names = [name for name, *_ in kind._fields_ if name in known and name not in without]
    return kind(**{name: known[name] for name in names})


def _pack(*arguments: ctypes.Structure | ctypes._SimpleCData) -> bytes:
    """As kernel parameters: each at a multiple of its alignment."""
    packed = bytearray()
    for argument in arguments:
        packed += b"\0" * (-len(packed) % ctypes.alignment(argument))
        packed += bytes(argument)
    return bytes(packed)


def _partition() -> ctypes.Structure:
    return Partition(VOCABULARY, segment_size(SEGMENTS), SEGMENTS)


def _workspace(row: OrdinaryRow) -> ctypes.Structure:
    return Workspace(row.address["workspace"], row.address["label_value"])


def _stats(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    call = _call(StatsForward, row, "label_value", "workspace")
    return _pack(call, _partition()), VOCABULARY, ("logprob", "entropy")


def _segment(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    return _pack(_inputs(row), _workspace(row), _partition()), segment_size(SEGMENTS), ()


def _stats_gradient(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    return _pack(_call(StatsBackward, row), _partition()), segment_size(SEGMENTS), ("gradient",)


def _loss(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    return _pack(_call(PolicyLoss, row, "workspace"), _partition()), VOCABULARY, ("logprob", "entropy", "gradient")


def _loss_gradient(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    arguments = (_call(PolicyLoss, row), _workspace(row), _partition(), c_int32(SEGMENTS))
    return _pack(*arguments), segment_size(SEGMENTS), ("logprob", "entropy", "gradient")


_ARGUMENTS: dict[str, Callable[[OrdinaryRow], tuple[bytes, int, tuple[str, ...]]]] = {
    "stats_row_kernel": _stats,
    "segment_kernel": _segment,
    "stats_gradient_kernel": _stats_gradient,
    "loss_cluster_kernel": _loss,
    "loss_block_kernel": _loss,
    "loss_gradient_kernel": _loss_gradient,
}


def work(function: str, launch: Launch, row: OrdinaryRow) -> Work:
    """What the kernel `function` does with the row: one block, or one cluster, of its launch."""
    params, elements, outputs = _ARGUMENTS[function](row)
    return Work(params, launch, elements, outputs)
