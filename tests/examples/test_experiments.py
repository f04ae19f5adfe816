"""The experiments at the smallest size: side by side is one by one, controls are what they claim, results repeat."""

import importlib
import json
import math

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import erc
from examples.experiments import erc_drift, erc_regimes, in_context, words
from examples.experiments.authors import (
    FEATURES,
    HELD_OUT,
    QUESTIONS,
    TRAINING,
    VOCABULARY,
    Authors,
    Demonstration,
    evidence_gains,
    logprobs,
)
from examples.experiments.compare import auc, interval, shown
from examples.experiments.policies import Optimizer, Policies, policy_update


def test_auc_equals_the_naive_count_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(0, 6, (count,), generator=generator).float() for count in (40, 30))
    naive = sum((h > l) + 0.5 * (h == l) for h in high.tolist() for l in low.tolist()) / (40 * 30)  # noqa: E741
    assert auc(high, low) == pytest.approx(naive)
    assert auc(low, high) == pytest.approx(1 - naive)


def test_intervals_cover_the_mean_of_eight_normal_differences_as_often_as_they_say():
    draws = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    covered = [low <= 0 <= high for _, low, high in (interval(row) for row in draws)]
    assert 0.86 < sum(covered) / len(covered) < 0.97  # 95 % is the aim; resampling eight values reaches about 91 %
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and low < 2.0 < high
    with pytest.raises(ValueError, match="differences"):
        interval([1.0])


def test_numbers_are_shown_without_a_leading_zero():
    assert shown((0.0884, -10.25, 0.1)) == "+.088 [-10.250, +.100]"


def test_runs_side_by_side_are_the_runs_one_by_one():
    """Gradients, norms and steps of three runs with rates of their own, against torch's Adam on each alone."""
    generator, sizes = torch.Generator().manual_seed(0), (3, 4)
    features = torch.stack([torch.randint(n, (3, 20), generator=generator) for n in sizes], -1)
    labels = torch.randint(7, (3, 20), generator=generator)
    advantages, rates = torch.randn(3, 20, generator=generator), torch.tensor([1e-3, 1e-2, 3e-2])
    together = Policies([1, 2, 3], sizes, 7, width=4, hidden=(5,))
    optimizer = Optimizer(together, rates, max_norm=0.05)
    old = erc.token_stats(together.logits(features), labels)
    for _ in range(3):
        _, norms = policy_update(
            together, optimizer, features, labels, old_logprob=old.logprob, advantages=advantages, objective="dapo"
        )
    for run in range(3):
        alone = Policies([run + 1], sizes, 7, width=4, hidden=(5,))
        alone.requires_grad(True)
        adam = torch.optim.Adam(alone.parameters, lr=rates[run].item(), betas=(0.9, 0.999))
        for _ in range(3):
            out = erc.policy_loss(
                alone.logits(features[run : run + 1]),
                labels[run : run + 1],
                old_logprob=old.logprob[run : run + 1],
                advantages=advantages[run : run + 1],
                objective="dapo",
            )
            adam.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(alone.parameters, 0.05)
            adam.step()
        assert norms[run] == pytest.approx(norm.item(), rel=1e-3)
        for ours, theirs in zip(together.parameters, alone.parameters, strict=True):
            torch.testing.assert_close(ours[run], theirs[0].detach(), rtol=1e-3, atol=1e-5)


def test_the_word_task_rewards_what_the_warm_start_shows_without_slips():
    task, generator = words.WordTask(), torch.Generator().manual_seed(0)
    a, b = task.prompts((2, 400), generator)
    rewards = task.reward(a, b, task.examples(a, b, generator))
    assert rewards.mean().item() == pytest.approx((1 - words.SLIPS) ** 3, abs=0.06)
    assert task.reward(a, b, torch.zeros(2, 400, words.LENGTH, dtype=torch.long)).mean() < 0.05


def by_parity(task, a, b, tokens):
    """A reward with which an untrained policy has something to learn."""
    return (tokens.sum(-1) % 2).float()


def test_a_random_drop_drops_as_many_tokens_as_the_gate(monkeypatch):
    monkeypatch.setattr(words.WordTask, "reward", by_parity)
    task = words.WordTask()
    start = words.warm_start(task, 2, steps=30)
    shares: list[torch.Tensor] = []
    erc_regimes.train(task, start, "gppo", "gate 0.05", 2, 2, shares)
    assert len(shares) == 2 * 2 * erc_regimes.MINIBATCHES and max(share.max() for share in shares) > 0.05
    dropped, real = [], erc_regimes.policy_update

    def watched(*arguments, mask, **options):
        dropped.append(1 - mask.float().mean(1))
        return real(*arguments, mask=mask, **options)

    monkeypatch.setattr(erc_regimes, "policy_update", watched)
    erc_regimes.train(task, start, "gppo", "random drop", 2, 2, shares)
    gaps = torch.stack(dropped) - torch.stack(shares)
    assert gaps.abs().max() < 0.2, "an update has 144 tokens"
    assert gaps.mean().abs() < 0.01


def test_best_rates_are_chosen_on_the_other_warm_starts():
    final = torch.tensor([[0.9, 0.0, 0.1], [0.1, 0.6, 0.2], [0.2, 0.5, 0.1]])
    assert erc_regimes.best_rate(final).tolist() == pytest.approx([0.0, 0.1, 0.2])


def test_evidence_gain_of_the_authors_equals_its_definition_and_prefers_what_it_saw():
    authors = Authors(torch.full((2,), 0.6), torch.full((2,), 0.6))
    policies = Policies([0, 1], FEATURES, VOCABULARY, hidden=(8, 8))
    question = TRAINING[:5].expand(2, -1)
    answer = authors.answers(question, torch.ones(2, 5, dtype=torch.bool), torch.Generator().manual_seed(0))
    gains = evidence_gains(policies, authors, question, answer, HELD_OUT[:3])
    expert = torch.full((2, 5), int(HELD_OUT[1]))
    sound = torch.stack([authors.sound[0][expert], authors.sound[1][expert], authors.result[expert]], -1)
    seen = Demonstration(question, answer[..., 0], answer[..., 1])
    expected = logprobs(policies, seen, expert, sound) - logprobs(policies, Demonstration.none((2, 5)), expert, sound)
    torch.testing.assert_close(gains[..., 1], expected.sum(-1), rtol=1e-4, atol=1e-5)
    assert gains.std() > 1e-3


@pytest.mark.parametrize(("single_slips", "careful", "rate"), [(False, True, 0), (False, False, 1), (True, False, 0.6)])
def test_authors_slip_as_they_should(single_slips, careful, rate):
    authors = Authors(torch.full((2,), 0.9), torch.full((2,), 0.3), single_slips)
    question = TRAINING.repeat(50).expand(2, -1)
    answer = authors.answers(question, torch.full(question.shape, careful), torch.Generator().manual_seed(0))
    right, sound = authors.judge(question, answer)
    assert 1 - sound.mean().item() == pytest.approx(rate, abs=0.02)
    for kind, chance in ((sound == 1, 0.9), (sound == 0, 0.3)):
        if kind.any():
            assert right[kind].mean().item() == pytest.approx(chance + (1 - chance) / 64, abs=0.03)


def test_demonstrations_reach_six_of_eight_rollouts_and_are_shared_by_the_prompts():
    authors = Authors(torch.full((1,), 0.6), torch.full((1,), 0.6))
    seen = in_context.demonstrated_groups(authors, 0.5, 1, 3, torch.Generator().manual_seed(0))
    groups = [value.view(3, 8) for value in seen]
    assert all(torch.equal(group[0], other) for group in groups for other in group)
    question, first, _ = (group[0] for group in groups)
    assert (question == QUESTIONS).tolist() == [False] * 6 + [True] * 2
    assert (first[:6] == authors.sound[0][question[:6]]).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("module", [erc_drift, erc_regimes, in_context])
def test_experiments_write_finite_results_that_repeat(module, tmp_path, monkeypatch):
    small = {"starts": 2, "threads": 1}
    if module is erc_drift:
        monkeypatch.setattr(erc_drift, "READINGS", (0, 1, 2))
        small["prompts"] = 4
    elif module is erc_regimes:
        monkeypatch.setattr(erc_regimes, "RULES", ("dapo", "gppo"))
        monkeypatch.setattr(erc_regimes, "REUSE", (1,))
        small["batches"] = 1
    else:
        small |= {"batches": 1, "warm_start_steps": 3}
    real = words.warm_start
    monkeypatch.setattr(words.WordTask, "reward", by_parity)
    for name in (erc_drift, erc_regimes):
        monkeypatch.setattr(name, "warm_start", lambda task, seeds: real(task, seeds, steps=3))

    def run(folder) -> dict:
        module.main(**small, output=folder)
        name = module.__name__.rsplit(".", 1)[-1]
        assert all(path.stat().st_size > 10_000 for path in folder.glob("*.png"))
        record = json.loads((folder / f"{name}.json").read_text())
        assert {"command", "machine", "minutes", "settings", "versions"} <= set(record)
        return {key: value for key, value in record.items() if key != "minutes"}

    first = run(tmp_path / "a")
    assert run(tmp_path / "b") == first
    numbers = [value for value in _numbers(first) if not isinstance(value, str)]
    assert len(numbers) > 100 and all(math.isfinite(value) for value in numbers)


@pytest.mark.parametrize("name", ["evidence_auc", "erc_transformer"])
def test_experiments_with_transformers_write_finite_results(name, tmp_path, monkeypatch):
    if name == "evidence_auc":
        pytest.importorskip("transformers")
        pytest.importorskip("reasoning_gym")
        small = {"queries": 3, "experts": 2, "warm_start_steps": 1}
    else:
        small = {"starts": 2, "batches": 1, "warm_start_steps": 30}
    module = importlib.import_module(f"examples.experiments.{name}")
    if name == "erc_transformer":
        monkeypatch.setattr(module, "REUSE", 1)
        monkeypatch.setattr(module, "CELLS", module.CELLS[:1])
        monkeypatch.setattr(module, "RATES", (1e-3,))
    module.main(**small, threads=1, output=tmp_path)
    numbers = [
        value for value in _numbers(json.loads((tmp_path / f"{name}.json").read_text())) if not isinstance(value, str)
    ]
    assert len(numbers) > 15 and all(math.isfinite(value) for value in numbers)


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield value
