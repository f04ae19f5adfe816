"""The form of CUDA's fused loss, cluster or block, by GPU and size of a row: the table of csrc/cuda/forms.cpp.

`make gpu-report` times both forms on its GPU and prints lines of that table; `python -m benchmarks loss-forms` puts
them in the file. Until then its lines are those of the model in docs/kernels.md.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import erc
from benchmarks.peers.base import Runner
from benchmarks.timing import Budget, interleave
from erc.backend import library_path

TABLE = Path(__file__).parents[1] / "csrc" / "cuda" / "forms.cpp"
FORMS = ("kCluster", "kBlock")  # by LossForm of csrc/cuda/forms.h
ROW_KIB = (64, 128, 297, 512, 594)  # of bfloat16 rows; 297 and 594: 151,936 columns in 16 and 32 bits, 512: 262,144
_BYTES = 1 << 30  # of the logits of one timing: no cache holds them
_LINE = re.compile(r"\{(\d+), (\d+), LossForm::(\w+)\},  // (.*?)\s*$", re.MULTILINE)
_TABLE = re.compile(r"(kTable = \{\n)(.*?)(\};\n)", re.DOTALL)
_EVERY_ROW = (1 << 31) - 1


class FormLine(NamedTuple):
    """Rows of at most `row_kib` KiB take `form` on GPUs of a compute capability (90: 9.0): who says so."""

    capability: int
    row_kib: int
    form: str
    source: str = ""

    def __str__(self) -> str:
        return f"    {{{self.capability}, {self.row_kib}, LossForm::{self.form}}},  // {self.source}"


# ---- the table's file ------------------------------------------------------------------------------------------------


def read_lines(text: str) -> list[FormLine]:
    """The lines of the table in a text: the sources, or what a GPU report says.

    Raises:
        ValueError: for a form that does not exist.
    """
    lines = [FormLine(int(gpu), int(kib), form, source) for gpu, kib, form, source in _LINE.findall(text)]
    if wrong := {line.form for line in lines} - set(FORMS):
        raise ValueError(f"a form must be one of {FORMS}, got {', '.join(sorted(wrong))}")
    return lines


def with_lines(text: str, measured: Iterable[FormLine]) -> str:
    """The sources `text` with measured lines in the place of all that the table had for their GPUs.

    Raises:
        ValueError: where `text` has no table.
    """
    measured = list(measured)
    if (table := _TABLE.search(text)) is None:
        raise ValueError("there is no table kTable of loss forms in this file")
    kept = [line for line in read_lines(table[2]) if line.capability not in {new.capability for new in measured}]
    lines = sorted({line[:2]: line for line in (*kept, *measured)}.values())
    return text[: table.start(2)] + "".join(f"{line}\n" for line in lines) + text[table.end(2) :]


def line_of(lines: Iterable[FormLine], capability: int, row_bytes: int) -> FormLine | None:
    """The line by which csrc/cuda/forms.cpp chooses; without one it takes a cluster."""
    return next((line for line in lines if line.capability == capability and row_bytes <= 1024 * line.row_kib), None)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class _Line(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("capability", "row_kib", "form")]


@contextmanager
def override(library: ctypes.CDLL, lines: Iterable[FormLine]) -> Iterator[None]:
    """Launches of the library inside go by these lines instead of its table."""
    values = [_Line(line.capability, line.row_kib, FORMS.index(line.form)) for line in lines]
    library.erc_cuda_loss_forms((_Line * len(values))(*values), len(values))
    try:
        yield
    finally:
        library.erc_cuda_loss_forms(None, 0)


def _seconds(runners: Mapping[str, Runner]) -> dict[str, float]:
    spreads, failed = interleave(dict(runners), "cuda", Budget(seconds=3))
    if failed:
        raise RuntimeError("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return {name: spread.median for name, spread in spreads.items()}


def measured_line(
    capability: int,
    row_kib: int,
    library: ctypes.CDLL,
    rows: int,
    gpu: str,
    backend: str = "cuda",
    device: str = "cuda",
    seconds: Callable[[Mapping[str, Runner]], dict[str, float]] = _seconds,
) -> FormLine:
    """The faster form of bfloat16 rows of `row_kib` KiB, on an ordinary call of erc-dapo.

    Raises:
        ArithmeticError: if the two forms differ in a bit.
        RuntimeError: if one does not run.
    """
    V = row_kib * 512
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(1, rows, V, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(rows, device=device)[None] % V
    old = erc.token_stats(logits.detach(), labels, backend=backend)  # on-policy: every token is kept
    given = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.ones_like(old.logprob)}
    objective = erc.objective("erc-dapo", entropy_coef=0.01)

    def call(form: str) -> erc.PolicyLoss:
        with override(library, [FormLine(capability, _EVERY_ROW, form)]):
            return erc.policy_loss(logits, labels, **given, objective=objective, backend=backend)

    results = [_with_gradient(call(form), logits) for form in FORMS]
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True)):
        raise ArithmeticError(f"cluster and block form differ for rows of {row_kib} KiB")
    del results
    taken = seconds({form: Runner(partial(call, form)) for form in FORMS})
    times = ", ".join(f"{form[1:].lower()} {1e6 * taken[form]:.0f} us" for form in FORMS)
    return FormLine(
        capability, row_kib, min(FORMS, key=lambda form: taken[form]), f"measured: {gpu}, {rows} rows: {times}"
    )


def _with_gradient(out: erc.PolicyLoss, logits: Tensor) -> list[Tensor]:
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return [out.loss.detach(), out.logprob, out.entropy, gradient]


def measure() -> Iterator[FormLine]:
    """A line for each size of `ROW_KIB`, on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    library = ctypes.CDLL(str(library_path("cuda")))
    for kib in ROW_KIB:
        rows = max(2048, _BYTES // (kib * 1024))
        yield measured_line(10 * major + minor, kib, library, rows, torch.cuda.get_device_name())
