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


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from(["grpo", "dr-grpo", "rloo"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_equal_rewards_give_exactly_zero_whatever_their_number_size_and_dtype(size, reward, kind, dtype):
    rewards = torch.full((size,), reward, dtype=torch.float64).to(dtype)
    if rewards.isfinite().all():
        assert not group_advantages(rewards, group_size=size, kind=kind).any()
    mixed = torch.cat([rewards, torch.tensor([0.0, 1.0], dtype=dtype)])  # the groups do not stand together
    ids = torch.cat([torch.zeros(size), torch.ones(2)])
    assert group_advantages(mixed, ids, kind=kind)[-1] > 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_rewards_are_reduced_in_float64(dtype):
    rewards = torch.ones(600, dtype=dtype)  # in bfloat16 a count of ones ends at 256
    rewards[-1] = 0
    for kind in ("grpo", "dr-grpo", "rloo"):
        advantages = group_advantages(rewards, group_size=600, kind=kind)
        exact = group_advantages(rewards.double(), group_size=600, kind=kind)
        assert advantages.dtype == dtype
        torch.testing.assert_close(advantages, exact.to(dtype), rtol=0, atol=0)
    assert informative_groups(rewards, group_size=600).all()
    assert not informative_groups(torch.ones(600, dtype=dtype), group_size=600).any()


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo"])
def test_an_unknown_reward_spoils_its_own_rollout_only(kind):
    rewards = torch.tensor([1.0, 0.0, torch.nan, 1.0, 2.0, 0.0, torch.nan, torch.nan])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), kind=kind)
    assert advantages.isnan().tolist() == rewards.isnan().tolist()
    torch.testing.assert_close(advantages[[0, 1, 3]], group_advantages(rewards[[0, 1, 3]], group_size=3, kind=kind))
    torch.testing.assert_close(advantages[4:6], group_advantages(rewards[4:6], group_size=2, kind=kind))
    informative = informative_groups(torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0, 0.0]), group_size=2)
    assert informative.tolist() == [False, False, False, False, True, True], "an unknown reward is not a wrong answer"


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
        (lambda: group_advantages(REWARDS, [0] * 8), "group_ids"),
        (lambda: group_advantages(REWARDS, group_size=4, kind="ppo"), "kind"),
        (lambda: group_advantages(REWARDS.view(2, 4), group_size=4), "rewards"),
        (lambda: overlong_penalty(torch.ones(2), 10, 11), "cache_length"),
    ],
)
def test_bad_arguments_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
