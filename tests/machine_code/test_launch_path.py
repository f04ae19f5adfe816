"""Triton's launch path itself, with a driver that only knows its target: what a GPU would be given."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: this process cannot compile kernels", allow_module_level=True)

from erc.triton_kernels import OPERATORS
from erc.triton_kernels.params import make_layout
from erc.triton_kernels.tuning import _OLD_COMPILER as OLD_COMPILER
from erc.triton_kernels.tuning import LANES, compile_options, token_options
from tests.stub_driver import TARGETS, stub_driver

PARAMS = torch.tensor([1.0, 0.0, 1.0, 0.2, 0.28, *[float("inf")] * 2, 0.05, 0.05, 1e-8, 0.0, float("inf")]).double()


def scale(rows: int) -> None:
    OPERATORS["scale_rows"](torch.zeros(1, rows, 2048, dtype=torch.float16), torch.ones(rows))


@pytest.mark.parametrize("arch", TARGETS)
def test_a_launch_compiles_for_the_target_and_is_handed_over(arch):
    with stub_driver(arch) as launches:
        scale(3)
    (launch,) = launches
    assert launch.kernel.metadata.target == TARGETS[arch] and launch.grid == (3,)
    assert launch.options["num_warps"] * TARGETS[arch].warp_size == LANES
    assert launch.arguments["V"] == 2048 and launch.arguments["factor_ptr"].tolist() == [1.0] * 3
    assert ("ptx" in launch.kernel.asm) == arch.startswith("sm_") and not torch.cuda.is_initialized()


def test_a_second_launch_finds_the_kernel_of_the_first():
    with stub_driver("sm_90") as launches:
        scale(3)
        scale(5)
    assert launches[0].kernel is launches[1].kernel


def test_few_rows_are_shared_by_several_programs():
    logits, labels = torch.zeros(1, 2, 40_960, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    with stub_driver("sm_90") as launches:
        OPERATORS["stats_forward"](logits, labels, None, PARAMS, -100)
    assert [launch.grid for launch in launches] == [(4,), (2,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("softcap", [False, True])
def test_only_nvidia_kernels_have_a_register_limit(dtype, softcap):
    """HIP's compiler takes no `maxnreg`, and raises; RDNA has warps of 32 threads as NVIDIA has."""
    for arch, target in TARGETS.items():
        layout = make_layout(dtype, softcap=softcap)
        options = compile_options("policy_loss_kernel", arch, target.warp_size, dtype, layout)
        limited = arch.startswith("sm_") and (softcap or dtype != torch.bfloat16)
        assert ("maxnreg" in options) == (limited or (OLD_COMPILER and arch.startswith("sm_")))
        assert ("maxnreg" in token_options(arch, dtype)) == (arch.startswith("sm_") and dtype == torch.float64)


@pytest.mark.parametrize("arch", TARGETS)
def test_the_kernels_of_a_support_compile_without_spilling(arch):
    """With a softcap, a temperature per row and every gradient: the most that they do."""
    rows, columns, ids = 3, 64, 12
    params = PARAMS.clone()
    params[1] = 30.0
    logits, labels = torch.zeros(1, rows, columns, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    given = [torch.zeros(ids, dtype=torch.int64), torch.zeros(rows + 1, dtype=torch.int64)]
    values, state, per_row = torch.zeros(ids), torch.zeros(3, rows), [torch.zeros(rows) for _ in range(8)]
    with stub_driver(arch) as launches:
        OPERATORS["support_forward_"](
            logits, labels, per_row[0], params, -100, None, 0, 0, columns, *given, False, values, *per_row[1:4],
            torch.zeros(3, rows), per_row[4], state, labels.clone(),
        )  # fmt: skip
        OPERATORS["support_backward_"](
            labels, per_row[0], params, None, 0, 0, *given, values, torch.zeros(3, rows), per_row[1], state,
            labels.clone(), *per_row[4:8], logits,
        )  # fmt: skip
    assert [launch.grid for launch in launches] == [(rows,)] * 2
    for launch in launches:
        assert launch.kernel.metadata.target == TARGETS[arch]
        assert getattr(launch.kernel, "n_spills", 0) in (0, None)
