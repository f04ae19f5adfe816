"""A seeded random search over what a caller may pass, on every backend, against formulas of its own.

Nothing here is the library's: statistics, divergences and their gradients are written out in NumPy's long double,
centred at the maximum. Every search draws its examples from one fixed seed, and stops when its share of processor time
is spent. What it must find, should it come back: a forbidden token that spoils gradients (0 * inf), logits that are too
large for a fast form, an upstream gradient that turns 0 into NaN.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import erc
from erc.check import half_ulp
from tests.oracle import ROUNDING

EXAMPLES = {"cpu": 200, "torch": 100, "cuda_host": 200, "triton": 14}  # in Triton's interpreter a call takes a second
SECONDS = 25.0  # of processor time, a search

Real = np.longdouble
RULES = [
    erc.PPOClip(0.2, 0.28, dual_clip=3.0),
    erc.GPPO(),
    erc.CEGPPO(),
    erc.CISPO(),
    erc.SAPO(),
    erc.DPPO("tv"),
    erc.DPPO("kl"),
    erc.Reinforce(),
    erc.DRO(),
    erc.NoClip(),
]


def search(kernels: str, *strategies: st.SearchStrategy, seconds: float = SECONDS) -> Callable:
    """Decorates what one example checks, and runs it."""

    def run(check: Callable) -> None:
        spent_before = time.process_time()

        @settings(
            max_examples=EXAMPLES[kernels],
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.tuples(*strategies))
        def example(drawn):
            if time.process_time() - spent_before < seconds:
                check(*drawn)

        example()

    return run


# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Rows and their scaling. `repr` shows how they are made, not what they hold."""

    seed: int
    rows: int
    vocab: int
    dtype: torch.dtype
    spread: float
    offset: float
    forbidden: str
    temperature: float
    temperature_by_row: bool
    softcap: float | None
    logit_scale: float
    upstream: float
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def logits(self) -> Tensor:
        """Rows from flat to peaked, far from 0, with ties, and with tokens that have no probability."""
        z = self.spread * self.normal(self.rows, self.vocab)
        z += self.offset
        z[:, 0] = z.amax(-1)  # a tie
        lead = torch.tensor([0.0, 4.0, 12.0, 20.0])[torch.randint(4, (self.rows,), generator=self.generator)]
        z[torch.arange(self.rows), torch.randint(self.vocab, (self.rows,), generator=self.generator)] += lead
        z = z.to(self.dtype)
        if self.forbidden != "none":
            lowest = {"-inf": -torch.inf, "finfo.min": torch.finfo(self.dtype).min}[self.forbidden]
            hole = torch.rand(self.rows, self.vocab, generator=self.generator) < 0.3
            hole[:, -1] = False
            z = torch.where(hole, lowest, z)
        return z

    def labels(self, logits: Tensor) -> Tensor:
        labels = torch.randint(self.vocab, (self.rows,), generator=self.generator)
        return torch.where(torch.rand(self.rows, generator=self.generator) < 0.4, logits.argmax(-1), labels)

    def weights(self, *shape: int) -> Tensor:
        return self.upstream * self.normal(*shape)

    @property
    def scaling(self) -> dict:
        temperature: float | Tensor = self.temperature
        if self.temperature_by_row:
            temperature = self.temperature * torch.linspace(0.7, 1.3, self.rows)
        return {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}


def drawn_rows(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    def fits(drawn: Drawn) -> bool:  # float16 ends at 65,504
        return drawn.dtype != torch.float16 or drawn.offset < 1e4

    return st.builds(
        Drawn,
        seed=st.integers(0, 2**31),
        rows=st.integers(1, 4),
        vocab=st.one_of(st.integers(2, 40), st.integers(41, 600)),
        dtype=st.sampled_from(dtypes),
        spread=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
        offset=st.sampled_from([0.0, 1e7, -30.0, 1e6, 300.0, 1e8]),
        forbidden=st.sampled_from(["none", "-inf", "-inf", "finfo.min"]),
        temperature=st.sampled_from([0.05, 0.6, 1.0, 1.7, 20.0]),
        temperature_by_row=st.booleans(),
        softcap=st.sampled_from([None, None, None, 5.0, 30.0]),
        logit_scale=st.sampled_from([1.0, 1.0, 0.3, 2.5]),
        upstream=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    ).filter(fits)


# ---- the formulas, in long double ------------------------------------------------------------------------------------


class Gradient(NamedTuple):
    """A gradient, and the sum of its terms' sizes: where they cancel, their rounding stays."""

    value: np.ndarray
    size: np.ndarray

    def rows(self, chosen: np.ndarray) -> Gradient:
        return Gradient(self.value[chosen], self.size[chosen])


class Exact:
    """The statistics of rows of logits, and the gradients of them by the logits."""

    def __init__(self, logits: Tensor, scaling: dict) -> None:
        z = logits.double().numpy().astype(Real)
        temperature = scaling["temperature"]
        if isinstance(temperature, Tensor):
            temperature = temperature.to(torch.promote_types(logits.dtype, torch.float32)).double().numpy()[:, None]
        temperature = np.asarray(temperature, Real)
        cap, scale = scaling["softcap"], Real(scaling["logit_scale"])
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            inner = z * scale
            capped = inner if cap is None else np.where(np.isinf(z), z, Real(cap) * np.tanh(inner / Real(cap)))
            slope = scale if cap is None else scale / np.cosh(np.minimum(np.abs(inner) / Real(cap), Real(5e3))) ** 2
            self.x = capped / temperature
            lowest = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).min
            self.x = np.where(self.x < lowest, -np.inf, self.x)  # what the statistics' dtype cannot hold
            self.chain = np.where(np.isneginf(z), Real(0), slope / temperature * np.ones_like(z))
            top = self.x.max(-1, keepdims=True)
            u = self.x - top
            e = np.exp(u)
            at_top = np.zeros_like(e)
            at_top[np.arange(len(e)), u.argmax(-1)] = 1
            rest = (e - at_top).sum(-1, keepdims=True)
            log_sum = np.log1p(rest)
            self.p = e / (1 + rest)
            self.log_p = u - log_sum
            p_log_p = np.where(self.p == 0, Real(0), self.p * np.where(self.p == 0, Real(0), self.log_p))
            # log1p(R) - sum e u / S: two terms >= 0.
            weighed = np.where(e == 0, Real(0), e * np.where(e == 0, Real(0), u)).sum(-1, keepdims=True)
            self.entropy = (log_sum - weighed / (1 + rest))[:, 0]
            self.logsumexp = (top + log_sum)[:, 0]
            self.d_entropy = -(p_log_p + self.p * self.entropy[:, None])
            self.entropy_terms = np.abs(p_log_p) + self.p * self.entropy[:, None]
            self.largest_x = np.abs(np.where(np.isinf(self.x), Real(0), self.x)).max(-1)

    def logprob(self, labels: Tensor) -> np.ndarray:
        return self.log_p[np.arange(len(self.p)), labels.numpy()]

    def d_logprob(self, labels: Tensor) -> np.ndarray:
        one = np.zeros_like(self.p)
        one[np.arange(len(self.p)), labels.numpy()] = 1
        others = np.where(one == 1, Real(0), self.p).sum(-1, keepdims=True)
        return np.where(one == 1, others, -self.p)  # 1 - p of the label, without cancellation

    def gradient(self, by_logprob, by_entropy, by_logsumexp, labels: Tensor) -> Gradient:
        rows = [np.asarray(g, Real)[:, None] for g in (by_logprob, by_entropy, by_logsumexp)]
        terms = [rows[0] * self.d_logprob(labels), rows[1] * self.d_entropy, rows[2] * self.p]
        sizes = [np.abs(terms[0]), np.abs(rows[1]) * self.entropy_terms, np.abs(terms[2])]
        return Gradient(sum(terms) * self.chain, sum(sizes) * self.chain)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(Real)


def assert_rows(tested: Tensor, exact: np.ndarray, bound: np.ndarray, name: str) -> None:
    error = np.abs(numbers(tested) - exact)
    same = numbers(tested) == exact  # infinities
    assert (same | (error <= bound)).all(), (name, tested, exact, error / bound)


def assert_gradient(tested: Tensor, exact: Gradient, relative, absolute=0.0) -> None:
    """Within `relative` of the row's largest, plus the rounding of the dtype."""
    largest = exact.size.max(-1, keepdims=True)
    tiny = 2.0**-24 if tested.dtype == torch.float16 else 1e-37
    bound = relative * largest + ROUNDING[tested.dtype] * 1.01 * np.abs(exact.value) + tiny + absolute
    representable = np.abs(exact.value) * 1.01 <= torch.finfo(tested.dtype).max
    assert tested.isfinite()[torch.tensor(representable)].all(), tested
    error = np.abs(numbers(tested) - exact.value)
    assert (error <= bound)[representable].all(), (error / bound)[representable].max()


def floor(exact: Exact, upstream: Tensor) -> np.ndarray:
    """Of a gradient: what is left where its terms cancel, whatever their size in the end."""
    return (
        1e-12 * np.abs(numbers(upstream)).reshape(-1, len(exact.p)).sum(0)[:, None] * exact.chain.max(-1, keepdims=True)
    )


def relative_error(drawn: Drawn) -> float:
    """Of a float32 gradient: the contract's 1e-6 (docs/concepts.md), and what a softcap's tanh adds."""
    return 3e-6 + 2.0**-22 * (drawn.softcap or 0.0) / drawn.temperature


def huge(drawn: Drawn) -> bool:
    """A softcap at the end of its range: its slope is below what the row's numbers tell apart."""
    return drawn.softcap is not None and (abs(drawn.offset) + 4 * drawn.spread) * drawn.logit_scale > 8 * drawn.softcap


# ---- the searches ----------------------------------------------------------------------------------------------------


def test_statistics_and_their_gradients(kernels):
    @search(kernels, drawn_rows())
    def check(drawn: Drawn) -> None:
        if huge(drawn):
            return
        logits = drawn.logits().requires_grad_()
        labels = drawn.labels(logits.detach())
        exact = Exact(logits.detach(), drawn.scaling)
        # Beyond what the dtype holds a finite logit is -inf once it is scaled, and its own log-prob has no gradient.
        beyond = np.isneginf(exact.logprob(labels)) & np.isfinite(
            numbers(logits)[np.arange(drawn.rows), labels.numpy()]
        )
        labels = torch.where(torch.tensor(beyond), logits.detach().argmax(-1), labels)
        stats = erc.token_stats(logits, labels, **drawn.scaling)
        logprob = exact.logprob(labels)
        forbidden = np.isneginf(logprob) | (logprob < -1e30)
        size = np.maximum(1, exact.largest_x)
        softcap_error = 2.0**-23 * (drawn.softcap or 0.0) / drawn.temperature * 2
        assert (stats.entropy >= 0).all()
        assert_rows(stats.entropy, exact.entropy, (2e-6 + softcap_error) * exact.entropy + 1e-13, "entropy")
        assert_rows(stats.logsumexp, exact.logsumexp, 1e-6 * np.maximum(size, np.abs(exact.logsumexp)), "logsumexp")
        bound = 1e-6 * np.maximum(size, np.where(forbidden, 0, np.abs(logprob)))
        assert_rows(stats.logprob[~forbidden], logprob[~forbidden], bound[~forbidden], "logprob")
        upstream = drawn.weights(3, drawn.rows).to(stats.entropy.dtype)
        at_forbidden = torch.tensor(forbidden & np.isneginf(numbers(logits)[np.arange(drawn.rows), labels.numpy()]))
        (gradient,) = torch.autograd.grad(list(stats[:3]), logits, list(upstream))
        error, least = relative_error(drawn), floor(exact, upstream)
        assert_gradient(gradient, exact.gradient(*numbers(upstream), labels), error, least)
        assert not gradient[torch.arange(drawn.rows), labels][at_forbidden].any()
        (alone,) = torch.autograd.grad(erc.token_stats(logits, **drawn.scaling).entropy, logits, upstream[1])
        zero = np.zeros(drawn.rows)
        assert_gradient(alone, exact.gradient(zero, numbers(upstream[1]), zero, labels), error, least)


def test_pairs_and_their_gradients(kernels):
    @search(kernels, drawn_rows((torch.float32, torch.bfloat16, torch.float64)))
    def check(drawn: Drawn) -> None:
        if huge(drawn):
            return
        logits, old = drawn.logits().requires_grad_(), drawn.logits()
        new, before = Exact(logits.detach(), drawn.scaling), Exact(old, drawn.scaling)
        pair = erc.entropy_ratio(logits, old, **drawn.scaling)
        p, q = new.p, before.p
        with np.errstate(invalid="ignore"):
            delta = np.where((p == 0) & (q == 0), Real(0), new.log_p - before.log_p)
            kl = np.where(p == 0, Real(0), p * delta).sum(-1)
            reverse = np.where(q == 0, Real(0), -q * delta).sum(-1)
        variation = np.abs(p - q).sum(-1) / 2
        ratio = (new.entropy + 1e-8) / (before.entropy + 1e-8)
        # A divergence is made of log-probs, each within 1e-6 of the largest x.
        size = 1e-6 * np.maximum(1, np.maximum(new.largest_x, before.largest_x))
        assert_rows(
            pair.entropy, new.entropy, 3e-6 * new.entropy + 1e-13 + size * (drawn.softcap is not None), "entropy"
        )
        assert_rows(pair.total_variation, variation, 4 * size * variation + 1e-6, "total_variation")
        finite = (np.abs(kl) < 1e30) & (np.abs(reverse) < 1e30)  # further out a difference of log-probs overflows
        for name, value in (("kl_new_old", kl), ("kl_old_new", reverse)):
            tested = getattr(pair, name)
            assert (tested >= 0).all()
            assert_rows(tested[finite], value[finite], (4 * size * (1 + np.abs(value)) + 1e-6)[finite], name)
        upstream = drawn.weights(2, drawn.rows).to(pair.entropy.dtype)
        (gradient,) = torch.autograd.grad(
            [pair.entropy, pair.ratio, pair.total_variation],
            logits,
            [upstream[0], torch.zeros_like(upstream[0]), upstream[1]],
            retain_graph=True,
        )
        g = numbers(upstream)[..., None]
        signs = np.sign(p - q)
        clear = (np.abs(p - q) > 1e-4 * (p + q)) | (p + q == 0)
        clear = clear.all(-1)  # where they all but agree the sign is that of a rounding
        by_entropy, by_variation = g[0] * new.d_entropy, g[1] / 2 * p * (signs - (p * signs).sum(-1, keepdims=True))
        entropy_terms = np.abs(g[0]) * new.entropy_terms
        exact = Gradient((by_entropy + by_variation) * new.chain, (entropy_terms + np.abs(by_variation)) * new.chain)
        rounding = 1e-6 * np.abs(g[1]) / drawn.temperature * max(1.0, drawn.logit_scale) * 2
        error = relative_error(drawn) + 4 * size[:, None]
        if clear.any():
            assert_gradient(gradient[torch.tensor(clear)], exact.rows(clear), error[clear], rounding[clear])
        (alone,) = torch.autograd.grad(pair.entropy, logits, upstream[0])
        by_entropy = by_entropy * new.chain
        assert_gradient(alone, Gradient(by_entropy, entropy_terms * new.chain), error, floor(new, upstream[0]))
        assert_rows(pair.ratio, ratio, 1e-5 * ratio + size * (drawn.softcap is not None), "ratio")


def test_objectives_and_their_gradients(kernels):
    rules = st.sampled_from(RULES)
    gates = st.sampled_from([None, erc.EntropyRatioClip(), erc.EntropyRatioClip(value="zero")])
    penalties = st.sampled_from([None, *(erc.KLPenalty(kind, 0.5) for kind in ("k1", "k2", "k3", "abs", "k3+"))])

    @search(kernels, drawn_rows((torch.float32, torch.bfloat16)), rules, gates, penalties, st.sampled_from([0.0, 0.3]))
    def check(drawn: Drawn, rule, gate, penalty, bonus) -> None:
        if huge(drawn) or abs(drawn.offset) > 1e4:  # a log-prob's rounding would be the whole ratio
            return
        logits = drawn.logits().requires_grad_()
        labels = drawn.labels(logits.detach())
        stats = erc.token_stats(logits.detach(), labels, **drawn.scaling)
        labels = torch.where(stats.logprob < -80, logits.detach().argmax(-1), labels)
        stats = erc.token_stats(logits.detach(), labels, **drawn.scaling)
        rows = {
            "old_logprob": stats.logprob + 0.3 * drawn.normal(drawn.rows),
            "old_entropy": stats.entropy * (1 + 0.05 * drawn.normal(drawn.rows)),
            "ref_logprob": stats.logprob + 0.3 * drawn.normal(drawn.rows),
            "advantages": drawn.normal(drawn.rows),
            "mask": drawn.upstream * torch.rand(drawn.rows, generator=drawn.generator),
        }
        objective = erc.Objective(
            rule, gate, penalty, entropy_coef=bonus, entropy_reduction="loss", reduction="token-sum"
        )
        out = erc.policy_loss(logits, labels, objective=objective, **rows, **drawn.scaling)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        # The same decisions: in float64, from the log-prob and entropy that the kernel reports.
        logprob, entropy = (value.double().requires_grad_() for value in (out.logprob, out.entropy))
        doubles = {name: value.double() for name, value in rows.items()}
        expected = erc.reference.objective_loss(logprob, entropy, objective=objective, **doubles)
        by_logprob, by_entropy = torch.autograd.grad(expected.loss, (logprob, entropy), allow_unused=True)
        by_entropy = torch.zeros_like(by_logprob) if by_entropy is None else by_entropy
        exact = Exact(logits.detach(), drawn.scaling)
        torch.testing.assert_close(out.per_token_loss.double(), expected.per_token_loss, rtol=1e-5, atol=1e-5)
        gradient_exact = exact.gradient(numbers(by_logprob), numbers(by_entropy), np.zeros(drawn.rows), labels)
        # A coefficient may be a small difference of two terms of the size of the log-prob.
        absolute = 3e-6 * numbers(rows["mask"]) * np.abs(exact.chain).max(-1) * (1 + np.abs(numbers(out.logprob)) * 0.1)
        relative = relative_error(drawn) + half_ulp(out.logprob).numpy()
        assert_gradient(gradient, gradient_exact, relative[:, None], absolute[:, None])


def test_linear_forms(kernels):
    """Of small whole numbers the logits are exact in every dtype, so the statistics are those of `token_stats` bit for
    bit, and the gradients products of the dense one."""
    sizes = st.tuples(st.integers(1, 5), st.integers(2, 300), st.integers(1, 6), st.integers(0, 2**31))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    names = st.sampled_from(["dapo", "erc-gppo", "gspo", "cispo"])

    @search(kernels, sizes, dtypes, names, st.booleans(), st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
    def check(size, dtype, name, by_rows, weight_of_tokens, bias) -> None:
        rows, vocab, width, seed = size
        generator = torch.Generator().manual_seed(seed)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype).requires_grad_()

        hidden, weight = whole(1, rows, width), whole(vocab, width)
        offset = whole(vocab) if bias else None
        logits = torch.nn.functional.linear(
            hidden.detach(), weight.detach(), None if offset is None else offset.detach()
        )
        logits.requires_grad_()
        labels = torch.randint(vocab, (1, rows), generator=generator)
        labels[0, 0] = labels[0, 0] if rows == 1 else -100
        settings = {"temperature": 0.7, "memory_budget": 2 * vocab * dtype.itemsize if by_rows else None}
        dense = erc.token_stats(logits, labels, temperature=0.7)
        stats = erc.linear_token_stats(hidden, weight, labels, bias=offset, **settings)
        for tested, expected in zip(stats, dense, strict=True):
            torch.testing.assert_close(tested, expected, rtol=1e-6, atol=1e-6)
        arguments = {
            "old_logprob": dense.logprob.detach() + 0.3 * torch.randn(1, rows, generator=generator),
            "old_entropy": dense.entropy.detach() * (1 + 0.05 * torch.randn(1, rows, generator=generator)),
            "advantages": torch.randn(1, rows, generator=generator).to(dense.entropy.dtype),
            "mask": torch.full((1, rows), weight_of_tokens),
            "objective": erc.objective(name, reduction="token-sum"),
        }
        (by_logits,) = torch.autograd.grad(erc.policy_loss(logits, labels, temperature=0.7, **arguments).loss, logits)
        loss = erc.linear_policy_loss(hidden, weight, labels, bias=offset, **settings, **arguments).loss
        leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
        gradients = torch.autograd.grad(loss, leaves)
        g = by_logits.double().view(rows, vocab)
        exact = [(g @ weight.double()).view(1, rows, width), g.t() @ hidden.double().view(rows, width), g.sum(0)]
        relative = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float64: 1e-5}[dtype]
        for tested, expected in zip(gradients, exact, strict=False):
            bound = relative * g.abs().sum() * 3 + 1e-12
            assert (tested.double() - expected).abs().max() <= bound


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytestmark = []
