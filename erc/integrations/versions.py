"""Which releases of another project an integration was written for."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, minimum: tuple[int, int], below: tuple[int, int]) -> None:
    """Check that `package` is installed in a release `minimum <= release < below`, by major and minor number.

    Raises:
        ImportError: naming the package, what is installed and what is supported.
    """
    supported = f"{package}>={minimum[0]}.{minimum[1]},<{below[0]}.{below[1]}"
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"erc.integrations needs {supported}, which is not installed") from error
    major, minor = (int(number) for number in re.findall(r"\d+", installed)[:2])
    if not minimum <= (major, minor) < below:
        raise ImportError(f"erc.integrations supports {supported}, but {package} {installed} is installed")
