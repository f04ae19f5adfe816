"""The demo's trainer end to end at the smallest useful size: finite, reproducible, resumable, scored by the package's
verifier."""

import copy
import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
reasoning_gym = pytest.importorskip("reasoning_gym")

from examples.tasks import Task  # noqa: E402
from examples.train_rlvr import TrainConfig, Trainer, train  # noqa: E402

TINY = TrainConfig(
    steps=2, warm_start_steps=2, warm_start_batch=8, prompts=4, group_size=4, updates_per_batch=2, eval_problems=8
)


def test_a_run_is_finite_and_the_same_seed_repeats_it():
    first, second = train(TINY), train(TINY)
    assert first.numbers() == second.numbers()
    assert [row["step"] for row in first.steps] == [1, 2]
    assert all(math.isfinite(value) for row in first.steps for value in row.values())
    assert all(0 <= value <= 1 for value in (*first.before.values(), *first.after.values()))


def test_a_resumed_run_goes_on_with_the_same_numbers():
    whole = Trainer(TINY)
    whole.train_step()
    state = copy.deepcopy(whole.state_dict())
    expected = whole.train_step()
    resumed = Trainer(TINY)
    resumed.load_state_dict(state)
    assert resumed.train_step() == expected


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    train(replace(TINY, steps=1), checkpoint=checkpoint)
    phases = []
    resumed = train(TINY, lambda phase, *_: phases.append(phase), checkpoint)
    assert set(phases) == {"rollouts and updates"}
    assert resumed.steps == train(TINY).steps


@pytest.mark.parametrize("objective", ["erc-dapo", "erc-gppo-paper"])
def test_micro_batches_change_nothing_but_rounding(objective):
    tiny = replace(TINY, steps=1, objective=objective)
    whole, parts = train(tiny), train(replace(tiny, micro_batch=3, generation_batch=5))
    for name in ("grad_norm", "entropy", "clip_fraction"):
        assert parts.steps[0][name] == pytest.approx(whole.steps[0][name], rel=1e-3, abs=1e-6)


def test_neighbouring_seeds_give_different_problems():
    task = Task("products", short=True)
    first, second = ({p.question for p in task.problems(64, seed)} for seed in (1, 2))
    assert len(first & second) < 16


def test_held_out_questions_never_appear_in_training():
    task = Task("chain_sum", short=True)
    training = {p.question for seed in range(8) for p in task.problems(128, seed)}
    assert not training & {p.question for p in task.problems(128, seed=0, held_out=True)}


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic"])
def test_the_reward_is_the_verifiers_verdict(name):
    task = Task(name, short=True)
    for problem in task.problems(8, seed=3):
        scored = reasoning_gym.get_score_answer_fn(name)
        for answer in (problem.answer, f"{problem.answer}1", "", "no number"):
            assert task.reward(answer, problem) == float(scored(answer, problem.entry) == 1.0)
        assert task.reward(problem.answer, problem) == 1.0
        assert task.reward(f"first 5, then <answer>{problem.answer}</answer>", problem) == 1.0
