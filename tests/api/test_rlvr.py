"""Advantages, dynamic sampling and overlong shaping against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erc.rlvr import group_advantages, informative_groups, overlong_penalty

REWARDS = torch.tensor([1.0, 0.0, 0.0, 2.0, 5.0, 5.0, 5.0, 7.0])


def test_grpo_standardises_each_group():
    advantages = group_advantages(REWARDS, group_size=4).view(2, 4)
    groups = REWARDS.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages, expected)


def test_dr_grpo_only_centres():
    groups = REWARDS.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(group_advantages(REWARDS, group_size=4, kind="dr-grpo"), expected)


def test_rloo_leaves_the_rollout_itself_out_of_its_baseline():
    advantages = group_advantages(REWARDS, group_size=4, kind="rloo")
    for i, reward in enumerate(REWARDS):
        start = i // 4 * 4
        others = [REWARDS[j] for j in range(start, start + 4) if j != i]
        torch.testing.assert_close(advantages[i], reward - torch.stack(others).mean())


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.sampled_from(["grpo", "dr-grpo", "rloo"]))
def test_group_ids_may_come_in_any_order(order, kind):
    index = torch.tensor(order)
    by_size = group_advantages(REWARDS, group_size=4, kind=kind)
    by_ids = group_advantages(REWARDS[index], index // 4 * 10, kind=kind)
    torch.testing.assert_close(by_ids, by_size[index])


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo"])
def test_a_group_of_one_or_of_equals_has_no_advantage(kind):
    assert not group_advantages(torch.tensor([3.0]), group_size=1, kind=kind).any()
    assert not group_advantages(torch.full((4,), 0.25), group_size=4, kind=kind).any()


def test_groups_that_are_all_right_or_all_wrong_teach_nothing():
    rewards = torch.tensor([1, 1, 0, 0, 1, 0])
    assert informative_groups(rewards, group_size=2).tolist() == [False, False, False, False, True, True]


def test_overlong_penalty_has_the_papers_three_pieces():
    lengths = torch.tensor([0, 16_384, 18_432, 20_480, 30_000])
    assert overlong_penalty(lengths).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group_advantages(REWARDS, group_size=3), "group_size"),
        (lambda: group_advantages(REWARDS), "group_ids"),
        (lambda: group_advantages(REWARDS, torch.zeros(3)), "group_ids"),
        (lambda: group_advantages(REWARDS, group_size=4, kind="ppo"), "kind"),
        (lambda: group_advantages(REWARDS.view(2, 4), group_size=4), "rewards"),
        (lambda: overlong_penalty(torch.ones(2), 10, 11), "cache_length"),
    ],
)
def test_bad_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
