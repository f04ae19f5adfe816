"""In-Context RLVR: demonstrations, templates, groups, and Evidence Gain on a random model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from erc.rlvr import (
    Demonstration,
    DemonstrationPool,
    InContextRollouts,
    InContextWording,
    evidence_gain,
    group_prompts,
    with_demonstrations,
)
from erc.rlvr.evidence import answer_logprobs

transformers = pytest.importorskip("transformers", reason="the random model comes from transformers")

QUESTION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
DEMOS = [Demonstration("1+1?", "it is 2", "2"), Demonstration("3+4?", "seven: 7", "7"), Demonstration("5+1?", "6", "6")]


class CharacterTokenizer:
    """Bytes as tokens and a chat template of one control byte per role."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [1 + b % 127 for b in text.encode()]}

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        marks = {"user": "\x02", "assistant": "\x03", "system": "\x05"}
        text = "".join(marks[message["role"]] + message["content"] + "\x04" for message in messages)
        return text + (marks["assistant"] if add_generation_prompt else "")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that contexts matter
    return model


def naive_logprob(model, context, answer):
    """One sequence, float64 log-softmax, no padding, no cache."""
    logits = model(torch.tensor([context + answer])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    return sum(logprobs[len(context) - 1 + i, token] for i, token in enumerate(answer))


def test_pool_reads_jsonl_and_names_every_bad_line(tmp_path):
    good = {"query": "q", "answer": "a", "ground_truth": "g"}
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, "query": "other"}) + "\n")
    assert [demo.query for demo in DemonstrationPool.from_jsonl(path).demonstrations] == ["q", "other"]
    path.write_text(f"{json.dumps(good)}\n{{oops\n[1]\n{json.dumps({'query': 'q', 'answer': ' '})}\n")
    with pytest.raises(
        ValueError, match=r"3 bad record\(s\): line 2: not JSON .*line 3: not a JSON object.*line 4: 'answer'"
    ):
        DemonstrationPool.from_jsonl(path)


def test_sampling_is_seeded_and_without_repetition():
    pool = DemonstrationPool(tuple(DEMOS))
    draws = [pool.sample(2, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 2
    with pytest.raises(ValueError, match="k must be"):
        pool.sample(4, torch.Generator())


def test_multi_round_puts_demonstrations_into_earlier_turns():
    prompt = with_demonstrations(QUESTION, DEMOS[:2], "multi-round")
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt[2]["content"] == "it is 2" and prompt[-1] == QUESTION[-1]


def test_in_context_lists_demonstrations_in_the_question():
    prompt = with_demonstrations(QUESTION, DEMOS[:2])
    assert [m["role"] for m in prompt] == ["system", "user"]
    assert all(part in prompt[-1]["content"] for part in ("1+1?", "it is 2", "seven: 7", "2+2?"))
    assert QUESTION[-1]["content"] == "2+2?", "the caller's messages stay as they are"


def test_budget_leaves_out_whole_demonstrations_and_never_the_question():
    tokenizer = CharacterTokenizer()
    full = len(tokenizer.apply_chat_template(with_demonstrations(QUESTION, DEMOS, "multi-round")))
    cut = with_demonstrations(QUESTION, DEMOS, "multi-round", tokenizer=tokenizer, max_tokens=full - 1)
    assert cut == with_demonstrations(QUESTION, DEMOS[:2], "multi-round")
    with pytest.raises(ValueError, match="max_tokens"):
        with_demonstrations(QUESTION, DEMOS, tokenizer=tokenizer, max_tokens=3)


def test_demonstrations_that_do_not_fit_are_counted():
    tokenizer = CharacterTokenizer()
    long = Demonstration("9+9?", "eighteen, since nine and nine make eighteen", "18")
    budget = len(tokenizer.apply_chat_template(with_demonstrations(QUESTION, DEMOS[:2], "multi-round")))
    limits = {"template": "multi-round", "tokenizer": tokenizer, "max_tokens": budget}
    group = group_prompts(QUESTION, [*DEMOS[:2], long, *DEMOS[:1]], 3, 2, per_rollout=2, **limits)
    assert group.left_out == [0, 2, 0]
    assert [len(prompt) for prompt in group.rollout] == [6, 2, 2]
    assert group_prompts(QUESTION, DEMOS[:2], 3, 2).left_out == [0, 0, 0]


def test_wording_keeps_braces_that_are_not_its_own():
    wording = InContextWording(example="{query} -> {answer}", closing=r"{query} Put it into \boxed{}, as {n}.")
    tricky = Demonstration("{answer}?", "{query} {0}", "x")
    content = with_demonstrations(QUESTION, [tricky], wording=wording)[-1]["content"]
    assert content.endswith("{answer}? -> {query} {0}\n\n2+2? Put it into \\boxed{}, as {n}.")
    for words in ({"example": "{query}"}, {"closing": "solve it"}):
        with pytest.raises(ValueError, match=next(iter(words))):
            InContextWording(**words)


@pytest.mark.parametrize("train", ["demonstrated", "original"])
@pytest.mark.parametrize("old", ["demonstrated", "original"])
def test_groups_mix_demonstrated_and_plain_rollouts_in_four_conditioning_modes(train, old):
    group = group_prompts(QUESTION, DEMOS, 5, 3, template="multi-round", train=train, old=old)
    assert [len(p) for p in group.rollout] == [4, 4, 4, 2, 2]
    assert group.rollout[1] == with_demonstrations(QUESTION, DEMOS[1:2], "multi-round")
    for mode, prompts in ((train, group.train), (old, group.old)):
        assert prompts == (group.rollout if mode == "demonstrated" else [QUESTION] * 5)


def test_answer_logprobs_equal_a_naive_loop_whatever_the_batch_padding_or_prefix(model):
    tokenizer = CharacterTokenizer()
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    prefix, prompts, answers = (
        encode("shared: "),
        [encode(p) for p in ("a", "bcd ef", "")],
        [encode(a) for a in ("xy", "z", "w!?")],
    )
    exact = torch.stack([naive_logprob(model, prefix + p, a) for p, a in zip(prompts, answers, strict=True)])
    for batch_size in (1, 2, 3):
        tested = answer_logprobs(model, prompts, answers, batch_size=batch_size, shared_prefix=prefix)
        torch.testing.assert_close(tested.double(), exact, rtol=1e-5, atol=1e-5)
    joined = answer_logprobs(model, [prefix + p for p in prompts], answers)
    torch.testing.assert_close(joined.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_token", [True, False])
def test_evidence_gain_equals_its_definition(model, per_token):
    tokenizer = CharacterTokenizer()
    encode = lambda *turns: tokenizer(tokenizer.apply_chat_template(turns))["input_ids"]  # noqa: E731
    user, said = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
    traces = ["because 2+2=4", "guess"]
    expected = []
    for trace in traces:
        gains = []
        for demo in DEMOS:
            answer = tokenizer(demo.answer)["input_ids"]
            shown = naive_logprob(model, encode(user("2+2?"), said(trace), user(demo.query)), answer)
            gain = shown - naive_logprob(model, encode(user(demo.query)), answer)
            gains.append(gain / len(answer) if per_token else gain)
        expected.append(torch.stack(gains).mean())
    tested = evidence_gain(model, tokenizer, "2+2?", traces, DEMOS, per_token=per_token, batch_size=2)
    torch.testing.assert_close(tested.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (tested[0] - tested[1]).abs() > 1e-3, "traces that the measure cannot tell apart test nothing"


def test_bayes_identity_between_the_demonstrated_weight_of_a_trace_and_its_gain(model):
    """The weight of a trace o once the answer a is known is pi(o | q, a) = pi(o, a | q) / pi(a | q). Its logarithm is
    the plain log-prob of o plus the gain log pi(a | q, o) - log pi(a | q)."""
    tokenizer = CharacterTokenizer()
    question, answer = tokenizer("2+2? ")["input_ids"], tokenizer("yes 4")["input_ids"]

    def logprob(context, text):
        return answer_logprobs(model, [context], [text]).double()

    without_trace = logprob(question, answer)
    for trace in (tokenizer(text)["input_ids"] for text in ("so 4. ", "perhaps 7? ")):
        demonstrated = logprob(question, trace + answer) - without_trace
        gain = logprob(question + trace, answer) - without_trace
        torch.testing.assert_close(demonstrated, logprob(question, trace) + gain, rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="template"):
        with_demonstrations(QUESTION, DEMOS, "few-shot")
    with pytest.raises(ValueError, match="messages"):
        with_demonstrations([{"role": "assistant", "content": "hm"}], DEMOS)
    with pytest.raises(ValueError, match="demonstrations"):
        group_prompts(QUESTION, DEMOS, 8, 6)
    with pytest.raises(ValueError, match=r"answers\[0\]"):
        answer_logprobs(model, [[1]], [[]])
    with pytest.raises(ValueError, match="traces"):
        evidence_gain(model, CharacterTokenizer(), "q", [], DEMOS)


def test_rollouts_by_place_are_those_of_the_demos_own_trainer():
    pytest.importorskip("reasoning_gym", reason="the demo's tasks come from reasoning-gym")
    from examples.in_context_trainer import InContextConfig, InContextTrainer
    from examples.tasks import Problem

    config = InContextConfig(group_size=4, demonstrated=2, per_rollout=1, template="multi-round")
    pool = DemonstrationPool(tuple(DEMOS))
    shown = InContextRollouts(pool, demonstrated=2, template="multi-round", seed=5)
    problems = [Problem(question, "", {}) for question in ("1+2?", "3+3?") for _ in range(4)]
    for batch in range(3):
        trainer = SimpleNamespace(
            config=config, sound_pool=pool, draws=torch.Generator().manual_seed(5 * 1_000_003 + batch)
        )
        theirs = InContextTrainer.prompts(trainer, problems)
        asked = [[{"role": "user", "content": problem.question}] for problem in problems]
        ours = [shown.prompt(messages, row % 4, 4, batch) for row, messages in enumerate(asked)]
        assert ours == theirs
    assert len({str(shown.demonstrations(batch)) for batch in range(8)}) > 1
    with pytest.raises(ValueError, match=r"rollout must be in \[0, group_size=4\), got 4"):
        shown.prompt(asked[0], 4, 4, 0)
    with pytest.raises(ValueError, match="the size of the pool"):
        InContextRollouts(pool, demonstrated=4).prompt(asked[0], 0, 4, 0)
