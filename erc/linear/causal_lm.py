"""What a causal language model hands to its head, and what it makes of the head's logits.

Hidden states are those that the model's own forward gives to its head, so whatever stands before the head is right by
construction. What stands behind it, a scale and a softcap, is measured: once per model a short row goes through the
model with known values in place of logits, and the model's own logits are compared with what erc will compute. The
model is any module with `get_output_embeddings()` and the forward of transformers' causal language models; transformers
itself is not needed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from erc.linear.loss import linear_policy_loss
from erc.linear.stats import linear_token_stats
from erc.results import PolicyLoss

if TYPE_CHECKING:
    from erc.results import LabelledStats

PROBES = torch.tensor([sign * 2.0**power for power in range(-6, 16) for sign in (1.0, -1.0)])
"""In place of logits: small enough to show a scale, large enough to saturate a softcap."""

_EXACT = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference between logits, relative to the largest, that is rounding; 16-bit models round more."""


class HeadInputs(NamedTuple):
    """What the linear forms of erc need of a model: `hidden` `[B, T, D]`, `weight` `[V, D]`, `bias` `[V]` or None, and
    how the model treats its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def token_stats(self, labels: Tensor, **options: Any) -> LabelledStats:
        """`erc.linear_token_stats` of the model's own distribution; `labels` `[B, T]`."""
        return linear_token_stats(self.hidden, self.weight, labels, **self._head(), **options)

    def policy_loss(self, labels: Tensor, **options: Any) -> PolicyLoss:
        """`erc.linear_policy_loss` of the model's own distribution; `labels` `[B, T]`."""
        return linear_policy_loss(self.hidden, self.weight, labels, **self._head(), **options)

    def _head(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


class LogitReading(NamedTuple):
    """A model's logits are the first `columns` of `softcap(logit_scale * head(hidden))`."""

    softcap: float | None
    logit_scale: float
    columns: int


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _never_compiled(function: _Function) -> _Function:
    """A compiled caller would trace the exchange of the head's forward. PyTorch's decorator has no types."""
    return torch.compiler.disable(function)


@_never_compiled
def head_inputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **forward: Any,
) -> HeadInputs:
    """Run `model` up to its head, and read the head.

    Args:
        model: a causal language model of transformers, or one like them; not a wrapper around one.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 on padding at either side; None where every token counts.
        position_ids: `[B, T]`. For packed sequences `[1, N]`, starting at 0 in each, without an attention mask. Without
            them the model counts as it does by itself.
        forward: what else the model's forward takes.

    Returns:
        HeadInputs, attached to the graph. A head that tensor parallelism sharded is gathered, differentiably.

    Raises:
        TypeError: if the head is not a plain linear layer, as where LoRA adapts it: its weight would not be what it
            applies.
        ValueError: if the model's logits are another function of its head, as a hook or a mask of some tokens makes
            them; or for `position_ids` that the model's forward does not take.
        RuntimeError: for a model that FSDP2 shards, outside a forward whose hooks gather its parameters, or whose head
            holds no weight because another library parted it.
    """
    head = _linear_head(model)
    _check_fsdp(model, head)
    reading = logit_reading(model)
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    if position_ids is not None and not takes_position_ids(model):
        raise ValueError(f"position_ids must be None: the forward of {type(model).__name__} does not take them")
    forward = {"use_cache": False} | {name: value for name, value in given.items() if value is not None} | forward
    seen: list[Tensor] = []

    def stop(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 0)  # no logits: what stands behind the head has nothing to do

    with _head_forward(head, stop):
        model.forward(input_ids=input_ids, **forward)
    hidden = _one_call(model, seen, tuple(input_ids.shape))
    weight, bias = (_whole(value) for value in (head.weight, head.bias))
    if reading.columns < weight.shape[0]:
        weight, bias = weight[: reading.columns], None if bias is None else bias[: reading.columns]
    return HeadInputs(hidden, weight, bias, reading.softcap, reading.logit_scale)


def takes_position_ids(model: Any) -> bool:
    """Whether the model's forward names them; one that does not would ignore or refuse them."""
    return "position_ids" in inspect.signature(model.forward).parameters


_readings: WeakKeyDictionary[Any, tuple[tuple, LogitReading]] = WeakKeyDictionary()


def logit_reading(model: Any) -> LogitReading:
    """What `model` does to the logits of its head: measured at the first call, and again when its head, or a forward or
    hook of either, is another one.

    Raises:
        TypeError, ValueError: as `head_inputs`.
    """
    head = _linear_head(model)
    forwards = (getattr(module.forward, "__func__", module.forward) for module in (model, head))
    state = (id(head), tuple(head._forward_hooks), tuple(model._forward_hooks), *map(id, forwards))
    known = _readings.get(model)
    if known is None or known[0] != state:
        known = (state, _measure(model, head))
        _readings[model] = known
    return known[1]


@torch.no_grad()
def _measure(model: Any, head: torch.nn.Linear) -> LogitReading:
    """Both halves of a short row at once: at the first positions the head does what it does, at the others it returns
    `PROBES`."""
    size = model.get_input_embeddings().weight.shape[0]
    width, device = head.weight.shape[0], head.weight.device
    real = 4
    length = real + -(-2 * len(PROBES) // width)
    tokens = (torch.arange(1, length + 1, device=device) % size)[None]
    probes = PROBES.to(device)[torch.arange((length - real) * width, device=device) % len(PROBES)].view(1, -1, width)
    seen: list[tuple[Tensor, Tensor]] = []
    apply = head.forward

    def replace(hidden: Tensor) -> Tensor:
        logits = apply(hidden)
        seen.append((hidden, logits))
        return torch.cat([logits[:, :real].float(), probes], 1) if hidden.shape[:-1] == tokens.shape else logits

    with _evaluating(model), _head_forward(head, replace):
        run = model.forward if _is_fsdp(model) else model
        output = run(input_ids=tokens, use_cache=False)
    hidden, logits = _one_call(model, seen, tuple(tokens.shape))
    expected = torch.nn.functional.linear(hidden, _whole(head.weight), _whole(head.bias))
    _compare(model, "the output of its head", logits, expected, _EXACT.get(logits.dtype, 2e-2))
    found = output[0] if isinstance(output, tuple) else output.logits
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != tokens.shape or found.shape[2] > width:
        raise _refusal(model, "its output is not one row of logits per token")
    columns = found.shape[2]
    reading = _fit(probes[..., :columns].flatten(), found[:, real:].flatten(), columns)
    if reading is None:
        raise _refusal(model, "what it makes of known logits is neither a scale nor a softcap")
    treated = _treat(reading, logits[:, :real, :columns].float())
    _compare(model, "its logits", found[:, :real].float(), treated, _EXACT[torch.float32])
    return reading


def _fit(probes: Tensor, found: Tensor, columns: int) -> LogitReading | None:
    """The scale and the softcap that take `probes` to `found`; None if none do."""
    probes, found = probes.double(), found.double()
    top, below = (float(found[(probes - value).abs().argmin()]) for value in (probes.max(), probes.max() / 2))
    softcap = top if top == below else None  # it has saturated; a scale alone still doubles
    if top <= 0:
        return None
    if softcap is None:
        scale = top / float(probes.max())
    else:
        middle = (found - 0.4 * softcap).abs().argmin()  # where tanh is neither linear nor flat
        scale = math.atanh(float(found[middle]) / softcap) * softcap / float(probes[middle])
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
    reading = LogitReading(softcap, scale, columns)
    return reading if torch.allclose(_treat(reading, probes), found, rtol=1e-5, atol=1e-9) else None


def _treat(reading: LogitReading, logits: Tensor) -> Tensor:
    logits = logits * reading.logit_scale
    return logits if reading.softcap is None else reading.softcap * torch.tanh(logits / reading.softcap)


def _compare(model: Any, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max())
    if not error <= tolerance * largest:
        raise _refusal(model, f"{what} differs by {error:.3g} from what its weights give, at most {largest:.3g}")


def _refusal(model: Any, why: str) -> ValueError:
    return ValueError(
        f"model must compute its logits as softcap(scale * (hidden @ weight.T + bias)) of its lm_head, and "
        f"{type(model).__name__} does not: {why}. Use erc.policy_loss on the model's own logits"
    )


def _linear_head(model: Any) -> torch.nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise TypeError(f"model must have an nn.Linear as its lm_head, got {type(head).__name__}")
    if head.weight.dim() != 2 or not head.weight.numel():
        raise RuntimeError(
            f"model must hold the weight of its lm_head, got shape {tuple(head.weight.shape)}: gather parameters that "
            f"DeepSpeed or FSDP1 parted around the call"
        )
    return head


def _one_call(model: Any, seen: list, shape: tuple[int, ...]) -> Any:
    """The one call of the head over all tokens."""
    if len(seen) != 1:
        raise _refusal(model, f"it calls its lm_head {len(seen)} times in a forward pass")
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if tuple(hidden.shape[:-1]) != shape:
        raise _refusal(model, f"its lm_head gets hidden states {list(hidden.shape)} for tokens {list(shape)}")
    return seen[0]


@contextmanager
def _head_forward(head: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`forward` in place of the head's own, hooks around it as ever."""
    own = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout, so no random number is drawn, and no statistic is updated."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _whole(value: Any) -> Any:
    """A parameter or None; what FSDP2 has sharded is gathered."""
    return value.full_tensor() if type(value).__name__ == "DTensor" else value


def _is_fsdp(module: Any) -> bool:
    return hasattr(module, "_get_fsdp_state")


def _check_fsdp(model: Any, head: torch.nn.Module) -> None:
    """FSDP2 gathers parameters, and reduces their gradients, by hooks around a forward: outside one the gradient of
    the head would be that of one rank."""
    if _is_fsdp(head):
        raise RuntimeError(
            "model must keep its lm_head in the unit of fully_shard(model): a unit of its own frees the weight before "
            "the loss reads it"
        )
    if _is_fsdp(model) and model._get_fsdp_state()._training_state.name == "IDLE":
        raise RuntimeError(
            "model is sharded by FSDP2, whose hooks gather its parameters inside a registered forward only: define a "
            "method of the model that makes this call, register it by torch.distributed.fsdp."
            "register_fsdp_forward_method(model, name), and call that method"
        )
