"""The same bits whatever the strides, the addresses, the batch and the form of a call: one order of sums for all."""

from __future__ import annotations

import pytest
import torch

import erc
from tests.backends import INTERPRETED, loss_call, params
from tests.oracle import random_labels, random_logits, same_bits

pytestmark = pytest.mark.sanitize
IGNORE = -100
LONG = 2053 if INTERPRETED else 24_576


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("softcap", [0.0] if INTERPRETED else [0.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("V", [1032] if INTERPRETED else [1032, 12_296])
def test_strides_and_alignment_change_no_bit(V, dtype, softcap, native):
    """Padded rows, `logits[:, :-1]`, rows that start two or four bytes off: the same columns meet in the same order."""
    plain = random_logits(2, 2, V, dtype=dtype)
    padded = torch.zeros(2, 3, V + 64, dtype=dtype)
    padded[:, :2, :V] = plain
    shifted = torch.zeros(4 * V + 1, dtype=dtype)[1:].view(2, 2, V).copy_(plain)
    labels = random_labels(4, V=V)
    results = []
    for logits in (plain, padded[:, :2, :V], shifted):
        rows = (logits, labels, None, params(softcap=softcap), IGNORE)
        statistics = native.ops.stats_forward(*rows)
        ones = torch.ones_like(statistics[1])
        gradient = native.ops.stats_backward(*rows, statistics[3], ones, ones, None)
        results.append((*statistics, gradient, *loss_call(native.ops, logits, labels, softcap=softcap)))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_a_row_does_not_depend_on_its_batch(machine):
    logits, labels = random_logits(4, 2053), random_labels(4, V=2053)
    together, alone = erc.token_stats(logits, labels), erc.token_stats(logits[2:3].clone(), labels[2:3])
    assert_same_bits([stat[2:3] for stat in together], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("forbidden", [False, True])
def test_statistics_loss_and_gradients_in_place_agree(forbidden, dtype, native):
    logits, labels = random_logits(1, 3, LONG, dtype=dtype), random_labels(3, V=LONG)
    labels[1] = IGNORE
    if forbidden:
        logits[0, 2, LONG // 2 : LONG // 2 + 900] = -torch.inf
    rows = (logits, labels, None, params(), IGNORE)
    logprob, entropy, _, saved = native.ops.stats_forward(*rows)
    *outputs, gradient = loss_call(native.ops, logits, labels)
    assert same_bits(logprob, outputs[2]) and same_bits(entropy, outputs[3])
    overwritten = logits.clone()
    assert_same_bits(outputs, loss_call(native.ops, overwritten, labels, in_place=True))
    assert same_bits(gradient, overwritten) and gradient.any()
    upstream = [torch.linspace(-1, 1, 3, dtype=logprob.dtype) for _ in range(3)]
    gradient, overwritten = native.ops.stats_backward(*rows, saved, *upstream), logits.clone()
    native.ops.stats_backward_(overwritten, *rows[1:], None, 0, saved, *upstream, overwritten)
    assert same_bits(gradient, overwritten) and gradient.any()
