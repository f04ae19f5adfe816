"""`erc.shifted_labels` against a loop over tokens."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch

import erc


def by_hand(tokens, first, last, prompt) -> list[int]:
    """The labels of one sequence whose real tokens stand at `[first, last)`."""
    labels = [-100] * len(tokens)
    for t in range(first, last - 1):
        if t + 1 - first >= prompt:
            labels[t] = tokens[t + 1]
    return labels


@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
def test_padded_rows(side):
    generator = torch.Generator().manual_seed(0)
    width, lengths, prompts = 9, [9, 6, 2, 1, 0], [3, 6, 0, 1, 0]
    tokens = torch.randint(7, (5, width), generator=generator)
    firsts = [{"left": width - n, "right": 0, "both": (width - n) // 2, "none": 0}[side] for n in lengths]
    if side == "none":
        lengths, prompts, mask = [width] * 5, [3, 9, 0, 1, 12], None
    else:
        mask = torch.tensor([[f <= t < f + n for t in range(width)] for f, n in zip(firsts, lengths, strict=True)])
    labels = erc.shifted_labels(tokens, torch.tensor(prompts), attention_mask=mask)
    expected = [
        by_hand(row, f, f + n, p) for row, f, n, p in zip(tokens.tolist(), firsts, lengths, prompts, strict=True)
    ]
    assert labels.tolist() == expected and labels.dtype == torch.int64
    assert (labels != -100).any()


def test_packed_rows_equal_the_padded_ones():
    tokens = torch.arange(10, 21)
    offsets, prompts = torch.tensor([0, 4, 4, 5, 11]), torch.tensor([2, 0, 0, 1])
    labels = erc.shifted_labels(tokens, prompts, cu_seqlens=offsets, ignore_index=-1)
    for start, end, prompt in zip(offsets[:-1].tolist(), offsets[1:].tolist(), prompts.tolist(), strict=True):
        alone = tokens[start:end]
        padded = erc.shifted_labels(alone[None], torch.tensor([prompt]), ignore_index=-1)[0]
        assert torch.equal(labels[start:end], padded)
    assert erc.shifted_labels(tokens, cu_seqlens=offsets).ne(-100).sum() == 11 - 3  # three sequences have tokens


def test_the_loss_reads_the_completion_and_its_end():
    """The end-of-sequence token is learnt although it is what pads."""
    end, tokens = 0, torch.tensor([[5, 6, 7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    labels = erc.shifted_labels(tokens, torch.tensor([2]), attention_mask=mask)
    assert labels.tolist() == [[-100, 7, end, -100, -100, -100]]
    logprob = erc.token_stats(torch.randn(1, 6, 9), labels).logprob
    assert (logprob != 0).tolist() == [[False, True, True, False, False, False]]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be an integer tensor"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens must be an integer tensor"),
        (
            {"tokens": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"tokens must be \[B, T\], or \[N\] with cu_seqlens",
        ),
        ({"prompt_lengths": torch.ones(3, dtype=torch.long)}, ValueError, r"prompt_lengths must have shape \(2,\)"),
        ({"prompt_lengths": torch.tensor([1, -1])}, ValueError, "prompt_lengths must be >= 0"),
        ({"prompt_lengths": torch.ones(2)}, TypeError, "prompt_lengths must be an integer tensor"),
        ({"attention_mask": torch.ones(2, 2)}, ValueError, "attention_mask must have the shape"),
        ({"attention_mask": [[1]]}, TypeError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, ValueError, "sequence 1 has padding inside"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens goes with packed tokens"),
        ({"tokens": torch.zeros(3, dtype=torch.long), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "rise from 0"),
    ],
)
def test_bad_arguments_are_named(changes, error, match):
    given = {"tokens": torch.zeros(2, 3, dtype=torch.long)} | changes
    with pytest.raises(error, match=match):
        erc.shifted_labels(**given)


def test_the_example_runs():
    assert doctest.testmod(sys.modules["erc.labels"]).failed == 0
