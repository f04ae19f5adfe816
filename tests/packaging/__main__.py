"""`python -m tests.packaging dist`, which `make dist-test` runs: the sdist and the wheel that a user would get, on the
oldest and the newest Python with the oldest and the newest PyTorch, in environments that hold nothing else.

pip installs the wheel, which it would refuse for another platform or Python. Then the command line runs without rich
and numpy, and tests of the unpacked sdist run against the installed package.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.compat.environments import PAIRS, Environment, Pair, Unavailable, environment

# Quick ones that compile nothing, among them some that read what lies at the top of the tree.
TESTS = (
    "tests/api/test_objectives.py",
    "tests/packaging",
    "tests/api/test_labels.py",
    "tests/api/test_advantages.py",
)
OPTIONAL = ("rich", "numpy")


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def install(wheel: Path, env: Environment) -> None:
    """By the pip of that Python, beside the PyTorch that is unpacked there."""
    command = [env.python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(env.folder), str(wheel)], check=True, capture_output=True, text=True)


def command_line(env: Environment) -> dict[str, str]:
    """What `erc info --json` says; `erc check` must hold. Both without the packages that they can do without."""
    blocked = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({OPTIONAL}); runpy.run_module('erc', run_name='__main__')"
    )
    version = env.run("-c", blocked, "--version").strip()
    env.run("-c", blocked, "check")
    facts = json.loads(env.run("-c", blocked, "info", "--json"))
    if version != f"erc {facts['erc']}" or facts["backends"]["cpu"] != "available":
        raise SystemExit(f"not what was built: {version}, {facts}")
    return facts


def sdist_tests(sdist: Path, env: Environment) -> str:
    """The last line of pytest over TESTS of the unpacked sdist, with the installed package in place of its own."""
    with TemporaryDirectory(prefix="erc-sdist-") as folder:
        shutil.unpack_archive(sdist, folder)
        tree = next(Path(folder).iterdir())
        shutil.rmtree(tree / "erc")
        (tree / "erc").symlink_to(env.folder / "erc")
        variables = {"PATH": os.environ["PATH"], "HOME": folder, "PYTHONPATH": str(env.folder)}
        command = [env.python, "-S", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=tree, env=variables, check=True, capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1]


def try_pair(pair: Pair, wheel: Path, sdist: Path) -> bool:
    """Whether it holds, or cannot be tried here."""
    name = f"Python {pair.python}, PyTorch {pair.torch}"
    try:
        with environment(pair) as env:
            install(wheel, env)
            facts = command_line(env)
            say(f"{name} ({facts['python']}): erc check holds, {facts['cpu instruction set']}")
            say(f"{name}: {sdist_tests(sdist, env)}")
    except Unavailable as error:
        say(f"{name}: not tried: {error}")
    except subprocess.CalledProcessError as error:
        say(f"{name}: FAILED\n{error.stdout or ''}\n{error.stderr or ''}")
        return False
    return True


def main() -> int:
    """Returns 1 where a pair that could be tried fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging", description=__doc__)
    parser.add_argument("dist", type=Path, help="the folder with one wheel and one sdist")
    parser.add_argument("--torch", action="append", choices=[pair.torch for pair in PAIRS], help="only this release")
    options = parser.parse_args()
    (wheel,), (sdist,) = options.dist.glob("*.whl"), options.dist.glob("*.tar.gz")
    wanted = options.torch or [PAIRS[0].torch, PAIRS[-1].torch]
    say(f"{wheel.name} and {sdist.name}")
    return int(not all([try_pair(pair, wheel.resolve(), sdist) for pair in PAIRS if pair.torch in wanted]))


if __name__ == "__main__":
    sys.exit(main())
