"""bfloat16 products with float32 results on the CPU: as the exact ones, in every shape, on each instruction set.

Sizes: 32 is a block and a step, 512 the longest run of terms that are added in order; around them, and several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import erc
from erc.backend import cpu_wide_product
from erc.linear.products import add_product, write_logits

pytestmark = pytest.mark.skipif(not cpu_wide_product(), reason="this processor does not multiply bfloat16")
ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1, 1), (31, 33, 31), (32, 32, 32), (33, 65, 100), (5, 16, 513), (70, 1027, 544), (3, 40, 4096)]


def operands(rows, columns, width, bias=True):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    weight = torch.randn(columns, width, generator=generator).bfloat16()
    return hidden, weight, torch.randn(columns, generator=generator).bfloat16() if bias else None


def exact(hidden, weight, bias):
    return torch.nn.functional.linear(hidden.double(), weight.double(), bias if bias is None else bias.double())


@pytest.mark.sanitize
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, bias):
    hidden, weight, offset = operands(*shape, bias)
    expected = exact(hidden, weight, offset)
    room = torch.full((shape[0] + 1, shape[1] + 3), 7.0)
    out = room[:-1, :-3]
    write_logits(hidden, weight, offset, out)
    bound = 4e-7 * max(1.0, float(expected.abs().max()))
    assert (out - expected).abs().max() <= bound
    assert (out - out.bfloat16()).abs().max() > bound or shape == (1, 1, 1), "rounding to bfloat16 would be noticed"
    assert (room[-1] == 7).all() and (room[:, -3:] == 7).all(), "nothing beside the result is written"


@pytest.mark.sanitize
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sum_of_products(shape, first):
    """The gradient of a weight `[V, D]` from that of logits `[n, V]` and hidden states `[n, D]`."""
    count, columns, width = shape
    hidden, weight, _ = operands(width, columns, count, bias=False)  # as [D, n] and [V, n]
    grad_logits, rows = weight.t().contiguous(), hidden.t().contiguous()
    room = torch.full((columns + 1, width + 3), 7.0)
    total = room[:-1, :-3]
    add_product(total, grad_logits.t(), rows, first)
    expected = exact(weight, hidden, None) + (0 if first else 7)
    assert (total - expected).abs().max() <= 4e-7 * max(1.0, float(expected.abs().max()))
    assert (room[-1] == 7).all() and (room[:, -3:] == 7).all(), "nothing beside the result is written"


def test_strides_of_every_operand():
    hidden, weight, _ = operands(20, 80, 96, bias=False)
    out = torch.empty(20, 40)
    write_logits(hidden[::2, 32:], weight[40:, 32:], None, out[::2])
    torch.testing.assert_close(out[::2].double(), exact(hidden[::2, 32:], weight[40:, 32:], None), rtol=0, atol=1e-5)


def test_a_row_is_the_same_in_any_company():
    hidden, weight, bias = operands(70, 500, 600)
    whole = torch.empty(70, 500)
    write_logits(hidden, weight, bias, whole)
    for rows in (slice(0, 1), slice(33, 70)):
        part = torch.empty(len(hidden[rows]), 500)
        write_logits(hidden[rows], weight, bias, part)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(value):
    hidden, weight, _ = operands(40, 70, 40, bias=False)
    hidden[35, 3] = value
    weight[66, 39] = value
    out = torch.empty(40, 70)
    write_logits(hidden, weight, None, out)
    expected = exact(hidden, weight, None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5, equal_nan=True)
    assert out.isfinite().sum() == 39 * 69


def test_operands_that_do_not_fit_are_refused():
    hidden, weight, _ = operands(4, 8, 32, bias=False)
    for out in (torch.empty(4, 7), torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, 8)[:, ::2].t()):
        with pytest.raises(RuntimeError, match="wide_product_ needs"):
            torch.ops.erc_cpu.wide_product_(hidden, weight, None, False, out)


def test_opcheck():
    hidden, weight, bias = operands(4, 8, 32)
    torch.library.opcheck(torch.ops.erc_cpu.wide_product_, (hidden, weight, bias.float(), True, torch.zeros(4, 8)))


def test_compiled_code_calls_it():
    hidden, weight, _ = operands(6, 50, 32, bias=False)
    labels = torch.arange(6)

    def call(hidden, weight):
        return erc.linear_token_stats(hidden, weight, labels, backend="cpu").logprob

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), call(hidden, weight))


@pytest.mark.skipif("ERC_CPU_ISA" in os.environ, reason="one of the other processes")
@pytest.mark.parametrize(("isa", "instructions"), [("avx512", "avx512_bf16"), ("avx2", "")])
def test_on_the_vectors_of_avx512(isa, instructions):
    test = (Path(__file__), "-k", "every_shape or sum or company or finite") if instructions else ()
    found = f"from erc.backend import cpu_wide_product as f; assert f() == {instructions!r}, f()"
    environment = os.environ | {"ERC_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", found], cwd=ROOT, env=environment, check=True)
    if test:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, test)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
