"""Every peer computes what erc computes, by the adapter that is timed, or says why it does not take part."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("rich", reason="the benchmarks need rich")
from benchmarks import ours
from benchmarks.peers import PEERS, Unsupported, Variant, compiled, flash_attn, liger, quack
from benchmarks.variants import all_variants
from benchmarks.workloads import Case, Inputs, plain_statistics

ROWS, VOCAB, HIDDEN = 16, 515, 32  # four sequences; an odd vocabulary
(ORACLE,) = ours.variants(("torch",))


def gradients(variant: Variant, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What one call of `variant` leaves in the leaves that it differentiates."""
    kept: list[Tensor] = []

    def logits(storage: Tensor | None = None) -> Tensor:
        kept[:] = [(inputs.logits_master if storage is None else storage).clone().requires_grad_()]
        return kept[0]

    def head() -> tuple[Tensor, Tensor]:
        kept[:] = [leaf.clone().requires_grad_() for leaf in (inputs.hidden, inputs.weight)]
        return kept[0], kept[1]

    monkeypatch.setattr(inputs, "logits", logits)
    monkeypatch.setattr(inputs, "head", head)
    variant.prepare(inputs).call()
    return [leaf.grad for leaf in kept]


def undecided(case: Case) -> Inputs:
    """Inputs of tokens with entropies of some nats: on certain tokens a peer's entropy is so far off that ERC decides
    otherwise, which is what the accuracy table is for, and not a fault of the adapter."""
    inputs = Inputs(case)
    if case.hidden:
        inputs.hidden.mul_(0.3)
        inputs.logprob, inputs.entropy = plain_statistics(inputs.hidden @ inputs.weight.t(), inputs.labels)
        noise = torch.randn(2, case.rows, generator=inputs.generator)
        inputs.old_logprob, inputs.old_entropy = inputs.logprob + 0.1 * noise[0], inputs.entropy * (1 + 0.04 * noise[1])
    return inputs


def assert_like_the_oracle(variant: Variant, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(ORACLE, inputs, monkeypatch)
    found = gradients(variant, inputs, monkeypatch)
    assert len(found) == len(wanted) and all(gradient.abs().max() > 1e-3 for gradient in wanted)
    for got, want in zip(found, wanted, strict=True):
        if got.dim() == 3:  # sequences; a peer's may have one logit row more than tokens
            got = got[:, : ROWS // inputs.sequences].reshape(-1, got.shape[-1])
        torch.testing.assert_close(got, want.view_as(got), rtol=1e-4, atol=1e-6)


ON_CPU = [peer for peer in PEERS if "cpu" in peer.devices and peer is not compiled.PEER]  # that is the eager code
WITHOUT_ENTROPY = ("Liger", "cut-cross-entropy", "PyTorch linear_cross_entropy")
GRADIENTS = [
    pytest.param(peer, operator, objective, id=f"{peer.name}, {operator} {objective}")
    for peer in ON_CPU
    for operator, objectives in {
        "stats-backward": ("",),
        "policy-loss": ("dapo", "erc-dapo", "erc-gppo"),
        "linear": ("dapo", "erc-dapo", "erc-gppo"),
    }.items()
    for objective in (objectives[:1] if peer.name in WITHOUT_ENTROPY else objectives)
    if operator in peer.operators and (peer, operator) != (liger.PEER, "policy-loss")  # a Triton kernel
]


@pytest.mark.parametrize(("peer", "operator", "objective"), GRADIENTS)
def test_a_peer_has_our_gradient(peer, operator, objective, monkeypatch):
    case = Case(operator, "float32", ROWS, VOCAB, objective, HIDDEN if operator == "linear" else 0)
    if reason := peer.why_not(case):
        pytest.skip(reason)
    assert_like_the_oracle(peer, undecided(case), monkeypatch)


@pytest.mark.parametrize("peer", [peer for peer in ON_CPU if peer.name in WITHOUT_ENTROPY], ids=lambda peer: peer.name)
def test_a_peer_without_entropy_says_so(peer):
    case = Case("linear", "float32", ROWS, VOCAB, "erc-dapo", HIDDEN)
    if reason := peer.why_not(case):
        pytest.skip(reason)
    with pytest.raises(Unsupported, match=r"no entropy|has no erc-dapo"):
        peer.prepare(Inputs(case)).call()


@pytest.mark.parametrize("peer", [peer for peer in ON_CPU if "stats" in peer.operators], ids=lambda peer: peer.name)
def test_a_peer_has_our_statistics(peer):
    case = Case("stats", "float32", ROWS, VOCAB)
    if reason := peer.why_not(case):
        pytest.skip(reason)
    inputs = Inputs(case)
    logprob, entropy = peer.prepare(inputs).call()
    wanted = ORACLE.prepare(inputs).call()
    torch.testing.assert_close(logprob, wanted.logprob.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, wanted.entropy.float(), rtol=1e-4, atol=1e-5)


def test_the_plain_entropy_ratio_is_ours():
    inputs = Inputs(Case("entropy-ratio", "float32", ROWS, VOCAB))
    (plain,) = (peer for peer in PEERS if peer.name == "eager PyTorch")
    wanted = ORACLE.prepare(inputs).call()
    for got, want in zip(plain.prepare(inputs).call(), wanted, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-5)


def flash_attn_contract(logits: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """`flash_attn.ops.triton.cross_entropy.cross_entropy_loss` as documented: `(losses, z_losses)`, one a row."""
    assert logits.dim() == 2 and labels.shape == logits.shape[:1] and not options
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses, torch.zeros_like(losses)


def quack_contract(x: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """`quack.cross_entropy.cross_entropy` as documented."""
    assert x.dim() == 2 and target.dim() == 1
    return F.cross_entropy(x, target, reduction=reduction)


def liger_contract(logits, old_logp, ref_logp, completion_ids, advantages, **options):
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss` as documented, token-level with `loss_type="dapo"`."""
    batch, length = completion_ids.shape
    assert logits.shape[:2] == (batch, length + 1) and advantages.shape == (batch,) and ref_logp is None
    assert options["beta"] == 0 and options["loss_type"] == "dapo" and options["reduce"]
    logp = torch.log_softmax(logits[:, :-1] / options["temperature"], -1)
    ratio = (logp.gather(-1, completion_ids[..., None]).squeeze(-1) - old_logp).exp()
    clipped = ratio.clamp(1 - options["eps_low"], 1 + options["eps_high"])
    weight = advantages[:, None]
    return -torch.minimum(ratio * weight, clipped * weight).mean(), []


@pytest.mark.parametrize(
    ("peer", "module", "function", "contract"),
    [
        (flash_attn.PEER, "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", flash_attn_contract),
        (quack.PEER, "quack.cross_entropy", "cross_entropy", quack_contract),
        (liger.PEER, "liger_kernel.transformers.grpo_loss", "triton_grpo_loss", liger_contract),
        (liger.IN_PLACE, "liger_kernel.transformers.grpo_loss", "triton_grpo_loss", liger_contract),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else None,
)
def test_an_adapter_of_a_gpu_kernel_has_our_gradient_given_what_the_kernel_documents(
    peer, module, function, contract, monkeypatch
):
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setattr(sys.modules[module], function, contract, raising=False)
    inputs = Inputs(Case("policy-loss", "float32", ROWS, VOCAB, "dapo"))
    inputs.case = dataclasses.replace(inputs.case, device="cuda")
    assert_like_the_oracle(peer, inputs, monkeypatch)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_variant_takes_part_or_says_why_not(device):
    for variant in all_variants():
        for operator in variant.operators:
            reason = variant.why_not(Case(operator, "float32", 4, 64, device=device))
            assert reason is None or len(reason) > 3


def test_a_missing_peer_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", None)
    monkeypatch.delitem(sys.modules, "quack", raising=False)
    case = Case("policy-loss", "bfloat16", 4, 64, "dapo", device="cuda")
    assert "quack" in quack.PEER.why_not(case)
    assert quack.PEER.why_not(dataclasses.replace(case, device="cpu")) == "does not run on cpu"


def test_the_peers_extra_names_what_a_cpu_runs_and_no_pytorch():
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["peers"]
    named = {re.split("[<>=~]", requirement)[0].replace("-", "_") for requirement in extra}
    modules = {module.split(".")[0] for peer in ON_CPU for module in peer.requires}
    assert named == modules - {"verl"}, "verl's pins exclude the others': the Makefile installs it without them"
    assert "torch" not in named
