"""What each public call costs, counted on meta tensors: launches, bytes that move, peak memory, and a modelled time.

The calls run as on a GPU, with operators that only know shapes. A launch is an operator of PyTorch that computes or
fills, even where PyTorch takes several kernels for it; for ours it is the number of kernels in `LAUNCHES`, which a test
holds to the CUDA sources. An operator moves each of its tensors once: logits that a gradient sweep reads again come
from the L2 cache by the kernels' design, and a gradient whose factor is 1, as here, is not touched again. A support has
64 ids a token, padding included; its kernels move those, and not the rows that they lie in. Memory is
what lives at once beyond the inputs, gradients included.

Modelled time of a launch: max(LAUNCH, bytes / (bandwidth * efficiency)); the host is assumed to queue ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import erc
from benchmarks.hardware import GPU
from benchmarks.markdown import markdown_table
from benchmarks.step_share import ACCELERATORS, EFFICIENCY
from erc import ops
from erc.backend import register_namespace

LAUNCHES = {"token_table": 2, "policy_loss": 4, "policy_loss_": 4}
"""Kernels of an operator that launches more than one; where rows are split over blocks, their merge comes on top, and
around the rows of a loss over a support two more."""
LAUNCH = 2e-6
"""Seconds that a launch takes at least."""
ROWS, LENGTH, VOCAB = 16, 512, 151_936
_META = "erc_meta"
_SPARSE = ("support_forward_", "support_backward_")
_NOTHING = ("empty", "lift_fresh", "detach", "alias", "_unsafe_view", "_reshape_alias", "unbind", "split")


@dataclass
class Launch:
    """One operator's kernels, the bytes that its tensors move, and the flops of a matrix product."""

    name: str
    kernels: int
    bytes: int
    flops: int = 0

    def seconds(self, device: GPU) -> float:
        moving = self.bytes / (device.bandwidth * EFFICIENCY)
        return (self.kernels - 1) * LAUNCH + max(LAUNCH, moving)


@dataclass
class Cost:
    """What a call did."""

    launches: list[Launch] = field(default_factory=list)
    live: int = 0
    peak: int = 0

    @property
    def kernels(self) -> int:
        return sum(launch.kernels for launch in self.launches)

    @property
    def ours(self) -> int:
        return sum(launch.kernels for launch in self.launches if launch.name.startswith(_META))

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    def seconds(self, device: GPU) -> float:
        return sum(launch.seconds(device) for launch in self.launches)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost, self._known = Cost(), set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs))
        self._known |= {_storage(tensor) for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        for tensor in outputs:
            self._allocated(tensor)
        name = func.name()
        computes = not func.is_view and not name.split("::")[1].removeprefix("new_").startswith(_NOTHING)
        if computes and any(tensor.device.type == "meta" for tensor in (*inputs, *outputs)):
            kernels = kernels_of(name.split("::")[1], dict(_given(func, args, kwargs or {})))
            moved = _moved(func, args, kwargs or {}, outputs)
            self.cost.launches.append(Launch(name, kernels, moved, _flops(name, args)))
        return result

    def _allocated(self, tensor: Tensor) -> None:
        if _storage(tensor) in self._known or tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        self._known.add(storage._cdata)
        self.cost.live += storage.nbytes()
        self.cost.peak = max(self.cost.peak, self.cost.live)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.cost.live -= size


def kernels_of(operator: str, given: dict[str, Any]) -> int:
    """How many kernels an operator launches with these arguments, by their names."""
    around = 0 if given.get("token_ids") is None or operator not in LAUNCHES else 1 + bool(given["need_grad"])
    return LAUNCHES.get(operator, 1) + around


def _given(func: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    names = [argument.name for argument in func._schema.arguments]
    return [*zip(names, args, strict=False), *kwargs.items()]


def _moved(func: Any, args: Any, kwargs: dict[str, Any], outputs: list[Tensor]) -> int:
    """Bytes of what is read and of what is written; what PyTorch changes in place is both."""
    schema, name = func._schema.arguments, func.name()
    fills = name.removeprefix("aten::").startswith(("copy_", "zero_", "fill_"))
    changes = name.startswith("aten::") and not fills
    sparse = name.split("::")[1] in _SPARSE  # of the rows they touch what `values` [K] holds, and nothing else
    given = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    if name == f"{_META}::scale_rows_":
        given = given[1:]
    reads: dict[Any, int] = {}
    writes: dict[Any, int] = {}
    for argument, value in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if sparse and argument.name in ("logits", "grad_logits"):
            continue
        for tensor in _tensors(value):
            if written:
                writes[_place(tensor)] = _bytes(tensor)
            if not written or (changes and not argument.kwarg_only):
                reads[_place(tensor)] = _bytes(tensor)
    writes |= {_place(tensor): _bytes(tensor) for tensor in outputs}
    return sum(reads.values()) + sum(writes.values())


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return _storage(tensor), tensor.storage_offset(), tensor.shape


def _flops(name: str, args: Any) -> int:
    if name.removeprefix("aten::").split(".")[0] not in ("mm", "addmm", "addmm_"):
        return 0
    left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor is read from what it repeats; numbers on the CPU, `params` among them, do not count."""
    if tensor.device.type != "meta":
        return 0
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * prod(sizes)


def count(call: Callable[[], Any]) -> Cost:
    """What `call` costs. It makes its own tensors before; what it returns counts as alive until it ends."""
    with _Counter() as counter:
        call()
    return counter.cost


def calls(rows: int = ROWS, length: int = LENGTH, vocab: int = VOCAB) -> dict[str, Callable[[], Any]]:
    """Every public call that reads logits, in bfloat16, with a mask, advantages per sequence and a
    normalizer on the device; with its backward where it says so."""
    register()

    def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    logits = tensor(rows, length, vocab, dtype=torch.bfloat16, grad=True)
    old_logits = tensor(rows, length, vocab, dtype=torch.bfloat16)
    labels = tensor(rows, length, dtype=torch.long)
    per_token = {
        name: tensor(rows, length) for name in ("old_logprob", "old_entropy", "ref_logprob", "mask", "old_divergence")
    }
    rewarded = tensor(rows, length)
    arguments = {**per_token, "advantages": tensor(rows), "normalizer": tensor(), "backend": "meta"}

    def gradients(value: Tensor | list[Tensor], *upstream: Tensor) -> None:
        torch.autograd.grad(value, logits, upstream or None)

    def loss(name: str, **more: Any) -> Callable[[], Any]:
        nll = {"nll_mask": rewarded, "nll_normalizer": tensor()} if erc.objective(name).nll_coef else {}
        return lambda: gradients(erc.policy_loss(logits, labels, objective=name, **arguments, **nll, **more).loss)

    def stats() -> None:
        found = erc.token_stats(logits, labels, backend="meta")
        gradients([found.logprob, found.entropy], rewarded, rewarded)

    kept = erc.SamplingSupport.from_ids(tensor(rows, length, 64, dtype=torch.long))

    def kept_stats() -> None:
        found = erc.token_stats(logits, labels, support=kept, backend="meta")
        gradients([found.logprob, found.entropy], rewarded, rewarded)

    def ratio() -> None:
        pair = erc.entropy_ratio(logits, old_logits, backend="meta")
        gradients([pair.ratio, pair.kl_new_old], rewarded, rewarded)

    return {
        "token_stats": lambda: erc.token_stats(logits.detach(), labels, backend="meta"),
        "token_stats and backward": stats,
        "token_stats over a support and backward": kept_stats,
        "entropy_ratio and backward": ratio,
        "policy_loss over a support and backward: erc-dapo": loss("erc-dapo", support=kept),
        "policy_loss over a support and backward: gspo": loss("gspo", support=kept),
        **{f"policy_loss and backward: {name}": loss(name) for name in erc.objectives()},
    }


def register() -> None:
    """Make `backend="meta"` known."""
    if _META not in _LIBRARIES:
        _LIBRARIES[_META] = ops.define(_META)
        register_namespace("meta", _META)


_LIBRARIES: dict[str, torch.library.Library] = {}  # a library handle that is freed takes its operators along
HEADINGS = ("call", "launches", "erc's", "GB moved", "peak GiB", *(f"{device.name}, ms" for device in ACCELERATORS))


def call_rows(rows: int = ROWS, length: int = LENGTH, vocab: int = VOCAB) -> list[tuple[str, ...]]:
    """The table, by `HEADINGS`; objectives that cost the same share a line."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, call in calls(rows, length, vocab).items():
        cost = count(call)
        times = [f"{1e3 * cost.seconds(device):.2f}" for device in ACCELERATORS]
        line = (str(cost.kernels), str(cost.ours), f"{cost.bytes / 1e9:.2f}", f"{cost.peak / 2**30:.2f}", *times)
        names.setdefault(line, []).append(name)
    return [(_shared(calls), *line) for line, calls in names.items()]


def _shared(names: list[str]) -> str:
    call, *_ = names[0].split(": ")
    objectives = [name.removeprefix(f"{call}: ") for name in names]
    both = [name for name in objectives if f"erc-{name}" in objectives]
    gated = [f"erc-{name}" for name in both]
    listed = [f"(erc-){name}" if name in both else name for name in objectives if name not in gated]
    return call if objectives == [call] else f"{call}: {', '.join(listed)}"


def call_block() -> str:
    """The section of docs/benchmarks.md."""
    table = markdown_table(list(HEADINGS), [list(row) for row in call_rows()])
    return (
        f"{table}\n\nCounted on meta tensors, bfloat16, {ROWS} sequences of {LENGTH} tokens, V = {VOCAB:,}, with mask, "
        "advantages per sequence and a normalizer on the device; one launch more where few rows are split over blocks. "
        f"Times are modelled: {LAUNCH * 1e6:g} us a launch at least, {EFFICIENCY:.0%} of the peak bandwidth. "
        "`python -m benchmarks call` prints the table."
    )
