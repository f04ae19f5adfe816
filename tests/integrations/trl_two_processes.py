"""What torchrun starts in two processes: `ERCTrainer` against `GRPOTrainer`, case by case.

torchrun --nproc-per-node 2 -m tests.integrations.trl_two_processes FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from datasets import Dataset

import erc
from tests.integrations.test_trl import (
    DAPO,
    ERCConfig,
    ERCTrainer,
    GRPOConfig,
    GRPOTrainer,
    assert_same_training,
    make_model,
    reference_logits,
    train,
)

SHARED = {"optim": "sgd", "ddp_backend": "gloo", "steps": 2}
CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "lora": {"gradient_accumulation_steps": 2, "learning_rate": 0.3},
    "padding-free": {},
}
ROWS = Dataset.from_list([{"prompt": "1+2=", "index": 0}, {"prompt": "3+4=", "index": 1}])


def lora() -> dict:
    return {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


def compare(path: Path, case: str) -> None:
    trainer = lora() if case == "lora" else {}
    packed = {"padding_free": True} if case == "padding-free" else {}
    options = SHARED | CASES[case]
    ours = train(path / "a", ERCTrainer, ERCConfig, trainer=trainer, objective="dapo", **packed, **options)
    theirs = train(path / "b", GRPOTrainer, GRPOConfig, trainer=trainer, **DAPO, **options)
    assert_same_training(ours, theirs)


def compare_evaluation(path: Path) -> None:
    options = SHARED | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    evaluations = []
    for name, trainer, config, rule in (
        ("a", ERCTrainer, ERCConfig, {"objective": "dapo"}),
        ("b", GRPOTrainer, GRPOConfig, DAPO),
    ):
        seen: list = []
        given = {"trainer": {"eval_dataset": ROWS}, "prepare": seen.append}
        train(path / name, trainer, config, **given, **rule, **options)
        evaluations.append([entry for entry in seen[0].state.log_history if "eval_loss" in entry])
    for ours, theirs in zip(*evaluations, strict=True):
        for name in [name for name in theirs if not name.endswith(("_runtime", "_per_second", "step_time"))]:
            assert abs(ours[name] - theirs[name]) <= 2e-3 * abs(theirs[name]) + 2e-5, (name, ours[name], theirs[name])


def compare_resumed(path: Path) -> None:
    """Four steps at once, and two and two, with the gate; the processes share the folder."""
    options = SHARED | {"steps": 4, "objective": "erc-dapo", "save_strategy": "steps", "save_steps": 2}
    logs, parameters, moved = train(path / "whole", ERCTrainer, ERCConfig, **options)
    checkpoint = str(path / "whole" / "checkpoint-2")
    resumed_logs, resumed, _ = train(path / "again", ERCTrainer, ERCConfig, resume=checkpoint, **options)
    assert moved > 1e-3 and len(logs) == 4
    for ours, theirs in zip(resumed_logs, logs, strict=True):
        assert {**ours, "step_time": 0} == {**theirs, "step_time": 0}
    for name, value in parameters.items():
        assert torch.equal(resumed[name], value), name


def compare_nll(path: Path) -> None:
    """An update of two ranks with the NLL term and half of the groups, against its formula on the rows of both."""
    rank, seen = dist.get_rank(), []

    def noting(trainer) -> None:
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: (seen.append(inputs), compute(model, inputs))[1]

    options = SHARED | {"steps": 1, "num_iterations": 1, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    options |= {"per_device_train_batch_size": 8, "keep_groups": 0.5, "nll_reward": 0.125, "max_grad_norm": 1e9}
    trainer = {"objective": erc.objective("dapo", nll_coef=0.5)}
    _, parameters, moved = train(path, ERCTrainer, ERCConfig, trainer=trainer, prepare=noting, **options)
    parts: list = [None, None]
    dist.all_gather_object(parts, seen[0])
    model = make_model()
    loss = torch.zeros(())
    for part in parts:  # of 2 groups each rank generated in each half, 1 is left
        logits = reference_logits(model, part)
        stats = erc.token_stats(logits, part["completion_ids"], backend="torch")
        out = erc.policy_loss(
            logits,
            part["completion_ids"],
            old_logprob=part["old_per_token_logps"],
            advantages=part["advantages"],
            mask=part["completion_mask"],
            objective="dapo",
            normalizer=part["num_items_in_batch"] / 2,
            backend="torch",
        )
        loss = loss + out.loss - 0.5 * (stats.logprob * part["nll_mask"]).sum() / (part["num_nll_in_batch"] / 2)
    loss.backward()
    assert moved > 1e-3 and parts[0]["nll_mask"].sum() != parts[1]["nll_mask"].sum()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 3e-2 * parameter.grad
        torch.testing.assert_close(parameters[name], expected, rtol=1e-4, atol=1e-5, msg=f"{name} of rank {rank}")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    own = folder / str(dist.get_rank())
    for case in CASES:
        compare(own / case, case)
        print(f"{case}: same", flush=True)
    compare_evaluation(own / "evaluation")
    print("evaluation: same", flush=True)
    compare_resumed(folder / "resumed")
    print("resumed: same", flush=True)
    compare_nll(own / "nll")
    print("nll: same", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
