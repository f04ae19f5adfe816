"""The demo's trainer end to end at the smallest useful size: finite, reproducible, resumable, scored by the package's
verifier."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch

import erc

pytest.importorskip("transformers")
reasoning_gym = pytest.importorskip("reasoning_gym")

from rich.console import Console  # noqa: E402

from examples.progress import reporting  # noqa: E402
from examples.rollout import Batch, concatenate, plain_prompts  # noqa: E402
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
    sizes = (None, 3)
    first, second = (Trainer(replace(TINY, objective=objective, micro_batch=size)).train_step() for size in sizes)
    assert first["grad_norm"] > 1e-3, "without a gradient there is nothing to compare"
    for name in ("grad_norm", "entropy", "clip_fraction"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6)


def test_generation_batches_change_no_likeliest_answer():
    whole, parts = Trainer(TINY), Trainer(replace(TINY, generation_batch=3))
    problems = whole.held_out()
    texts = [trainer.rollouts(problems, plain_prompts(problems), 0.0).texts for trainer in (whole, parts)]
    assert texts[0] == texts[1]


def test_groups_without_an_advantage_are_replaced_by_fresh_prompts():
    trainer = Trainer(replace(TINY, resample=3))
    asked, asks = [], iter([[1, 0, 1, 0] + [1] * 4 + [0] * 4 + [1, 0, 0, 0], [1] * 4 + [0, 0, 0, 1], [0, 1, 1, 1]])
    real = trainer.rollouts

    def scripted(problems, prompts, temperature):
        asked.append([problem.question for problem in problems[:: TINY.group_size]])
        rolled = real(problems, prompts, temperature)
        return rolled._replace(rewards=torch.tensor(next(asks), dtype=torch.float32))

    trainer.rollouts = scripted
    batch, rewards, row = trainer.informative_rollouts()
    assert [len(questions) for questions in asked] == [4, 2, 1]
    assert len({question for questions in asked for question in questions}) == 7, "fresh prompts"
    assert rewards.tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    assert len(batch.tokens) == 16
    assert row["reward"] == pytest.approx(7 / 16) and row["informative"] == 0.5, "of what the policy did at first"


def test_where_too_few_groups_have_an_advantage_the_batch_is_filled_up():
    trainer = Trainer(replace(TINY, resample=1))
    real = trainer.rollouts
    trainer.rollouts = lambda *asked: real(*asked)._replace(rewards=torch.ones(len(asked[0])))
    batch, rewards, _ = trainer.informative_rollouts()
    assert len(batch.tokens) == len(rewards) == 16
    row = trainer.train_step()
    assert row["informative"] == 0 and math.isfinite(row["entropy"])


def test_batches_of_different_prompt_lengths_are_padded_on_the_left():
    first = Batch(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long), torch.tensor([[-100, 3, -100]]))
    second = Batch(torch.tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.long), torch.tensor([[5, -100]]))
    both = concatenate([first, second], pad=9)
    assert both.tokens.tolist() == [[1, 2, 3], [9, 4, 5]]
    assert both.attention.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert both.labels.tolist() == [[-100, 3, -100], [-100, 5, -100]]


def test_overlong_answers_are_punished():
    """Rewards are equal, so that advantages can only stem from the lengths."""
    trainer, seen = Trainer(TINY), []
    real, update = trainer.rollouts, trainer._update
    trainer.rollouts = lambda *asked: real(*asked)._replace(rewards=torch.ones(len(asked[0])))

    def watched(batch, index, advantages, old, rewards):
        seen.append(((batch.labels[index] != -100).sum(1), advantages[index]))
        return update(batch, index, advantages, old, rewards)

    trainer._update = watched
    trainer.train_step()
    lengths, advantages = (torch.cat(column) for column in zip(*seen, strict=True))
    assert advantages.abs().max() > 0.5
    assert advantages[lengths == 6].mean() < advantages[lengths <= 4].mean()


@pytest.mark.parametrize(("name", "value"), [("band", 0.2), ("optimizer", "sgd"), ("epochs", 2)])
def test_flags_change_the_run(name, value):
    changed = Trainer(replace(TINY, **{name: value}))
    if name == "band":
        assert changed.objective.entropy_ratio == erc.EntropyRatioClip(0.2, 0.2)
    elif name == "optimizer":
        assert isinstance(changed.optimizer, torch.optim.SGD)
    else:
        updates, real = [], changed._update
        changed._update = lambda *arguments: updates.append(1) or real(*arguments)
        changed.train_step()
        assert len(updates) == 2 * TINY.updates_per_batch


def test_bad_flags_are_named():
    with pytest.raises(ValueError, match="band"):
        Trainer(replace(TINY, objective="dapo", band=0.1))
    with pytest.raises(ValueError, match="optimizer"):
        Trainer(replace(TINY, optimizer="lion"))


def test_a_piped_run_prints_a_line_per_step():
    written = io.StringIO()
    with reporting(Console(file=written)) as report:
        train(TINY, report)
    text = written.getvalue()
    assert "rollouts and updates 1/2" in text and "rollouts and updates 2/2" in text
    assert "warm start 2/2" in text and "\x1b" not in text
    with reporting(Console(file=written)) as report:
        for done in range(1, 1001):
            report("warm start", done, 1000, "")
    assert 15 < written.getvalue().count("/1000") < 30


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
