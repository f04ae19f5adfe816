"""The states of a vocabulary's shards, which a process group merges: `partial_stats_` of every backend."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import erc
from erc.ops import stats_dtype
from tests.backends import INTERPRETED, params, shard_state
from tests.oracle import assert_entropy, assert_logprob, merged_states, random_labels, random_logits, same_bits

pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
INF = torch.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
def test_a_shard_without_any_token_is_the_empty_state(dtype, temperature, native):
    logits = torch.full((1, 1, 7), -INF, dtype=dtype)
    state = shard_state(native.ops, logits, torch.tensor([900]), 512, temperature=temperature)
    assert state[:, 0].tolist() == [-INF, 0, 0, -INF]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_merge_to_the_whole_row(dtype, softcap, native):
    V, cuts = 2053, (0, 700, 701, 2053)
    logits, labels = random_logits(1, 4, V, dtype=dtype), torch.tensor([3, 700, 1999, -100])
    logits[0, 1, :700] = -INF  # a shard without any token
    scaling = {"temperature": 0.8, "softcap": softcap}
    shards = [shard_state(native.ops, logits[..., a:b], labels, a, **scaling) for a, b in pairwise(cuts)]
    assert all(shard.dtype == stats_dtype(dtype) for shard in shards)
    state = merged_states(shards, 1 / 0.8)[:, :3]
    expected = erc.reference.token_stats(logits[0, :3].double(), labels[:3], temperature=0.8, softcap=softcap or None)
    logprob = (state[3] - state[0]) / 0.8 - state[1].log1p()
    entropy = state[1].log1p() - state[2] / (1 + state[1])
    assert_logprob(logprob, expected.logprob, torch.tensor(25.0))
    assert_entropy(entropy.clamp(min=0), expected.entropy, softcap)
    assert shards[0][3, 0] != -INF and shards[1][3, 0] == -INF, "the label is in the first shard"
    assert shards[0][0, 1] == -INF and shards[0][1, 1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_state_of_a_whole_row_has_the_bits_of_its_statistics(dtype, native):
    V = 2053 if INTERPRETED else 24_576
    logits, labels = random_logits(1, 3, V, dtype=dtype), random_labels(3, V=V)
    saved = native.ops.stats_forward(logits, labels, None, params(), -100)[3]
    assert same_bits(shard_state(native.ops, logits, labels, 0)[:3], saved)
