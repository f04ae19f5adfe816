"""`fused_policy_forward` equals the loss on the model's own logits; the core imports no trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import erc

transformers = pytest.importorskip("transformers", reason="needs transformers")
from erc.integrations.transformers import fused_policy_forward, head_inputs  # noqa: E402
from erc.integrations.versions import require  # noqa: E402

VOCAB = 37
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gemma2":  # softcap, tied weights
        config = transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5, tie_word_embeddings=True)
        config._attn_implementation = "eager"
        return transformers.Gemma2ForCausalLM(config)
    if kind == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.3))
    if kind == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=4.0))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False))


def make_batch(padding: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (2, 6), generator=generator)
    attention = torch.ones_like(tokens)
    attention[1, slice(0, 2) if padding == "left" else slice(4, 6)] = 0
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    labels[:, :-1][(attention[:, 1:] == 0) | (attention[:, :-1] == 0)] = -100
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}


ROLLOUT = {
    "old_logprob": torch.full((2, 6), -3.6),
    "old_entropy": torch.full((2, 6), 3.58),
    "advantages": torch.tensor([1.0, -0.7]),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "cohere", "granite"])
def test_loss_and_gradients_equal_those_of_the_models_own_logits(kind, padding):
    batch, ours, theirs = make_batch(padding), make_model(kind), make_model(kind)
    out = fused_policy_forward(ours, **batch, **ROLLOUT)
    out.loss.backward()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits
    reference = erc.policy_loss(logits, batch["labels"], backend="torch", **ROLLOUT)
    reference.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.entropy, reference.entropy, rtol=1e-5, atol=1e-6)
    largest = 0.0
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
        largest = max(largest, float(b.grad.abs().max()))
    assert largest > 1e-3, "gradients that vanish compare nothing"


def test_twenty_steps_with_a_verifier_equal_those_of_the_reference():
    pytest.importorskip("reasoning_gym", reason="the verifier comes from reasoning-gym")
    from examples.model import character_tokenizer, small_decoder
    from examples.rollout import sample
    from examples.tasks import Task

    tokenizer, task = character_tokenizer(), Task("chain_sum", short=True)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(small_decoder(tokenizer, width=32, layers=1))
    ours, theirs = models
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-2) for model in models]
    gated = []
    for step in range(10):  # of two updates each
        torch.manual_seed(step)
        asked = [problem for problem in task.problems(2, seed=step) for _ in range(4)]
        device = torch.device("cpu")
        found = sample(theirs, tokenizer, task, asked, max_new_tokens=4, temperature=1.0, device=device)
        batch, labels = found.batch, found.batch.labels
        digits = torch.tensor([sum(c.isdigit() for c in text) / 4 for text in found.texts])
        advantages = erc.rlvr.group_advantages(found.rewards.float() + digits, group_size=4)
        positions = (batch.attention.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            old = head_inputs(ours, batch.tokens, batch.attention, positions).token_stats(labels)
            expected = erc.token_stats(batch.logits(theirs), labels, backend="torch")
        torch.testing.assert_close(old.entropy, expected.entropy, rtol=1e-3, atol=1e-3)
        for _ in range(2):
            rollout = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": advantages}
            out = fused_policy_forward(ours, batch.tokens, labels, attention_mask=batch.attention, **rollout)
            rollout |= {"old_logprob": expected.logprob, "old_entropy": expected.entropy}
            reference = erc.policy_loss(batch.logits(theirs), labels, backend="torch", **rollout)
            for result, optimizer in zip((out, reference), optimizers, strict=True):
                optimizer.zero_grad()
                result.loss.backward()
            torch.testing.assert_close(out.loss, reference.loss, rtol=1e-3, atol=1e-5)
            for name, value in reference.metrics.items():
                torch.testing.assert_close(
                    out.metrics[name], value, rtol=2e-3, atol=2e-5, equal_nan=True, check_dtype=False, msg=name
                )
            largest = max(float(b.grad.abs().max()) for b in theirs.parameters())
            for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * largest, msg=name)
            for optimizer in optimizers:
                optimizer.step()
            gated.append(float(out.metrics["erc_fraction"]))
    assert gated[0] == 0 and max(gated) > 0.05


def test_packed_sequences_equal_separate_ones():
    model = make_model("qwen3")
    tokens = make_batch("left")["input_ids"]
    apart = head_inputs(model, tokens).hidden
    packed = head_inputs(model, tokens.view(1, -1), position_ids=torch.arange(6).repeat(2)[None]).hidden
    torch.testing.assert_close(packed.view_as(apart), apart, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_linear_is_refused():
    model = make_model("qwen3")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="lm_head"):
        head_inputs(model, torch.ones(1, 2, dtype=torch.long))


def test_versions_are_checked_with_a_clear_error():
    with pytest.raises(ImportError, match=r"torch>=99\.0,<100\.0, but torch .* is installed"):
        require("torch", (99, 0), (100, 0))
    with pytest.raises(ImportError, match="not installed"):
        require("no-such-trainer", (1, 0), (2, 0))


def test_the_core_never_imports_a_trainer():
    code = "import sys, erc; print([m for m in ('transformers', 'trl', 'verl', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
