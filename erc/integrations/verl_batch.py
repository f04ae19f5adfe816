"""What verl's batches carry beside what verl hands to a registered loss: entropies of both policies, and the
rows with reward 1. `erc.integrations.verl` puts `with_batch` around verl's `ppo_loss` and `counting_nll` around its
update of a mini-batch; a loop of one's own sets `entropies` and `nll_rows`. And what the sampler kept of each response
token, for the log-probs that verl's engine computes: `with_support` is around its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from erc.support import SamplingSupport

OLD_ENTROPIES = "old_entropys"
"""The batch's key of the rollout policy's entropies, `[B, response_length]`, spelled as verl spells `entropys`."""

_OLD = (OLD_ENTROPIES, "entropy")
"""Where they are found: verl's trainer of today keeps what its old-log-prob pass found under the second name."""

SAMPLING_IDS = "sampling_ids"
"""The batch's key of what the sampler kept: integers `[B, response_length, k]`, filled up with -1, or jagged."""

_SCORES = ("token_level_scores", "rm_scores")
"""The keys of the verifier's scores, `[B, response_length]`, in verl's older trainer and in that of today."""

NO_ENTROPY = "the actor computes none. Set actor_rollout_ref.actor.calculate_entropy=True"
NO_OLD_ENTROPY = (
    "the batch has no old ones, which verl's pass for old log-probs records. In bypass mode there is no such pass: set "
    f"algorithm.rollout_correction.bypass_mode=False. A trainer of your own puts them into data[{OLD_ENTROPIES!r}]"
)
NOT_INSTALLED = (
    "nobody handed them over. Set actor_rollout_ref.model.external_lib=erc.integrations.verl_plugin; a loop of your "
    "own sets erc.integrations.verl.entropies and nll_rows"
)

_entropies: ContextVar[tuple[Tensor, Tensor] | str] = ContextVar("erc_entropies", default=NOT_INSTALLED)
_nll: ContextVar[tuple[Tensor, Any] | None] = ContextVar("erc_nll", default=None)
_support: ContextVar[SamplingSupport | None] = ContextVar("erc_support", default=None)
_nll_tokens: ContextVar[Tensor | None] = ContextVar("erc_nll_tokens", default=None)


@contextmanager
def _setting(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def entropies(entropy: Tensor, old_entropy: Tensor) -> Any:
    """A context in which a registered loss compares these, `[B, T]` each, in nats."""
    return _setting(_entropies, (entropy, old_entropy))


def nll_rows(rows: Tensor, tokens: Tensor | float) -> Any:
    """A context in which the NLL term of a registered loss covers `rows`, bool `[B]`, and is divided by `tokens`: those
    of all such rows of the mini-batch on all ranks, as `global_batch_info["batch_num_tokens"]` counts all tokens."""
    return _setting(_nll, (rows, tokens))


def carried_entropies() -> tuple[Tensor, Tensor] | str:
    """The entropies that are set, or what to do about it."""
    return _entropies.get()


def carried_nll() -> tuple[Tensor, Any] | None:
    return _nll.get()


def with_batch(ppo_loss: Callable[..., tuple[Tensor, dict]]) -> Callable[..., tuple[Tensor, dict]]:
    """verl's `ppo_loss`, or one of its signature, for batches that carry old entropies under `OLD_ENTROPIES` or, as
    verl's trainer of today does, under `entropy`. Others pass through: a gated loss raises there."""

    @wraps(ppo_loss)
    def loss(config: Any, model_output: dict, data: Any, dp_group: Any = None) -> tuple[Tensor, dict]:
        from verl.workers.utils.padding import no_padding_2_padding

        entropy, old = model_output.get("entropy"), _first(data, _OLD)
        rows, tokens = _rewarded(data), _nll_tokens.get()
        with ExitStack() as stack:
            if rows is not None and tokens is not None:
                stack.enter_context(nll_rows(rows, tokens))
            if entropy is None or old is None:
                stack.enter_context(_setting(_entropies, NO_ENTROPY if entropy is None else NO_OLD_ENTROPY))
            else:
                if not config.entropy_coeff:  # else a zero gradient would go through the vocabulary once more
                    model_output = {**model_output, "entropy": entropy.detach()}
                old_entropy = data.select(old).to_padded_tensor()[old]
                stack.enter_context(entropies(no_padding_2_padding(entropy, data), old_entropy))
            return ppo_loss(config, model_output, data, dp_group)

    return loss


def with_support(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of verl's engine on a micro-batch, whose log-probs, of old policy, reference and update alike, are
    over the kept tokens where the batch has `SAMPLING_IDS`. Entropies stay those of the full vocabulary."""

    @wraps(forward_step)
    def step(engine: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if SAMPLING_IDS not in micro_batch.keys():  # noqa: SIM118
            return forward_step(engine, micro_batch, *args, **kwargs)
        with _setting(_support, _packed_support(micro_batch)):
            return forward_step(engine, micro_batch, *args, **kwargs)

    return step


def carried_support(labels: Tensor) -> SamplingSupport | None:
    """The support that is set, for packed rows with these labels; rows that pad them are not cut.

    Raises:
        RuntimeError: where sequence parallelism gave this process a part of the rows.
    """
    support, rows = _support.get(), labels.numel()
    if support is None:
        return None
    if rows < support.rows:
        raise RuntimeError(
            f"{SAMPLING_IDS} does not go with Ulysses sequence parallelism: {support.rows} rows, of which this process "
            f"has {rows}. Set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1"
        )
    offsets = support.offsets
    padding = offsets[-1:].expand(rows - support.rows)
    return SamplingSupport(support.token_ids.to(labels.device), torch.cat([offsets, padding]).to(labels.device))


def _packed_support(data: Any) -> SamplingSupport:
    """The support of a micro-batch's packed rows, where the row before a response token predicts it."""
    ids, responses, ends = data[SAMPLING_IDS], data["responses"], data["input_ids"].offsets()[1:]
    ids = ids.to_padded_tensor(-1) if ids.is_nested else ids
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, -responses.shape[1] :].sum(1)
    token = torch.arange(ids.shape[1], device=ids.device)
    first = (ends - lengths - 1).to(ids.device)[:, None]
    there = token < lengths.to(ids.device)[:, None]
    packed = ids.new_full((int(ends[-1]), ids.shape[2]), -1)
    packed[(first + token)[there]] = ids[there]
    return SamplingSupport.from_ids(packed)


def counting_nll(train_batch: Callable[..., Any]) -> Callable[..., Any]:
    """verl's update of a mini-batch, with the tokens of its rows with reward 1 counted over all ranks first."""

    @wraps(train_batch)
    def train(engine: Any, data: Any, loss_function: Callable) -> Any:
        rows = _rewarded(data)
        if rows is None:
            return train_batch(engine, data, loss_function)
        from verl.utils.device import get_device_id

        count = (rows * _row_sums(data["loss_mask"])).sum().to(get_device_id())
        torch.distributed.all_reduce(count, group=engine.get_data_parallel_group())
        with _setting(_nll_tokens, count):
            return train_batch(engine, data, loss_function)

    return train


def _first(data: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in data.keys()), None)  # noqa: SIM118


def _rewarded(data: Any) -> Tensor | None:
    """Bool `[B]`: whose scores sum to 1 or more; None for a batch without scores."""
    name = _first(data, _SCORES)
    return None if name is None else _row_sums(data[name]) >= 1


def _row_sums(values: Tensor) -> Tensor:
    """Sums over T of `[B, T]`, padded or jagged."""
    return (values.to_padded_tensor(0) if values.is_nested else values).sum(-1)
