"""Builds the compiled backends of erc; what the package is called and needs stands in pyproject.toml.

The libraries reach PyTorch through its stable ABI and do not touch Python, so they are plain shared objects beside
the Python files (`erc/lib/liberc_cpu.so`, `erc/lib/liberc_cuda.so`) that `torch.ops.load_library` opens, and one wheel
serves every Python and every PyTorch from 2.10 on. Environment variables that steer the build:

    ERC_BUILD=0         compile nothing; the package then runs on its plain PyTorch backend
    ERC_BUILD_CUDA      1: build the CUDA library, an error where that is not possible or fails; 0: do not;
                        unset: build it where nvcc is found, and go on without it where that fails
    ERC_CUDA_ARCHS      what to compile it for, default the GPU that is there, else "8.0;9.0;10.0+PTX"
    ERC_NVCC            nvcc, default $CUDA_HOME/bin/nvcc, then the one on PATH
    CXX                 the C++ compiler, default c++, g++ or clang++
    ERC_SANITIZE=1      build erc/lib/liberc_cpu_asan.so instead, under AddressSanitizer and UBSan
    ERC_BUILD_JOBS      compilers at a time, default one for each processor
    ERC_REPOSITORY_URL  where the sources are published: the package's description links there

`python setup.py build_ext --inplace` compiles what changed, and nothing else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
BUILD_DIR = ROOT / "build" / "native"
OLDEST_TORCH = "0x020a000000000000"  # 2.10: the oldest release whose stable ABI the libraries may call
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"

# Flags of each instruction set; csrc/cpu/dispatch.cpp chooses among them at run time. From the least to the most
# capable, which is also the link order: of an inline function that several objects hold the linker keeps the first
# copy, and that one must run on every processor.
ISA_FLAGS = (
    {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
        ],
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {"neon": []}
)
# -fno-math-errno and -ffp-contract=fast leave NaN, infinities and the order of additions alone; -ffast-math would not.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno", "-ffp-contract=fast"]
# No contraction: every fused multiply-add is written out, so no bit depends on what a compiler contracts.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def say(message: str) -> None:
    print(f"erc: {message}", file=sys.stderr, flush=True)


def enabled(name: str) -> bool | None:
    """The environment switch `name`: True, False, or None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise PlatformError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1" if value else None


def run(command: Sequence[str]) -> str:
    """Run `command` in the source tree and return what it printed, warnings included.

    Raises:
        CompileError: with the command and its output, where it fails.
    """
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise CompileError(f"exit status {result.returncode} of\n{shlex.join(command)}\n{result.stdout}")
    return result.stdout


# ---- what is on this machine -----------------------------------------------------------------------------------------


@functools.cache
def cxx() -> list[str] | None:
    """The C++ compiler's command, None where there is none.

    Raises:
        PlatformError: where $CXX names none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise PlatformError(f"CXX={os.environ['CXX']}: {chosen[0]} is not found")
        return chosen
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@functools.cache
def nvcc() -> str | None:
    """The path of nvcc, None where there is none.

    Raises:
        PlatformError: where $ERC_NVCC names none.
    """
    if chosen := os.environ.get("ERC_NVCC"):
        if shutil.which(chosen) is None:
            raise PlatformError(f"ERC_NVCC={chosen}: it is not found")
        return shutil.which(chosen)
    home = os.environ.get("CUDA_HOME", "")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


@functools.cache
def gpu_archs() -> list[str]:
    """The compute capabilities of the GPUs here, such as ["9.0"]."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return sorted(set(result.stdout.split())) if result.returncode == 0 else []


@functools.cache
def torch_dir() -> Path:
    """The directory of PyTorch, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise PlatformError(
            "building erc needs PyTorch: install torch>=2.10, then run pip with --no-build-isolation"
            " (or set ERC_BUILD=0 for an install without compiled backends)"
        )
    return Path(spec.origin).parent


@functools.cache
def builds_native() -> bool:
    """Whether this build compiles anything; says why where it does not."""
    if enabled("ERC_BUILD") is False:
        say("ERC_BUILD=0, so nothing is compiled: the package runs on its plain PyTorch backend")
    elif not sys.platform.startswith("linux"):
        say(f"no compiled backends on {sys.platform}: the package runs on its plain PyTorch backend")
    elif cxx() is None:
        say("no C++ compiler found (c++, g++, clang++ or $CXX): the package runs on its plain PyTorch backend")
        say("install one (Debian, Ubuntu: apt install g++) and install again to get the fast CPU backend")
    else:
        return True
    return False


@functools.cache
def why_no_cuda() -> str | None:
    """Why this build makes no CUDA library, None where it makes one.

    Raises:
        PlatformError: where ERC_BUILD_CUDA=1 asks for one and it is not possible.
    """
    wanted = enabled("ERC_BUILD_CUDA")
    if wanted is False:
        return "ERC_BUILD_CUDA=0"
    if enabled("ERC_SANITIZE"):
        return "ERC_SANITIZE=1"
    reason = None
    if not any((ROOT / CSRC / "cuda").glob("*.cu")):
        reason = "no csrc/cuda/*.cu"
    elif nvcc() is None:
        reason = "no nvcc on PATH, in $CUDA_HOME or as $ERC_NVCC"
    if wanted and reason:
        raise PlatformError(f"ERC_BUILD_CUDA=1, but {reason}")
    return reason


# ---- compiling and linking -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """One object file: `command` compiles it; -o, -MF and the source are added."""

    source: Path
    path: Path
    command: tuple[str, ...]

    @property
    def _depfile(self) -> Path:
        return self.path.with_suffix(".d")

    @property
    def _command_file(self) -> Path:
        return self.path.with_suffix(".cmd")

    @property
    def _full_command(self) -> list[str]:
        return [*self.command, "-MD", "-MF", str(self._depfile), "-c", str(self.source), "-o", str(self.path)]

    def _recipe(self) -> str:
        return f"torch {version('torch')}\n{shlex.join(self._full_command)}\n"

    def is_fresh(self) -> bool:
        """Whether it is newer than its source and every header it read, and was made by the same command."""
        if not (self.path.exists() and self._depfile.exists() and self._command_file.exists()):
            return False
        if self._command_file.read_text() != self._recipe():
            return False
        made = self.path.stat().st_mtime_ns
        read = self._depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
        return all((ROOT / name).exists() and (ROOT / name).stat().st_mtime_ns <= made for name in read)

    def compile(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._command_file.unlink(missing_ok=True)
        started = time.time_ns()
        output = run(self._full_command)
        os.utime(self.path, ns=(started, started))  # what is edited while the compiler runs is newer than the object
        self._command_file.write_text(self._recipe())
        if output.strip():
            say(f"{self.path.name}:\n{output.rstrip()}")


@dataclass(frozen=True)
class Library:
    """A shared object made of `objects`, in the order in which they are linked."""

    path: Path
    link: tuple[str, ...]  # the command; objects and libraries are added
    libraries: tuple[str, ...]
    objects: list[Object] = field(default_factory=list)

    def build(self, jobs: int) -> bool:
        """Compile and link what changed; returns whether anything did."""
        stale = [item for item in self.objects if not item.is_fresh()]
        command = [*self.link, "-o", str(self.path), *(str(item.path) for item in self.objects), *self.libraries]
        recipe, recipe_file = shlex.join(command), self.path.with_suffix(".cmd")
        if stale:
            say(f"compiling {len(stale)} of {len(self.objects)} objects for {self.path.name}")
            failed = Event()

            def compile_unless_one_failed(item: Object) -> None:
                if failed.is_set():  # what has not begun is of no use any more
                    return
                try:
                    item.compile()
                except CompileError:
                    failed.set()
                    raise

            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(compile_unless_one_failed, stale))
        elif self.path.exists() and recipe_file.exists() and recipe_file.read_text() == recipe:
            return False
        run(command)
        recipe_file.write_text(recipe)
        say(f"built {self.path.name}")
        return True


def sources(*patterns: str) -> Iterable[Path]:
    """The files below csrc that match, relative to the source tree, in a fixed order."""
    return (path.relative_to(ROOT) for pattern in patterns for path in sorted((ROOT / CSRC).glob(pattern)))


def common_flags() -> list[str]:
    return [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{CSRC}", "-isystem", str(torch_dir() / "include")]


def cpu_library(sanitize: bool) -> Library:
    """csrc/cpu/*.cpp and the bindings once, csrc/cpu/isa/*.cpp once for each instruction set."""
    build_dir = BUILD_DIR / ("cpu_asan" if sanitize else "cpu")
    compiler = cxx() or []
    optimise = ["-O1", "-g", *SANITIZE_FLAGS] if sanitize else ["-O3"]
    compile_ = [*compiler, *CXX_FLAGS, *optimise, *common_flags()]
    objects = [
        Object(source, build_dir / source.parent.name / f"{source.stem}.o", tuple(compile_))
        for source in sources("cpu/*.cpp", "bindings/cpu.cpp", "bindings/gradient_memory.cpp", "bindings/stamp.cpp")
    ]
    for isa, flags in ISA_FLAGS.items():
        command = (*compile_, f"-DERC_ISA={isa}", *flags)
        objects += [
            Object(source, build_dir / isa / f"{source.stem}.o", command) for source in sources("cpu/isa/*.cpp")
        ]
    # A sanitized library leaves the run-time library's symbols undefined: they come from LD_PRELOAD.
    link = (*compiler, "-shared", *(SANITIZE_FLAGS if sanitize else ["-Wl,-z,defs"]))
    path = build_dir / ("liberc_cpu_asan.so" if sanitize else "liberc_cpu.so")
    return Library(path, link, (f"-L{torch_dir() / 'lib'}", "-ltorch_cpu"), objects)


def gencode(archs: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0;10.0+PTX", where +PTX adds code for later GPUs.

    >>> gencode("9.0+PTX")
    ['-gencode=arch=compute_90,code=sm_90', '-gencode=arch=compute_90,code=compute_90']
    """
    flags = []
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        number, plus, ptx = arch.partition("+")
        digits = number.replace(".", "")
        if not arch:
            continue
        if not digits[:-1].isdigit() or (plus and ptx != "PTX"):
            raise PlatformError(f"ERC_CUDA_ARCHS must look like {DEFAULT_CUDA_ARCHS!r}, got {archs!r}")
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if plus:
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags


def cuda_archs() -> str:
    """What the CUDA library is compiled for, such as "8.0;9.0+PTX"."""
    return os.environ.get("ERC_CUDA_ARCHS") or ";".join(gpu_archs()) or DEFAULT_CUDA_ARCHS


def cuda_library() -> Library:
    """csrc/cuda/*.cu by nvcc, its bindings by the C++ compiler: these first, to fail before minutes are spent."""
    build_dir = BUILD_DIR / "cuda"
    compiler = cxx() or []
    driver = nvcc() or ""
    cuda_home = toolkit_of(driver)
    archs = gencode(cuda_archs())
    flags = (*NVCC_FLAGS, "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")
    device = (driver, "-ccbin", compiler[0], *flags, *archs, *common_flags())
    host = (*compiler, *CXX_FLAGS, "-O3", *common_flags(), "-DUSE_CUDA", "-isystem", str(cuda_home / "include"))
    objects = [
        Object(source, build_dir / "host" / f"{source.stem}.o", host)
        for source in sources("cuda/*.cpp", "bindings/cuda.cpp", "bindings/stamp.cpp")
    ]
    objects += [Object(source, build_dir / "device" / f"{source.stem}.o", device) for source in sources("cuda/*.cu")]
    # libtorch.so stands for libtorch_cpu.so and, in a CUDA build of PyTorch, libtorch_cuda.so: so this also links
    # against a PyTorch without CUDA. The CUDA run-time is linked in: its version need not be that of PyTorch's.
    libraries = ("-Wl,--no-as-needed", f"-L{torch_dir() / 'lib'}", "-ltorch", *cuda_runtime(cuda_home))
    return Library(build_dir / "liberc_cuda.so", (*compiler, "-shared"), libraries, objects)


def toolkit_of(driver: str) -> Path:
    """The toolkit's directory. nvcc may be a wrapper script somewhere else, so nvcc itself is asked."""
    dry_run = run([driver, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"])
    tops = [line.partition("TOP=")[2].strip() for line in dry_run.splitlines() if "TOP=" in line]
    return Path(tops[0] if tops else Path(driver).resolve().parent.parent).resolve()


def cuda_runtime(cuda_home: Path) -> list[str]:
    directories = (cuda_home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
    return [*(f"-L{path}" for path in directories if path.is_dir()), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


# ---- setuptools ------------------------------------------------------------------------------------------------------


class BuildNative(Command):
    """Compile the libraries and put them into erc/lib, of the source tree or of the wheel."""

    description = "compile the CPU and CUDA libraries"
    user_options = [
        ("inplace", "i", "put the libraries into erc/lib of the source tree"),
        ("build-lib=", "b", "put them into erc/lib of this directory (default: build's)"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def _destination(self) -> Path:
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib or "")
        return package / "erc" / "lib"

    def run(self) -> None:
        if not builds_native():
            return
        import fcntl  # builds are for Linux, this file is read everywhere

        reason = why_no_cuda()
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        with open(BUILD_DIR / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at a time would link each other's unfinished objects
            fresh = self._build(cpu_library(bool(enabled("ERC_SANITIZE"))))
            if reason is None:
                self._build_cuda()
            elif fresh:
                say(f"the CUDA backend is not built: {reason}")

    def _build(self, library: Library) -> bool:
        fresh = library.build(int(os.environ.get("ERC_BUILD_JOBS") or len(os.sched_getaffinity(0))))
        self._install(library.path, self._destination() / library.path.name)
        return fresh

    def _build_cuda(self) -> None:
        """A CUDA library that nobody asked for may fail: an nvcc on the PATH may be too old, or its headers missing."""
        try:
            self._build(cuda_library())
        except CompileError as error:
            if enabled("ERC_BUILD_CUDA"):
                raise
            (self._destination() / "liberc_cuda.so").unlink(missing_ok=True)  # an older one would be loaded
            say(f"{error}\nerc: the CUDA backend is NOT built, see above; everything else is installed")
            say("ERC_BUILD_CUDA=0 leaves it out, ERC_BUILD_CUDA=1 makes this an error")

    def _install(self, built: Path, installed: Path) -> None:
        if installed.exists() and installed.stat().st_mtime_ns >= built.stat().st_mtime_ns:
            return
        installed.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, never overwritten: a process that has the old library mapped keeps it.
        fresh = installed.with_suffix(".new")
        shutil.copy(built, fresh)
        fresh.replace(installed)

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sources("**/*.*")]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._destination().glob("liberc_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def declared_version() -> str:
    """`erc.__version__`, read without importing it. A wheel that was asked to hold the CUDA library names its GPUs:
    `+cuda.sm80.sm90.ptx90` has code for two, and PTX for later ones."""
    init = (ROOT / "erc" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    if found is None:
        raise PlatformError("erc/__init__.py has no line __version__ = ...")
    if not enabled("ERC_BUILD_CUDA") or "sdist" in sys.argv:
        return found[1]
    archs = (flag.rpartition("=")[2].replace("compute_", "ptx").replace("_", "") for flag in gencode(cuda_archs()))
    return f"{found[1]}+cuda.{'.'.join(archs)}"


def long_description(repository: str) -> str:
    """The README for a package index, which resolves no relative link: links and images lead into `repository`, and
    without one they become their text. Fenced code stays as it is."""

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        text = re.sub(pattern, link, text)  # an image in a link
        if not repository:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/HEAD/{target})"

    pattern = r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\(([^)\s]+)\)"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = (re.sub(pattern, link, part) for part in parts[::2])
    if repository:
        parts[::2] = (re.sub(r'src="(?![a-z]+:)', f'src="{repository}/raw/HEAD/', part) for part in parts[::2])
    return "".join(parts)


class NativeDistribution(Distribution):
    """A distribution that belongs to one platform if and only if it holds compiled libraries."""

    def has_ext_modules(self) -> bool:
        return builds_native()


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the libraries depend on the platform, and not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


REPOSITORY = os.environ.get("ERC_REPOSITORY_URL", "").rstrip("/")

setup(
    version=declared_version(),
    long_description=long_description(REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls={"Source": REPOSITORY, "Changelog": f"{REPOSITORY}/blob/HEAD/CHANGELOG.md"} if REPOSITORY else {},
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    packages=find_packages(include=["erc", "erc.*"]),
    package_data={"erc": ["py.typed"]},
)
