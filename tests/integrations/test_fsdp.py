"""A step of a small transformers model under FSDP2, its head sharded by vocabulary, equals the step of one process."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import erc
from tests.processes import on_ranks

transformers = pytest.importorskip("transformers", reason="the small model comes from transformers")
from erc.integrations.transformers import fused_policy_forward  # noqa: E402

VOCAB, SPLIT, RANKS = 61, 40, 2  # uneven shards
LEARNING_RATE = 0.1


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3ForCausalLM(config)


def make_batch() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, 7), generator=generator)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    rollout = {
        "old_logprob": -4 + 0.1 * torch.randn(2, 7, generator=generator),
        "old_entropy": 4.0 + 0.2 * torch.rand(2, 7, generator=generator),
        "advantages": torch.tensor([1.0, -0.5]),
    }
    return tokens, labels, rollout


def step(model: torch.nn.Module, head: torch.nn.Parameter, shard: erc.VocabShard | None) -> float:
    tokens, labels, rollout = make_batch()
    hidden = model.model(input_ids=tokens).last_hidden_state
    out = erc.linear_policy_loss(
        hidden, head, labels, objective="erc-dapo", vocab_shard=shard, validate=True, **rollout
    )
    out.loss.backward()
    torch.optim.SGD([*model.model.parameters(), head], lr=LEARNING_RATE).step()
    return out.loss.item()


def run_rank(rank: int) -> tuple[float, dict, torch.Tensor]:
    model = make_model()
    start, stop = (0, SPLIT) if rank == 0 else (SPLIT, VOCAB)
    head = torch.nn.Parameter(model.lm_head.weight.detach()[start:stop].clone())
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    loss = step(model, head, erc.VocabShard(None, start, VOCAB))
    parameters = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in model.model.named_parameters()
    }
    with pytest.raises(TypeError, match=r"weight is a DTensor: pass weight\.to_local\(\)"):
        erc.linear_token_stats(torch.zeros(1, 16), model.model.embed_tokens.weight)
    return loss, parameters, head.detach()


def test_fsdp2_step_with_a_sharded_head_equals_the_single_process_step():
    ranks = on_ranks(RANKS, run_rank)
    model = make_model()
    before = {name: value.detach().clone() for name, value in model.model.named_parameters()}
    head_before = model.lm_head.weight.detach().clone()
    loss = step(model, model.lm_head.weight, None)
    assert ranks[0][0] == ranks[1][0] == pytest.approx(loss, rel=1e-6)
    moved = 0.0
    for name, value in model.model.named_parameters():
        moved = max(moved, float((value.detach() - before[name]).abs().max()))
        for _, parameters, _ in ranks:
            torch.testing.assert_close(parameters[name], value.detach(), rtol=1e-5, atol=1e-6)
    assert moved > 1e-3, "a step that moves nothing compares nothing"
    head = torch.cat([rank[2] for rank in ranks])
    torch.testing.assert_close(head, model.lm_head.weight.detach(), rtol=1e-5, atol=1e-6)
    assert (head - head_before).abs().max() > 1e-3


def fused_step(model: torch.nn.Module, forward, rows: slice) -> float:
    """The loss of some rows; under FSDP2 the mean over the ranks is that of all."""
    tokens, labels, rollout = make_batch()
    rollout = {name: value[rows] for name, value in rollout.items()}
    ranks = len(tokens) / len(tokens[rows])
    count = (labels != -100).sum() / ranks
    out = forward(tokens[rows], labels[rows], objective="erc-dapo", normalizer=count.float(), **rollout)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    return out.loss.item()


def run_fused_rank(rank: int) -> tuple[float, dict]:
    model = make_model()
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens, labels, rollout = make_batch()
    with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
        fused_policy_forward(model, tokens, labels, **rollout)
    model.policy_forward = types.MethodType(fused_policy_forward, model)
    register_fsdp_forward_method(model, "policy_forward")
    losses = [fused_step(model, model.policy_forward, slice(rank, rank + 1)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
        fused_policy_forward(model, tokens, labels, **rollout)
    alone = make_model()
    fully_shard(alone.lm_head, mesh=mesh)
    fully_shard(alone, mesh=mesh)
    with pytest.raises(RuntimeError, match="a unit of its own"):
        fused_policy_forward(alone, tokens, labels, **rollout)
    return losses, {name: value.full_tensor().detach() for name, value in model.named_parameters()}


def test_a_fused_forward_that_fsdp2_knows_equals_the_single_process_step():
    ranks = on_ranks(RANKS, run_fused_rank)
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    losses = [fused_step(model, types.MethodType(fused_policy_forward, model), slice(None)) for _ in range(2)]
    mean = [sum(rank[0][i] for rank in ranks) / RANKS for i in range(2)]
    assert mean == pytest.approx(losses, rel=1e-5)
    for name, value in model.named_parameters():
        for _, parameters in ranks:
            torch.testing.assert_close(parameters[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert (model.lm_head.weight.detach() - before).abs().max() > 1e-3
