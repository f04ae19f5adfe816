"""The operators that work per token, the table and the summary, of every backend against their definitions in PyTorch.

Thousands of tokens, so that several runs, blocks and groups take part; sums of 0/1 masks are exact, so tables have the
definition's bits but where weights that are not whole numbers are added up.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from erc.constants import COUNT_RUN, INVALID_VALUE, Column, KLKind, Metric, Present, Reduction, TokenFlag
from erc.constants import IMPORTANCE_WEIGHTED_KL as WEIGHTED
from erc.surrogate import metrics as definition_of_summary
from erc.surrogate import token_table as definition_of_table
from tests.backends import INTERPRETED, operators, params  # noqa: F401

NAN, INF, IGNORE, V = math.nan, math.inf, -100, 1000
B, T = 9, 1033
N = B * T
assert N > 2 * COUNT_RUN, "several runs"
# A call takes a second in the interpreter, which knows one way to load a number.
MASKS = [torch.bool] if INTERPRETED else [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, *([] if INTERPRETED else [torch.bfloat16, torch.float32, torch.float64])]


def few(values):
    """All of them; in the interpreter every third."""
    return list(values)[:: 3 if INTERPRETED else 1]


ALL = Present.OLD_LOGPROB | Present.OLD_ENTROPY | Present.REF_LOGPROB
NAMES = ("labels", "advantages", "mask", "old_logprob", "old_entropy", "ref_logprob", "policy_weight", "nll_mask")
NAMES += ("cu_seqlens", "normalizer", "entropy_normalizer", "nll_normalizer", "grad_scale")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def packed_offsets(tokens: int = N) -> Tensor:
    """Sequences of very different lengths, some empty, more than a block has threads."""
    cuts = torch.randint(0, tokens, (300,), generator=generator(3)).sort().values
    return torch.cat([torch.tensor([0, 0]), cuts, torch.tensor([tokens, tokens])])


def given(tokens: int = N, mask: torch.dtype | None = torch.bool, packed: bool = False, per_sequence: bool = True):
    """Arguments of a table by name, and the numbers that say how they lie."""
    draw = generator(1)
    arguments: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    labels = torch.randint(0, V, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.05] = IGNORE
    arguments["labels"] = labels
    if mask is not None:
        drawn = torch.rand(tokens, generator=draw)
        whole = drawn < 0.8
        arguments["mask"] = (whole * (0.5 + drawn)).to(mask) if mask.is_floating_point else whole.to(mask)
        if tokens == N:
            arguments["mask"][2 * T : 3 * T] = 0  # a sequence without active tokens
    for name in ("old_logprob", "old_entropy", "ref_logprob"):
        arguments[name] = torch.randn(tokens, generator=draw)
    arguments["policy_weight"] = torch.rand(tokens, generator=draw)
    arguments["nll_mask"] = torch.rand(tokens, generator=draw) < 0.3
    offsets = packed_offsets(tokens) if packed else None
    arguments["cu_seqlens"] = offsets
    sequences = len(offsets) - 1 if packed else B
    arguments["advantages"] = torch.randn(sequences if per_sequence else tokens, generator=draw)
    length = 0 if packed else T
    numbers = {"sequence_length": length, "advantage_length": length if per_sequence else 1, "present": int(ALL)}
    return arguments, numbers


def table_of(ops: Any, arguments: dict, numbers: dict, wide: bool = False, vocab_size: int = V):
    tensors = (arguments[name] for name in NAMES)
    return ops.token_table(*tensors, params(max_length=700, **numbers), IGNORE, vocab_size, wide)


def assert_tables(tested: tuple[Tensor, ...], exact: tuple[Tensor, ...], whole: bool = True) -> None:
    """The same labels, counter and table: bit by bit, or, where fractions were added up, but for the last bits."""
    assert torch.equal(tested[1], exact[1]) and torch.equal(tested[2], exact[2])
    table, expected = tested[0], exact[0]
    assert table.dtype == expected.dtype and table.shape == expected.shape
    if whole:
        torch.testing.assert_close(table, expected, rtol=0, atol=0, equal_nan=True)
        return
    given_as_they_are = [Column.ADVANTAGE, Column.OLD_LOGPROB, Column.OLD_ENTROPY, Column.REF_LOGPROB]
    torch.testing.assert_close(table[:, given_as_they_are], expected[:, given_as_they_are], rtol=0, atol=0)
    torch.testing.assert_close(table, expected, rtol=2 * torch.finfo(table.dtype).eps, atol=0, equal_nan=True)


def compare_tables(ops: Any, arguments: dict, numbers: dict, wide: bool = False, whole: bool = True) -> Tensor:
    exact = table_of(definition_of_table, arguments, numbers, wide)
    tested = table_of(ops, arguments, numbers, wide)
    assert_tables(tested, exact, whole)
    return tested[0]


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", few(Reduction))
def test_every_reduction_with_masks_of_every_dtype(reduction, packed, operators):  # noqa: F811
    weights = []
    for number, (mask, wide) in enumerate(product([None, *MASKS, *FLOATS], [False, True])):
        if (number + reduction) % 2:  # half of the dtypes in each width, the other half with the next reduction
            continue
        arguments, numbers = given(mask=mask, packed=packed, per_sequence=number % 4 < 2)
        numbers |= {"reduction": reduction, "entropy_coef": 0.01, "nll_coef": 0.5, "entropy_shares": number % 3 == 0}
        whole = mask is None or not mask.is_floating_point
        table = compare_tables(operators.ops, arguments, numbers, wide, whole)
        weights.append(table[:, Column.WEIGHT])
        assert (table[:, Column.ENTROPY_WEIGHT] != 0).any() and (table[:, Column.LOGPROB_WEIGHT] != 0).any()
    assert all((weight != 0).any() and (weight == 0).any() for weight in weights)


def test_a_wrong_count_would_be_seen(operators):  # noqa: F811
    arguments, numbers = given()
    exact = table_of(definition_of_table, arguments, numbers)
    fewer = {**arguments, "mask": arguments["mask"].clone()}
    fewer["mask"][int(exact[0][:, Column.WEIGHT].nonzero()[0])] = False
    with pytest.raises(AssertionError):
        assert_tables((table_of(operators.ops, fewer, numbers)[0], *exact[1:]), exact, whole=False)


NORMALIZERS = {
    "numbers": {"normalizer": 1234.0, "entropy_normalizer": 77.5, "nll_normalizer": 3.0, "grad_scale": 1024.0},
    "float32": {
        "normalizer": torch.tensor(1234.5),
        "entropy_normalizer": torch.tensor(77.5),
        "nll_normalizer": torch.tensor(3.25),
        "grad_scale": torch.tensor(65536.0),
    },
    "other dtypes": {
        "normalizer": torch.tensor(1234),
        "entropy_normalizer": torch.tensor(77, dtype=torch.int32),
        "nll_normalizer": torch.tensor(3.25, dtype=torch.float64),
        "grad_scale": torch.tensor(3.0, dtype=torch.bfloat16),
    },
    "the main one": {"normalizer": torch.tensor(1234.5)},
    "the others": {"entropy_normalizer": 9.0, "nll_normalizer": torch.tensor(3.25)},
}


@pytest.mark.parametrize("which", few(NORMALIZERS))
def test_normalizers_and_scales_as_numbers_and_tensors(which, operators):  # noqa: F811
    for reduction, packed in product(Reduction, [False, True]):
        arguments, numbers = given(packed=packed)
        numbers |= {"reduction": reduction, "entropy_coef": 0.01, "nll_coef": 0.5}
        for name, value in NORMALIZERS[which].items():
            (arguments if isinstance(value, Tensor) else numbers)[name] = value
        plain = table_of(definition_of_table, *given(packed=packed))
        table = compare_tables(operators.ops, arguments, numbers, wide=packed)
        assert not torch.equal(table.float(), plain[0])


@pytest.mark.parametrize("wide", [False, True])
def test_columns_of_every_dtype(wide, operators):  # noqa: F811
    """The float16 column holds every pattern that is a number, subnormal ones and infinities among them."""
    patterns = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.float16)
    patterns = patterns[~patterns.isnan()]
    tokens = len(patterns)
    dtypes = {torch.float16: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.uint8}
    for dtype, label_dtype in dtypes.items():
        arguments, numbers = given(tokens, per_sequence=False)
        arguments["labels"] = (arguments["labels"].clamp(min=0) % 120).to(label_dtype)
        arguments["advantages"] = arguments["advantages"].to(dtype)
        for name in ("old_entropy", "ref_logprob", "policy_weight"):
            arguments[name] = arguments[name].to(dtype)
        arguments["old_logprob"] = patterns if dtype == torch.float16 else patterns.to(dtype)
        numbers |= {"sequence_length": 0}
        table = compare_tables(operators.ops, arguments, numbers, wide)
        column = table[:, Column.OLD_LOGPROB]
        active = table[:, Column.WEIGHT] != 0
        assert torch.equal(column[active], arguments["old_logprob"].to(table.dtype)[active])
        assert column.isinf().any() or dtype != torch.float16


def test_offsets_in_32_bits(operators):  # noqa: F811
    arguments, numbers = given(packed=True)
    arguments["cu_seqlens"] = arguments["cu_seqlens"].int()
    compare_tables(operators.ops, arguments, numbers | {"reduction": Reduction.SEQ_MEAN_TOKEN_MEAN})


def test_what_the_caller_left_out(operators):  # noqa: F811
    arguments, numbers = given(mask=None)
    for name in ("old_logprob", "old_entropy", "ref_logprob", "policy_weight", "nll_mask"):
        arguments[name] = None
    table = compare_tables(operators.ops, arguments, numbers | {"present": 0})
    assert (table[:, Column.POLICY_WEIGHT] == 1).all() and (table[:, Column.OLD_LOGPROB] == 0).all()


def test_tokens_that_are_not_read_may_hold_anything(operators):  # noqa: F811
    arguments, numbers = given(per_sequence=False)
    unread = (arguments["labels"] == IGNORE) | ~arguments["mask"]
    arguments["labels"][~arguments["mask"]] = 10**12  # no label at all
    for name in ("old_logprob", "old_entropy", "ref_logprob", "policy_weight", "advantages"):
        arguments[name][unread] = NAN
    numbers |= {"entropy_coef": 0.01, "nll_coef": 0.5}
    table = compare_tables(operators.ops, arguments, numbers)
    row = torch.zeros(len(Column))
    row[Column.POLICY_WEIGHT] = 1
    assert unread.any() and (table[unread] == row).all()


def test_no_active_token_weighs_nothing(operators):  # noqa: F811
    for reduction in Reduction:
        arguments, numbers = given()
        arguments["mask"].zero_()
        numbers |= {"reduction": reduction, "entropy_coef": 0.01, "nll_coef": 0.5}
        table = compare_tables(operators.ops, arguments, numbers)
        assert (table[:, Column.WEIGHT] == 0).all()


@pytest.mark.parametrize("tensor", [False, True])
def test_a_normalizer_of_zero_where_a_term_covers_nothing(tensor, operators):  # noqa: F811
    arguments, numbers = given()
    arguments["nll_mask"].zero_()
    (arguments if tensor else numbers)["nll_normalizer"] = torch.tensor(0.0) if tensor else 0.0
    table = compare_tables(operators.ops, arguments, numbers | {"nll_coef": 0.5})
    assert (table[:, Column.LOGPROB_WEIGHT] == 0).all() and (table[:, Column.WEIGHT] != 0).any()


def test_tokens_outside_of_every_sequence_are_an_error(operators):  # noqa: F811
    if operators.name == "triton":
        pytest.skip("checked in Python")
    for changes in ({"sequence_length": T + 1}, {"advantage_length": T - 1}):
        arguments, numbers = given()
        with pytest.raises(RuntimeError, match="must be in a sequence"):
            table_of(operators.ops, arguments, numbers | changes)
    arguments, numbers = given(packed=True)
    arguments["cu_seqlens"], arguments["advantages"] = torch.zeros(1, dtype=torch.int64), torch.zeros(0)
    with pytest.raises(RuntimeError, match="must be in a sequence"):
        table_of(operators.ops, arguments, numbers)


@pytest.mark.parametrize("tokens", [0, 1, 255, COUNT_RUN, COUNT_RUN + 1])
def test_few_tokens_and_whole_runs(tokens, operators):  # noqa: F811
    arguments, numbers = given(tokens, per_sequence=False)
    compare_tables(operators.ops, arguments, numbers | {"sequence_length": 0, "entropy_coef": 0.01})


@pytest.mark.parametrize("name", ["advantages", "old_logprob", "ref_logprob", "policy_weight", "old_entropy"])
def test_a_nan_among_the_inputs_makes_its_token_nan(name, operators, monkeypatch):  # noqa: F811
    """Of the old entropy it drops the token instead. The CPU refuses both."""
    arguments, numbers = given(mask=None, per_sequence=False)
    token = int((arguments["labels"] != IGNORE).nonzero()[N // 2])
    arguments[name][token] = NAN
    if operators.checks_values:
        with pytest.raises(RuntimeError, match=INVALID_VALUE):
            table_of(operators.ops, arguments, numbers)
        return
    monkeypatch.setattr(definition_of_table, "values_are_readable", lambda _: False)
    table = compare_tables(operators.ops, arguments, numbers)
    broken = table[:, Column.WEIGHT].isnan()
    assert broken.sum() == (name != "old_entropy") and table[token].isnan().any()


def test_tables_repeat_bit_by_bit(operators):  # noqa: F811
    arguments, numbers = given(mask=torch.float32)
    first = table_of(operators.ops, arguments, numbers)
    for again in (table_of(operators.ops, arguments, numbers) for _ in range(2)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- the summary -----------------------------------------------------------------------------------------------------


def batch(tokens: int, wide: bool = False, seed: int = 5):
    """What rows leave behind: losses, log-probs, entropies and flags, around the table's rollout values."""
    draw = generator(seed)
    real = torch.float64 if wide else torch.float32
    entropy = 2 * torch.rand(tokens, generator=draw)
    logprob = -3 * torch.rand(tokens, generator=draw)
    table = torch.randn(tokens, len(Column), generator=draw)
    table[:, Column.OLD_LOGPROB] = logprob + 0.3 * torch.randn(tokens, generator=draw)
    table[:, Column.REF_LOGPROB] = logprob + 0.3 * torch.randn(tokens, generator=draw)
    table[:, Column.OLD_ENTROPY] = entropy * (1 + 0.1 * torch.randn(tokens, generator=draw))
    losses = torch.randn(2, tokens, generator=draw) / max(1, tokens)
    flags = torch.randint(0, 2 * TokenFlag.FILTERED, (tokens,), generator=draw, dtype=torch.int32)
    labels = torch.randint(0, V, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.2] = IGNORE
    per_token = torch.cat([losses, logprob[None], entropy[None]]).to(real)
    return {
        "per_token": per_token,
        "logprob_full": (logprob - 2 * torch.rand(tokens, generator=draw)).to(real),
        "flags": flags,
        "table": table.to(real),
        "labels": labels,
        "counter": torch.zeros(1, dtype=torch.int32),
    }


def summary_of(ops: Any, values: dict, **numbers: float):
    values = {**values, "counter": values["counter"].clone()}
    return ops.token_summary(*values.values(), params(**numbers), IGNORE)


def compare_summaries(ops: Any, values: dict, **numbers: float) -> Tensor:
    """Within the rounding of a sum of so many numbers, each of them one of the definition's."""
    loss, metrics, tokens = summary_of(ops, values, **numbers)
    exact_loss, exact, exact_tokens = summary_of(definition_of_summary, values, **numbers)
    assert torch.equal(tokens, exact_tokens) and tokens.dtype == torch.int64
    assert metrics.dtype == torch.float64 and loss.dtype == exact_loss.dtype and loss.shape == ()
    for metric in Metric:
        a, b = metrics[metric], exact[metric]
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, equal_nan=True, msg=f"{metric.name}: {a} {b}")
    torch.testing.assert_close(loss, exact_loss, rtol=torch.finfo(loss.dtype).eps, atol=1e-14, equal_nan=True)
    return metrics


PENALTIES = [*KLKind, *(kind + WEIGHTED for kind in KLKind if kind)]


@pytest.mark.parametrize("tokens", [0, 1, 511, 512, 513, N])
def test_the_summary_of_few_and_many_tokens(tokens, operators):  # noqa: F811
    for wide in (False, True):
        metrics = compare_summaries(operators.ops, batch(tokens, wide), present=int(ALL), kl_id=KLKind.K3, kl_clamp=9.0)
        assert tokens < N or (metrics[1:] != 0).sum() == len(Metric) - 2, "all but nan_inputs count something"


@pytest.mark.parametrize("kl", few(PENALTIES))
def test_the_summary_of_every_penalty_and_presence(kl, operators):  # noqa: F811
    for number in range(0, ALL + 1, 3 if INTERPRETED else 1):
        full = Present.KL_OVER_FULL * (number % 3 == 0)
        numbers = {"present": number | full, "kl_id": kl, "kl_clamp": 0.02 if number % 2 else INF, "gate_eps": 1e-3}
        values = batch(1500, seed=number)
        values |= {} if number % 3 < 2 else {"logprob_full": None}
        metrics = compare_summaries(operators.ops, values, **numbers)
        assert (metrics[Metric.KEPT_MASS] == 1) == (values["logprob_full"] is None)
        assert metrics[Metric.KL].isnan() == (kl == KLKind.NONE)
        assert metrics[Metric.ENTROPY_RATIO_MIN].isnan() == (number & Present.OLD_ENTROPY == 0)


def test_a_summary_without_active_tokens(operators):  # noqa: F811
    values = batch(700)
    values["labels"].fill_(IGNORE)
    values["per_token"].fill_(NAN)
    values["table"].fill_(NAN)
    metrics = compare_summaries(operators.ops, values, present=int(ALL), kl_id=KLKind.K1)
    assert metrics[Metric.LOSS] == 0 and metrics[Metric.RATIO_MAX].isnan()


def test_nan_and_infinite_tokens_in_a_summary(operators):  # noqa: F811
    values = batch(3000)
    active = (values["labels"] != IGNORE).nonzero()[:, 0]
    numbers = {"present": int(ALL), "kl_id": KLKind.K3}
    values["per_token"][2, active[7]] = -INF  # a label at -inf, old and new: no difference
    values["table"][active[7], Column.OLD_LOGPROB] = -INF
    values["table"][active[7], Column.REF_LOGPROB] = -INF
    values["per_token"][2, active[9]] = -60.0  # beyond the clamp of a log-ratio
    assert compare_summaries(operators.ops, values, **numbers)[[Metric.APPROX_KL, Metric.KL]].isfinite().all()
    values["table"][active[2000], Column.WEIGHT] = NAN
    values["table"][active[2001], Column.OLD_ENTROPY] = NAN
    metrics = compare_summaries(operators.ops, values, **numbers)
    assert metrics[Metric.NAN_INPUTS] == 2 and metrics[Metric.ENTROPY_RATIO_MIN].isnan()
    values["per_token"][:, active[5]] = NAN
    metrics = compare_summaries(operators.ops, values, **numbers)
    assert metrics[[Metric.LOSS, Metric.ENTROPY, Metric.RATIO_MAX, Metric.ENTROPY_RATIO_MAX]].isnan().all()


def test_summaries_repeat_bit_by_bit(operators):  # noqa: F811
    values = batch(N)
    first = summary_of(operators.ops, values, present=int(ALL), kl_id=KLKind.K3)
    for again in (summary_of(operators.ops, values, present=int(ALL), kl_id=KLKind.K3) for _ in range(2)):
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, again, strict=True))


# ---- both around the rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_the_fused_operator_is_its_parts(per_row, operators):  # noqa: F811
    """policy_loss against token_table, loss_rows_ and token_summary: the same bits of everything."""
    columns, count = 33, 60 if INTERPRETED else N  # the interpreter takes a tenth of a second for each row
    arguments, numbers = given(count, mask=torch.float32, packed=INTERPRETED)
    arguments["labels"] = torch.where(arguments["labels"] == IGNORE, IGNORE, arguments["labels"] % columns)
    logits = torch.randn(1, count, columns, generator=generator())
    values = params((0.2, 0.28, INF, INF), reduction=Reduction.SEQ_MEAN_TOKEN_MEAN, entropy_coef=0.01,
                    kl_coef=0.1, kl_id=KLKind.K3, **numbers)  # fmt: skip
    tensors = (arguments[name] for name in NAMES)
    fused = operators.ops.policy_loss(logits, None, *tensors, values, IGNORE, None, None, per_row, True)
    tensors = (arguments[name] for name in NAMES)
    table, labels, counter = operators.ops.token_table(*tensors, values, IGNORE, columns, False)
    per_token, flags = torch.empty(4, count), torch.empty(count, dtype=torch.int32)
    grad = torch.empty_like(logits)
    operators.ops.loss_rows_(logits, labels, None, values, IGNORE, None, 0, table, per_token, flags, None, grad)
    loss, metrics, tokens = operators.ops.token_summary(per_token, None, flags, table, labels, counter, values, IGNORE)
    parts = (per_token[0] if per_row else loss, per_token[1:], flags, metrics, tokens, grad)
    for a, b in zip(fused, parts, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert loss.isfinite() and loss != 0 and (grad != 0).any()
    total = float(per_token[0].double().sum())
    assert total == pytest.approx(float(loss)) == pytest.approx(float(metrics[Metric.LOSS]))
