"""What verl's own trainers need, and whether this environment has it: `make test-verl` makes one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

NEEDED = "verl ray TransferQueue torchdata cachetools uvicorn fastapi orjson hydra-core datasets reasoning-gym"


def lacks() -> str:
    """What is missing, or installed in a release that verl excludes; empty where all is well."""
    try:
        pins = [Requirement(text) for text in requires("verl") or []]
        pins = [pin for pin in pins if pin.name in ("transformers", "tensordict") and pin.marker is None]
        missing = [f"{pin}, not {version(pin.name)}" for pin in pins if version(pin.name) not in pin.specifier]
        for package in NEEDED.split():
            version(package)
    except PackageNotFoundError as error:
        return f"needs {error.name}"
    return f"verl needs {' and '.join(missing)}" if missing else ""
