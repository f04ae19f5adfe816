"""The arguments of the CUDA kernels on the ordinary row: the structs of csrc/cuda, field by field."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_double, c_float, c_int, c_int64, c_uint32, c_void_p

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
from erc.constants import Gate, Present

SEGMENTS = 8  # of the row in bfloat16
_BFLOAT16, _IGNORE = 1, -100
_PRESENT = Present.OLD_LOGPROB | Present.OLD_ENTROPY


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _pointers(*names: str) -> dict[str, type]:
    return dict.fromkeys(names, c_void_p)


_SIZES = dict.fromkeys(("num_rows", "vocab_size", "inner", "outer_stride", "inner_stride"), c_int64)
Rows = _struct("Rows", data=c_void_p, dtype=c_int, **_SIZES)
RowInputs = _struct(
    "RowInputs", logits=Rows, **_pointers("labels", "temperature"), temperature_value=c_double, softcap=c_double,
    logit_scale=c_double, ignore_index=c_int64, label_start=c_int64, row_index=c_void_p, first_token=c_int64,
    num_tokens=c_int64,
)  # fmt: skip
StatsForward = _struct(
    "StatsForward", rows=RowInputs, **_pointers("logprob", "entropy", "logsumexp", "saved", "label_value", "workspace")
)
StatsBackward = _struct(
    "StatsBackward", rows=RowInputs, **_pointers("saved", "grad_logprob", "grad_entropy", "grad_logsumexp"),
    grad_logits=Rows,
)  # fmt: skip
PolicyLoss = _struct(
    "PolicyLoss", rows=RowInputs, table=c_void_p, **dict.fromkeys(("rule_id", "kl", "gate", "present"), c_int),
    **dict.fromkeys(NUMBERS, c_double), **_pointers("loss", "token_loss", "logprob", "entropy", "flags"),
    **_pointers("support_logprob", "logprob_full", "saved", "d_logprob", "d_logprob_full", "d_entropy"),
    grad_logits=Rows, workspace=c_void_p,
)  # fmt: skip
Partition = _struct("Partition", **dict.fromkeys(("vocab_size", "segment_size", "segments", "log_segments"), c_int))
RowScale = _struct(
    "RowScale", **dict.fromkeys(("scale", "rate", "chain", "chain_by_rate", "softcap", "inner", "decay"), c_float)
)
RowAddress = _struct("RowAddress", data=c_void_p, outer_bytes=c_int64, inner_bytes=c_int64)
Prepared = _struct(
    "Prepared", partition=Partition, scale=RowScale, logits=RowAddress, inner=c_int, factor=c_uint32, shift=c_int
)
Workspace = _struct("Workspace", states=c_void_p, label_values=c_void_p)


def _rows(address: int) -> ctypes.Structure:
    return Rows(address, _BFLOAT16, 1, VOCABULARY, 1, VOCABULARY, VOCABULARY)


def _inputs(row: OrdinaryRow) -> ctypes.Structure:
    softcap = SOFTCAP if row.softcap else 0.0
    logits, labels = _rows(row.address["logits"]), row.address["labels"]
    return RowInputs(logits, labels, None, TEMPERATURE, softcap, 1.0, _IGNORE, 0, None, 0, 1)


def _call(kind: type[ctypes.Structure], row: OrdinaryRow, *without: str) -> ctypes.Structure:
    """A call's struct with what the row has, but for the fields `without`."""
    known = {**row.address, **NUMBERS, "rows": _inputs(row), "grad_logits": _rows(row.address["gradient"])}
    known |= {"gate": Gate.KEEP_VALUE, "present": _PRESENT}
    names = [name for name, *_ in kind._fields_ if name in known and name not in without]
    return kind(**{name: known[name] for name in names})


def _pack(*arguments: ctypes.Structure | ctypes._SimpleCData) -> bytes:
    """As kernel parameters: each at a multiple of its alignment."""
    packed = bytearray()
    for argument in arguments:
        packed += b"\0" * (-len(packed) % ctypes.alignment(argument))
        packed += bytes(argument)
    return bytes(packed)


def _address(address: int) -> ctypes.Structure:
    return RowAddress(address, 2 * VOCABULARY, 2 * VOCABULARY)


def _prepared(row: OrdinaryRow) -> ctypes.Structure:
    """What the host makes of the call: csrc/cuda/rows.cuh."""
    partition = Partition(VOCABULARY, segment_size(SEGMENTS), SEGMENTS, SEGMENTS.bit_length() - 1)
    scale, inner = 1 / TEMPERATURE, 1 / SOFTCAP if row.softcap else 1.0
    rate, decay = scale * math.log2(math.e), -2 * inner * math.log2(math.e)
    softcap = SOFTCAP if row.softcap else 0.0
    scaling = RowScale(scale, rate, scale, scale / rate, softcap, inner, decay)
    return Prepared(partition, scaling, _address(row.address["logits"]), 1, 1 << 31, 0)


def _gradient(row: OrdinaryRow) -> ctypes.Structure:
    return _address(row.address["gradient"])


def _workspace(row: OrdinaryRow) -> ctypes.Structure:
    return Workspace(row.address["workspace"], row.address["label_value"])


def _stats(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    call = _call(StatsForward, row, "label_value", "workspace")
    return _pack(call, _prepared(row)), VOCABULARY, ("logprob", "entropy")


def _segment(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    return _pack(_inputs(row), _workspace(row), _prepared(row)), segment_size(SEGMENTS), ()


def _stats_gradient(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    arguments = (_call(StatsBackward, row), _prepared(row), _gradient(row))
    return _pack(*arguments), segment_size(SEGMENTS), ("gradient",)


def _loss(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    arguments = (_call(PolicyLoss, row, "workspace", "saved"), _prepared(row), _gradient(row))
    return _pack(*arguments), VOCABULARY, ("logprob", "entropy", "gradient")


def _loss_gradient(row: OrdinaryRow) -> tuple[bytes, int, tuple[str, ...]]:
    log_blocks = c_int(SEGMENTS.bit_length() - 1)
    arguments = (_call(PolicyLoss, row), _workspace(row), _prepared(row), _gradient(row), log_blocks)
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
