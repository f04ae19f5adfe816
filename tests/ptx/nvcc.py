"""PTX of csrc/cuda: what nvcc makes of the sources that a wheel is built from, with setup.py's flags.

One file per source and architecture, kept under build/ by a hash of what it was compiled from and by what.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks.locks import one_process
from tests import build_script
from tests.ptx.native import BUILD_DIR
from tests.ptx.program import Program
from tests.ptx.source import entries, parse

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90, 100)


def nvcc() -> str | None:
    """The compiler, or None where there is none."""
    return shutil.which("nvcc")


@cache
def _compiler_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(flags: tuple[str, ...], folder: Path) -> str:
    digest = hashlib.sha256(" ".join((_compiler_version(), *flags)).encode())
    headers = [*folder.glob("cuda/*.cuh"), *folder.glob("cuda/*.h"), *folder.glob("common/*.h")]
    for path in sorted(headers):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ptx(source: Path, architecture: int, csrc: Path = CSRC) -> Path:
    """The PTX file of one source; compiled if there is none.

    Raises:
        RuntimeError: with the compiler's output.
    """
    flags = (*build_script.builder().NVCC_FLAGS, f"-arch=compute_{architecture}")
    key = hashlib.sha256(_digest(flags, csrc).encode() + source.read_bytes()).hexdigest()[:16]
    path = BUILD_DIR / "nvcc" / f"{source.stem}-{architecture}-{key}.ptx"
    with one_process(path):
        if not path.exists():
            fresh = path.with_suffix(".partial")
            command = [nvcc(), *flags, "-ptx", f"-I{csrc}", str(source), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            for stale in path.parent.glob(f"{source.stem}-{architecture}-*.ptx"):
                stale.unlink()
            fresh.replace(path)
    return path


def compile_all(pairs: Iterable[tuple[Path, int]]) -> None:
    """Compile several (source, architecture) pairs, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: ptx(*pair), pairs))


class Library:
    """Kernels of csrc/cuda by the name of their symbol, compiled and translated when they are asked for."""

    def __init__(self, architecture: int, sources: tuple[Path, ...] | None = None, csrc: Path = CSRC) -> None:
        self.architecture = architecture
        self.csrc = csrc
        self.sources = sources or tuple(sorted(csrc.glob("cuda/*.cu")))
        self.programs: dict[str, Program] = {}
        self.texts: dict[Path, str] = {}

    def program(self, name: str) -> Program:
        """The kernel `name`, a mangled symbol.

        Raises:
            KeyError: where no source defines it.
        """
        if name not in self.programs:
            self.programs[name] = Program(parse(self.text(name)))
        return self.programs[name]

    def text(self, name: str) -> str:
        """The part of a file that holds one kernel."""
        function = re.search(r"erc4cuda\d+(\w+?_kernel)", name)
        likely = [p for p in self.sources if function and function.group(1) in p.read_text()]
        for source in likely:
            if source not in self.texts:
                self.texts[source] = ptx(source, self.architecture, self.csrc).read_text()
            text = self.texts[source]
            start = text.find(f".entry {name}(")
            if start >= 0:
                first = text.index(".entry ")
                module = text[: text.rindex("\n", 0, first)]  # version, target, variables of the module
                end = text.find(".entry ", start + 10)
                return module + "\n" + text[start : end if end > 0 else len(text)]
        raise KeyError(f"no source of {self.csrc / 'cuda'} defines {name}")


def kernels(source: Path, architecture: int) -> list[str]:
    """The symbols that one source compiles to."""
    return entries(ptx(source, architecture).read_text())
