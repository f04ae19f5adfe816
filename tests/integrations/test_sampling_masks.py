"""Readers of what engines report of their samplers, as batches carry it."""

from __future__ import annotations

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import erc
from erc.integrations import sampling_masks
from erc.integrations.sampling_masks import padded_ids, read_sampling_mask

KEPT = [[5, 3, 8], [4], [9, 0]]
FLAT = [token for row in KEPT for token in row]
FORMS = {
    "vLLM": SimpleNamespace(token_ids=FLAT, offsets=[0, 3, 4, 6]),
    "vLLM, as JSON": {"token_ids": FLAT, "offsets": [0, 3, 4, 6]},
    "prime-rl": SimpleNamespace(ids=np.array(FLAT, np.int32), counts=np.array([3, 1, 2], np.int32)),
    "SkyRL": torch.tensor([[5, 3, 8], [4, -1, -1], [9, 0, 9]]),
    "SkyRL, as lists": [[5, 3, 8], [4, -1, -1], [9, 0, 9]],
    "erc": erc.SamplingSupport.from_counts(FLAT, [3, 1, 2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form):
    mask = read_sampling_mask(FORMS[form]).to_mask(10)
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(row) for row in KEPT]


@pytest.mark.parametrize("mask", [3, "abc", {"ids": [1]}, [[0.5, 1.0]], [1, 2], [[1, 2], [3]]])
def test_what_is_no_mask_is_named(mask):
    with pytest.raises(TypeError, match="must have token_ids and offsets, or ids and counts, or be integers"):
        read_sampling_mask(mask)


def test_a_batch_skips_padding_and_what_a_tool_wrote():
    generated = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    ids = padded_ids([FORMS["vLLM"], None, FORMS["SkyRL"]], generated)
    assert ids.shape == (3, 5, 3) and ids.dtype == torch.int32
    kept = erc.SamplingSupport.from_ids(ids).to_mask(10).view(3, 5, 10)
    for rollout, positions in ((0, (0, 1, 3)), (2, (0, 1, 2))):
        for row, position in zip(KEPT, positions, strict=True):
            assert kept[rollout, position].nonzero().flatten().tolist() == sorted(row)
    cut = torch.zeros(3, 5, dtype=torch.bool)
    cut[0, [0, 1, 3]] = cut[2, :3] = True
    assert torch.equal(kept.all(-1), ~cut), "the other rows were not cut"
    assert (padded_ids([None] * 3, generated) == -1).all()
    with pytest.raises(ValueError, match="rollout 1 has 3 for 2 tokens"):
        padded_ids([None, FORMS["vLLM"], None], generated)


def test_the_examples_run():
    assert doctest.testmod(sampling_masks).failed == 0
