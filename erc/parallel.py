"""Vocabulary-parallel statistics over torch.distributed.

Each rank holds some columns of every row. A sweep over them leaves four numbers per row (the row state and the label's
value); an all-gather of those, merged in rank order, gives every rank the same statistics, bit for bit. The backward
needs no communication: each rank owns its columns of the gradient of the one replicated loss. The linear forms send
each chunk of rows while the next one is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erc.constants import ABSENT_LABEL, Param
from erc.inputs import check_logits
from erc.ops import contiguous, refuse_double_backward, stats_dtype

LOCAL_IGNORE_INDEX = -100
"""`ignore_index` of `local_labels`, whose columns count from 0 and could collide with the caller's."""


class GatheredStates(NamedTuple):
    """An all-gather under way."""

    parts: list[Tensor]
    work: dist.Work

    def wait(self) -> Tensor:
        """`[ranks, *]`."""
        self.work.wait()
        return torch.stack(self.parts)


class ReducedRows(NamedTuple):
    """An all-reduce under way."""

    total: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.total


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: the columns `[start, start + V_local)` of `vocab_size`.

    Args:
        group: a torch.distributed process group, None for the default one.
        start: the vocabulary index of the first local column.
        vocab_size: the true size; columns held beyond it are padding, and take no part and get gradient 0. A shard may
            be empty, and shards may differ in size, but in rank order they must cover the vocabulary without gap or
            overlap.
    """

    group: dist.ProcessGroup | None
    start: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"start must be an int >= 0, got {self.start!r}")
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ValueError(f"vocab_size must be an int >= 1, got {self.vocab_size!r}")

    def real_columns(self, held: int) -> int:
        """How many of the `held` local columns are not padding."""
        return max(0, min(held, self.vocab_size - self.start))

    def local_rows(self, weight: Tensor) -> Tensor:
        """The rows of a local `[V_local, D]` weight, or entries of a bias, that are not padding."""
        return weight[: self.real_columns(weight.shape[0])]

    def local_labels(self, labels: Tensor, ignore_index: int, columns: int) -> Tensor:
        """Labels as local columns: `ABSENT_LABEL` where another rank holds them, `LOCAL_IGNORE_INDEX` where ignored."""
        local = labels - self.start
        here = (local >= 0) & (local < columns)
        local = torch.where(here, local, ABSENT_LABEL)
        return torch.where(labels == ignore_index, LOCAL_IGNORE_INDEX, local)

    def even_share(self) -> int:
        """The columns of an even share: chunks sized by it are as many on every rank, however uneven the shards."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    def gather(self, state: Tensor) -> GatheredStates:
        """Start collecting a tensor of the same shape from every rank, such as the four numbers of each row."""
        state = state.contiguous()
        parts = [torch.empty_like(state) for _ in range(dist.get_world_size(self.group))]
        return GatheredStates(parts, dist.all_gather(parts, state, group=self.group, async_op=True))

    def reduce(self, part: Tensor) -> ReducedRows:
        """Start summing every rank's part of the gradient of some rows of `hidden`, in float32."""
        total = part.to(torch.promote_types(part.dtype, torch.float32))
        return ReducedRows(total, dist.all_reduce(total, group=self.group, async_op=True))

    @contextmanager
    def agreement(self, validate: bool) -> Iterator[Facts]:
        """Around a rank's own argument checks: with `validate`, no rank goes on, or hangs, where another one failed, or
        where what must be the same on every rank is not.

        Raises:
            ValueError: on every rank, naming the mismatch, where a rank's checks failed, facts differ, or shards do not
                tile the vocabulary.
        """
        facts = Facts(wanted=validate)
        try:
            yield facts
        except Exception as error:
            if validate:
                self._exchange(facts, f"{type(error).__name__}: {error}")
            raise
        if not validate:
            return
        problem = _mismatch(self._exchange(facts, None))
        if problem:
            raise ValueError(f"vocab_shard: {problem}")

    def _exchange(self, facts: Facts, failure: str | None) -> list[dict[str, Any]]:
        """The facts of every rank, as objects: a rank whose checks failed knows fewer than the others."""
        mine = {"failure": failure, "start": self.start, "vocab_size": self.vocab_size, **facts}
        ranks: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(ranks, mine, group=self.group)
        return ranks


class Facts(dict[str, Any]):
    """What the ranks of a sharded call compare; empty unless `wanted`, since looking at values synchronises."""

    def __init__(self, wanted: bool = False) -> None:
        super().__init__()
        self.wanted = wanted

    def add(self, **values: Any) -> None:
        if self.wanted:
            self.update({name: _comparable(value) for name, value in values.items()})


def _comparable(value: Any) -> Any:
    """A tensor as its dtype, shape and a digest of its bytes."""
    if not isinstance(value, Tensor):
        return value if value is None or isinstance(value, (int, float, str)) else repr(value)
    values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = ctypes.string_at(values.data_ptr(), values.numel())  # not through numpy, which need not be there
    digest = hashlib.blake2b(data, digest_size=4).hexdigest()
    return f"{value.dtype} {tuple(value.shape)} of digest {digest}"


def _mismatch(ranks: list[dict[str, Any]]) -> str | None:
    failures = {rank: facts["failure"] for rank, facts in enumerate(ranks) if facts["failure"] is not None}
    if failures:
        return f"the arguments of rank(s) {list(failures)} did not pass their checks: {failures}"
    for name in ranks[0]:
        values = [facts.get(name) for facts in ranks]
        if name not in ("failure", "start", "columns") and len(set(values)) > 1:
            return f"{name} must be the same on every rank, got {values}"
    expected, vocab_size = 0, ranks[0]["vocab_size"]
    for rank, facts in enumerate(ranks):
        start, columns = facts["start"], max(0, min(facts["columns"], vocab_size - facts["start"]))
        if columns and start != expected:
            kind = "gap" if start > expected else "overlap"
            return f"{kind} between shards: rank {rank} must start at {expected}, got {start}"
        expected += columns
    if expected != vocab_size:
        return f"shards must cover all {vocab_size} columns, together they hold {expected}"
    return None


def agreement(shard: VocabShard | None, validate: bool) -> AbstractContextManager[Facts]:
    """`shard.agreement`, or nothing to agree on without a shard."""
    if shard is None:
        return nullcontext(Facts())
    if not isinstance(shard, VocabShard):
        raise TypeError(f"vocab_shard must be an erc.VocabShard or None, got {type(shard).__name__}")
    return shard.agreement(validate)


def check_columns(logits: Tensor, shard: VocabShard | None, facts: Facts, name: str = "logits") -> int:
    """Check the logits, of which a shard may hold no column at all; returns the size of the vocabulary."""
    if shard is None:
        check_logits(logits, name)
        return logits.shape[-1]
    if not isinstance(logits, Tensor) or logits.dim() < 1 or logits.shape[-1] > 0:
        check_logits(logits, name)
    facts.add(rows=logits.shape[:-1].numel(), columns=logits.shape[-1], dtype=logits.dtype)
    return shard.vocab_size


def check_shardable(backend: str, inplace_backward: bool, facts: Facts) -> None:
    """Refuse what a sharded call does not do; enter the backend, whose order of summation is its own, into what the
    ranks agree on."""
    facts.add(backend=backend)
    if backend == "torch":
        raise ValueError("vocab_shard needs a backend with kernels: the torch backend has no partial statistics")
    if inplace_backward:
        raise ValueError("inplace_backward is not available with vocab_shard")


def row_scale(params: Tensor, temperature: Tensor | None) -> float | Tensor:
    """x = v * scale, as the kernels take it: csrc/common/row_state.h."""
    scalar, softcap, logit_scale = params[: Param.RULE].tolist()
    numerator = logit_scale if softcap == 0 else 1.0
    return numerator / (scalar if temperature is None else temperature.double())


def merge_states(states: Tensor, params: Tensor, temperature: Tensor | None) -> Tensor:
    """States `[parts, 4, N]` of disjoint columns as the state `[4, N]` of the row, in float64, in the order given."""
    scale = row_scale(params, temperature)
    row_max, sum_rest, weighted_sum, label = states.double().unbind(1)
    top, winner = row_max.max(0)
    empty = torch.isneginf(row_max)
    shift = torch.where(empty, 0.0, row_max - top) * scale
    factor = torch.where(empty, 0.0, shift.exp())
    # The part that holds the maximum gives its R, every other one its S = 1 + R.
    holds_max = torch.zeros_like(empty).scatter(0, winner[None], True)
    rest = (factor * (sum_rest + torch.where(holds_max, 0.0, 1.0))).sum(0)
    weighted = (factor * (weighted_sum + (1 + sum_rest) * shift)).sum(0)
    return torch.stack((top, rest, weighted, label.amax(0))).to(states.dtype)


def state_statistics(
    state: Tensor, params: Tensor, temperature: Tensor | None, ignored: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp `[N]` of row states `[4, N]`; 0 where `ignored`, NaN where a row has no
    distribution."""
    scale = row_scale(params, temperature)
    row_max, sum_rest, weighted_sum, label = state.double()
    log_sum = torch.log1p(sum_rest)
    logsumexp = row_max * scale + log_sum
    logprob = (label - row_max) * scale - log_sum
    entropy = log_sum - weighted_sum / (1 + sum_rest)
    valid = row_max.isfinite() & sum_rest.isfinite() & weighted_sum.isfinite()

    def result(stat: Tensor) -> Tensor:
        stat = torch.where(valid, stat, torch.nan)
        return (stat if ignored is None else torch.where(ignored, 0.0, stat)).to(state.dtype)

    return result(logprob), result(entropy), result(logsumexp)


def poisoned(state: Tensor, labels: Tensor | None, ignore_index: int, vocab_size: int) -> Tensor:
    """The state of whole rows, NaN where the label is no column of the vocabulary. No shard can tell that alone, and
    where nobody reads labels (on a GPU, in compiled code) nothing else does."""
    if labels is None:
        return state
    labels = labels.reshape(-1)
    valid = ((labels >= 0) & (labels < vocab_size)) | (labels == ignore_index)
    return torch.where(valid, state, torch.nan)


def sharded_stats(
    rows: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    params: Tensor,
    ignore_index: int,
    shard: VocabShard,
    backend_operators: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp `[N]` of rows whose columns `[outer, inner, V_local]` this rank holds."""
    rows = rows[..., : shard.real_columns(rows.shape[-1])]
    return _ShardedStats.apply(rows, labels, temperature, params, ignore_index, shard, backend_operators)


def sharded_state(
    rows: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    params: Tensor,
    ignore_index: int,
    shard: VocabShard,
    backend_operators: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor]:
    """The statistics, and what a backward needs of them: labels `[N]` as local columns, and the state `[3, N]`."""
    labels = None if labels is None else labels.reshape(-1)
    state = rows.new_empty((4, rows.shape[0] * rows.shape[1]), dtype=stats_dtype(rows.dtype))
    backend_operators.partial_stats_(rows, labels, temperature, params, ignore_index, None, 0, shard.start, state)
    state = merge_states(shard.gather(state).wait(), params, temperature)
    state = poisoned(state, labels, ignore_index, shard.vocab_size)
    ignored = None if labels is None else labels == ignore_index
    local = None if labels is None else shard.local_labels(labels, ignore_index, rows.shape[-1])
    return state_statistics(state, params, temperature, ignored), local, state[:3].contiguous()


class _ShardedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        labels: Tensor | None,
        temperature: Tensor | None,
        params: Tensor,
        ignore_index: int,
        shard: VocabShard,
        backend_operators: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats, local, saved = sharded_state(rows, labels, temperature, params, ignore_index, shard, backend_operators)
        ctx.save_for_backward(rows, local, temperature, params, saved)
        ctx.operators = backend_operators
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a sharded loss")
        rows, labels, temperature, params, saved = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 7
        if labels is None:
            grads = (None, *grads[1:])
        upstream = map(contiguous, grads)
        grad_rows = ctx.operators.stats_backward(
            rows, labels, temperature, params, LOCAL_IGNORE_INDEX, saved, *upstream
        )
        return (grad_rows,) + (None,) * 6


def sharded_pair(
    rows: Tensor,
    old_rows: Tensor,
    temperature: Tensor | None,
    params: Tensor,
    shard: VocabShard,
    backend_operators: Any,
) -> Tensor:
    """`paired_forward`'s stats `[6, N]` of rows whose columns `[outer, inner, V_local]` this rank holds."""
    rows, old_rows = (r[..., : shard.real_columns(r.shape[-1])] for r in (rows, old_rows))
    return _ShardedPair.apply(rows, old_rows, temperature, params, shard, backend_operators)


def merged_pair(
    rows: Tensor,
    old_rows: Tensor,
    temperature: Tensor | None,
    params: Tensor,
    shard: VocabShard,
    backend_operators: Any,
) -> tuple[Tensor, Tensor]:
    """What `paired_forward` returns of whole rows, on every rank: a sweep for the states of both rows, which are
    merged, and one for the sums of their divergences, which are added in rank order. Two all-gathers, eight and four
    numbers per row."""
    count = rows.shape[0] * rows.shape[1]
    states = rows.new_empty((2, 4, count), dtype=stats_dtype(rows.dtype))
    for side, state in zip((rows, old_rows), states, strict=True):
        backend_operators.partial_stats_(side, None, temperature, params, 0, None, 0, shard.start, state)
    gathered = shard.gather(states).wait()
    states = torch.cat([merge_states(gathered[:, side], params, temperature)[:3] for side in (0, 1)])
    stats, saved = backend_operators.paired_forward(rows, old_rows, temperature, params, states)
    sums = torch.cat((stats[3:], saved[7:]))
    sums = shard.gather(sums).wait().double().sum(0).to(stats.dtype)
    return torch.cat((stats[:3], sums[:3])), torch.cat((states, sums[:1], sums[3:]))


class _ShardedPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        old_rows: Tensor,
        temperature: Tensor | None,
        params: Tensor,
        shard: VocabShard,
        backend_operators: Any,
    ) -> Tensor:
        stats, saved = merged_pair(rows, old_rows, temperature, params, shard, backend_operators)
        ctx.save_for_backward(rows, old_rows, temperature, params, saved)
        ctx.operators = backend_operators
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    def backward(ctx: Any, grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a sharded entropy_ratio")
        if grads is None:
            return (None,) * 6
        return (ctx.operators.paired_backward(*ctx.saved_tensors, grads.contiguous()),) + (None,) * 5
