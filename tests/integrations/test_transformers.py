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
from erc.linear.causal_lm import logit_reading  # noqa: E402
from tests.integrations.tiny_models import NOT_BUILT, causal_lms, small_causal_lm  # noqa: E402

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


def own_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=tokens, use_cache=False)
    return (output[0] if isinstance(output, tuple) else output.logits).float()


def assert_reads_the_models_own_distribution(model: torch.nn.Module) -> None:
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(3, min(vocab, 60), (2, 5), generator=torch.Generator().manual_seed(1))
    logits = own_logits(model, tokens)
    found = head_inputs(model, tokens).token_stats(tokens)
    expected = erc.token_stats(logits, tokens, backend="torch")
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=2e-5, atol=2e-5)
    with pytest.raises(AssertionError):  # logits near 0 would compare nothing
        other = erc.token_stats(1.5 * logits, tokens, backend="torch")
        torch.testing.assert_close(tuple(other), tuple(expected), rtol=1e-3, atol=1e-3)


HEADS = {
    "recurrent_gemma": (0.5, 1.0),  # a softcap under a name of its own
    "xlstm": (0.5, 1.0),  # the same, and chunks
    "modernbert-decoder": (None, 1.0),  # a transform before the head
    "inkling_text": (None, 1.0),  # a scale before the head, and fewer logits than rows of the weight
    "mpt": (None, 1.0),  # a logit_scale in the config that the model does not apply
    "hyperclovax": (None, 4.0),  # a logits_scaling by which it multiplies
    "granite": (None, 0.25),  # one by which it divides
    "llama4_text": (None, 1.0),  # a base_model that is the model itself
    "mllama": (None, 1.0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_stands_around_the_head_is_the_models(kind):
    torch.manual_seed(0)
    model = small_causal_lm(kind)
    assert_reads_the_models_own_distribution(model)
    softcap, scale = HEADS[kind]
    assert logit_reading(model)[:2] == (softcap, pytest.approx(scale, rel=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in causal_lms() if kind not in NOT_BUILT])
def test_every_causal_language_model_is_read_or_refused(kind):
    torch.manual_seed(0)
    model = small_causal_lm(kind)
    if kind == "prophetnet":
        with pytest.raises(ValueError, match="its lm_head gets hidden states"):
            assert_reads_the_models_own_distribution(model)
    else:
        assert_reads_the_models_own_distribution(model)


TOKENS = torch.tensor([[5, 6, 7]])


def test_hooks_that_change_logits_are_refused_and_others_are_not():
    model = make_model("qwen3")
    doubling = model.lm_head.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    assert_reads_the_models_own_distribution(model)
    doubling.remove()
    head_inputs(model, TOKENS)
    for module in (model.lm_head, model):  # after a first reading, too
        biasing = module.register_forward_hook(lambda module, given, output: _biased(output))
        with pytest.raises(ValueError, match=r"Use erc\.policy_loss on the model's own logits"):
            head_inputs(model, TOKENS)
        biasing.remove()
    assert_reads_the_models_own_distribution(model)


def _biased(output):
    if isinstance(output, torch.Tensor):
        return output + 0.1 * (torch.arange(output.shape[-1]) % 2)
    output.logits = _biased(output.logits)
    return output


@pytest.mark.parametrize("change", ["masks a token", "squares", "calls its head twice", "has another weight"])
def test_logits_that_are_another_function_of_the_head_are_refused(change):
    model = make_model("qwen3")
    forward, apply = model.forward, model.lm_head.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        if change == "masks a token":
            output.logits[..., 3] = torch.finfo(torch.float32).min
        elif change == "squares":
            output.logits = output.logits * output.logits.abs()
        elif change == "calls its head twice":
            output.logits = model.lm_head(torch.zeros_like(kwargs["input_ids"][..., None].float().expand(-1, -1, 16)))
        return output

    model.forward = changed
    if change == "has another weight":
        model.lm_head.forward = lambda hidden: 1.01 * apply(hidden)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM does not"):
        head_inputs(model, TOKENS)


def test_a_compiled_caller_gets_what_an_uncompiled_one_gets():
    model, batch = make_model("gemma2"), make_batch("left")
    compiled = torch.compile(fused_policy_forward, backend="eager")
    results = []
    for call in (fused_policy_forward, compiled, compiled):
        model.zero_grad()
        call(model, **batch, **ROLLOUT).loss.backward()
        results.append(model.lm_head.weight.grad.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].abs().max() > 1e-3


def test_a_16_bit_model_is_read_exactly():
    torch.manual_seed(0)
    model = make_model("cohere").bfloat16()
    assert head_inputs(model, TOKENS).logit_scale == pytest.approx(0.3, rel=1e-6)
    model = make_model("gemma2").bfloat16()
    assert head_inputs(model, TOKENS)[3:] == (0.5, 1.0)


def test_reading_a_model_leaves_it_and_the_random_numbers_as_they_were():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=16)  # with dropout
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.drop.eval()
    torch.manual_seed(1)
    logit_reading(model)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert model.training and model.lm_head.training and not model.transformer.drop.training
    assert "forward" not in vars(model.lm_head) and all(p.grad is None for p in model.parameters())


def test_positions_are_refused_where_a_model_would_ignore_them():
    torch.manual_seed(0)
    model = small_causal_lm("bloom")
    with pytest.raises(ValueError, match="position_ids must be None"):
        head_inputs(model, TOKENS, position_ids=torch.arange(3)[None])
    arguments = {"old_logprob": None, "advantages": torch.ones(1), "objective": "dapo"}
    fused_policy_forward(model, TOKENS, TOKENS, attention_mask=torch.ones_like(TOKENS), **arguments).loss.backward()
    assert model.transformer.word_embeddings.weight.grad.abs().max() > 1e-4


def test_a_head_that_is_not_linear_is_refused():
    model = make_model("qwen3")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="lm_head"):
        head_inputs(model, torch.ones(1, 2, dtype=torch.long))


def test_a_head_without_its_weight_is_refused():
    model = make_model("qwen3")
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"must hold the weight of its lm_head, got shape \(0,\)"):
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
