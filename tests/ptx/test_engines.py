"""The two ways of a launch to the interpreter, and faults planted in the kernels that ship: one instruction that
synchronises is taken out of the compiled code, and the interpreter must notice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import erc
from tests.cuda_host import build
from tests.ptx import nvcc
from tests.ptx.machine import Fault
from tests.ptx.program import Program
from tests.ptx.source import parse
from tests.ptx.subjects import Subject, architectures, cluster_architecture, is_whole, why_not

pytestmark = pytest.mark.timeout(3600 if is_whole() else 900)
INF, IGNORE = float("inf"), -100


def skip_without(backend: str):
    return pytest.mark.skipif(why_not(backend) is not None, reason=str(why_not(backend)))


def inputs(V: int = 24_576, rows: int = 4):
    """Rows that need every pass of every kernel: one with a hole is swept twice, one is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, V, generator=generator)).bfloat16()
    logits[1, 100:900] = -INF
    labels = torch.randint(V, (rows,), generator=generator)
    labels[2] = IGNORE
    statistics = erc.reference.token_stats(logits.double(), labels.clamp(min=0))
    given = {"old_logprob": statistics.logprob.float(), "old_entropy": statistics.entropy.float()}
    return logits, labels, {**given, "advantages": torch.ones(rows)}


def run(subject: Subject, logits, labels, given, statistics: bool = True) -> list[str]:
    """Statistics if wanted, and the fused loss with its gradient; returns the kernels that ran."""
    with subject.running() as engine:
        if statistics:
            erc.token_stats(logits, labels, backend=subject.name)
        erc.policy_loss(logits.detach().requires_grad_(), labels, **given, backend=subject.name)
    return [launched.kernel for launched in engine.launches]


# ---- csrc/cuda -------------------------------------------------------------------------------------------------------


@skip_without("cuda")
@pytest.mark.skipif(80 not in architectures("cuda"), reason="compute_80 is not compiled for this tree; make ptx does")
def test_a_cluster_kernel_without_code_is_found():
    """Code for compute_80 has the kernel's name and nothing in it. The launcher asks what its code was compiled for;
    here it is told something else, as if it did not ask."""
    logits, labels, given = inputs()
    subject = Subject("cuda", 80, "cluster")
    assert not any("cluster" in name for name in run(subject, logits, labels, given))
    with subject.running():
        build.load().configure(clusters=True, compiled_for=90)
        with pytest.raises(
            RuntimeError, match=r"loss_cluster_kernel.* is empty for sm_80: the launch would do nothing"
        ):
            erc.policy_loss(logits.requires_grad_(), labels, **given, backend=subject.name)


@skip_without("cuda")
def test_launches_are_the_launchers():
    """Kernel, grid, block, cluster and bytes of shared memory as the host's own launches record them."""
    logits, labels, given = inputs()
    subject = Subject("cuda", cluster_architecture(), "cluster")
    with subject.running() as engine:
        erc.policy_loss(logits.requires_grad_(), labels, **given, backend=subject.name)
    found = [(one.shape.grid, one.shape.threads, one.shape.cluster, one.shape.shared) for one in engine.launches]
    assert build.load().launches() == found
    (position,) = (i for i, one in enumerate(engine.launches) if "loss_cluster_kernel" in one.kernel)
    assert found[position][:3] == (8, 128, 2) and found[position][3] > 24_576


@skip_without("cuda")
def test_without_the_interpreter_launches_run_on_fibers_again():
    logits, labels, given = inputs(V=2048)
    subject = Subject("cuda", architectures("cuda")[0], "block")
    run(subject, logits, labels, given)
    host = build.load()
    host.configure()
    expected = erc.reference.token_stats(logits[:1].double()).entropy
    assert torch.allclose(erc.token_stats(logits[:1], backend=subject.name).entropy.double(), expected, rtol=1e-5)


@skip_without("cuda")
def test_memory_that_no_tensor_of_the_call_holds_is_out_of_bounds(monkeypatch):
    """The bindings' tensors are all that a kernel may touch: here it is told nothing of them."""
    logits, labels, _ = inputs(V=2048)
    subject = Subject("cuda", architectures("cuda")[0], "block")
    with subject.running(), monkeypatch.context() as patched:
        patched.setattr(build.Host, "tensors", lambda _: [])
        with pytest.raises(RuntimeError, match="global memory out of bounds, and no tensor is known"):
            erc.token_stats(logits, labels, backend=subject.name)


def test_ptx_is_compiled_again_when_a_header_changes(tmp_path):
    if nvcc.nvcc() is None:
        pytest.skip("needs nvcc")
    for folder in ("cuda", "common"):
        (tmp_path / folder).mkdir()
    header, source = tmp_path / "cuda" / "one.cuh", tmp_path / "cuda" / "one.cu"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "one.cuh"\n__global__ void one_kernel(int* p) { *p = VALUE; }\n')
    first = nvcc.ptx(source, 90, tmp_path)
    assert nvcc.ptx(source, 90, tmp_path) == first and first.exists()
    header.write_text("#define VALUE 2\n")
    second = nvcc.ptx(source, 90, tmp_path)
    assert second != first and not first.exists() and "one_kernel" in second.read_text()
    second.unlink()


SYNCHRONISES = re.compile(
    r"bar\.sync\s+0;|bar\.warp\.sync\s+\S+;|barrier\.cluster\.\S+;|fence\.mbarrier_init\S+;|mbarrier\.[^;]*;|st\.async[^;]*;"
)
# What may go without harm: the barrier before a segment's second pass (between a thread's last look at the states and
# their next change lies another barrier), in the block form the one between two rows that are both read, and in the
# cluster form waits for parts of the copy that come again: in the guarded sweep, behind the fast one, and behind a loop
# that has waited for them.
HARMLESS = {"stats_row": 1, "loss_block": 2, "loss_cluster": 12, "segment": 1, "loss_gradient": 0}
PART_WAIT = "mbarrier.try_wait.parity.acquire.cta"


@skip_without("cuda")
@pytest.mark.parametrize(
    ("kernel", "form"),
    [("loss_cluster", "cluster"), ("stats_row", "block"), ("loss_block", "block"), ("segment", "split"),
     ("loss_gradient", "split")][: None if is_whole() else 1],
)  # fmt: skip
def test_what_synchronises_a_kernel_cannot_be_taken_out(kernel, form):
    """Every barrier, wait and announcement of the compiled kernel, one at a time."""
    subject, statistics = Subject("cuda", cluster_architecture(), form), form != "cluster"
    given = inputs(V=39_064) if form == "cluster" else inputs()  # of all parts of the copy, and a rest
    names = run(subject, *given, statistics)
    (name,) = {name for name in names if f"{kernel}_kernel" in name}
    with subject.running() as engine:
        library = engine.library
    text, sound, unnoticed = library.text(name), library.programs[name], []
    found = list(SYNCHRONISES.finditer(text))
    assert len(found) > HARMLESS[kernel]
    try:
        for match in found:
            instead = "mov.pred done, -1;" if "try_wait" in match.group() else ""
            library.programs[name] = Program(parse(text[: match.start()] + instead + text[match.end() :]))
            try:
                run(subject, *given, statistics)
                unnoticed.append(match.group())
            except RuntimeError as error:
                assert "Fault" in str(error), error
    finally:
        library.programs[name] = sound
    assert len(unnoticed) <= HARMLESS[kernel], unnoticed
    unnoticed = [text for text in unnoticed if not text.startswith(PART_WAIT)]
    assert not any(text.startswith(("barrier.cluster", "mbarrier", "st.async")) for text in unnoticed), unnoticed


# ---- Triton ----------------------------------------------------------------------------------------------------------


@skip_without("triton")
def test_triton_launches_its_own_way_and_gives_the_driver_back():
    from triton.runtime import driver

    before = driver._active
    logits, labels, given = inputs(V=2048)
    subject = Subject("triton", architectures("triton")[0], "block")
    names = run(subject, logits, labels, given)
    assert names[0] == "stats_forward_kernel" and "policy_loss_kernel" in names and driver._active is before


@skip_without("triton")
def test_a_kernel_without_its_barriers_is_noticed(monkeypatch):
    """Triton's reductions pass values between warps through shared memory."""
    from tests.ptx import triton_engine

    logits, labels, _ = inputs(V=2048)
    subject = Subject("triton", architectures("triton")[0], "block")
    with subject.running() as engine:
        ran, execute = [], engine.execute
        monkeypatch.setattr(engine, "execute", lambda program, *rest: (ran.append(program), execute(program, *rest)))
        erc.token_stats(logits, labels, backend=subject.name)
    assert engine.launches[0].counts.block_barriers > 0
    path = next(path for path, program in triton_engine._programs.items() if program is ran[0])
    text = Path(path).read_text()
    without = re.sub(r"bar\.sync\s+0;", "", text)
    assert without != text
    program = Program(parse(without))
    with subject.running() as engine:
        monkeypatch.setattr(engine, "execute", _with(engine, program))
        with pytest.raises(Fault, match="nothing between them that orders the two"):
            erc.token_stats(logits, labels, backend=subject.name)


def _with(engine, program):
    """The engine's `execute`, with another program for the kernel of that name."""
    execute = engine.execute

    def replaced(given, *arguments):
        execute(program if given.kernel.name == program.kernel.name else given, *arguments)

    return replaced
