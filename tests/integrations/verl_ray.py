"""verl's own `main_ppo` on the CPUs of this machine, under a Ray of its own, and a twin in one process that repeats the
training with `erc.reference` on the logits of the model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import erc
from examples.model import character_tokenizer, small_decoder
from examples.verl_cpu import settings as cpu

TEMPERATURE, LEARNING_RATE, EPOCHS, PROMPTS, GROUP, NEW_TOKENS, STEPS = 0.8, 2e-2, 3, 4, 4, 8, 2
REPORTED = {
    "actor/loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/erc_fraction": "erc_fraction",
    "actor/entropy_ratio": "entropy_ratio",
    "actor/ppo_kl": "approx_kl",
    "critic/score/mean": "score",
}
"""What verl logs of a step, by the twin's names."""


class Run(NamedTuple):
    """A training under Ray: what every step logged, what was sampled, and the weights after each step."""

    logged: list[dict[str, float]]
    rollouts: list[list[tuple[list[int], list[int]]]]
    weights: list[dict[str, torch.Tensor]]


def make_data(folder: Path, agent: str | None = None) -> None:
    """A tiny model with a tokenizer of characters, sums as prompts, and demonstrations for them."""
    import datasets

    torch.manual_seed(0)
    tokenizer = character_tokenizer("0123456789+= ")
    small_decoder(tokenizer, width=32, layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"index": 12 * a + b},
        }
        | ({} if agent is None else {"agent_name": agent})
        for a in range(12)
        for b in range(12)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    demonstrations = [{"query": f"{a}+{a}=", "answer": str(2 * a), "ground_truth": str(2 * a)} for a in range(20, 26)]
    (folder / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, demonstrations)))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """The verifier: the share of digits, and one more for the sum. verl calls it in processes of its own."""
    digits = sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)
    return digits + float(ground_truth in solution_str)


def run_under_ray(folder: Path, workers: int, overrides: list[str], timeout: int = 1500) -> Run:
    """Train for `STEPS` steps of one batch, `EPOCHS` updates each; `overrides` of verl's settings come last."""
    record = folder / "record"
    record.mkdir()
    short = tempfile.mkdtemp(prefix="ray")
    environment = cpu.environment(short) | {
        "ERC_VERL_RECORD": str(record),
        "VERL_FILE_LOGGER_PATH": str(record / "log.jsonl"),
        "PYTHONWARNINGS": "ignore",
    }
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    sequences = PROMPTS * GROUP // workers
    settings = [
        *cpu.overrides(workers, "erc.integrations.verl_plugin"),
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=32",
        f"data.max_response_length={NEW_TOKENS}",
        "data.seed=0",
        f"actor_rollout_ref.model.path={folder}/model",
        f"{actor}.ppo_mini_batch_size={PROMPTS}",
        f"{actor}.ppo_micro_batch_size_per_gpu={sequences}",
        f"{actor}.ppo_epochs={EPOCHS}",
        f"{actor}.optim.lr={LEARNING_RATE}",
        f"{actor}.policy_loss.loss_mode=erc_dapo",
        f"{actor}.calculate_entropy=True",
        f"{rollout}.n={GROUP}",
        f"{rollout}.temperature={TEMPERATURE}",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={sequences}",
        f"reward.custom_reward_function.path={Path(__file__)}",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        f"trainer.total_training_steps={STEPS}",
        "trainer.total_epochs=1",
    ]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]
    with open(folder / "out.log", "w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(short, ignore_errors=True)
    if code:
        raise RuntimeError(f"verl ended with {code}:\n" + (folder / "out.log").read_text()[-8000:])
    return read_run(record)


def read_run(record: Path) -> Run:
    logged = {entry["step"]: entry["data"] for entry in map(json.loads, (record / "log.jsonl").open())}
    lines = [json.loads(line) for file in sorted(record.glob("rollouts-*.jsonl")) for line in file.open()]
    rollouts = [[(prompt, told) for at, prompt, told, _ in lines if at == step] for step in range(STEPS)]
    weights = [torch.load(next(record.glob(f"weights-{step}-*.pt"))) for step in range(STEPS + 1)]
    return Run([logged[step + 1] for step in range(STEPS)], rollouts, weights)


class Twin(NamedTuple):
    """The same training in this process."""

    reports: list[dict[str, float]]
    weights: list[dict[str, torch.Tensor]]


def twin(
    folder: Path,
    rollouts: list[list[tuple[list[int], list[int]]]],
    objective: str | erc.Objective = "erc-dapo",
    nll_coef: float = 0.0,
) -> Twin:
    """Repeat a recorded training from its rollouts, which are scored, grouped and learned from anew. `nll_coef` weighs
    the mean negative log-prob of the rollouts whose score is 1 or more."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    result = Twin([], [_copy(model)])
    for batch in rollouts:
        tokens, attention, labels = _padded(batch, tokenizer.pad_token_id)
        # A question is what stands behind the last answer of a demonstration.
        questions = [tokenizer.decode(prompt).split(tokenizer.eos_token)[-1] for prompt, _ in batch]
        scores = torch.tensor(
            [
                compute_score("", tokenizer.decode(told, skip_special_tokens=True), _sum(question))
                for question, (_, told) in zip(questions, batch, strict=True)
            ]
        )
        advantages = _group_advantages(scores, questions)

        def logits(model=model, tokens=tokens, attention=attention) -> torch.Tensor:
            return model(tokens, attention_mask=attention).logits

        with torch.no_grad():
            old = erc.token_stats(logits(), labels, temperature=TEMPERATURE, backend="torch")
        rewarded = (labels != -100) & (scores >= 1)[:, None]
        updates = []
        for _ in range(EPOCHS):
            found = logits()
            nll = -erc.token_stats(found, labels, temperature=TEMPERATURE, backend="torch").logprob[rewarded].mean()
            out = erc.policy_loss(
                found,
                labels,
                old_logprob=old.logprob,
                old_entropy=old.entropy,
                advantages=advantages,
                objective=objective,
                normalizer=(labels != -100).sum().float(),
                temperature=TEMPERATURE,
                backend="torch",
            )
            loss = out.loss + nll_coef * nll if nll_coef else out.loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            names = ("erc_fraction", "entropy_ratio", "approx_kl")
            metrics = {name: out.metrics[name].item() for name in names}
            updates.append({"loss": loss.item(), "grad_norm": norm.item(), **metrics})
        report = {name: sum(update[name] for update in updates) / EPOCHS for name in updates[0]}
        result.reports.append(report | {"score": scores.mean().item()})
        result.weights.append(_copy(model))
    return result


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _sum(question: str) -> str:
    return str(sum(int(term) for term in question.strip(" =").split("+")))


def _padded(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and labels, position t predicting `labels[:, t]`."""
    width = max(len(prompt) + len(told) for prompt, told in batch)
    tokens = torch.full((len(batch), width), pad)
    attention, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, (prompt, told) in enumerate(batch):
        end = len(prompt) + len(told)
        tokens[row, :end], attention[row, :end] = torch.tensor(prompt + told), 1
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(told)
    return tokens, attention, labels


def _group_advantages(scores: torch.Tensor, questions: list[str]) -> torch.Tensor:
    advantages = torch.zeros_like(scores)
    for question in set(questions):
        members = torch.tensor([row for row, other in enumerate(questions) if other == question])
        group = scores[members]
        advantages[members] = (group - group.mean()) / (group.std() + 1e-6)
    return advantages
