"""The papers' trainings with TRL:

    torchrun --nproc-per-node 8 -m examples.recipes.with_trl erc-dapo-paper --data math.jsonl
    torchrun --nproc-per-node 8 -m examples.recipes.with_trl ic-dapo-paper --data math.jsonl --demonstrations pool.jsonl
    python -m examples.recipes.with_trl erc-dapo-paper --smoke

`math.jsonl` holds one `{"problem": ..., "answer": ...}` per line, `pool.jsonl` what `DemonstrationPool.from_jsonl`
reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from erc.integrations.trl import ERCConfig, ERCTrainer
from erc.rlvr import DemonstrationPool, InContextRollouts
from examples.recipes import paper, smoke
from examples.recipes.verifier import question, reward


def settings(scale: paper.Scale, output: Path, processes: int, rows: int) -> dict[str, Any]:
    """`ERCConfig`'s fields: `rows` of a micro-batch are trained on in each of `processes`."""
    share = scale.trained / scale.generated
    generated_rows = round(rows / share)
    accumulation = scale.per_update * scale.rollouts // (rows * processes)
    return {
        "output_dir": str(output),
        # A generation: 256 prompts of 8 rollouts each, of which half the groups are kept, those with unequal rewards.
        "num_generations": scale.rollouts,
        "per_device_train_batch_size": generated_rows,
        "steps_per_generation": scale.updates * accumulation,
        "keep_groups": share,
        # An update: 16 prompts, all their rollouts; 8 updates a generation, one pass over it. So old log-probs and old
        # entropies are recorded, and the gate has something to compare with from the second update on.
        "gradient_accumulation_steps": accumulation,
        "num_iterations": 1,
        "max_steps": scale.batches * scale.updates,
        # Sampling, as in training: temperature 1, no truncation of the distribution.
        "temperature": scale.temperature,
        "top_p": 1.0,
        "max_completion_length": scale.response_tokens,
        # AdamW at a constant rate after a short warm-up.
        "learning_rate": scale.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": scale.warmup_steps,
        "weight_decay": scale.weight_decay,
        "max_grad_norm": scale.gradient_norm,
        # Group advantages over all rollouts; no KL, no entropy bonus; the NLL term on rollouts with reward 1 is the
        # objective's.
        "scale_rewards": "group",
        "beta": 0.0,
        "nll_reward": 1.0,
        "padding_free": True,
        "logging_steps": 1,
        "report_to": [],
    }


ON_GPUS = {
    "bf16": True,
    "use_vllm": True,
    "vllm_mode": "colocate",
    # The authors take the old log-probs of the trainer, and correct nothing.
    "vllm_importance_sampling_correction": False,
    "save_steps": 80,
}
ON_A_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
ON_A_CPU |= {"disable_tqdm": True, "seed": 1}


def read_problems(path: Path, tokenizer: Any, limit: int) -> Dataset:
    """Prompts of at most `limit` tokens, and the answers for the verifier."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rows = [{"prompt": question(line["problem"]), "answer": line["answer"]} for line in lines]

    def tokens(messages: list[dict[str, str]]) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Dataset.from_list([row for row in rows if tokens(row["prompt"]) <= limit])


def main(
    recipe: Annotated[str, typer.Argument(help="erc-dapo-paper, erc-gppo-paper or ic-dapo-paper")] = "erc-dapo-paper",
    data: Annotated[Path | None, typer.Option(help="problems and answers, JSON lines")] = None,
    demonstrations: Annotated[Path | None, typer.Option(help="the pool of ic-dapo-paper, JSON lines")] = None,
    model: Annotated[str, typer.Option(help="a causal LM of transformers")] = paper.MODEL,
    output: Annotated[Path, typer.Option(help="checkpoints and log")] = Path("output/recipe"),
    smoke_form: Annotated[bool, typer.Option("--smoke", help="minutes on a CPU: a random model, sums")] = False,
) -> None:
    paper.check(recipe)
    in_context = recipe.startswith("ic-")
    scale = paper.IN_CONTEXT if in_context else paper.ERC
    rows = 1
    if smoke_form:
        smoke.write(output)
        data, demonstrations = output / "problems.jsonl", output / "demonstrations.jsonl"
        model, scale, rows = str(output / "model"), paper.SMOKE, 16
    if data is None or (in_context and demonstrations is None):
        raise typer.BadParameter("give --data, and --demonstrations for ic-dapo-paper, or --smoke")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = ERCConfig(
        objective=recipe, **settings(scale, output, processes, rows), **(ON_A_CPU if smoke_form else ON_GPUS)
    )
    rollouts = (
        InContextRollouts(
            DemonstrationPool.from_jsonl(demonstrations),
            paper.DEMONSTRATED,
            paper.DEMONSTRATIONS_EACH,
            paper.TEMPLATE,
            tokenizer=tokenizer,
            max_tokens=scale.prompt_tokens,
        )
        if in_context
        else None
    )
    trainer = ERCTrainer(
        AutoModelForCausalLM.from_pretrained(model) if smoke_form else model,
        reward,
        args=config,
        train_dataset=read_problems(data, tokenizer, scale.prompt_tokens),
        processing_class=tokenizer,
        in_context=rollouts,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output / "log.json").write_text(json.dumps(log))
        rewards = [entry["reward"] for entry in log if "reward" in entry]  # of each generation
        print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f} in {len(log)} updates")


if __name__ == "__main__":
    typer.run(main)
