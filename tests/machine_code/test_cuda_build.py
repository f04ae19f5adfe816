"""How setup.py builds the CUDA library: what it does without nvcc, and with nvcc but a PyTorch that knows no CUDA.

The library is built as PTX for sm_90 alone, without the assembler and most of the time: `test_cuda_machine_code`
takes the same sources through it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import build_script

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is compiled elsewhere")


@pytest.fixture
def builder(monkeypatch) -> ModuleType:
    """setup.py as a module that builds nothing by itself, on a machine without environment variables of ours."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 70.1")
    for name in [name for name in os.environ if name.startswith("ERC_")]:
        monkeypatch.delenv(name)
    return build_script.load()


@pytest.fixture
def command(builder, monkeypatch, tmp_path):
    """The build command into `tmp_path / "wheel"`, with a CPU library that takes no compiler."""

    class Library:
        path = tmp_path / "liberc_cpu.so"

        def build(self, jobs: int) -> bool:
            self.path.write_text("a library")
            return True

    monkeypatch.setattr(builder, "gpu_archs", lambda: ["9.0"])
    monkeypatch.setattr(builder, "cxx", lambda: ["c++"])
    monkeypatch.setattr(builder, "cpu_library", lambda sanitize: Library())
    monkeypatch.setattr(builder, "BUILD_DIR", tmp_path / "build")
    build = builder.BuildNative(builder.Distribution())
    build.build_lib = str(tmp_path / "wheel")
    return build


def installed(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "wheel" / "erc" / "lib").iterdir()}


def test_without_nvcc_the_build_says_so_and_goes_on(builder, command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(builder, "nvcc", lambda: None)
    command.run()
    assert installed(tmp_path) == {"liberc_cpu.so"}
    assert "the CUDA backend is not built: no nvcc" in capsys.readouterr().err


def test_a_cuda_build_that_fails_is_an_error_only_where_it_was_asked_for(
    builder, command, monkeypatch, tmp_path, capsys
):
    def fail():
        raise builder.CompileError("nvcc: unsupported GNU version")

    monkeypatch.setattr(builder, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(builder, "cuda_library", fail)
    (tmp_path / "wheel" / "erc" / "lib").mkdir(parents=True)
    (tmp_path / "wheel" / "erc" / "lib" / "liberc_cuda.so").write_text("of an earlier build")
    command.run()
    assert installed(tmp_path) == {"liberc_cpu.so"}
    message = capsys.readouterr().err
    assert "unsupported GNU version" in message and "the CUDA backend is NOT built" in message
    assert command.get_outputs() == [str(tmp_path / "wheel" / "erc" / "lib" / "liberc_cpu.so")]
    monkeypatch.setenv("ERC_BUILD_CUDA", "1")
    with pytest.raises(builder.CompileError, match="unsupported GNU version"):
        command.run()


@pytest.mark.parametrize("name", ["CXX", "ERC_NVCC"])
def test_a_compiler_that_does_not_exist_is_an_error_and_no_silent_python_install(builder, monkeypatch, name):
    monkeypatch.setenv(name, "nosuch -m64" if name == "CXX" else "nosuch")
    with pytest.raises(builder.PlatformError, match=f"{name}=nosuch.*is not found"):
        builder.builds_native() and builder.why_no_cuda()


def test_host_files_compile_first_and_a_failing_one_leaves_the_rest_alone(builder, monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(builder, "cxx", lambda: ["c++"])
    monkeypatch.setattr(builder, "toolkit_of", lambda driver: tmp_path)
    monkeypatch.setattr(builder, "BUILD_DIR", tmp_path)
    library = builder.cuda_library()
    kinds = [item.source.suffix for item in library.objects]
    assert set(kinds) == {".cpp", ".cu"} and kinds == sorted(kinds)
    compiled = []

    def compile_(item):
        compiled.append(item.source.name)
        raise builder.CompileError("no such header")

    monkeypatch.setattr(builder.Object, "compile", compile_)
    with pytest.raises(builder.CompileError):
        library.build(jobs=1)
    assert compiled == [library.objects[0].source.name]


def test_a_wheel_has_the_cuda_library_where_nvcc_is_found_and_nobody_objects(builder, monkeypatch):
    monkeypatch.setattr(builder, "gpu_archs", list)
    monkeypatch.setattr(builder, "nvcc", lambda: "nvcc")
    assert builder.why_no_cuda() is None
    builder.why_no_cuda.cache_clear()
    monkeypatch.setenv("ERC_BUILD_CUDA", "0")
    assert builder.why_no_cuda() == "ERC_BUILD_CUDA=0"


def test_a_cuda_build_that_is_asked_for_and_impossible_is_an_error(builder, monkeypatch):
    monkeypatch.setattr(builder, "nvcc", lambda: None)
    monkeypatch.setenv("ERC_BUILD_CUDA", "1")
    with pytest.raises(builder.PlatformError, match="no nvcc"):
        builder.why_no_cuda()


def test_the_architectures_are_chosen_by_the_environment(builder, monkeypatch):
    if builder.nvcc() is None:
        pytest.skip("needs nvcc")
    monkeypatch.setattr(builder, "gpu_archs", list)
    for archs, expected in ((None, {"sm_80", "sm_90", "sm_100", "compute_100"}), ("9.0", {"sm_90"})):
        if archs:
            monkeypatch.setenv("ERC_CUDA_ARCHS", archs)
        for built in (each for each in builder.cuda_library().objects if each.source.suffix == ".cu"):
            assert {flag.rpartition("code=")[2] for flag in built.command if "gencode" in flag} == expected
            assert "-fmad=false" in built.command, "no bit may depend on what the compiler contracts"


@pytest.fixture
def library(builder, monkeypatch) -> Path:
    """liberc_cuda.so with PTX alone, kept by a hash of what it is made of."""
    if builder.nvcc() is None or builder.cxx() is None:
        pytest.skip("needs nvcc and a C++ compiler")
    rooms = ("csrc/cuda", "csrc/common", "csrc/bindings")
    read = [*(path for room in rooms for path in (ROOT / room).iterdir()), ROOT / "setup.py"]
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(path.read_bytes() for path in sorted(read)))
    folder = ROOT / "build" / "cuda_ptx" / digest.hexdigest()[:16]
    monkeypatch.setattr(builder, "BUILD_DIR", folder)
    flags = ["-gencode=arch=compute_90,code=compute_90", "-Werror=all-warnings"]
    monkeypatch.setattr(builder, "gencode", lambda _: flags)
    built = builder.cuda_library()
    if not built.path.exists():
        built.build(jobs=2)
    return built.path


@pytest.mark.timeout(900)
def test_the_library_needs_nothing_that_a_pytorch_without_cuda_lacks(library):
    """It compiles and links here, and of PyTorch it calls C functions of the stable ABI alone."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    needed = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    assert {name for name in needed if name.startswith(("aoti_torch_", "torch_"))} >= {
        "aoti_torch_get_current_cuda_stream"
    }
    from_cxx = [name for name in needed if name.startswith("_Z") and re.search("erc|at|c10|torch", name[2:])]
    own = [name for name in from_cxx if not re.match(r"_Z(N[KVO]*S|St|Td|Zn|n|d)", name)]
    assert own == [], "C++ symbols that are neither the standard library's nor this library's"
    assert not any(name.startswith("cuda") for name in needed), "the CUDA run-time is linked in"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the library is loaded")
def test_without_a_gpu_the_library_is_not_loaded(library):
    code = (
        "import erc, torch; assert erc.backends()['cuda'] == 'no CUDA device', erc.backends();"
        "erc.token_stats(torch.zeros(2, 5)); print(open('/proc/self/maps').read())"
    )
    environment = {**os.environ, "ERC_CUDA_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch_cpu" in done.stdout and library.name not in done.stdout
