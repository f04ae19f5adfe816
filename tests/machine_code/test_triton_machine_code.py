"""The Triton kernels compiled ahead of time, with no GPU present: what they cost, and what never compiles them again.

Targets for bfloat16 logits: statistics at most 9 instructions and 1.13 special-function operations an element, the
fused loss at most 18 instructions for both sweeps, 128-bit loads and stores, no spill, nothing that waits in a main
loop.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: this process cannot compile kernels", allow_module_level=True)

import erc
from benchmarks.hardware import GPUS
from benchmarks.machine_code.report import CompiledKernel, measure
from benchmarks.machine_code.sass import disassemble
from benchmarks.machine_code.triton_variants import TARGETS, all_variants, main_variants
from erc.constants import Gate, KLKind, Present
from erc.triton_kernels import OPERATORS
from tests.backends import params

NVIDIA = ("sm_80", "sm_90", "sm_100")
IGNORE = -100


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("variant", main_variants(), ids=lambda v: v.name)
def test_main_loops_meet_the_targets(variant, arch):
    compiled = variant.compile(arch)
    m = measure(CompiledKernel(variant.name, arch, compiled.asm["cubin"]))
    assert not m.spills
    assert m.statistics or m.gradient
    if m.statistics:
        assert m.statistics.instructions <= 9
        assert m.statistics.mufu <= 1.13
        assert m.statistics.load_bits == (128,)
    if m.gradient:
        assert m.gradient.load_bits == m.gradient.store_bits == (128,)
        # Rounded to nearest even, once: the interpreter cannot show it.
        assert "cvt.rn.bf16x2.f32" in compiled.asm["ptx"]
    assert m.instructions() <= 18
    # A row that is read twice stays in the cache because what is written leaves it first, not because it is held: who
    # would let go of the rows of dropped tokens?
    assert "evict_last" not in compiled.asm["ptx"]
    assert "st.global.v4" not in compiled.asm["ptx"] or not m.gradient
    for loop in filter(None, (m.statistics, m.gradient)):
        assert loop.barriers == loop.shuffles == 0
        assert "shared" not in loop.pipes
    assert all(reachable.share > 0.95 for reachable in m.reachable.values())
    assert set(m.reachable) == {gpu.name for gpu in GPUS if gpu.arch == arch}


@pytest.mark.parametrize("variant", main_variants(), ids=lambda v: v.name)
def test_amd_kernels_compile_without_scratch_memory(variant):
    code = variant.compile("gfx942").asm["amdgcn"]
    assert re.search(r"ScratchSize: 0\b", code)
    assert re.search(r"vgpr_spill_count: 0\b", code)
    assert "global_load_dwordx4" in code


@pytest.mark.slow
@pytest.mark.parametrize("variant", all_variants(), ids=lambda v: v.name)
def test_no_kernel_spills(variant):
    """Every kernel with every feature on and off. One architecture each, in turn: the features meet all of them."""
    arch = NVIDIA[sum(map(ord, variant.name)) % len(NVIDIA)]
    (kernel,) = disassemble(variant.compile(arch).asm["cubin"])
    assert not kernel.spills()


def test_a_spill_is_noticed():
    """The check above can fail: the same kernel squeezed into 24 registers does spill."""
    import triton

    variant = main_variants()[0]
    options = {"num_warps": 16, "enable_fp_fusion": False, "maxnreg": 24}
    cubin = triton.compile(variant.source(), target=TARGETS["sm_90"], options=options).asm["cubin"]
    (kernel,) = disassemble(cubin)
    assert kernel.spills()


# ---- what compiles anew ----------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """Record, instead of launching, what Triton's cache of compiled kernels would look up: the specialisation key."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = set()

    def record(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        keys.add((self.__name__, str(specialization), str(sorted(options.items()))))

    monkeypatch.setattr(JITFunction, "run", record)
    return keys


def run_every_operator(
    V=2048, rows=3, padding=0, temperature=1.0, row_temperature=False, softcap=0.0, logit_scale=1.0,
    rule=(0.2, 0.28, 1.0, 1.0), beta=0.05, gate_eps=1e-8, kl=(0.1, 10.0), offset=0, start=0, dtype=torch.float32,
    ignore_index=IGNORE,
):  # fmt: skip
    storage = torch.zeros(rows * (V + padding) + offset, dtype=dtype)[offset:]
    logits = storage.as_strided((1, rows, V), (rows * (V + padding), V + padding, 1))
    labels = torch.zeros(rows, dtype=torch.int64)
    numbers = params(
        rule, temperature=temperature, softcap=softcap, logit_scale=logit_scale, beta_low=beta, beta_high=beta,
        gate_eps=gate_eps, gate_id=Gate.KEEP_VALUE, kl_coef=kl[0], kl_clamp=kl[1], kl_id=KLKind.K3,
        present=Present.OLD_LOGPROB | Present.OLD_ENTROPY | Present.REF_LOGPROB,
    )  # fmt: skip
    temperatures = torch.ones(rows) if row_temperature else None
    values = torch.zeros(rows)
    inputs = (labels, temperatures, numbers, ignore_index)
    saved = OPERATORS["stats_forward"](logits, *inputs)[3]
    OPERATORS["stats_backward"](logits, *inputs, saved, values, values, values)
    tokens = (labels, values, None, values, values, values, *[None] * 7, numbers, ignore_index)
    OPERATORS["policy_loss"](logits, temperatures, *tokens, None, None, False, True)
    OPERATORS["policy_loss_"](logits, temperatures, *tokens, None, None, False, True)
    OPERATORS["partial_stats_"](logits, *inputs, None, 0, start, torch.empty(4, rows))
    OPERATORS["scale_rows"](logits, values)
    _, paired = OPERATORS["paired_forward"](logits, logits, temperatures, numbers)
    OPERATORS["paired_backward"](logits, logits, temperatures, numbers, paired, torch.zeros(6, rows))


@pytest.mark.parametrize(
    "change",
    [
        {"V": 151_936}, {"V": 32_000}, {"V": 16}, {"V": 4}, {"rows": 1}, {"rows": 64}, {"padding": 64},
        {"temperature": 0.7}, {"temperature": 2.0}, {"rule": (0.1, 0.3, 10.0, 2.0)}, {"rule": (1.0, 1.0, 1.0, 1.0)},
        {"logit_scale": 0.5}, {"logit_scale": 16.0}, {"gate_eps": 0.0}, {"gate_eps": 1.0},
        {"beta": 0.1}, {"beta": 1.0}, {"kl": (0.5, 1.0)}, {"offset": 4}, {"start": 1}, {"start": 2**33},
        {"ignore_index": -1}, {"ignore_index": 1},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_that_changes_from_step_to_step_compiles(change, compilations):
    run_every_operator()
    before = set(compilations)
    assert before
    run_every_operator(**change)
    assert compilations == before


@pytest.mark.parametrize(
    "change", [{"dtype": torch.bfloat16}, {"softcap": 5.0}, {"V": 2053}, {"row_temperature": True}]
)
def test_what_changes_the_machine_code_does_compile(change, compilations):
    """The count above can fail. An unaligned V costs one more variant, not one a value."""
    run_every_operator()
    before = set(compilations)
    run_every_operator(**change)
    assert compilations != before
    if "V" in change:
        after = set(compilations)
        run_every_operator(V=50_257)
        assert compilations == after


def test_no_kernel_is_wrapped_in_an_autotuner():
    """Triton's times kernels during a call: it would wait, and run an in-place kernel over its own output."""
    from triton.runtime.jit import JITFunction

    assert all(type(variant.kernel) is JITFunction for variant in all_variants())


def test_softcap_values_compile_once(compilations):
    run_every_operator(softcap=5.0)
    before = set(compilations)
    run_every_operator(softcap=30.0)
    assert compilations == before


def test_the_operators_are_complete():
    assert set(OPERATORS) == set(erc.ops.SCHEMAS)
