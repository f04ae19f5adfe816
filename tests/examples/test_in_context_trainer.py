"""The In-Context trainer and the worked solutions it learns from."""

import random
from dataclasses import replace

import pytest
import torch
import typer

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from typer.testing import CliRunner

from examples import in_context_trainer
from examples.in_context_trainer import InContextConfig, InContextTrainer, dialogue_batch
from examples.train_rlvr import train
from examples.worked import WorkedSums, judge, solution

TINY = InContextConfig(
    steps=2, warm_start_steps=2, warm_start_batch=4, prompts=2, group_size=4, demonstrated=3, eval_problems=8
)


@pytest.fixture
def sums():
    settings = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2}
    task = WorkedSums("chain_sum", short=True, settings=settings)
    return task, task.problems(64, seed=1)


def test_sound_solutions_pass_and_lucky_ones_are_right_but_not_sound(sums):
    task, problems = sums
    rng = random.Random(0)
    for problem in problems:
        terms = problem.entry["metadata"]["expression"].split(" ")[::2]
        assert judge(solution(problem), problem) == (True, True)
        assert task.reward(solution(problem), problem) == 1.0
        lucky, unlucky = (solution(problem, rng, luck) for luck in (1.0, 0.0))
        assert judge(lucky, problem).right
        assert task.reward(lucky, problem) == 1.0
        if "0" not in terms:
            assert not judge(lucky, problem).sound
            assert judge(unlucky, problem) == (False, False)
            assert task.reward(unlucky, problem) == 0.0


@pytest.mark.parametrize("completion", ["", "=", "nothing", "{answer}", "x = {answer}", "{answer} = {answer} + 1"])
def test_answers_without_checkable_steps_are_not_sound(sums, completion):
    problem = sums[1][0]
    assert not judge(completion.format(answer=problem.answer), problem).sound


def test_only_the_demonstrated_rollouts_see_a_demonstration_and_pools_are_apart_from_the_evaluation():
    trainer = InContextTrainer(TINY)
    problems = [p for p in trainer.task.problems(2, seed=7) for _ in range(4)]
    prompts = trainer.prompts(problems)
    assert [len(prompt) for prompt in prompts] == [3, 3, 3, 1] * 2
    assert [prompt[-1]["content"] for prompt in prompts] == [problem.question for problem in problems]
    assert prompts[0][:2] == prompts[4][:2]
    asked = {problem.question for problem in trainer.held_out()}
    for pool in (trainer.pool(), trainer.pool(lucky=True)):
        assert len(pool) > 50
        assert not asked & {demo.query for demo in pool.demonstrations}


def test_documents_read_as_the_chat_template_and_label_every_answer():
    trainer = InContextTrainer(TINY)
    rows = [[("1 + 2 + 3 =", "3 + 3 = 6"), ("2 - 1 =", "1")], [("5 =", "5")]]
    batch = dialogue_batch(trainer.tokenizer, rows, trainer.device)
    messages = [
        {"role": role, "content": content}
        for pair in rows[0]
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    text = trainer.tokenizer.apply_chat_template(messages, tokenize=False)
    assert trainer.tokenizer(text, add_special_tokens=False)["input_ids"] == batch.tokens[0].tolist()
    answers = batch.labels[0][batch.labels[0] != -100]
    assert trainer.tokenizer.decode(answers) == "3 + 3 = 6<eos>1<eos>"
    at = (batch.labels[0] != -100).nonzero().flatten()
    assert torch.equal(batch.tokens[0][at + 1], answers)


def test_in_context_runs_repeat():
    first = train(TINY).numbers()
    assert train(TINY).numbers() == first
    assert train(replace(TINY, seed=1)).numbers()["steps"] != first["steps"]


@pytest.mark.parametrize(("rates", "expected"), [((0.0, 1.0), 0.5), ((0.1, 0.6), 0.35)])
def test_authors_slip_as_often_as_they_should(rates, expected):
    config = replace(TINY, warm_start_sound=0.0, warm_start_rates=rates, warm_start_batch=64, warm_start_luck=1.0)
    trainer = InContextTrainer(config)
    sound = []
    for index in range(4):
        batch = trainer.warm_batch(index)
        for row in batch.tokens:
            turns = trainer.tokenizer.decode(row).replace("<pad>", "").split("<eos>")[:-1]
            for question, steps in (turn.strip().split("= ", 1) for turn in turns):
                truth = eval(question)
                sound.append(all(eval(step) == truth for step in steps.split(" = ")))
    assert sum(sound) / len(sound) == pytest.approx(1 - expected, abs=0.08)  # forgetting a zero is no mistake


def test_the_command_trains_and_writes_its_numbers(tmp_path):
    app = typer.Typer()
    app.command()(in_context_trainer.main)
    sizes = ["--steps", "1", "--prompts", "2", "--warm-start-steps", "2", "--eval-problems", "8"]
    result = CliRunner().invoke(app, ["--output", str(tmp_path), *sizes])
    assert result.exit_code == 0, result.output
    assert "before: right" in result.output and "RL 1/1" in result.output
    assert (tmp_path / "in_context.json").exists()
    assert CliRunner().invoke(app, ["--preset", "huge"]).exit_code == 2


def test_the_papers_preset_has_the_papers_numbers():
    paper, rule = in_context_trainer.PAPER, in_context_trainer.PAPER.overrides["ratio"]
    assert (paper.group_size, paper.prompts, paper.prompts // paper.updates_per_batch) == (8, 128, 16)
    assert (rule.eps_low, rule.eps_high, rule.dual_clip) == (0.2, 0.28, 10.0)
