"""Beside the other tests, takes some cases of each test that runs compiled kernels; `subjects` says which are all."""

from __future__ import annotations

import hashlib

from tests.ptx.subjects import digest, is_whole

TAKEN = {"cuda": 2, "triton": 1}
"""Cases of each test, and in CUDA of each form: Triton compiles a kernel for almost every one."""


def pytest_collection_modifyitems(config, items) -> None:
    if is_whole():
        return
    groups: dict[tuple, list] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        subject = parameters.get("subject")
        if item.path.parent.name == "ptx" and (subject or "backend" in parameters):
            backend = subject.backend if subject else parameters["backend"]
            form = subject.form if subject and backend == "cuda" else ""
            groups.setdefault((item.originalname, backend, form), []).append(item)
    left = set()
    for (_, backend, _), group in groups.items():
        seed = str(digest(backend))
        group.sort(key=lambda item, seed=seed: hashlib.sha256((seed + item.name).encode()).digest())
        left.update(group[TAKEN[backend] :])
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
