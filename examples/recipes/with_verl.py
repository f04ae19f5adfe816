"""The papers' trainings with verl, over a Ray cluster:

    python -m examples.recipes.with_verl erc-dapo-paper --data math.jsonl --validation aime.jsonl --nodes 8 --gpus 8
    python -m examples.recipes.with_verl ic-dapo-paper --data math.jsonl --demonstrations pool.jsonl ...
    python -m examples.recipes.with_verl erc-dapo-paper --smoke

`math.jsonl` holds one `{"problem": ..., "answer": ...}` per line, `pool.jsonl` what `DemonstrationPool.from_jsonl`
reads. What follows `--` goes to verl's `main_ppo` as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import datasets
import typer

from examples.recipes import paper, smoke, verifier
from examples.verl_cpu import settings as cpu

LOSSES = "erc.integrations.verl_plugin"


def settings(recipe: str, scale: paper.Scale, model: str, output: Path) -> list[str]:
    """verl's settings that make the training the paper's; the machine's come after them."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        f"data.train_files={output}/train.parquet",
        f"data.val_files={output}/validation.parquet",
        f"data.max_prompt_length={scale.prompt_tokens}",
        f"data.max_response_length={scale.response_tokens}",
        "data.filter_overlong_prompts=True",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.model.external_lib={LOSSES}",
        "actor_rollout_ref.model.use_remove_padding=True",
        # Group advantages over 8 rollouts; groups with equal rewards are left out and others sampled in their place,
        # with as many prompts in flight as the authors generate.
        "algorithm.adv_estimator=grpo",
        f"{rollout}.n={scale.rollouts}",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=reward",
        f"algorithm.filter_groups.max_inflight_gen_batches={scale.generated // scale.trained}",
        f"data.train_batch_size={scale.trained}",
        # The loss: clips, dual clip, gate and NLL term are the objective's (verl's clip_ratio* are not read); its gate
        # compares entropies, so the actor computes them. Old log-probs are the trainer's own.
        f"{actor}.policy_loss.loss_mode={recipe.replace('-', '_')}",
        f"{actor}.calculate_entropy=True",
        f"{actor}.loss_agg_mode=token-mean",
        f"{actor}.ppo_mini_batch_size={scale.per_update}",
        f"{actor}.ppo_epochs=1",
        f"{actor}.use_kl_loss=False",
        f"{actor}.entropy_coeff=0",
        "algorithm.use_kl_in_reward=False",
        # AdamW at a constant rate after a short warm-up.
        f"{actor}.optim.lr={scale.learning_rate}",
        f"{actor}.optim.lr_warmup_steps={scale.warmup_steps}",
        f"{actor}.optim.weight_decay={scale.weight_decay}",
        f"{actor}.grad_clip={scale.gradient_norm}",
        # Sampling without truncation, as in training; for validation as the authors do.
        f"{rollout}.temperature={scale.temperature}",
        f"{rollout}.top_p=1.0",
        f"{rollout}.top_k=-1",
        f"{rollout}.val_kwargs.do_sample=True",
        f"{rollout}.val_kwargs.temperature=0.6",
        f"{rollout}.val_kwargs.top_p=0.95",
        # The verifier.
        f"reward.custom_reward_function.path={Path(verifier.__file__)}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.val_before_train=False",
        f"trainer.total_training_steps={scale.batches}",
        "trainer.total_epochs=1000",
        "trainer.project_name=erc",
        f"trainer.experiment_name={recipe}",
        f"trainer.default_local_dir={output}/checkpoints",
        "trainer.logger=[console,file]",
    ]


def on_gpus(scale: paper.Scale, nodes: int, gpus: int) -> list[str]:
    """A cluster of GPUs with vLLM, as the authors'."""
    tokens = (scale.prompt_tokens + scale.response_tokens) // 4
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        f"{actor}.ulysses_sequence_parallel_size=4",
        f"{actor}.use_dynamic_bsz=True",
        f"{actor}.ppo_max_token_len_per_gpu={tokens}",
        f"{rollout}.log_prob_use_dynamic_bsz=True",
        f"{rollout}.log_prob_max_token_len_per_gpu={tokens}",
        f"{actor}.fsdp_config.param_offload=True",
        f"{actor}.fsdp_config.optimizer_offload=True",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        f"{rollout}.name=vllm",
        f"{rollout}.tensor_model_parallel_size=2",
        f"{rollout}.gpu_memory_utilization=0.6",
        f"{rollout}.val_kwargs.n=32",
        f"trainer.nnodes={nodes}",
        f"trainer.n_gpus_per_node={gpus}",
        "trainer.test_freq=10",
        "trainer.save_freq=10",
    ]


def on_cpus(scale: paper.Scale, workers: int) -> list[str]:
    """This machine's CPUs, with `workers` actor processes and rollouts by transformers."""
    sequences = scale.per_update * scale.rollouts // workers
    return [
        *cpu.overrides(workers, LOSSES),
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={sequences}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={sequences}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
    ]


def write_rows(problems: Path, to: Path, agent: str) -> None:
    """verl's rows: prompt, truth, and the agent loop that asks."""
    lines = map(json.loads, problems.read_text(encoding="utf-8").splitlines())
    rows = [
        {
            "data_source": "math",
            "prompt": verifier.question(line["problem"]),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": line["answer"]},
            "extra_info": {"index": index},
            "agent_name": agent,
        }
        for index, line in enumerate(lines)
    ]
    datasets.Dataset.from_list(rows).to_parquet(to)


def write_agent_loop(demonstrations: Path, to: Path) -> list[str]:
    """In-Context RLVR: which rollouts of a group see demonstrations, as settings of an agent loop (JSON is YAML)."""
    loop = {
        "name": "erc_in_context",
        "_target_": "erc.integrations.verl_in_context.InContextAgentLoop",
        "pool": str(demonstrations.resolve()),
        "demonstrated": paper.DEMONSTRATED,
        "per_rollout": paper.DEMONSTRATIONS_EACH,
        "template": paper.TEMPLATE,
    }
    to.write_text(json.dumps([loop]), encoding="utf-8")
    return [f"actor_rollout_ref.rollout.agent.agent_loop_config_path={to}"]


def main(
    recipe: Annotated[str, typer.Argument(help="erc-dapo-paper, erc-gppo-paper or ic-dapo-paper")] = "erc-dapo-paper",
    others: Annotated[list[str] | None, typer.Argument(help="settings of verl, after --")] = None,
    data: Annotated[Path | None, typer.Option(help="problems and answers, JSON lines")] = None,
    validation: Annotated[Path | None, typer.Option(help="others for validation")] = None,
    demonstrations: Annotated[Path | None, typer.Option(help="the pool of ic-dapo-paper, JSON lines")] = None,
    model: Annotated[str, typer.Option(help="a causal LM of transformers")] = paper.MODEL,
    output: Annotated[Path, typer.Option(help="data, checkpoints and log")] = Path("output/recipe"),
    nodes: Annotated[int, typer.Option(help="machines")] = 8,
    gpus: Annotated[int, typer.Option(help="GPUs of each")] = 8,
    smoke_form: Annotated[bool, typer.Option("--smoke", help="minutes on a CPU: a random model, sums")] = False,
) -> None:
    paper.check(recipe)
    output = output.resolve()
    in_context = recipe.startswith("ic-")
    scale = paper.IN_CONTEXT if in_context else paper.ERC
    if smoke_form:
        smoke.write(output)
        data, demonstrations = output / "problems.jsonl", output / "demonstrations.jsonl"
        model, scale = str(output / "model"), paper.SMOKE
    if data is None or (in_context and demonstrations is None):
        raise typer.BadParameter("give --data, and --demonstrations for ic-dapo-paper, or --smoke")
    output.mkdir(parents=True, exist_ok=True)
    write_rows(data, output / "train.parquet", "erc_in_context" if in_context else "single_turn_agent")
    write_rows(validation or data, output / "validation.parquet", "single_turn_agent")
    given = settings(recipe, scale, model, output)
    given += on_cpus(scale, workers=1) if smoke_form else on_gpus(scale, nodes, gpus)
    given += write_agent_loop(demonstrations, output / "agent_loops.yaml") if in_context else []
    sockets = tempfile.mkdtemp(prefix="ray")
    environment = cpu.environment(sockets) if smoke_form else cpu.with_this_repository()
    environment["VERL_FILE_LOGGER_PATH"] = str(output / "log.jsonl")
    try:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *given, *(others or [])]
        code = subprocess.run(command, cwd=output, env=environment).returncode
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
    if code:
        raise typer.Exit(code)
    log = [json.loads(line)["data"] for line in (output / "log.jsonl").open()]
    rewards = [entry["critic/score/mean"] for entry in log if "critic/score/mean" in entry]
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f} in {len(rewards)} batches")


if __name__ == "__main__":
    typer.run(main)
