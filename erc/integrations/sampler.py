"""Log-probs of sampled tokens for rollout engines, by the kernels that the trainer uses.

Where an engine's logits are the trainer's, so are the log-probs, bit for bit: a row's statistics depend on that row and
its dtype alone, not on the batch it is in. `sampled_logprobs` is the function for an engine that has logits and tokens
at hand; `LogprobRecorder` is for engines that show logits to a logits processor before they sample, as vLLM does.
Neither imports an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erc.stats import token_stats


@torch.no_grad()
def sampled_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """`log pi(token)` in nats of one sampled token per row, float32 `[N]`.

    Args:
        logits: `[N, V]`, what the model computed, before any truncation or penalty of the sampler.
        tokens: `[N]` int64.
        temperature: of sampling, a float or `[N]`, given as the trainer gives it: the float 0.7 and a float32 tensor of
            it are not the same number.
        dtype: the dtype of the trainer's logits. Engines turn 16-bit logits to float32, which adds nothing; turned
            back they give the trainer's bits. None leaves them.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.

    >>> sampled_logprobs(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    logits = logits if dtype is None else logits.to(dtype)
    return token_stats(logits, tokens, temperature=temperature).logprob


@dataclass
class RecordedRequest:
    """A request of the engine: its sampling parameters, prompt, tokens so far, and their log-probs.

    `tokens` is the engine's own list, which grows.
    """

    params: Any
    prompt: Sequence[int] | None
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)


class LogprobRecorder:
    """A logits processor that changes nothing and records the log-prob of every token that is sampled.

    It has the interface of vLLM's logits processors: `update_state` before a forward pass, with the requests that were
    removed, added and moved, then `apply` with their logits, a row for each. A row's token is known at the next
    `update_state`, and its log-prob is computed then, from a copy of the logits. For vLLM:

        class Recorder(LogprobRecorder, vllm.v1.sample.logits_processor.LogitsProcessor):
            def report(self, request):
                ...  # request.params.extra_args names it

    Other processors may stand behind it. Truncation (top-k, top-p, min-p) and penalties are not in its log-probs, and
    speculative decoding, where a step samples several tokens, raises.

    Args:
        config, device, pin_memory: what vLLM hands to a processor; not used.
    """

    dtype: torch.dtype | None = None
    """As `sampled_logprobs`; set by a subclass."""

    def __init__(self, config: Any = None, device: Any = None, pin_memory: bool = False) -> None:
        self._requests: dict[int, RecordedRequest] = {}
        self._pending: tuple[list[RecordedRequest], Tensor] | None = None

    def report(self, request: RecordedRequest) -> None:
        """Called with each request once it is finished; a subclass takes what it needs."""
        raise NotImplementedError("LogprobRecorder.report must be defined by a subclass")

    def is_argmax_invariant(self) -> bool:
        """False, as the engine then applies it to greedy requests too, and before temperatures."""
        return False

    def needs_output_token_ids(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """Finish the rows of the last pass, then follow the engine's batch; None where it did not change."""
        self._finish_rows()
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._remove(index)
        for index, params, prompt, tokens in batch_update.added:
            self._remove(index)
            self._requests[index] = RecordedRequest(params, prompt, tokens)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._requests.pop(source), self._requests.pop(target, None)
            self._requests[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._requests[source] = replaced
            elif replaced is not None:
                self.report(replaced)

    def apply(self, logits: Tensor) -> Tensor:
        """`logits` `[number of requests, V]`, as they are."""
        order = [self._requests[index] for index in range(len(logits))]
        self._pending = order, logits.clone()  # processors and samplers behind this one write in place
        return logits

    def flush(self) -> None:
        """Finish and report everything: after an engine's last step nothing calls `update_state`."""
        self._finish_rows()
        for index in list(self._requests):
            self._remove(index)

    def _remove(self, index: int) -> None:
        request = self._requests.pop(index, None)
        if request is not None:
            self.report(request)

    def _finish_rows(self) -> None:
        if self._pending is None:
            return
        (requests, logits), self._pending = self._pending, None
        grown = [len(request.tokens) - len(request.logprobs) for request in requests]
        if any(count > 1 for count in grown):
            raise ValueError("a step must sample at most one token per request: speculative decoding is not supported")
        rows = [row for row, count in enumerate(grown) if count]  # a part of a long prompt samples none
        temperatures = [getattr(requests[row].params, "temperature", 1.0) or 1.0 for row in rows]  # 0 is greedy
        for temperature in set(temperatures):  # a float, as the trainer's: a float32 tensor would be another number
            same = [row for row, other in zip(rows, temperatures, strict=True) if other == temperature]
            tokens = torch.tensor([requests[row].tokens[-1] for row in same], device=logits.device)
            found = sampled_logprobs(logits[same], tokens, temperature=temperature, dtype=self.dtype)
            for row, logprob in zip(same, found.tolist(), strict=True):
                requests[row].logprobs.append(logprob)
