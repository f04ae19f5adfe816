"""Every rule with every gate, penalty and reduction: the backends against the float64 oracle, in float64.

The tokens stand on both sides of every bound and exactly on it: an old log-prob equal to the new one gives r = 1,
which is the bound of a rule of width 0. The CPU backend runs the full product. The emulated backends (Triton's
interpreter, CUDA on the host) take every rule with every gate, and go round the penalties and reductions.

Triton interprets for a whole process or not at all, so its part runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import erc
from erc.backend import register_namespace
from erc.surrogate.reductions import REDUCTIONS
from tests.cuda_host import build
from tests.oracle import gradients_that_must_fail

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
SEQUENCES, TOKENS, VOCAB = 2, 8, 33
TOLERANCE = 1e-9

RULES = [
    erc.PPOClip(0.2, 0.28),
    erc.PPOClip(0.2, 0.28, dual_clip=2.0, delta=3.0),
    erc.PPOClip(0.0, 0.0),
    erc.GPPO(0.2, 0.28, dual_clip=2.0),
    erc.GPPO(0.0, 0.0),
    erc.CEGPPO(),
    erc.CEGPPO(0.0, 0.0),
    erc.CISPO(0.8, 1.28),
    erc.CISPO(1.0, 1.0),
    erc.SAPO(),
    erc.DPPO("tv"),
    erc.DPPO("tv", 0.0, 0.0),
    erc.DPPO("kl", 0.01, 0.01),
    erc.DPPO("full-tv", 0.1, 0.1),
    erc.DPPO("full-kl", 0.1, 0.1),
    erc.Reinforce(),
    erc.DRO(0.5),
    erc.NoClip(),
    erc.IPO(0.05, 0.3),
    erc.IPO(0.0, 0.0),
    erc.TOPR(),
    erc.GSPO(0.1, 0.1),
    erc.GMPO(0.2, 0.2),
    erc.GMPO(0.0, 0.0),
    erc.VESPO(),
    erc.ClipCov(fraction=0.2, low=0.01),
    erc.KLCov(fraction=0.2),
]
GATES = [
    None,
    erc.EntropyRatioClip(),
    erc.EntropyRatioClip(0.05, 0.08, value="zero"),
    erc.EntropyRatioClip(0.0, 0.0),  # rho = 1 stands on both bounds, which are strict
]
KLS = [None, *(erc.KLPenalty(kind, 0.3) for kind in ("k1", "k2", "k3", "abs", "k3+", "full"))]
KLS += [erc.KLPenalty("k3", 0.3, clamp=0.05), erc.KLPenalty("k2", 0.3, importance_weighted=True)]


@pytest.fixture(scope="module")
def cuda_host():
    register_namespace("cuda_host", build.NAMESPACE)
    build.load().configure(clusters=True, multiprocessors=1)


@cache
def problem(backend: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Logits, reference logits, labels and arguments: log-ratios and entropy ratios around every bound.

    They start from the backend's own log-probs: a tie is a matter of the last bit.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(SEQUENCES, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    ref_logits = logits + 0.5 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    labels = logits.topk(2).indices[..., 1]
    stats = erc.token_stats(logits, labels, backend=backend)
    log_ratio = torch.tensor([-1.5, -0.25, -0.1, 0.0, 0.1, 0.26, 0.9, 3.0], dtype=torch.float64)
    entropy_ratio = torch.tensor([1.0, 0.9, 1.02, 1.0, 0.97, 1.12, 1.06, 0.94], dtype=torch.float64)
    arguments = {
        "old_logprob": stats.logprob - log_ratio,
        "old_entropy": stats.entropy / entropy_ratio,
        "ref_logprob": stats.logprob - log_ratio.roll(3) / 2,
        "old_divergence": torch.linspace(0.0, 0.2, TOKENS, dtype=torch.float64).expand(SEQUENCES, TOKENS),
        "advantages": torch.tensor([1.3, -0.7], dtype=torch.float64),
        "mask": torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64).repeat(SEQUENCES, 1),
    }
    arguments["mask"][1, 2] = 0
    labels[0, 5] = -100
    return logits, ref_logits, labels, arguments


def run(objective: erc.Objective, backend: str) -> tuple[erc.PolicyLoss, Tensor]:
    logits, ref_logits, labels, arguments = problem(backend)
    arguments = dict(arguments)
    logits = logits.clone().requires_grad_()
    if objective.kl is not None and objective.kl.kind == "full":
        arguments["ref_kl"] = erc.entropy_ratio(logits, ref_logits, backend=backend).kl_new_old
    generator = torch.Generator().manual_seed(0)
    out = erc.policy_loss(logits, labels, objective=objective, generator=generator, backend=backend, **arguments)
    out.loss.sum().backward()
    return out, logits.grad


@cache
def oracle(objective: erc.Objective) -> tuple[erc.PolicyLoss, Tensor]:
    return run(objective, "torch")


def close(tested: Tensor, exact: Tensor) -> bool:
    """Within the tolerance of the largest value; NaN where the oracle has NaN."""
    return torch.allclose(
        tested, exact, rtol=0, atol=TOLERANCE * max(1.0, float(exact.detach().nan_to_num().abs().max()))
    )


def compare(objective: erc.Objective, backend: str) -> None:
    (tested, gradient), (exact, expected) = run(objective, backend), oracle(objective)
    assert close(tested.loss, exact.loss), objective
    assert close(tested.per_token_loss, exact.per_token_loss), objective
    assert tested.metrics.keys() == exact.metrics.keys()
    for name, value in tested.metrics.items():
        torch.testing.assert_close(value.double(), exact.metrics[name].double(), rtol=1e-6, atol=1e-9, equal_nan=True)
    scale = expected.abs().max()
    assert (gradient - expected).abs().max() <= TOLERANCE * scale, objective
    if scale > 0:
        assert all((wrong - expected).abs().max() > TOLERANCE * scale for wrong in gradients_that_must_fail(gradient))


def named(value: Any) -> str:
    return str(value).replace("erc.", "")


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_cpu_backend_on_the_full_product(rule):
    gradients = 0
    for gate, kl, reduction in product(GATES, KLS, REDUCTIONS):
        objective = erc.Objective(rule, gate, kl, entropy_coef=0.01 if kl is None else 0.0, reduction=reduction)
        compare(objective, "cpu")
        gradients += bool(oracle(objective)[1].any())
    assert gradients == len(GATES) * len(KLS) * len(REDUCTIONS), "an objective without any gradient tests little"


def round_robin(rule: erc.RatioRule, kls_a_gate: int) -> list[erc.Objective]:
    """The rule with every gate; over all rules each penalty and each reduction comes up with each gate."""
    first = RULES.index(rule)
    chosen = []
    for number, (gate, turn) in enumerate(product(GATES, range(kls_a_gate))):
        kl = KLS[(first * kls_a_gate + turn + number) % len(KLS)]
        reduction = REDUCTIONS[(first + number) % len(REDUCTIONS)]
        chosen.append(erc.Objective(rule, gate, kl, entropy_coef=0.01, reduction=reduction))
    return chosen


@pytest.mark.skipif(build.compiler() is None or INTERPRETED, reason="needs g++")
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_cuda_on_the_host(rule, cuda_host):
    for objective in round_robin(rule, 3):
        compare(objective, "cuda_host")


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_triton_in_the_interpreter(rule, monkeypatch):
    from erc.triton_kernels import tuning

    monkeypatch.setattr(tuning, "LANES", 32)
    for objective in round_robin(rule, 1):
        compare(objective, "triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_in_a_process_of_its_own():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "interpreter"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert f"{len(RULES)} passed" in ran.stdout


@pytest.mark.parametrize("name", [name for name in erc.objectives() if not name.startswith("erc-")])
def test_the_product_holds_every_preset(name):
    assert type(erc.objective(name).ratio) in {type(rule) for rule in RULES}
