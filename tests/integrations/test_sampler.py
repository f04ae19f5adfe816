"""Log-probs that a rollout engine reports are the bits of the trainer's old log-probs, where the logits are."""

from __future__ import annotations

from enum import Enum, auto
from types import SimpleNamespace

import pytest
import torch

import erc
from erc.integrations.sampler import LogprobRecorder, RecordedRequest, sampled_logprobs

VOCAB = 2053  # more than one block, and a tail


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


class Recorder(LogprobRecorder):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.finished: list[RecordedRequest] = []

    def report(self, request: RecordedRequest) -> None:
        self.finished.append(request)


def model(prompt: list[int], position: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of one position of one request, whatever else is computed beside it."""
    generator = torch.Generator().manual_seed(1000 * prompt[0] + position)
    return (3 * torch.randn(VOCAB, generator=generator)).to(dtype)


class Engine:
    """Stands in for vLLM: continuous batching of at most `size` requests, float32 logits shown to processors, which it
    then divides by temperatures in place; rows are packed together when a request ends."""

    def __init__(self, processor: LogprobRecorder, size: int, dtype: torch.dtype, swap: bool = False) -> None:
        self.processor, self.size, self.dtype, self.swap = processor, size, dtype, swap
        self.generator = torch.Generator().manual_seed(0)

    def run(self, requests: list[SimpleNamespace]) -> None:
        waiting, batch = list(requests), []
        while waiting or batch:
            removed = [i for i, request in enumerate(batch) if len(request.tokens) == request.length]
            added, moved = [], []
            kept = [request for i, request in enumerate(batch) if i not in removed]
            while waiting and len(kept) + len(added) < self.size:
                request = waiting.pop(0)
                added.append((removed.pop(0) if removed else len(batch) + len(added), request))
            moved = self._place(batch, removed, added)
            update = None
            if removed or added or moved:
                update = SimpleNamespace(
                    batch_size=len(batch),
                    removed=removed,
                    added=[(i, request.params, request.prompt, request.tokens) for i, request in added],
                    moved=moved,
                )
            self.processor.update_state(update)
            if batch:
                self._step(batch)

    def _place(self, batch: list, removed: list[int], added: list) -> list[tuple]:
        """Fill the places of what was removed, in place; returns the moves."""
        for index, request in added:
            if index < len(batch):
                batch[index] = request
            else:
                batch.append(request)
        moved = []
        for hole in sorted(removed):
            while len(batch) - 1 in removed and len(batch) - 1 >= hole:
                batch.pop()
            if hole < len(batch):
                moved.append((len(batch) - 1, hole, Direction.UNIDIRECTIONAL))
                batch[hole] = batch.pop()
        if self.swap and len(batch) > 1:
            batch[0], batch[1] = batch[1], batch[0]
            moved.append((0, 1, Direction.SWAP))
        return moved

    def _step(self, batch: list) -> None:
        rows = [model(request.prompt, len(request.tokens), self.dtype).float() for request in batch]
        logits = self.processor.apply(torch.stack(rows))
        temperatures = torch.tensor([request.params.temperature or 1.0 for request in batch])
        probabilities = logits.div_(temperatures[:, None]).softmax(-1)
        sampled = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].tolist()
        for request, token in zip(batch, sampled, strict=True):
            request.tokens.append(token)


def make_requests(temperature: float) -> list[SimpleNamespace]:
    """Every third is sampled at 1.0."""
    return [
        SimpleNamespace(
            prompt=[i, 7],
            tokens=[],
            length=2 + (5 * i) % 4,
            params=SimpleNamespace(temperature=temperature if i % 3 else 1.0, name=i),
        )
        for i in range(7)
    ]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_logprobs_are_the_trainers_bits(dtype, temperature, swap):
    recorder = Recorder(None, torch.device("cpu"), False)
    recorder.dtype = dtype
    requests = make_requests(temperature)
    Engine(recorder, size=3, dtype=dtype, swap=swap).run(requests)
    recorder.flush()
    assert sorted(request.params.name for request in recorder.finished) == list(range(7))
    for request in recorder.finished:
        assert len(request.tokens) == len(request.logprobs) == 2 + (5 * request.params.name) % 4
        logits = torch.stack([model(request.prompt, t, dtype) for t in range(len(request.tokens))])
        temperature = request.params.temperature
        old = erc.token_stats(logits, torch.tensor(request.tokens), temperature=temperature)
        assert torch.tensor(request.logprobs).equal(old.logprob)
        plain = (logits.float() / temperature).log_softmax(-1).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(old.logprob, plain, rtol=1e-4, atol=1e-4)
    ratios = torch.cat([torch.tensor(request.logprobs) for request in recorder.finished])
    assert ratios.unique().numel() > 10


def test_a_prompt_in_parts_samples_no_token_and_greedy_requests_have_temperature_one():
    recorder, tokens = Recorder(), []
    request = (0, SimpleNamespace(temperature=0.0), [1], tokens)
    recorder.update_state(SimpleNamespace(removed=[], added=[request], moved=[]))
    logits = torch.randn(1, VOCAB)
    recorder.apply(logits)  # the first part
    recorder.update_state(None)
    recorder.apply(logits)
    tokens.append(5)
    recorder.update_state(SimpleNamespace(removed=[0], added=[], moved=[]))
    (finished,) = recorder.finished
    assert finished.logprobs == erc.token_stats(logits, torch.tensor([5])).logprob.tolist()


def test_speculative_steps_and_a_missing_report_are_refused():
    recorder, tokens = Recorder(), []
    recorder.update_state(
        SimpleNamespace(removed=[], added=[(0, SimpleNamespace(temperature=1), [1], tokens)], moved=[])
    )
    recorder.apply(torch.zeros(1, VOCAB))
    tokens += [1, 2]
    with pytest.raises(ValueError, match="speculative decoding"):
        recorder.update_state(None)
    with pytest.raises(NotImplementedError, match="report"):
        LogprobRecorder().report(RecordedRequest(None, None, []))


def test_the_batch_around_a_row_does_not_change_its_bits():
    logits = 3 * torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(9)
    together = sampled_logprobs(logits, tokens, temperature=0.9)
    for row in range(9):
        assert sampled_logprobs(logits[row : row + 1], tokens[row : row + 1], temperature=0.9).equal(
            together[row : row + 1]
        )


def test_diagnose_shows_what_remains_different():
    """With the engine's logits the log ratios are all 0; with those of another backbone they spread."""
    logits = 3 * torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(3))
    tokens = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(4))[:, 0]
    old = erc.token_stats(logits, tokens)
    out = erc.policy_loss(logits, tokens, old_logprob=old.logprob, old_entropy=old.entropy, advantages=torch.ones(64))
    spreads = []
    for engine in (logits, logits + 0.05 * torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(5))):
        rollout = sampled_logprobs(engine, tokens)
        found = erc.diagnose(
            out, old_logprob=rollout, old_entropy=old.entropy, advantages=torch.ones(64), objective="erc-dapo"
        )
        rows = found.histogram.sum(1)
        spreads.append(int((rows > 0).sum()))
        same = found.groups["all"].ratio == 1
        assert same == (engine is logits)
    assert spreads[0] == 1 < spreads[1]
