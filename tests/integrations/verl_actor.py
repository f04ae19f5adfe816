"""verl's own actor on the CPU of this process: `ActorRolloutRefWorker` with its FSDP2 engine, driven by the methods of
verl's trainers that record old log-probs and update the actor. One process, gloo, no Ray.

What stands in for parts of verl: a CPU platform (`examples.verl_cpu`); a direct call in place of the worker group that
would call the actor by Ray; and a dictionary in place of the service through which trainer and actor exchange a batch
(TransferQueue).
"""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import erc
from examples.model import character_tokenizer, small_decoder
from examples.rollout import Batch, sample
from examples.tasks import Task

SEQUENCES, MICRO, EPOCHS, GROUP, NEW_TOKENS, TEMPERATURE, LEARNING_RATE = 8, 4, 4, 4, 4, 0.8, 1e-2
CPU = torch.device("cpu")
REPORTED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "clip_fraction_high": "actor/pg_clipfrac",
    "clip_fraction_low": "actor/pg_clipfrac_lower",
    "approx_kl": "actor/ppo_kl",
    "erc_fraction": "actor/erc_fraction",
    "entropy_ratio": "actor/entropy_ratio",
}
"""What verl's actor reports of each update, by the names of erc's metrics."""


def make_policy() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    return small_decoder(tokenizer, width=32, layers=1), tokenizer


def rollouts(model: Any, tokenizer: Any, step: int) -> tuple[Batch, torch.Tensor]:
    """A batch of completions and their advantages, by a verifier."""
    task = Task("chain_sum", short=True)
    asked = [problem for problem in task.problems(2, seed=step) for _ in range(GROUP)]
    torch.manual_seed(step)
    found = sample(model, tokenizer, task, asked, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, device=CPU)
    digits = torch.tensor([sum(c.isdigit() for c in text) / NEW_TOKENS for text in found.texts])
    return found.batch, erc.rlvr.group_advantages(found.rewards.float() + digits, group_size=GROUP)


class Twin:
    """What the actor should do: the same model and optimizer, and `erc.reference` on its logits."""

    def __init__(self, objective: str) -> None:
        self.model, self.tokenizer = make_policy()
        self.objective = objective
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)

    def old_statistics(self, batch: Batch) -> erc.TokenStats:
        with torch.no_grad():
            return erc.token_stats(batch.logits(self.model), batch.labels, temperature=TEMPERATURE, backend="torch")

    def update(self, batch: Batch, old: erc.TokenStats, advantages: torch.Tensor) -> dict[str, float]:
        """One optimizer step over all micro-batches; loss, gradient norm and metrics as verl reports them."""
        tokens, outs = (batch.labels != -100).sum(), []
        for rows in torch.arange(SEQUENCES).split(MICRO):
            part = batch.rows(rows)
            out = erc.policy_loss(
                part.logits(self.model),
                part.labels,
                old_logprob=old.logprob[rows],
                old_entropy=old.entropy[rows],
                advantages=advantages[rows],
                objective=self.objective,
                normalizer=tokens.float(),
                temperature=TEMPERATURE,
                backend="torch",
            )
            out.loss.backward()
            outs.append(out)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        names = REPORTED.keys() - {"loss", "grad_norm"}
        metrics = {name: sum(float(out.metrics[name]) for out in outs) / len(outs) for name in names}
        return {"loss": sum(out.loss.item() for out in outs), "grad_norm": norm.item(), **metrics}


class Run(NamedTuple):
    """A training: what was recorded of the rollout policy for each batch, the report of each update, and the end."""

    recorded: list[list[torch.Tensor]]
    updates: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]


def train_twin(objective: str, steps: int) -> tuple[Run, list[tuple[Batch, torch.Tensor]]]:
    """`steps` batches of `EPOCHS` updates each, by the twin; also returns the batches with their advantages."""
    twin, run, batches = Twin(objective), Run([], [], {}), []
    for step in range(steps):
        batch, advantages = rollouts(twin.model, twin.tokenizer, step)
        batches.append((batch, advantages))
        old = twin.old_statistics(batch)
        run.recorded.append([value[:, -NEW_TOKENS - 1 : -1] for value in (old.logprob, old.entropy)])
        run.updates.extend(twin.update(batch, old, advantages) for _ in range(EPOCHS))
    run.parameters.update({name: value.detach() for name, value in twin.model.named_parameters()})
    return run, batches


def train(rank: int, objective: str, steps: int, variants: dict[str, list[str]]) -> dict[str, Run]:
    """The training of the twin, repeated by verl's actor once for each of `variants`, which are overrides of verl's
    config under `actor_rollout_ref`. "padded" runs under verl's older trainer. One with fused kernels comes last: verl
    patches the class of the model."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    run, batches = train_twin(objective, steps)
    runs = {"twin": run}
    mode = f"actor.policy_loss.loss_mode={objective.replace('-', '_')}"
    import examples.verl_cpu.plugin
    import examples.verl_cpu.process_group  # noqa: F401

    with tempfile.TemporaryDirectory() as path:
        make_policy()[0].save_pretrained(path)
        for name, overrides in variants.items():
            actor, run = Actor(path, [mode, *overrides], older_trainer=name == "padded"), Run([], [], {})
            for batch in batches:
                recorded, updates = actor.step(*batch)
                run.recorded.append(recorded)
                run.updates.extend(updates)
            run.parameters.update(actor.parameters())
            runs[name] = run
    return runs


class Queue:
    """TransferQueue of one process, and the worker group: the two calls a trainer makes of each."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.fields, self.reports = actor, {}, {}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        return self._tensordict({name: self.fields[name] for name in select_fields})

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> Any:
        from transfer_queue import KVBatchMeta

        self.fields |= dict(fields.items())
        return KVBatchMeta(keys, [{}] * len(keys), partition_id)

    def compute_log_prob(self, batch: Any) -> Any:
        output = self.actor.compute_log_prob(self._data(batch))
        self.fields |= {name: value for name, value in output.items() if torch.is_tensor(value)}
        return output if isinstance(batch, type(output)) else batch

    def update_actor(self, batch: Any) -> Any:
        output = self.actor.update_actor(self._data(batch))
        self.reports = dict(output["metrics"])
        return output

    def _data(self, batch: Any) -> Any:
        """The older trainer passes the batch itself, the newer one what says where it is."""
        return self._tensordict(self.fields, batch.extra_info) if hasattr(batch, "extra_info") else batch

    @staticmethod
    def _tensordict(*fields: dict) -> Any:
        from verl.utils.tensordict_utils import get_tensordict

        return get_tensordict(*fields)


class Actor:
    """verl's actor, with erc installed by verl's own setting for it, and the trainer methods that call it."""

    def __init__(self, path: str, overrides: list[str], older_trainer: bool) -> None:
        self.older = older_trainer
        from hydra import compose, initialize_config_module
        from verl.workers.engine_workers import ActorRolloutRefWorker

        settings = {
            "model.path": path,
            "model.external_lib": "erc.integrations.verl_plugin",
            "+model.load_tokenizer": False,
            "+model.override_config.attn_implementation": "eager",
            "model.enable_gradient_checkpointing": False,
            "actor.strategy": "fsdp2",
            "+actor.fsdp_config.mixed_precision.param_dtype": "fp32",
            "actor.fsdp_config.use_torch_compile": False,
            "actor.ppo_mini_batch_size": SEQUENCES,
            "actor.ppo_micro_batch_size_per_gpu": MICRO,
            "actor.ppo_epochs": EPOCHS,
            "actor.use_dynamic_bsz": False,
            "actor.calculate_entropy": True,
            "actor.optim.lr": LEARNING_RATE,
            "actor.optim.total_training_steps": 100,
            "rollout.log_prob_micro_batch_size_per_gpu": MICRO,
            "rollout.name": "hf",
            "rollout.n": 1,
            "rollout.calculate_log_probs": False,
            "rollout.temperature": TEMPERATURE,
        }
        given = [f"{name}={value}" for name, value in settings.items()] + overrides
        prefixed = ["+" * name.startswith("+") + "actor_rollout_ref." + name.lstrip("+") for name in given]
        with initialize_config_module("verl.trainer.config", version_base=None):
            self.config = compose("ppo_trainer", overrides=prefixed)
        self.actor = ActorRolloutRefWorker(self.config.actor_rollout_ref, role="actor")
        self.actor.init_model()
        self.queue = Queue(self.actor)
        self.trainer = SimpleNamespace(config=self.config, actor_rollout_wg=self.queue)

    def step(self, batch: Batch, advantages: torch.Tensor) -> tuple[list[torch.Tensor], list[dict]]:
        """Old log-probs and entropies `[B, NEW_TOKENS]`, and what verl reports of each update."""
        mask = batch.attention[:, -NEW_TOKENS:]
        do = self._older_trainer if self.older else self._newer_trainer
        recorded, logged = do(batch, advantages[:, None] * mask, mask)
        assert "actor/erc_fraction" in logged
        reports = self.queue.reports
        return recorded, [{name: reports[key][i] for name, key in REPORTED.items()} for i in range(EPOCHS)]

    def _older_trainer(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> tuple[list, dict]:
        """`RayPPOTrainer`: a padded batch; its training loop logs the entropies and takes them out."""
        from verl import DataProto
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer

        given = {
            "prompts": batch.tokens[:, :-NEW_TOKENS],
            "responses": batch.tokens[:, -NEW_TOKENS:],
            "input_ids": batch.tokens,
            "attention_mask": batch.attention,
            "position_ids": (batch.attention.cumsum(-1) - 1).clamp(min=0),
            "response_mask": mask,
        }
        lengths = batch.attention.sum(-1).tolist()
        data = DataProto.from_single_dict(given, {"temperature": TEMPERATURE, "global_token_num": lengths})
        old, _ = RayPPOTrainer._compute_old_log_prob(self.trainer, data)
        old.batch.pop("entropys")
        data = data.union(old)
        data.batch["advantages"] = advantages
        recorded = [data.batch[name] * mask for name in ("old_log_probs", "old_entropys")]
        return recorded, RayPPOTrainer._update_actor(self.trainer, data).meta_info["metrics"]

    def _newer_trainer(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> tuple[list, dict]:
        """`PPOTrainer`, verl's default: a batch without padding, kept in TransferQueue."""
        import verl.trainer.ppo.v1.trainer_base as trainer_base

        trainer_base.tq = self.queue
        everywhere, answer = batch.attention.bool(), mask.bool()

        def jagged(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            rows = [row[kept] for row, kept in zip(values, where, strict=True)]
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

        fields = {
            "prompts": jagged(batch.tokens[:, :-NEW_TOKENS], everywhere[:, :-NEW_TOKENS]),
            "responses": jagged(batch.tokens[:, -NEW_TOKENS:], answer),
            "input_ids": jagged(batch.tokens, everywhere),
            "position_ids": jagged(batch.attention.cumsum(-1) - 1, everywhere),
            "response_mask": jagged(mask, answer),
            "loss_mask": jagged(mask, answer),
            "advantages": jagged(advantages, answer),
        }
        self.queue.fields, logged = {}, {}
        meta = self.queue.kv_batch_put([str(row) for row in range(SEQUENCES)], "train", fields)
        meta = trainer_base.PPOTrainer._compute_old_log_prob(self.trainer, meta, logged)
        padded = [self.queue.fields[name].to_padded_tensor(0.0) for name in ("old_log_probs", "entropy")]
        recorded = [torch.nn.functional.pad(value, (0, NEW_TOKENS - value.shape[1])) for value in padded]
        trainer_base.PPOTrainer._update_actor(self.trainer, meta, logged)
        return recorded, logged

    def parameters(self) -> dict[str, torch.Tensor]:
        module = self.actor.actor.engine.module
        return {name: value.full_tensor().detach() for name, value in module.named_parameters()}
