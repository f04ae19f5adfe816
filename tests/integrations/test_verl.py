"""Registered losses and fused statistics against verl's own functions."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import erc

try:
    import verl.trainer.ppo.core_algos as core_algos
    import verl.utils.experimental.torch_functional as verl_linear
    import verl.utils.torch_functional as verl_functional
except ImportError as error:
    pytest.skip(f"needs verl: {error}", allow_module_level=True)

from erc.integrations import verl as integration
from erc.integrations.verl_batch import with_batch, with_support

SHAPE = (3, 6)


class ActorConfig(SimpleNamespace):
    """What verl's losses read of its actor's config."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -2 + 0.5 * torch.randn(SHAPE, generator=generator)
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "old_log_prob": old,
        "log_prob": old + 0.4 * torch.randn(SHAPE, generator=generator),
        "advantages": torch.randn(SHAPE, generator=generator),
        "response_mask": mask,
    }


def run(function, batch, **options) -> tuple[torch.Tensor, torch.Tensor]:
    log_prob = batch["log_prob"].clone().requires_grad_()
    loss, _ = function(**(batch | {"log_prob": log_prob}), **options)
    loss.backward()
    return loss.detach(), log_prob.grad


def config(**batch_info) -> ActorConfig:
    # clip_ratio_c out of reach: the preset has no dual clip
    return ActorConfig(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1e9, global_batch_info=batch_info
    )


INFOS = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 8, "loss_scale_factor": 9},
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_dapo_without_a_gate_equals_vanilla(mode, info, weights):
    batch = make_batch()
    options = {"loss_agg_mode": mode, "config": config(**INFOS[info])}
    if weights:
        options["rollout_is_weights"] = 0.5 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(9))
        options["rollout_is_weights"][0, 0] = 0
    ours = run(integration.policy_loss_function(erc.objective("dapo")), batch, **options)
    theirs = run(core_algos.get_policy_loss_fn("vanilla"), batch, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert theirs[1].abs().max() > 1e-3
    with pytest.raises(AssertionError):  # a wrong gradient would be seen
        torch.testing.assert_close(1.01 * ours[1], theirs[1], rtol=1e-5, atol=1e-7)


def test_registered_losses_gate_by_the_carried_entropies():
    names = integration.register()
    assert {"erc_dapo", "erc_gppo", "erc_ce_gppo"} <= set(names)
    function, batch = core_algos.get_policy_loss_fn("erc_dapo"), make_batch()
    old = torch.ones(SHAPE)
    new = torch.tensor([1.0, 1.2, 0.8]).repeat(3, 2)
    with pytest.raises(RuntimeError, match=r"external_lib=erc\.integrations\.verl_plugin"):
        function(**batch, config=config())
    with integration.entropies(new, old):
        _, gradient = run(function, batch, config=config())
        _, metrics = function(**batch, config=config())
    _, ungated = run(integration.policy_loss_function(erc.objective("dapo")), batch, config=config())
    torch.testing.assert_close(gradient, torch.where(new == 1, ungated, 0.0), rtol=1e-6, atol=1e-8)
    kept = (new == 1) & batch["response_mask"]
    assert gradient.abs().max() > 1e-3
    assert metrics["actor/erc_fraction"] == pytest.approx(1 - kept.sum().item() / batch["response_mask"].sum().item())


def test_fused_statistics_replace_verls_everywhere(monkeypatch):
    import verl.workers.rollout.naive.naive_rollout as importer

    replaced = ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
    originals = {name: getattr(verl_functional, name) for name in replaced}
    for name, original in originals.items():  # restored afterwards
        monkeypatch.setattr(verl_functional, name, original)
    monkeypatch.setattr(verl_linear, "FusedLinearForPPO", verl_linear.FusedLinearForPPO)
    monkeypatch.setattr(importer, "logprobs_from_logits", originals["logprobs_from_logits"])
    logits = torch.randn(2, 5, 31, generator=torch.Generator().manual_seed(2), requires_grad=True)
    labels = torch.arange(10).view(2, 5)

    def gradient() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprob = verl_functional.logprobs_from_logits(logits, labels)
        entropy = verl_functional.entropy_from_logits(logits)
        (logprob.sin() + entropy.square()).sum().backward()
        grad, logits.grad = logits.grad, None
        return logprob.detach(), entropy.detach(), grad

    theirs = gradient()
    integration.use_fused_statistics()
    assert verl_linear.FusedLinearForPPO is integration.FusedLinearForPPO
    assert importer.logprobs_from_logits is verl_functional.logprobs_from_logits is integration.logprobs_from_logits
    torch.testing.assert_close(gradient(), theirs, rtol=1e-5, atol=1e-6)
    assert theirs[2].abs().max() > 1e-2


def test_chunked_compiled_and_linear_statistics_are_the_same():
    """What verl's engines choose by their settings; `use_torch_compile` is verl's default."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, 31))
    labels = torch.arange(6)
    logits = hidden @ weight.t() / 0.7
    compiled = torch.compile(integration.entropy_from_logits, dynamic=True, backend="aot_eager")
    theirs = integration.entropy_from_logits(logits)
    torch.testing.assert_close(compiled(logits), theirs)
    torch.testing.assert_close(integration.entropy_from_logits_with_chunking(logits, chunk_size=2), theirs)
    linear = {"ours": integration.FusedLinearForPPO(), "theirs": verl_linear.FusedLinearForPPO(chunk_size=4)}
    assert type(linear["ours"]) is not type(linear["theirs"])
    results = {}
    for name, module in linear.items():
        logprob, entropy = module(hidden, weight, labels, temperature=0.7)
        grads = torch.autograd.grad((logprob.sin() + entropy.square()).sum(), (hidden, weight))
        results[name] = (logprob, entropy, *grads)
    torch.testing.assert_close(results["ours"], results["theirs"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results["ours"][1], theirs, rtol=1e-5, atol=1e-5)


def test_a_batch_without_old_entropies_is_left_to_verls_own_loss():
    """A gated loss then raises; the loss around it must not."""
    calls = []
    loss = with_batch(lambda *given: calls.append(given) or "loss")
    data = {"old_log_probs": torch.zeros(SHAPE)}
    assert loss(config(), {"log_probs": torch.zeros(SHAPE), "entropy": torch.zeros(SHAPE)}, data) == "loss"
    assert loss(config(), {"log_probs": torch.zeros(SHAPE)}, data | {"old_entropys": torch.zeros(SHAPE)}) == "loss"
    assert len(calls) == 2 and calls[0][2] is data


def test_a_gate_without_entropies_says_what_to_set():
    integration.register()
    function, batch = core_algos.get_policy_loss_fn("erc_dapo"), make_batch()
    loss = with_batch(lambda *_: function(**batch, config=config()))
    with pytest.raises(RuntimeError, match=r"actor_rollout_ref\.actor\.calculate_entropy=True"):
        loss(config(), {"log_probs": torch.zeros(SHAPE)}, {"old_entropys": torch.zeros(SHAPE)})
    with pytest.raises(RuntimeError, match=r"algorithm\.rollout_correction\.bypass_mode=False"):
        loss(config(), {"log_probs": torch.zeros(SHAPE), "entropy": torch.zeros(SHAPE)}, {})


@pytest.mark.parametrize("info", INFOS)
def test_the_nll_term_is_a_mean_over_its_own_tokens(info):
    """The loss without the term, and 0.1 times the mean negative log-prob of the rows with reward 1."""
    batch, rows = make_batch(), torch.tensor([True, False, True])
    function = integration.policy_loss_function(erc.objective("dapo", nll_coef=0.1))
    with pytest.raises(RuntimeError, match="rows with reward 1"):
        function(**batch, config=config(**INFOS[info]))
    mask = batch["response_mask"] & rows[:, None]
    dp_size = INFOS[info].get("dp_size", 1)
    tokens = 20.0 if dp_size == 2 else mask.sum()
    with integration.nll_rows(rows, tokens):
        loss, gradient = run(function, batch, config=config(**INFOS[info]))
    plain, plain_gradient = run(core_algos.get_policy_loss_fn("vanilla"), batch, config=config(**INFOS[info]))
    term = -(batch["log_prob"] * mask).sum() * dp_size / tokens
    torch.testing.assert_close(loss, plain + 0.1 * term, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, plain_gradient - 0.1 * mask * dp_size / tokens, rtol=1e-5, atol=1e-7)
    assert term.abs() > 0.1


def test_clip_widths_that_are_not_read_are_warned_of_once():
    batch = make_batch()
    widths = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}

    def warned_of(function, **other) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(**batch, config=ActorConfig(**widths | other, global_batch_info={}))
        return [str(warning.message) for warning in caught if "not read" in str(warning.message)]

    function = integration.policy_loss_function(erc.objective("dapo"))
    assert warned_of(function) == []  # verl's defaults, and the objective's own widths
    (message,) = warned_of(function, clip_ratio_high=0.3, clip_ratio_c=10.0)
    assert "clip_ratio_high=0.3, clip_ratio_c=10.0 are not read" in message and "eps_high=0.28" in message
    assert warned_of(function, clip_ratio_high=0.3, clip_ratio_c=10.0) == []
    assert len(warned_of(function, clip_ratio_low=0.1)) == 1
    mine = integration.policy_loss_function(erc.objective("dapo", ratio=erc.PPOClip(0.2, 0.3, dual_clip=10.0)))
    assert warned_of(mine, clip_ratio_high=0.3, clip_ratio_c=10.0) == []


def test_twenty_steps_with_a_verifier_raise_the_reward():
    """A one-token policy answers reasoning-gym sums; old entropies come from the rollout pass, two updates a batch."""
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="the verifier comes from reasoning-gym")
    task = reasoning_gym.create_dataset(
        "chain_sum", size=4, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    integration.register()
    function = core_algos.get_policy_loss_fn("erc_dapo")
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(4, 19, requires_grad=True)  # answers 0 to 18
    optimizer = torch.optim.SGD([table], lr=20.0)
    rewards, dropped = [], []
    for _ in range(20):
        rows = torch.arange(4).repeat_interleave(16)
        with torch.no_grad():
            answers = torch.multinomial(table[rows].softmax(-1), 1, generator=generator)
            old_log_prob = integration.logprobs_from_logits(table[rows][:, None], answers)
            old_entropy = integration.entropy_from_logits(table[rows][:, None])
        scores = [task.score_answer(str(int(a)), task[int(i)]) for a, i in zip(answers, rows, strict=True)]
        reward = torch.tensor(scores, dtype=torch.float32)
        rewards.append(reward.mean().item())
        advantages = erc.rlvr.group_advantages(reward, group_size=16, kind="dr-grpo")[:, None]
        for _ in range(2):
            entropy = integration.entropy_from_logits(table[rows][:, None])
            log_prob = integration.logprobs_from_logits(table[rows][:, None], answers)
            with integration.entropies(entropy, old_entropy):
                loss, metrics = function(
                    old_log_prob, log_prob, advantages, torch.ones(64, 1, dtype=torch.bool), config=config()
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            dropped.append(metrics["actor/erc_fraction"])
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
    assert dropped[0] == 0 and max(dropped) > 0


def micro_batch(generator: torch.Generator) -> tuple[dict, torch.Tensor, erc.SamplingSupport]:
    """Two packed sequences with prompts of 2 and 3 tokens and responses of 4 and 2; their logits, and the support of
    each row, of which the last of a sequence, and those of the prompt but the last, predict no response token."""
    prompts, responses = ([3, 4], [5, 6, 7]), ([8, 9, 1, 2], [4, 3])
    jagged = {
        "input_ids": [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)],
        "prompts": [torch.tensor(prompt) for prompt in prompts],
        "responses": [torch.tensor(response) for response in responses],
    }
    batch = {name: torch.nested.nested_tensor(parts, layout=torch.jagged) for name, parts in jagged.items()}
    logits = torch.randn(11, 12, generator=generator)
    kept = [[8, 1, 2], [9, 11], [1], [2, 0, 5], [4, 10, 3], [3, 1]]
    ids = torch.full((2, 4, 3), -1, dtype=torch.int32)
    for place, row in zip([(0, t) for t in range(4)] + [(1, t) for t in range(2)], kept, strict=True):
        ids[place][: len(row)] = torch.tensor(row, dtype=torch.int32)
    rows = [[]] * 11
    for row, tokens in zip((1, 2, 3, 4, 8, 9), kept, strict=True):
        rows[row] = tokens
    expected = erc.SamplingSupport.from_counts([i for row in rows for i in row], [len(row) for row in rows])
    return batch | {"sampling_ids": ids}, logits, expected


@pytest.mark.parametrize("form", ["dense", "jagged"])
@pytest.mark.parametrize("padding", [0, 3])
def test_an_engines_log_probs_are_over_what_the_sampler_kept(form, padding):
    batch, logits, expected = micro_batch(torch.Generator().manual_seed(0))
    if form == "jagged":
        parts = [ids[:length] for ids, length in zip(batch["sampling_ids"], (4, 2), strict=True)]
        batch["sampling_ids"] = torch.nested.nested_tensor(parts, layout=torch.jagged)
    labels = torch.roll(batch["input_ids"].values(), -1)
    logits = torch.cat([logits, torch.randn(padding, 12)])
    labels = torch.cat([labels, torch.zeros(padding, dtype=torch.long)])
    hidden, weight = torch.randn(len(labels), 5), torch.randn(12, 5)

    def forward_step(engine, data, loss_function, forward_only):
        linear = integration.FusedLinearForPPO()(hidden, weight, labels, 0.7)
        return integration.logprobs_from_logits(logits, labels), integration.entropy_from_logits(logits), linear

    forward = with_support(forward_step)
    logprob, entropy, linear = forward(None, batch, None, forward_only=True)
    count = 11
    exact = erc.reference.token_stats(logits[:count].double(), labels[:count], support=expected)
    torch.testing.assert_close(logprob[:count], exact.logprob.float())
    torch.testing.assert_close(entropy[:count], exact.entropy.float())
    assert (exact.logprob > exact.logprob_full + 0.01).sum() == 6, "six response tokens were cut"
    exact = erc.reference.token_stats((hidden @ weight.T)[:count], labels[:count], support=expected, temperature=0.7)
    torch.testing.assert_close(linear[0][:count], exact.logprob, rtol=1e-4, atol=1e-5)
    plain = erc.token_stats(logits, labels).logprob
    assert torch.equal(logprob[count:], plain[count:]), "padding was not cut"
    del batch["sampling_ids"]
    assert torch.equal(forward(None, batch, None, forward_only=True)[0], plain)


def test_a_part_of_the_rows_is_refused():
    batch, logits, _ = micro_batch(torch.Generator().manual_seed(0))
    forward = with_support(lambda *_: integration.logprobs_from_logits(logits[:5], torch.zeros(5, dtype=torch.long)))
    with pytest.raises(RuntimeError, match="Ulysses sequence parallelism: 11 rows, of which this process has 5"):
        forward(None, batch, None)
