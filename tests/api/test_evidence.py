"""Evidence Gain on the templates and models that people have: reasoning templates, none at all, every kind of cache."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="models and tokenizers come from transformers")

from erc.integrations.transformers import head_inputs  # noqa: E402
from erc.rlvr import Demonstration, EvidenceGain, answer_logprobs, evidence_gain, with_demonstrations  # noqa: E402
from examples.model import character_tokenizer  # noqa: E402

DEMOS = [Demonstration("1+1?", "it is 2", "2"), Demonstration("3+4?", "seven: 7", "7"), Demonstration("5+1?", "6", "6")]
QUERY, SOUND, NONSENSE = "2+2?", "<think>two and two</think>4", "<think>fish, blue!</think>4"
# What DeepSeek-R1 and Qwen3 do: an earlier turn loses its reasoning, and the generation prompt may open the thinking.
REASONING_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U:{{ m['content'] }}{% else %}"
    "A:{{ m['content'].split('</think>')[-1].strip() }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% if thinking %}<think>\n{% endif %}{% endif %}"
)


def tiny(name: str = "Qwen3", **settings) -> torch.nn.Module:
    sizes = dict(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256
    )
    if name not in ("GPT2", "Bloom"):
        sizes |= dict(intermediate_size=64, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that contexts matter
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def reasoning_tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = REASONING_TEMPLATE
    return tokenizer


def naive_logprob(model, context: list[int], answer: list[int]) -> torch.Tensor:
    """One sequence through the model itself, float64 log-softmax, no padding, no cache."""
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    return sum(logprobs[len(context) - 1 + i, token] for i, token in enumerate(answer))


def naive_gains(model, tokenizer, shown, bare) -> torch.Tensor:
    """`[experts]` of sums, from the texts before the experts' answers."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = zip(shown, bare, DEMOS, strict=True)
    return torch.stack(
        [
            naive_logprob(model, encode(long), encode(d.answer)) - naive_logprob(model, encode(short), encode(d.answer))
            for long, short, d in rows
        ]
    )


def test_a_template_that_cuts_the_trace_is_an_error(model):
    tokenizer = reasoning_tokenizer()
    with pytest.raises(ValueError, match=r"drops or changes a part of traces.*verbatim"):
        evidence_gain(model, tokenizer, QUERY, [SOUND, NONSENSE], DEMOS)
    assert evidence_gain(model, tokenizer, QUERY, [" 4 "], DEMOS).isfinite().all(), "what it trims is no loss"
    only_last = character_tokenizer()
    only_last.chat_template = "{{ messages[-1]['content'] }} "
    with pytest.raises(ValueError, match="part of query"):
        evidence_gain(model, only_last, QUERY, ["4"], DEMOS)


def test_a_template_that_cuts_a_demonstration_is_an_error():
    options = {"tokenizer": reasoning_tokenizer(), "max_tokens": 200}
    thoughtful = Demonstration("1+1?", "<think>one and one</think>2", "2")
    question = [{"role": "user", "content": QUERY}]
    with pytest.raises(ValueError, match=r"part of demonstrations.*cut the reasoning"):
        with_demonstrations(question, [thoughtful], "multi-round", **options)
    for demonstration, template in ((thoughtful, "in-context"), (DEMOS[0], "multi-round")):
        assert with_demonstrations(question, [demonstration], template, **options)


@pytest.mark.parametrize(("thinking", "prefix"), [(False, ""), (True, ""), (True, "\n</think>\n\n")])
def test_verbatim_traces_and_answer_prefix_equal_the_definition(model, thinking, prefix):
    tokenizer = reasoning_tokenizer()
    options = dict(verbatim=True, per_token=False, template_arguments={"thinking": thinking}, answer_prefix=prefix)
    gains = evidence_gain(model, tokenizer, QUERY, [SOUND, NONSENSE], DEMOS, reduce="none", batch_size=2, **options)
    start = "A:" + ("<think>\n" if thinking else "") + prefix
    bare = [f"U:{d.query}{start}" for d in DEMOS]
    for gain, trace in zip(gains, (SOUND, NONSENSE), strict=True):
        shown = [f"U:{QUERY}A:{trace}<eos>{text}" for text in bare]
        torch.testing.assert_close(gain.double(), naive_gains(model, tokenizer, shown, bare), rtol=1e-4, atol=1e-4)
    assert (gains[0] - gains[1]).abs().min() > 1e-3, "traces that the measure cannot tell apart test nothing"


@pytest.mark.parametrize("opening", ["<think>\n", "<thinking>", "<seed:think>", "[THINK]", "◁think▷"])
def test_where_the_answer_starts_must_be_said_if_the_prompt_opens_the_thinking(model, opening):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}" + opening
    with pytest.raises(ValueError, match="answer_prefix"):
        EvidenceGain(model, tokenizer, DEMOS)
    EvidenceGain(model, tokenizer, DEMOS, answer_prefix="")
    tokenizer.chat_template += "</think>\n"
    EvidenceGain(model, tokenizer, DEMOS)


def test_base_models_need_no_chat_template(model):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    gain = evidence_gain(model, tokenizer, QUERY, [SOUND], DEMOS, per_token=False, reduce="none")[0]
    bare = [f"{d.query}\n\n" for d in DEMOS]
    shown = [f"{QUERY}\n\n{SOUND}\n\n{text}" for text in bare]
    torch.testing.assert_close(gain.double(), naive_gains(model, tokenizer, shown, bare), rtol=1e-4, atol=1e-4)


def test_reductions_and_standard_errors_are_those_of_the_gains(model):
    evidence = EvidenceGain(model, character_tokenizer(), DEMOS, per_token=False)
    traces = ["so 4", "5!"]
    each = evidence.gains(QUERY, traces, "none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(evidence.gains(QUERY, traces), each.mean(1))
    torch.testing.assert_close(evidence.gains(QUERY, traces, "logmeanexp"), each.exp().mean(1).log())
    plain = evidence.estimate(QUERY, traces)
    torch.testing.assert_close(plain.standard_error, each.std(1) / 3**0.5)
    weights = each.exp()
    spread = weights.std(1) / weights.mean(1) / 3**0.5
    torch.testing.assert_close(evidence.estimate(QUERY, traces, "logmeanexp").standard_error, spread)
    assert EvidenceGain(model, character_tokenizer(), DEMOS[:1]).estimate(QUERY, traces).standard_error.isnan().all()


def test_prefix_is_computed_once_a_trace_and_plain_logprobs_once_until_the_weights_change():
    model, tokens = tiny(), []
    head_inputs(model, torch.tensor([[1, 2]]))  # what reads a model's head, once per model, runs it too
    hook = lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel())  # noqa: E731
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    evidence = EvidenceGain(model, character_tokenizer(), DEMOS, batch_size=1)
    trace = "x" * 100
    answer_logprobs(model, [[1]], [[2]])  # the head is measured once per model
    tokens.clear()
    first = evidence.gains(QUERY, [trace])
    plain, shown = sum(tokens[:3]), sum(tokens[3:])
    assert tokens[3] > 100 and max(tokens[4:]) < 20, "the prefix, then what differs between the experts"
    assert 100 < shown < 100 + 3 * 25
    tokens.clear()
    assert torch.equal(evidence.gains(QUERY, [trace, trace]), first.expand(2))
    assert sum(tokens) == 2 * shown
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    tokens.clear()
    assert not torch.equal(evidence.gains(QUERY, [trace]), first)
    assert sum(tokens) == plain + shown


def test_progress_counts_every_expert_of_every_pass(model, capsys):
    pytest.importorskip("rich")
    evidence = EvidenceGain(model, character_tokenizer(), DEMOS, progress=True)
    quiet = EvidenceGain(model, character_tokenizer(), DEMOS)
    for _ in range(2):  # the second time without the plain log-probs
        assert torch.equal(evidence.gains(QUERY, ["a", "b"]), quiet.gains(QUERY, ["a", "b"]))
        assert "100%" in capsys.readouterr().out


FAMILIES = {
    "Llama": {},
    "GPT2": {},
    "Bloom": {},
    "Cohere": {"logit_scale": 0.3},
    "Mistral": {"sliding_window": 8},
    "Gemma3Text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_and_padding_change_nothing_whatever_the_models_cache_and_head(name):
    model = tiny(name, **FAMILIES[name])
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(1, 128, (n,), generator=draw).tolist()  # noqa: E731
    prefix, prompts, answers = ids(20), [ids(3), ids(9), []], [ids(4), ids(1), ids(12)]
    exact = torch.stack([naive_logprob(model, prefix + p, a) for p, a in zip(prompts, answers, strict=True)])
    tested = answer_logprobs(model, prompts, answers, batch_size=2, shared_prefix=prefix)
    torch.testing.assert_close(tested.double(), exact, rtol=1e-4, atol=1e-4)
    moved = answer_logprobs(model, prompts, answers, batch_size=2, shared_prefix=ids(20))
    assert (moved.double() - exact).abs().min() > 1e-3, "a prefix that does not matter tests nothing"


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda evidence: evidence.gains(QUERY, []), "traces"),
        (lambda evidence: evidence.gains(QUERY, "one text"), "traces"),
        (lambda evidence: evidence.gains(QUERY, ["4"], "sum"), "reduce"),
        (lambda evidence: evidence.estimate(QUERY, ["4"], "none"), "reduce"),
        (lambda evidence: EvidenceGain(evidence.model, evidence.tokenizer, []), "demonstrations"),
    ],
)
def test_bad_arguments_are_named(model, call, match):
    with pytest.raises(ValueError, match=match):
        call(EvidenceGain(model, character_tokenizer(), DEMOS))
