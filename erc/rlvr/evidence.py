"""Evidence Gain (arXiv 2603.09803): how much a reasoning trace helps an expert to his answer, made of log-probs
alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.rlvr.answers import answer_logprobs
from erc.rlvr.chat import check_parts, encode, render
from erc.rlvr.demonstrations import Demonstration

REDUCTIONS = ("mean", "none", "logmeanexp")
OPEN_THINKING = re.compile(r"[<\[◁][\w:|]*think\w*\|?[>\]▷]\s*$", re.IGNORECASE)
TRACE_MARK = "erc-trace-goes-here"


class EvidenceEstimate(NamedTuple):
    """`gain` and `standard_error` `[traces]`, over the choice of experts; `per_expert` `[traces, experts]`; in nats."""

    gain: Tensor
    standard_error: Tensor
    per_expert: Tensor


class EvidenceGain:
    """Evidence Gain over one set of demonstrations, keeping what does not depend on the trace.

    The gain of a trace o of the question q at the expert (q_e, a_e) is `log pi(a_e | q, o, q_e) - log pi(a_e | q_e)`:
    how much more likely the expert's answer becomes when question and trace are shown as an earlier turn.

    Args:
        model: a transformers causal LM that `erc.integrations.transformers` can read, in eval mode.
        tokenizer: with or without a chat template; without one the messages stand as plain text, an empty line between.
        demonstrations: the experts' `query` q_e and `answer` a_e; the paper takes 100.
        per_token: divide each gain by the number of tokens of `a_e`; False gives the sum, which Bayes' rule is about.
        batch_size: sequences per forward pass; changes nothing but speed and memory.
        template_arguments: passed to the chat template, such as `{"enable_thinking": False}`.
        answer_prefix: text between the generation prompt and the expert's answer. Where the generation prompt opens
            the model's thinking (`<think>`) it must be given: "" if the answers start with their reasoning, or what
            closes the thinking, such as "\\n</think>\\n\\n".
        verbatim: place each trace unchanged into the turn that the template makes of a placeholder. Templates of
            reasoning models cut an earlier turn's reasoning; without `verbatim` that is an error.
        progress: draw a bar, by the package rich.

    The log-probs without a trace are computed once, and again after the weights have changed.

    Raises:
        ValueError: naming the argument; where the template loses a part of the context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        demonstrations: Sequence[Demonstration],
        *,
        per_token: bool = True,
        batch_size: int = 8,
        template_arguments: Mapping[str, Any] | None = None,
        answer_prefix: str | None = None,
        verbatim: bool = False,
        progress: bool = False,
    ) -> None:
        if not demonstrations:
            raise ValueError("demonstrations must not be empty")
        self.model, self.tokenizer, self.demonstrations = model, tokenizer, tuple(demonstrations)
        self.batch_size, self.verbatim, self.progress = batch_size, verbatim, progress
        self.template_arguments, self.answer_prefix = dict(template_arguments or {}), answer_prefix
        self._answers = [
            list(tokenizer(demo.answer, add_special_tokens=False)["input_ids"]) for demo in self.demonstrations
        ]
        self._bare = [encode(tokenizer, self._context(demo, [], [demo.query])) for demo in self.demonstrations]
        self._lengths = torch.tensor([len(answer) if per_token else 1 for answer in self._answers])
        self._plain: Tensor | None = None
        self._versions: list[int] = []

    def gains(self, query: str, traces: Sequence[str], reduce: str = "mean") -> Tensor:
        """The gain of each trace of `query`, in nats, float32.

        Args:
            reduce: over the experts: "mean", "logmeanexp" (`log mean_e exp(EG_e)`, the logarithm of the weight that
                In-Context RLVR approximates; of sums, so with `per_token=False`), or "none" for `[traces, experts]`.
        """
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {reduce!r}")
        if reduce == "none":
            return self.estimate(query, traces).per_expert
        return self.estimate(query, traces, reduce).gain

    @torch.no_grad()
    def estimate(self, query: str, traces: Sequence[str], reduce: str = "mean") -> EvidenceEstimate:
        """The gains with the standard error that stems from the choice of experts (NaN for a single one).

        That of "logmeanexp" is by the delta method, and too small where a few experts carry the sum.
        """
        if reduce not in ("mean", "logmeanexp"):
            raise ValueError(f'reduce must be "mean" or "logmeanexp", got {reduce!r}')
        if isinstance(traces, str) or not traces:
            raise ValueError("traces must be a sequence of at least one text")
        contexts = [[self._shown(query, trace, demo) for demo in self.demonstrations] for trace in traces]
        with self._advancing(len(traces) + 1) as advance:
            plain = self._plain_logprobs(advance)
            conditioned = torch.stack([self._conditioned_logprobs(texts, advance) for texts in contexts])
        gains = (conditioned - plain) / self._lengths.to(plain.device)
        if reduce == "mean":
            return EvidenceEstimate(gains.mean(1), _standard_error(gains), gains)
        reduced = gains.logsumexp(1) - math.log(gains.shape[1])
        return EvidenceEstimate(reduced, _standard_error((gains - reduced[:, None]).exp()), gains)

    def _shown(self, query: str, trace: str, demo: Demonstration) -> str:
        said = TRACE_MARK if self.verbatim else trace
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": said}]
        text = self._context(demo, turns, [query, said, demo.query])
        return text.replace(TRACE_MARK, trace, 1) if self.verbatim else text

    def _context(self, demo: Demonstration, turns: list[dict[str, str]], parts: list[str]) -> str:
        """The text before the expert's answer; checked to hold `parts`, in this order."""
        text = render(self.tokenizer, [*turns, {"role": "user", "content": demo.query}], self.template_arguments)
        names = ("query", "traces", "demonstrations")[-len(parts) :]
        check_parts(text, zip(names, parts, strict=True), "pass verbatim=True, or template_arguments that keep it")
        if self.answer_prefix is None and OPEN_THINKING.search(text):
            raise ValueError(
                "answer_prefix must be given, since the generation prompt opens the model's thinking with "
                f"{text[-20:]!r}: '' if the experts' answers start with their reasoning, else what closes the thinking"
            )
        return text + (self.answer_prefix or "")

    def _plain_logprobs(self, advance: Callable[[int], None]) -> Tensor:
        versions = [parameter._version for parameter in self.model.parameters() if not parameter.is_inference()]
        if self._plain is None or versions != self._versions:
            self._plain = answer_logprobs(
                self.model, self._bare, self._answers, batch_size=self.batch_size, advance=advance
            )
            self._versions = versions
        else:
            advance(len(self._answers))
        return self._plain

    def _conditioned_logprobs(self, texts: list[str], advance: Callable[[int], None]) -> Tensor:
        contexts = [encode(self.tokenizer, text) for text in texts]
        shared = _common_prefix(contexts)
        return answer_logprobs(
            self.model,
            [context[shared:] for context in contexts],
            self._answers,
            batch_size=self.batch_size,
            shared_prefix=contexts[0][:shared],
            advance=advance,
        )

    @contextmanager
    def _advancing(self, passes: int) -> Iterator[Callable[[int], None]]:
        if not self.progress:
            yield lambda count: None
            return
        try:
            from rich.progress import Progress
        except ImportError as error:
            raise ImportError("progress=True draws a bar with rich: pip install rich") from error
        with Progress() as bars:
            task = bars.add_task("Evidence Gain", total=passes * len(self.demonstrations))
            yield lambda count: bars.advance(task, count)


def _standard_error(values: Tensor) -> Tensor:
    """The standard error of the mean over the last dimension; NaN for a single value."""
    count = values.shape[-1]
    return values.std(-1) / count**0.5 if count > 1 else torch.full_like(values[..., 0], torch.nan)


def _common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share."""
    shortest, longest = min(sequences), max(sequences)
    pairs = enumerate(zip(shortest, longest, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(shortest), len(longest)))


def evidence_gain(
    model: Any,
    tokenizer: Any,
    query: str,
    traces: Sequence[str],
    demonstrations: Sequence[Demonstration],
    *,
    reduce: str = "mean",
    **options: Any,
) -> Tensor:
    """`mean_e [log pi(a_e | q, o, q_e) - log pi(a_e | q_e)]` for each trace o: float32 `[len(traces)]`, in nats.

    In-Context RLVR weighs rewards approximately by `mean_e exp(EG_e)` without computing it. Approximately, since the
    factor `pi(a_e | q_e) / pi(a_e | q, q_e)` that Bayes' rule leaves depends on the expert and so stays inside the
    mean, and since the experts' questions are taken to be independent of the trace.

    Args:
        reduce, options: as `EvidenceGain`, which saves work where several questions share their demonstrations.

    Raises:
        ValueError: as `EvidenceGain`.
    """
    return EvidenceGain(model, tokenizer, demonstrations, **options).gains(query, traces, reduce)
