"""Throw-away environments: unpacked wheels without their dependencies, and a Python that sees nothing else.

What is downloaded stays in `.cache/compat`, by pip and by whatever index pip is configured for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "compat"
# What `import torch` and torch.compile import, and this package's own dependency.
PURE = ("typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "numpy")
# What executes kernels under pytest (tests/ptx).
PYTEST = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli", "setuptools")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


@dataclass(frozen=True)
class Pair:
    """A PyTorch release, the Triton that it pins, and the Python that both are tried on (where this machine has it)."""

    torch: str
    triton: str
    python: str


PAIRS = (
    Pair("2.10.0", "3.6.0", "3.10"),
    Pair("2.11.0", "3.6.0", "3.12"),
    Pair("2.12.1", "3.7.1", "3.13"),
    Pair("2.13.0", "3.7.1", "3.11"),
    Pair("2.14.1", "3.8.0", "3.11"),
    Pair("2.15.0", "3.9.0", "3.13"),
)


class Unavailable(Exception):
    """A wheel or an interpreter that is not to be had here; the report says so."""


@cache
def interpreter(version: str) -> str:
    """A Python of this minor version, on the PATH or of pyenv; this one where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return sys.executable


@cache
def minor_version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def wheel(requirement: str, python_version: str, machine: str = "x86_64") -> Path:
    """The wheel of `name==version`, or of the newest version, downloaded if it is not in the cache.

    Raises:
        Unavailable: with pip's last line, where there is none.
    """
    folder = CACHE / "wheels" / f"{python_version}-{machine}"
    name, _, version = requirement.partition("==")
    cached = sorted(folder.glob(f"{name}-{version or '*'}[-+]*.whl"))
    if cached:
        return cached[-1]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", python_version, "--implementation", "cp", requirement]
    command += [f"--platform={platform}_{machine}" for platform in PLATFORMS]
    done = subprocess.run(command, capture_output=True, text=True)
    cached = sorted(folder.glob(f"{name}-{version or '*'}[-+]*.whl"))
    if done.returncode or not cached:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"{requirement} for Python {python_version} on {machine}: {(errors or ['no wheel'])[-1]}")
    return cached[-1]


def unpack(path: Path, target: Path, below: str = "") -> None:
    """The files of a wheel, or those whose names start with `below`."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(below)])


def headers(torch: str) -> Path:
    """The headers of a PyTorch release, kept without the rest of its wheel; those of a CPU wheel serve as well."""
    target = CACHE / "headers" / torch
    if not target.exists():
        # For Arm the oldest releases come without CUDA: a sixth of the download. The headers are the same.
        path = wheel(f"torch=={torch}", "3.11", "aarch64")
        unpack(path, fresh := target.with_suffix(".new"), "torch/include/")
        fresh.rename(target)
        path.unlink()
    return target / "torch" / "include"


@dataclass(frozen=True)
class Environment:
    """A folder of unpacked wheels; `isolated` hides what the interpreter itself has installed."""

    python: str
    version: str
    folder: Path
    isolated: bool = True

    def run(self, *arguments: str, **variables: str) -> str:
        """What `python arguments` prints, with the environment first on its path and this source tree last.

        Raises:
            subprocess.CalledProcessError: with both streams.
        """
        settings = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": f"{self.folder}:{ROOT}"}
        command = [self.python, *(["-S"] if self.isolated else []), *arguments]
        return subprocess.run(
            command, env=settings | variables, cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout


@contextmanager
def environment(pair: Pair) -> Iterator[Environment]:
    """PyTorch, Triton and what they import, unpacked into a folder that is removed at the end."""
    python = interpreter(pair.python)
    version = minor_version(python)
    names = (f"torch=={pair.torch}", f"triton=={pair.triton}", *PURE, *PYTEST)
    wheels = [wheel(name, version) for name in names]
    with TemporaryDirectory(prefix="erc-compat-") as folder:
        for path in wheels:
            unpack(path, Path(folder))
        for tool in Path(folder).glob("triton/backends/*/bin/*"):
            tool.chmod(0o755)
        stub_missing_libraries(Path(folder) / "torch" / "lib")
        yield Environment(python, version, Path(folder))


def stub_missing_libraries(folder: Path) -> None:
    """Stand-ins for the CUDA libraries that a CUDA build of PyTorch links against: 3 GB never called here.

    Every function of theirs returns 100, which is cudaErrorNoDevice.
    """

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    files = [path for path in folder.glob("*.so*") if path.is_file()]
    described = "".join(output("readelf", "--wide", "--dynamic", "--version-info", str(path)) for path in files)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", described)) - {path.name for path in files}
    missing = sorted(name for name in needed if re.match(r"lib(cu|nv|nccl)", name))
    undefined = {
        line.split()[-1] for path in files for line in output("nm", "-D", "--undefined-only", str(path)).splitlines()
    }
    unversioned = {name for name in undefined if re.match(r"(cu|nv|nccl)[^@]*$", name)}
    versions: dict[str, set[str]] = {}
    for name, entries in re.findall(r"File: (\S+)  Cnt: \d+\n((?:.*Name: .*\n)*)", described):
        versions.setdefault(name, set()).update(re.findall(r"Name: (\S+)", entries))
    source, script = folder / "stub.s", folder / "stub.map"
    for name in missing:
        symbols = {
            version: {s.split("@")[0] for s in undefined if s.endswith("@" + version)}
            for version in versions.get(name, ())
        }
        defined = sorted(set().union(unversioned if name == missing[0] else (), *symbols.values()))
        labels = "".join(f".globl {s}\n.type {s},@function\n{s}:\n" for s in defined)
        source.write_text(f".text\n{labels} mov $100, %eax\n ret\n")
        script.write_text(
            "".join(f"{v} {{ {' '.join(f'{s};' for s in sorted(names))} }};\n" for v, names in symbols.items())
        )
        options = [f"-Wl,-soname,{name}", *([f"-Wl,--version-script={script}"] if symbols else [])]
        output("cc", "-shared", "-nostdlib", *options, "-o", str(folder / name), str(source))
