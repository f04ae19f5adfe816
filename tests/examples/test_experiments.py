"""The experiments at the smallest size: what they measure is right, cells resume, and the same seed repeats."""

import json
import random
from dataclasses import replace

import pytest
import torch
import typer

import erc

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from typer.testing import CliRunner

from examples import erc_stability, in_context_rlvr
from examples.experiment import auc, run_cells, spread
from examples.in_context_trainer import InContextConfig, InContextTrainer, dialogue_batch
from examples.train_rlvr import TrainConfig
from examples.worked import WorkedSums, judge, solution

TINY = InContextConfig(
    steps=2, warm_start_steps=2, warm_start_batch=4, prompts=2, group_size=4, demonstrated=3, eval_problems=8
)
CALLS = []


def counted(config, report):
    CALLS.append(config.seed)
    return {"seed": config.seed}


@pytest.fixture
def sums():
    settings = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2}
    task = WorkedSums("chain_sum", short=True, settings=settings)
    return task, task.problems(64, seed=1)


def test_auc_equals_the_naive_count_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(0, 6, (count,), generator=generator).float() for count in (40, 30))
    naive = sum((h > l) + 0.5 * (h == l) for h in high.tolist() for l in low.tolist()) / (40 * 30)  # noqa: E741
    assert auc(high, low) == pytest.approx(naive)
    assert auc(low, high) == pytest.approx(1 - naive)


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


def test_finished_cells_are_read_and_changed_ones_run_again(tmp_path):
    cells = {f"seed{seed}": TrainConfig(seed=seed) for seed in (1, 2)}
    CALLS.clear()
    assert run_cells(cells, counted, tmp_path) == {"seed1": {"seed": 1}, "seed2": {"seed": 2}}
    run_cells(cells, counted, tmp_path)
    assert CALLS == [1, 2]
    run_cells({"seed1": replace(cells["seed1"], steps=1), "seed2": cells["seed2"]}, counted, tmp_path)
    assert CALLS == [1, 2, 1]


def test_spread_is_mean_and_sample_deviation():
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert spread([5.0]) == (5.0, 0.0)


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


def test_in_context_runs_repeat(tmp_path):
    first, second = (in_context_rlvr.Training(tmp_path / name) for name in "ab")
    for stage in (first, second):
        stage.work.mkdir()
    expected = first(TINY, lambda *_: None)
    assert second(TINY, lambda *_: None) == expected
    assert first(TINY, lambda *_: None) == expected  # from the kept warm start
    assert first(replace(TINY, seed=1), lambda *_: None)["steps"] != expected["steps"]


def call(module, tmp_path, *options):
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "results")]
    common = ["--seeds", "1", "--steps", "2", "--prompts", "2", "--warm-start-steps", "2", "--workers", "1"]
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [*folders, *common, *options])
    assert result.exit_code == 0, result.output
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}


def test_the_stability_experiment_writes_its_results_and_resumes(tmp_path):
    options = ["--objective", "dapo", "--objective", "erc-dapo", "--learning-rate", "1e-4"]
    cells = call(erc_stability, tmp_path, *options)
    assert len(cells) == 2
    summary = json.loads((tmp_path / "results" / "erc_stability.json").read_text())
    assert [row["objective"] for row in summary["mean_and_deviation"]] == ["dapo", "erc-dapo"]
    assert summary["config"]["steps"] == 2
    assert (tmp_path / "results" / "erc_stability.png").stat().st_size > 1000
    (tmp_path / "work" / "cells" / "dapo-lr0.0001-seed0.json").unlink()
    again = call(erc_stability, tmp_path, *options)
    assert again["erc-dapo-lr0.0001-seed0.json"] == cells["erc-dapo-lr0.0001-seed0.json"]
    assert json.loads((tmp_path / "results" / "erc_stability.json").read_text()) == summary


def test_the_in_context_experiment_writes_its_results(tmp_path):
    cells = call(in_context_rlvr, tmp_path, "--eval-problems", "8")
    assert set(cells) == {"ability.json", "evidence.json", "DAPO-seed0.json", "IC-DAPO-seed0.json"}
    results = json.loads((tmp_path / "results" / "in_context_rlvr.json").read_text())
    assert 0 <= results["evidence_gain"]["auc"] <= 1
    assert set(results["ability"]) == {"no demonstration", "1 sound", "3 sound", "1 lucky", "3 lucky"}
    assert call(in_context_rlvr, tmp_path, "--eval-problems", "8") == cells


def test_the_papers_preset_has_the_papers_numbers():
    paper = erc_stability.PAPER
    assert (paper.group_size, paper.prompts, paper.prompts // paper.updates_per_batch) == (8, 128, 16)
    for name in ("erc-dapo", "erc-gppo"):
        assert erc.objective(name, **erc_stability.paper_objective(name)) == erc.objective(f"{name}-paper")
    assert erc.objective("ppo", **erc_stability.paper_objective("ppo")).ratio == erc.PPOClip(0.2, 0.2, dual_clip=10.0)
    assert erc.objective("dapo", **erc_stability.paper_objective("dapo")) == erc.objective("ic-dapo-paper")
    assert in_context_rlvr.PAPER.objective == "ic-dapo-paper" and not in_context_rlvr.PAPER.overrides
