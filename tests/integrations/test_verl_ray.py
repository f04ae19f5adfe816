"""verl's own trainers over a real Ray cluster make the updates of a twin in one process: `make test-verl`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import erc
from tests.integrations.verl_environment import lacks

if reason := lacks():
    pytest.skip(reason, allow_module_level=True)

from tests.integrations.verl_ray import GROUP, PROMPTS, REPORTED, Run, Twin, make_data, run_under_ray, twin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]
PADDED = ["actor_rollout_ref.model.use_remove_padding=False"]
PACKED = ["actor_rollout_ref.model.use_remove_padding=True"]
ALL = tuple(REPORTED)


def largest_difference(run: Run, other: Twin) -> float:
    """Between the weights that the rollout engine was given and the twin's, over all steps."""
    pairs = zip(run.weights, other.weights, strict=True)
    return max(float((ours[name] - theirs[name]).abs().max()) for ours, theirs in pairs for name in ours)


def assert_equals_its_twin(folder, run: Run, names=ALL, objective="erc-dapo", nll_coef=0.0) -> None:
    same = twin(folder, run.rollouts, objective, nll_coef)
    assert [len(batch) for batch in run.rollouts] == [PROMPTS * GROUP] * len(run.logged)
    for logged, report in zip(run.logged, same.reports, strict=True):
        for name in names:
            assert logged[name] == pytest.approx(report[REPORTED[name]], rel=1e-3, abs=1e-4), name
    assert largest_difference(run, same) < 1e-4
    assert max(report["erc_fraction"] for report in same.reports) > 0.05, "a gate that never closes compares nothing"
    ungated = twin(folder, run.rollouts, replace(erc.objective("dapo"), ratio=_named(objective).ratio), nll_coef)
    assert largest_difference(run, ungated) > 1e-3, "a training without the gate would pass too"
    if nll_coef:
        without = twin(folder, run.rollouts, objective)
        assert largest_difference(run, without) > 1e-3, "a training without the NLL term would pass too"


def _named(objective: str | erc.Objective) -> erc.Objective:
    return erc.objective(objective) if isinstance(objective, str) else objective


def test_two_workers_padded(tmp_path):
    """Sequences of one length, so that the workers' mean metrics are the batch's."""
    make_data(tmp_path)
    run = run_under_ray(tmp_path, 2, [*PADDED, "actor_rollout_ref.rollout.ignore_eos=True"])
    assert_equals_its_twin(tmp_path, run)
    lengths = {len(told) for batch in run.rollouts for _, told in batch}
    assert len(lengths) == 1
    assert run.logged[0]["actor/erc_fraction"] < 1


def test_a_recipe_with_one_worker_packed_fused_and_demonstrated(tmp_path):
    """The paper's loss with its NLL term, log-probs and entropies from hidden states, sequences of many lengths, and a
    prompt for every rollout."""
    make_data(tmp_path, agent="erc_in_context")
    loops = tmp_path / "agent_loops.yaml"
    loops.write_text(
        f"- name: erc_in_context\n  _target_: erc.integrations.verl_in_context.InContextAgentLoop\n"
        f"  pool: {tmp_path}/demonstrations.jsonl\n  demonstrated: 3\n  template: multi-round\n  seed: 2\n"
    )
    fused = [
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
    ]
    agent = [f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}"]
    recipe = ["actor_rollout_ref.actor.policy_loss.loss_mode=erc_dapo_paper"]
    run = run_under_ray(tmp_path, 1, [*PACKED, *fused, *agent, *recipe])
    paper = erc.objective("erc-dapo-paper")
    assert_equals_its_twin(tmp_path, run, objective=replace(paper, nll_coef=0.0), nll_coef=paper.nll_coef)
    assert len({len(told) for batch in run.rollouts for _, told in batch}) > 1
    for step, batch in enumerate(run.rollouts):
        assert_demonstrated(tmp_path, step + 1, [prompt for prompt, _ in batch])


def assert_demonstrated(folder, step: int, prompts: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    from erc.rlvr import DemonstrationPool, InContextRollouts

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pool = DemonstrationPool.from_jsonl(folder / "demonstrations.jsonl")
    shown = InContextRollouts(pool, 3, template="multi-round", seed=2)
    texts = sorted(tokenizer.decode(prompt) for prompt in prompts)
    questions = {text.split(tokenizer.eos_token)[-1].strip() for text in texts}
    assert len(questions) == PROMPTS
    expected = [
        tokenizer.apply_chat_template(
            shown.prompt([{"role": "user", "content": question}], rollout, GROUP, step), tokenize=False
        )
        for question in questions
        for rollout in range(GROUP)
    ]
    assert texts == sorted(
        tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected
    )
    assert len(set(texts)) == PROMPTS * GROUP


def test_the_deprecated_trainer_with_two_workers_packed(tmp_path):
    make_data(tmp_path)
    run = run_under_ray(tmp_path, 2, [*PACKED, "trainer.use_v1=False"])
    names = [name for name in ALL if name not in ("actor/erc_fraction", "actor/entropy_ratio", "actor/ppo_kl")]
    assert_equals_its_twin(tmp_path, run, names)
    assert len({len(told) for batch in run.rollouts for _, told in batch}) > 1
    assert torch.tensor([entry["actor/erc_fraction"] for entry in run.logged]).max() > 0.05
