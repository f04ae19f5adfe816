"""Labels for the sampled tokens, from what a trainer has after sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from erc.inputs import check_offsets, values_are_readable


def shifted_labels(
    tokens: Tensor,
    prompt_lengths: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels such that position `t` predicts the token after it: what `token_stats` and `policy_loss` take together
    with the model's full logits.

    A position is ignored where the next token belongs to the prompt or is padding, and at the end of a sequence.

    Args:
        tokens: integer `[B, T]`, or `[N]` packed rows with `cu_seqlens`: prompt and completion of each sequence.
        prompt_lengths: integer `[B]` (packed: `[S]`), the prompt's tokens without padding; None trains on every token.
        attention_mask: `[B, T]`, nonzero for real tokens; padding may stand left, right or on both sides. Padding is
            never guessed from the tokens: many tokenizers pad with the end-of-sequence token that a policy must learn.
        cu_seqlens: `[S + 1]` offsets of packed rows.

    Returns:
        int64, the shape of `tokens`.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.

    >>> import torch
    >>> tokens = torch.tensor([[0, 11, 12, 21, 22], [11, 21, 22, 23, 0]])
    >>> mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])  # one prompt of 2 tokens, one of 1
    >>> shifted_labels(tokens, torch.tensor([2, 1]), attention_mask=mask)
    tensor([[-100, -100,   21,   22, -100],
            [  21,   22,   23, -100, -100]])
    """
    for name, given in (("tokens", tokens), ("prompt_lengths", prompt_lengths)):
        if given is None and name == "prompt_lengths":
            continue
        if not isinstance(given, Tensor) or given.dtype.is_floating_point or given.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {getattr(given, 'dtype', type(given).__name__)}")
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, T], or [N] with cu_seqlens, got shape {tuple(tokens.shape)}")
        sequences, real = tokens.shape[0], _real_tokens(attention_mask, tokens)
        position = real.long().cumsum(-1)  # of a real token in its sequence, from 1
    else:
        if tokens.dim() != 1 or attention_mask is not None:
            raise ValueError(
                f"cu_seqlens goes with packed tokens [N] and no attention_mask, got shape {tuple(tokens.shape)}"
            )
        offsets = check_offsets(cu_seqlens, tokens.shape[0], tokens.device)
        sequences, lengths = offsets.shape[0] - 1, offsets.diff()
        first = offsets[:-1].repeat_interleave(lengths, output_size=tokens.shape[0])
        position = torch.arange(1, tokens.shape[0] + 1, device=tokens.device) - first
        real = torch.ones_like(tokens, dtype=torch.bool)
    wanted = real
    if prompt_lengths is not None:
        if tuple(prompt_lengths.shape) != (sequences,) or prompt_lengths.device != tokens.device:
            raise ValueError(
                f"prompt_lengths must have shape ({sequences},) on {tokens.device}, one length per sequence, got "
                f"{tuple(prompt_lengths.shape)} on {prompt_lengths.device}"
            )
        if values_are_readable(prompt_lengths) and bool((prompt_lengths < 0).any()):
            raise ValueError(f"prompt_lengths must be >= 0, got {int(prompt_lengths.min())}")
        if cu_seqlens is None:
            prompt = prompt_lengths[:, None]
        else:
            prompt = prompt_lengths.repeat_interleave(lengths, output_size=tokens.shape[0])
        wanted = wanted & (position > prompt)
    # The first token of a sequence has no position before it that could predict it.
    wanted = wanted & (position > 1)
    return torch.where(wanted, tokens.long(), ignore_index).roll(-1, -1)


def _real_tokens(attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != tokens.shape or attention_mask.device != tokens.device:
        raise ValueError(
            f"attention_mask must have the shape and device of tokens, {tuple(tokens.shape)} on {tokens.device}, got "
            f"{tuple(attention_mask.shape)} on {attention_mask.device}"
        )
    real = attention_mask != 0
    if values_are_readable(real) and real.shape[1] > 0:
        starts = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(-1)
        if bool((starts > 1).any()):
            raise ValueError(
                f"attention_mask must mark one run of real tokens per sequence, but sequence {int(starts.argmax())} "
                "has padding inside, where no logits predict the token after it"
            )
    return real
