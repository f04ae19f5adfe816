"""A rollout engine for verl: one process per replica that holds the model and calls transformers' `generate`.

`ERC_VERL_RECORD` names a folder in which every replica leaves what it sampled, as lines of JSON
`[step, prompt ids, response ids, log-probs]`, and the weights that it was given at each step.
"""

from __future__ import annotations

import json
import os
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from erc.integrations.sampler import sampled_logprobs

RECORD = "ERC_VERL_RECORD"


def server_name(replica: int) -> str:
    return f"generate_server_{replica}"


class GenerateRollout(BaseRollout):
    """In each actor process: hands the actor's weights to the server of its replica."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        world = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica_rank, self.rank_in_replica = divmod(int(os.environ["RANK"]), world)

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        state = {name: tensor.detach().clone() for name, tensor in weights}  # every rank takes part in the gathers
        if self.rank_in_replica == 0:
            await ray.get_actor(server_name(self.replica_rank)).load.remote(state, global_steps)


class GenerateServer:
    """The model of one replica."""

    def __init__(self, path: str, response_length: int, ignore_eos: bool, replica: int) -> None:
        torch.manual_seed(replica)
        config = AutoConfig.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        self.response_length, self.ignore_eos, self.replica = response_length, ignore_eos, replica
        self.step: int | None = None
        self.record = os.environ.get(RECORD)

    def load(self, state: dict[str, torch.Tensor], step: int | None) -> None:
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or not set(missing) <= {"lm_head.weight"}:
            raise ValueError(f"weights must be the model's own, got {unexpected} and no {missing}")
        self.model.tie_weights()
        self.step = step
        if self.record:
            torch.save(state, f"{self.record}/weights-{step}-{self.replica}.pt")

    @torch.no_grad()
    def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        temperature = sampling_params.get("temperature", 1.0)
        length = sampling_params.get("max_tokens", self.response_length)
        out = self.model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=length,
            min_new_tokens=length if self.ignore_eos else None,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
            **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
        )
        tokens = out.sequences[0, len(prompt_ids) :]
        logprobs = None
        if sampling_params.get("logprobs"):
            logprobs = sampled_logprobs(torch.cat(out.logits), tokens, temperature=temperature or 1.0).tolist()
        if self.record:
            with open(f"{self.record}/rollouts-{self.replica}.jsonl", "a") as file:
                file.write(json.dumps([self.step, prompt_ids, tokens.tolist(), logprobs]) + "\n")
        return TokenOutput(
            token_ids=tokens.tolist(),
            log_probs=logprobs,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.step},
        )

    def nothing(self, *_: Any, **__: Any) -> None: ...

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class GenerateReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        name = server_name(self.replica_rank)
        actor = ray.remote(GenerateServer).options(name=name, num_cpus=1)
        config = self.config
        self._server_handle = actor.remote(
            self.model_config.path, config.response_length, config.ignore_eos, self.replica_rank
        )
        self._server_address, self.servers = name, [self._server_handle]
