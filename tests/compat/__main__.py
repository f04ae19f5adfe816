"""`python -m tests.compat`, which `make compat` runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.markdown import generated, markdown_table, rewrite
from tests.compat.environments import PAIRS, ROOT, Environment, Pair, Unavailable, environment, headers, unpack, wheel
from tests.compat.sources import build_wheel, check_bindings

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "gfx1100")
DOCUMENT = ROOT / "docs" / "start.md"
QUICK_ARCHS, QUICK_CALLS = ("sm_90", "gfx1100"), 2


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def last_line(error: subprocess.CalledProcessError) -> str:
    lines = (error.stderr or error.stdout or "").strip().splitlines()
    return f"exit status {error.returncode}: {lines[-1] if lines else ''}"


def kernels(env: Environment, archs: tuple[str, ...], *options: str) -> dict[str, Any]:
    """Every Triton kernel by architecture, two compilers at a time."""

    def one(arch: str) -> dict[str, Any]:
        try:
            return json.loads(env.run("-m", "tests.compat.kernels", arch, *options).splitlines()[-1])
        except subprocess.CalledProcessError as error:
            return {"kernels": [], "errors": {"all": last_line(error)}}

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, pool.map(one, archs), strict=True))


def executed(env: Environment) -> list[str]:
    """Tests of the numerics contract that fail where the PTX of this Triton's kernels is executed (tests/ptx)."""
    command = ["-m", "pytest", str(ROOT / "tests" / "ptx" / "test_contract.py"), "-k", "triton", "-q", "-c", os.devnull]
    try:
        env.run(*command, "--import-mode=importlib", "-p", "no:cacheprovider", ERC_PTX="90")
    except subprocess.CalledProcessError as error:
        failed = [line for line in error.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed or [last_line(error)]
    return []


def try_pair(pair: Pair, wheels: Path, tried: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. The first pair that is there builds the wheel; each Triton release compiles once."""
    row: dict[str, Any] = {"torch": pair.torch, "triton": pair.triton, "problems": []}
    try:
        with environment(pair) as env:
            row["python"] = env.version
            row["problems"] += check_bindings(env.folder / "torch" / "include")
            say(f"PyTorch {pair.torch}: bindings checked")
            if not any(wheels.iterdir()):
                build_wheel(env, options.cuda, wheels)
                tried["wheel"] = pair.torch
                say(f"wheel built on PyTorch {pair.torch}")
            unpack(next(wheels.glob("*.whl")), env.folder)
            row["loads"] = json.loads(env.run("-m", "tests.compat.load").splitlines()[-1])
            broken = [
                name for part in ("contract", "compiles") for name, fine in row["loads"][part].items() if not fine
            ]
            row["problems"] += [f"does not hold: {name}" for name in broken]
            say(f"PyTorch {pair.torch}: wheel loaded, {len(broken)} problems")
            if options.no_kernels:
                return row
            if pair.triton not in tried:
                tried[pair.triton] = kernels(env, options.arch or ARCHS)
                row["problems"] += executed(env)
            row["kernels"] = tried[pair.triton]
            for arch, result in row["kernels"].items():
                row["problems"] += [f"{arch}: {call}: {error}" for call, error in result["errors"].items()]
                row["problems"] += [
                    f"{arch}: {k['kernel']} spills ({k['call']})" for k in result["kernels"] if k["spilled"]
                ]
            say(f"Triton {pair.triton}: kernels compiled")
    except Unavailable as error:
        row["unavailable"] = str(error)
    except subprocess.CalledProcessError as error:
        row["problems"].append(last_line(error))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The report as Markdown."""
    header = ("PyTorch", "Triton", "Python", "wheel", "kernels", "instructions", "spills", "lane spills", "result")
    lines = []
    for row in rows:
        found = [k for result in row.get("kernels", {}).values() for k in result["kernels"]]
        spills = (sum(bool(k[name]) for k in found) for name in ("spilled", "lane_spills"))
        counts = (len(found), f"{sum(k['instructions'] for k in found):,}", *spills)
        state = row.get("unavailable") or ("; ".join(row["problems"][:3]) or "green")
        loaded = "holds" if row.get("loads") and all(row["loads"]["contract"].values()) else "-"
        lines.append((row["torch"], row["triton"], row.get("python", "-"), loaded, *counts, state))
    return markdown_table(header, lines, left=len(header))


def quick() -> int:
    """The cheapest part: the oldest headers, and a few kernels on the oldest Triton with the PyTorch that is here."""
    oldest, problems = PAIRS[0], []
    try:
        problems += check_bindings(headers(oldest.torch))
        say(f"bindings and the headers of PyTorch {oldest.torch}: {'; '.join(problems) or 'green'}")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        triton = wheel(f"triton=={oldest.triton}", version)
    except Unavailable as error:
        say(f"skipped: {error}")
        return bool(problems)
    with TemporaryDirectory(prefix="erc-compat-") as folder:
        unpack(triton, Path(folder))
        for tool in Path(folder).glob("triton/backends/*/bin/*"):
            tool.chmod(0o755)
        here = Environment(sys.executable, version, Path(folder), isolated=False)
        for arch, result in kernels(here, QUICK_ARCHS, f"--limit={QUICK_CALLS}").items():
            errors = [f"{arch}: {call}: {error}" for call, error in result["errors"].items()]
            say(f"Triton {oldest.triton}, {arch}: {len(result['kernels'])} kernels, {'; '.join(errors) or 'green'}")
            problems += errors
    return bool(problems)


def main() -> int:
    """Returns 1 where a pair that could be tried has a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the cheapest part, for every change")
    parser.add_argument("--torch", action="append", choices=[pair.torch for pair in PAIRS], help="only this release")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this architecture")
    parser.add_argument("--no-kernels", action="store_true", help="bindings and wheel only: minutes instead of an hour")
    parser.add_argument("--cuda", action="store_true", help="the wheel has the CUDA library too: minutes of nvcc")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "compat", help="the report's folder")
    options = parser.parse_args()
    if options.quick:
        return quick()
    rows: list[dict[str, Any]] = []
    tried: dict[str, Any] = {}
    with TemporaryDirectory(prefix="erc-compat-wheel-") as folder:
        for pair in PAIRS:
            if pair.torch in (options.torch or [pair.torch]):
                rows.append(try_pair(pair, Path(folder), tried, options))
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
                (options.output / "report.md").write_text(table(rows) + "\n")
    print(table(rows))
    if options.write:
        rewrite(DOCUMENT, generated("compat", table(rows)))
    print(f"The wheel was built on PyTorch {tried.get('wheel', '-')}. Everything: {options.output / 'report.json'}")
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
