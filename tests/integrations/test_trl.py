"""`ERCTrainer` against TRL's own `GRPOTrainer`: the same losses and the same parameters, step for step."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import erc

for package in ("transformers", "trl", "datasets", "tokenizers", "reasoning_gym"):
    pytest.importorskip(package, reason=f"needs {package}")
import reasoning_gym  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from erc.integrations.trl import ERCConfig, ERCTrainer  # noqa: E402

ROOT = Path(__file__).parents[2]
CHARACTERS = ["<pad>", "<eos>", "<unk>", *"0123456789+-=. "]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TASK = reasoning_gym.create_dataset("chain_sum", size=32, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    special |= {"padding_side": "left", "chat_template": CHAT}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.Qwen3ForCausalLM(config)


def verifier(completions: list[str], index: list[int], **_: object) -> list[float]:
    """reasoning-gym's score, and a little for digits, so that a random model's groups differ."""
    scores = []
    for text, i in zip(completions, index, strict=True):
        text = (text if isinstance(text, str) else text[-1]["content"]).strip()
        digits = sum(character.isdigit() for character in text) / 8
        scores.append(TASK.score_answer(text, TASK[i]) + digits)
    return scores


def train(
    path,
    trainer_class,
    config_class,
    steps: int = 3,
    trainer: dict | None = None,
    resume=None,
    prepare=None,
    rows: list[dict] | None = None,
    **options,
):
    settings = {
        "output_dir": str(path),
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "num_iterations": 2,
        "seed": 3,
    }
    rows = rows or [{"prompt": TASK[i]["question"].split("?")[0][-8:], "index": i} for i in range(len(TASK))]
    model = make_model()
    if options.get("beta"):  # TRL loads the reference from where the model came from
        model.save_pretrained(path / "reference")
        model.config._name_or_path = str(path / "reference")
    given = {"reward_funcs": verifier} | (trainer or {})
    trainer = trainer_class(
        model,
        args=config_class(**(settings | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **given,
    )
    if prepare is not None:
        prepare(trainer)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    after = {name: value.detach() for name, value in trainer.model.named_parameters()}
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, after, moved


def assert_same_log(ours, theirs, rel: float, abs: float) -> None:
    """Everything in `theirs` but times."""
    for entry, expected in zip(ours, theirs, strict=True):
        timed = {name for name in expected if name.endswith(("_runtime", "_per_second", "step_time"))}
        for name in expected.keys() - timed:
            assert entry[name] == pytest.approx(expected[name], rel=rel, abs=abs), name


def assert_same_training(ours, theirs, rel: float = 2e-3, abs: float = 2e-5) -> None:
    """Everything in the log of `theirs`, and the parameters."""
    assert len(ours[0]) == len(theirs[0]) > 0
    assert_same_log(ours[0], theirs[0], rel, abs)
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=rel, atol=10 * abs, msg=name)
    assert theirs[2] > 1e-3, "a training that moves nothing compares nothing"


DAPO = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}
CASES = {
    "iterations": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "one iteration, old log-probs": {"num_iterations": 1, "steps_per_generation": 2},
    "on-policy": {"num_iterations": 1},
    "kl": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.02, "gradient_accumulation_steps": 2},
    "temperature": {"temperature": 0.7},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "truncated completions masked": {"mask_truncated_completions": True, "max_completion_length": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_dapo_without_a_gate_reproduces_grpo_trainer(tmp_path, case):
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, objective="dapo", optim="sgd", **CASES[case])
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, optim="sgd", **DAPO, **CASES[case])
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("case", ["kl", "padded to a multiple"])
def test_packed_rows_without_padding_make_the_updates_of_padded_ones(tmp_path, case, monkeypatch):
    rows, forward = [], transformers.Qwen3Model.forward

    def noting(self, input_ids=None, use_cache=None, **kwargs):
        if use_cache is False:  # not generation
            rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, use_cache=use_cache, **kwargs)

    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, optim="sgd", **DAPO, **CASES[case])
    monkeypatch.setattr(transformers.Qwen3Model, "forward", noting)
    options = {"objective": "dapo", "optim": "sgd", "padding_free": True, **CASES[case]}
    assert_same_training(train(tmp_path / "a", ERCTrainer, ERCConfig, **options), theirs)
    assert set(rows) == {1}


SEQUENCE_WIDTHS = {"epsilon": 0.05, "epsilon_high": 0.06, "importance_sampling_level": "sequence"}
REDUCTIONS = {
    "grpo": ({"loss_type": "grpo"}, erc.objective("grpo")),
    "dr_grpo": ({"loss_type": "dr_grpo"}, erc.objective("dr-grpo")),
    "luspo": ({"loss_type": "luspo"} | SEQUENCE_WIDTHS, erc.objective("luspo", ratio=erc.GSPO(0.05, 0.06))),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_sequence_reductions_take_trls_normalisers(tmp_path, case):
    rule, objective = REDUCTIONS[case]
    accumulate = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 1e-2}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, trainer={"objective": objective}, **accumulate)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, **rule, **accumulate)
    if case == "luspo":  # TRL's clip metrics weigh sequences there, not tokens
        for entry in theirs[0]:
            for name in ("low_mean", "high_mean", "region_mean"):
                del entry[f"clip_ratio/{name}"]
    assert_same_training(ours, theirs)


@pytest.mark.slow
def test_two_processes_under_torchrun_make_the_updates_and_the_log_of_trls_two(tmp_path):
    """LoRA, accumulation, rows without padding, evaluation and a resumed run; ours and TRL's in the same processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.integrations.trl_two_processes", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    for case in ("plain", "accumulation", "lora", "padding-free", "evaluation", "resumed", "nll"):
        assert result.stdout.count(f"{case}: same") == 2, case


def test_evaluation_logs_what_trl_logs(tmp_path):
    rows = Dataset.from_list([{"prompt": "1+2=", "index": 0}, {"prompt": "3+4=", "index": 1}])
    histories = []
    for name, trainer, config, rule in [
        ("a", ERCTrainer, ERCConfig, {"objective": "dapo"}),
        ("b", GRPOTrainer, GRPOConfig, DAPO),
    ]:
        seen = []
        train(
            tmp_path / name,
            trainer,
            config,
            trainer={"eval_dataset": rows},
            prepare=seen.append,
            optim="sgd",
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            **rule,
        )
        histories.append([entry for entry in seen[0].state.log_history if "eval_loss" in entry])
    ours, theirs = histories
    assert len(ours) == len(theirs) > 0
    assert_same_log(ours, theirs, 2e-3, 2e-5)


def test_a_wrong_gradient_fails_the_comparison(tmp_path, monkeypatch):
    right = train(tmp_path / "a", ERCTrainer, ERCConfig, objective="dapo", optim="sgd")
    compute = ERCTrainer._compute_loss
    monkeypatch.setattr(ERCTrainer, "_compute_loss", lambda *args: 1.05 * compute(*args))
    wrong = train(tmp_path / "b", ERCTrainer, ERCConfig, objective="dapo", optim="sgd")
    with pytest.raises(AssertionError):
        assert_same_training(wrong, right)


def test_twenty_steps_of_erc_gate_tokens_and_log_it(tmp_path):
    logs, _, moved = train(tmp_path, ERCTrainer, ERCConfig, steps=20, objective="erc-dapo")
    assert len(logs) == 20 and moved > 1e-3
    assert logs[0]["erc/fraction"] == 0.0, "the first update of a generation starts from the rollout policy"
    assert max(entry["erc/fraction"] for entry in logs) > 0
    assert logs[0]["erc/entropy_ratio"] == pytest.approx(1, abs=1e-5)
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "entropy"} <= logs[0].keys()


def test_twenty_steps_equal_those_of_the_reference(tmp_path):
    """Rollout pass, gate, loss, gradients and metrics, against `erc.reference` in float64 throughout."""
    options = {"steps": 20, "objective": "erc-dapo", "beta": 0.05}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, **options)
    with erc.use_backend("torch"):
        theirs = train(tmp_path / "b", ERCTrainer, ERCConfig, **options)
    # At this learning rate a difference grows tenfold in four steps: 1e-7 in the first ones, 2e-3 in the last.
    assert_same_log(ours[0][:10], theirs[0][:10], 1e-4, 1e-6)
    assert_same_training(ours, theirs, rel=1e-2, abs=1e-4)
    assert max(entry["erc/fraction"] for entry in theirs[0]) > 0.05
    assert {"erc/entropy_ratio", "clip_ratio/low_min", "kl", "grad_norm"} <= theirs[0][0].keys()


def test_lora_trains_the_adapters_only(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, trainer=lora, objective="dapo", beta=0.1)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, trainer=lora, beta=0.1, **DAPO)
    assert_same_training(ours, theirs)


@pytest.mark.parametrize(("cast", "rel", "abs"), [(True, 2e-4, 2e-6), (False, 5e-3, 2e-5)])
def test_bf16_makes_trls_updates(tmp_path, cast, rel, abs):
    """With a float32 head, TRL's; without one TRL rounds each logit to bfloat16 and erc does not: within that rounding,
    which moves the parameters by 2 % of an update at most."""
    options = {"bf16": True, "cast_lm_head_to_fp32": cast, "optim": "sgd"}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, objective="dapo", **options)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, **DAPO, **options)
    assert_same_training(ours, theirs, rel=rel, abs=abs)
    with pytest.raises(AssertionError):
        assert_same_training((ours[0], {name: value * 1.01 for name, value in ours[1].items()}), theirs, rel, abs)


def corrected_loss(trainer_class, config_class, path, ratio, **options) -> tuple[torch.Tensor, list]:
    """Loss and gradients of one batch with the importance ratio of another engine, and a tool mask."""
    model = make_model()
    args = config_class(output_dir=str(path), use_cpu=True, bf16=False, report_to=[], beta=0.0, **options)
    rows = Dataset.from_list([{"prompt": "1+1", "index": 0}])
    trainer = trainer_class(model, verifier, args=args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    generator = torch.Generator().manual_seed(5)
    completion = torch.randint(3, len(CHARACTERS), (2, 4), generator=generator)
    inputs = {
        "prompt_ids": torch.tensor([[0, 4], [5, 6]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": completion,
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
        "advantages": torch.tensor([1.0, -0.5]),
        "old_per_token_logps": torch.full((2, 4), -2.9),
        "old_entropies": torch.tensor([[2.88, 2.88, 2.7, 2.88], [2.88, 3.2, 2.88, 2.88]]),
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": torch.tensor(6),
    }
    model.train()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_vllm_correction_and_tool_mask_equal_trls(tmp_path, level):
    ratio = torch.tensor([[0.5, 1.0, 2.0, 0.0], [1.5, 0.9, 1.1, 1.0]])
    ratio = ratio if level == "token" else ratio[:, :1]
    ours = corrected_loss(ERCTrainer, ERCConfig, tmp_path / "a", ratio, objective="dapo")
    theirs = corrected_loss(GRPOTrainer, GRPOConfig, tmp_path / "b", ratio, **DAPO)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in theirs[1]) > 1e-3


def engine(prompts: list[str], trainer) -> dict[str, list]:
    """Stands in for vLLM: completions and log-probs of an engine that disagrees with the model, and a mask for what a
    tool would have written."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    length = 5
    tokens = torch.randint(3, len(CHARACTERS), (len(prompts), length), generator=generator)
    logprobs = -2.9 + torch.randn(tokens.shape, generator=generator)
    mask = (torch.rand(tokens.shape, generator=generator) < 0.8).int()
    mask[:, 0] = 1
    ids = trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]
    values = {"completion_ids": tokens, "logprobs": logprobs, "env_mask": mask}
    return {"prompt_ids": ids} | {name: value.tolist() for name, value in values.items()}


def pretend_vllm(trainer) -> None:
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)


def cutting_engine(prompts: list[str], trainer) -> dict[str, list]:
    """Samples with top-k 5 of the model's own distribution, and reports what it kept and log-probs over it; in the
    three forms that engines have."""
    rollouts = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "sampling_mask": []}
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    model = trainer.accelerator.unwrap_model(trainer.model)
    for i, ids in enumerate(trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]):
        tokens, logprobs, kept = list(ids), [], []
        for _ in range(5):
            with torch.no_grad():
                top = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().topk(5)
            chosen = int(torch.multinomial(top.values.softmax(-1), 1, generator=generator))
            tokens.append(int(top.indices[chosen]))
            logprobs.append(float(top.values.log_softmax(-1)[chosen]))
            kept.append([tokens[-1], *top.indices.tolist()])
        flat = [token for row in kept for token in row[1:]]
        mask = ({"token_ids": flat, "offsets": list(range(0, 26, 5))}, SimpleNamespace(ids=flat, counts=[5] * 5), kept)
        for values, value in zip(rollouts.values(), (ids, tokens[len(ids) :], logprobs, mask[i % 3]), strict=True):
            values.append(value)
    return rollouts


def test_what_the_sampler_kept_is_replayed(tmp_path, monkeypatch):
    """A rollout of the present policy: over the kept tokens every ratio is 1, over the full vocabulary it is the kept
    mass; the loss is that of the reference."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen: list = []

    def noting(trainer) -> None:
        pretend_vllm(trainer)
        compute = trainer._compute_loss

        def computing(model, inputs):
            loss = compute(model, inputs)
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            kept = inputs["completion_ids"].shape[1]
            logits = trainer.accelerator.unwrap_model(model)(input_ids=ids, attention_mask=mask).logits
            support = erc.SamplingSupport.from_ids(inputs["sampling_ids"])
            exact = erc.reference.token_stats(logits[:, -kept - 1 : -1], inputs["completion_ids"], support=support)
            seen.append((inputs, exact, loss))
            return loss

        trainer._compute_loss = computing

    log = train(
        tmp_path, ERCTrainer, ERCConfig, steps=2, objective="erc-dapo", trainer={"rollout_func": cutting_engine},
        prepare=noting, vllm_importance_sampling_clip_max=3.0,
    )[0]  # fmt: skip
    (first, exact, _), (second, moved, _) = seen[:2]
    for inputs in (first, second):
        ratio = inputs["importance_sampling_ratio"]
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
    torch.testing.assert_close(first["old_per_token_logps"], exact.logprob, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["old_per_token_logps"], first["sampling_per_token_logps"], rtol=1e-4, atol=1e-5)
    assert (exact.logprob_full < exact.logprob - 0.1).all(), "the ratio without the support would be biased"
    assert not torch.allclose(moved.logprob, second["old_per_token_logps"], atol=1e-5), "an update lies between"
    mass = (exact.logprob_full - exact.logprob).exp().mean()
    assert log[0]["sampling/kept_mass"] == pytest.approx(float(mass), rel=1e-3)
    assert log[0]["loss"] == pytest.approx(0, abs=1e-3) and log[1]["grad_norm"] > 0


def test_a_mask_that_does_not_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def engine_that_forgets(prompts, trainer):
        rollouts = cutting_engine(prompts, trainer)
        rollouts["sampling_mask"][1] = rollouts["sampling_mask"][2][:3]
        return rollouts

    options = {"trainer": {"rollout_func": engine_that_forgets}, "prepare": pretend_vllm}
    with pytest.raises(ValueError, match="rollout 1 has 3 for 5 tokens"):
        train(tmp_path, ERCTrainer, ERCConfig, steps=1, **options)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_training_on_another_engines_rollouts_with_tool_masks_equals_trls(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    options = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": 0.3,
        "num_iterations": 1,
        "optim": "sgd",
        "trainer": {"rollout_func": engine},
        "prepare": pretend_vllm,
    }
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, objective="dapo", **options)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, **DAPO, **options)
    assert_same_training(ours, theirs)
    options |= {"num_iterations": 2}
    gated = train(tmp_path / "c", ERCTrainer, ERCConfig, objective="erc-dapo", **options)
    assert gated[0][0]["erc/entropy_ratio"] == pytest.approx(1, abs=1e-5), "old entropies are recorded"


@pytest.mark.parametrize("name", [name for name in erc.objectives() if name.startswith("erc-")])
def test_every_gated_preset_equals_the_reference_or_says_what_it_lacks(tmp_path, name):
    def loss() -> tuple[torch.Tensor, list]:
        return corrected_loss(ERCTrainer, ERCConfig, tmp_path, None, objective=name)

    if erc.objective(name).ratio.needs_divergence:
        with pytest.raises(ValueError, match="must not need old_divergence"):
            loss()
        return
    ours = loss()
    with erc.use_backend("torch"):
        theirs = loss()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in theirs[1]) > 1e-3


def erc_names(log: list[dict]) -> set[str]:
    return {name for entry in log for name in entry if "erc/" in name}


def test_a_gate_that_can_do_nothing_is_said_so_and_not_logged(tmp_path):
    with pytest.warns(UserWarning, match="gate of the objective can do nothing.*num_iterations=2"):
        logs, _, moved = train(tmp_path / "a", ERCTrainer, ERCConfig, num_iterations=1)
    assert not erc_names(logs) and moved > 1e-3
    ungated = train(tmp_path / "b", ERCTrainer, ERCConfig, objective="dapo", num_iterations=1)
    assert_same_training((logs, *ungated[1:]), ungated)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 1, "steps_per_generation": 2}, {"objective": "dapo"}])
def test_a_gate_that_can_act_warns_of_nothing(tmp_path, options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*entropy-ratio gate")
        logs, _, _ = train(tmp_path, ERCTrainer, ERCConfig, steps=1, **options)
    assert bool(erc_names(logs)) == ("objective" not in options)


def test_evaluation_has_no_gate_to_log(tmp_path):
    rows, seen = Dataset.from_list([{"prompt": "1+2=", "index": 0}, {"prompt": "3+4=", "index": 1}]), []
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    train(tmp_path, ERCTrainer, ERCConfig, trainer={"eval_dataset": rows}, prepare=seen.append, steps=2, **options)
    history = seen[0].state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert evaluations and "eval_entropy" in evaluations[0]
    assert not erc_names(evaluations) and erc_names(history)


MESSAGES = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "index": i} for i in range(8)]
POOL = erc.rlvr.DemonstrationPool(tuple(erc.rlvr.Demonstration(f"{i}+{i}=", str(2 * i), str(2 * i)) for i in range(5)))
ROLLOUTS = erc.rlvr.InContextRollouts(POOL, demonstrated=3, template="multi-round", seed=4)


def watched(trainer, seen: dict) -> None:
    """Records the prompts of every generation and what the updates are conditioned on."""
    tokenizer, generate, compute = trainer.processing_class, trainer._generate, trainer._compute_loss

    def generating(prompts):
        seen.setdefault("asked", []).append(["".join(part["content"] + " " for part in prompt) for prompt in prompts])
        return generate(prompts)

    def computing(model, inputs):
        texts = tokenizer.batch_decode(inputs["prompt_ids"][:, :], skip_special_tokens=True)
        seen.setdefault("conditioned", []).append(sorted(text.replace(" ", "") for text in texts))
        seen.setdefault("old", []).append(inputs.get("old_per_token_logps"))
        return compute(model, inputs)

    trainer._generate, trainer._compute_loss = generating, computing


def test_in_context_rollouts_decide_every_prompt(tmp_path):
    seen: dict[str, list] = {}
    logs, _, moved = train(
        tmp_path,
        ERCTrainer,
        ERCConfig,
        steps=4,
        rows=MESSAGES,
        trainer={"in_context": ROLLOUTS},
        prepare=lambda trainer: watched(trainer, seen),
    )
    assert len(seen["asked"]) == 2 and len(logs) == 4 and moved > 1e-3, "two generations of two updates each"
    for generation, asked in enumerate(seen["asked"]):
        shown = [f"{demo.query} {demo.answer} " for demo in ROLLOUTS.demonstrations(2 * generation)]
        for first in range(0, len(asked), 4):  # one group
            question = asked[first + 3]
            assert question in {f"{i}+1= " for i in range(8)}, "the last rollout of a group sees none"
            assert asked[first : first + 3] == [demo + question for demo in shown]
        expected = sorted(text.replace(" ", "") for text in asked)
        assert seen["conditioned"][2 * generation : 2 * generation + 2] == [expected, expected]
    assert seen["asked"][0][0] != seen["asked"][1][0]


def test_in_context_updates_equal_those_of_the_reference_under_the_same_prompts(tmp_path):
    """Old log-probs and two updates, against `erc.reference` on the logits of the rows that were sampled."""
    options = {"objective": "dapo", "optim": "sgd", "steps": 2}
    seen: list[dict] = []

    def noting(trainer) -> None:
        score = trainer._generate_and_score_completions

        def scoring(inputs):
            output = score(inputs)
            seen.append({name: value.clone() for name, value in output.items() if torch.is_tensor(value)})
            return output

        trainer._generate_and_score_completions = scoring

    trainer = {"in_context": ROLLOUTS}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, rows=MESSAGES, trainer=trainer, prepare=noting, **options)
    batch = seen[0]
    model = make_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-2)
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    kept = batch["completion_ids"].shape[1]
    logits = model(tokens, attention_mask=attention).logits[:, -kept - 1 : -1]
    old = erc.token_stats(logits.detach(), batch["completion_ids"], backend="torch").logprob
    torch.testing.assert_close(batch["old_per_token_logps"], old, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        logits = model(tokens, attention_mask=attention).logits[:, -kept - 1 : -1]
        arguments = {"old_logprob": old, "advantages": batch["advantages"], "mask": batch["completion_mask"]}
        out = erc.policy_loss(logits, batch["completion_ids"], objective="dapo", backend="torch", **arguments)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(ours[1][name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)
    assert ours[2] > 1e-3
    prompts = {tuple(row) for row in batch["prompt_ids"].tolist()}
    assert len(prompts) > 2, "the rollouts of a group see different prompts"


def recorded_batch(path, **options) -> tuple[dict[str, torch.Tensor], list, dict]:
    """What a training was given for its first generation, its log, and its parameters at the end."""
    seen: list[dict] = []

    def noting(trainer) -> None:
        score = trainer._generate_and_score_completions

        def scoring(inputs):
            seen.append(score(inputs))
            return dict(seen[-1])

        trainer._generate_and_score_completions = scoring

    logs, parameters, _ = train(path, ERCTrainer, ERCConfig, prepare=noting, optim="sgd", **options)
    return seen[0], logs, parameters


def reference_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    kept = batch["completion_ids"].shape[1]
    return model(tokens, attention_mask=attention).logits[:, -kept - 1 : -1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_nll_term_is_a_mean_over_its_own_tokens(tmp_path, accumulation):
    """Against its formula on the logits: 0.5 times the mean negative log-prob of the rollouts with a reward."""
    objective = erc.objective("dapo", nll_coef=0.5)
    options = {"steps": 1, "num_iterations": 1, "nll_reward": 0.25, "per_device_train_batch_size": 8}
    options |= {"gradient_accumulation_steps": accumulation, "steps_per_generation": 2 * accumulation}
    options |= {"per_device_train_batch_size": 8 // accumulation, "max_grad_norm": 1e9}
    given = {"trainer": {"objective": objective}} | options
    batch, _, parameters = recorded_batch(tmp_path, **given)
    rows = batch["nll_mask"].any(1)
    assert 0 < rows.sum() < len(rows)
    first = slice(0, 8)  # the first of the generation's two updates
    seen = trained_rows(batch, tmp_path, given, first)
    model = make_model()
    logits = reference_logits(model, seen)
    arguments = {"old_logprob": seen["old_per_token_logps"], "advantages": seen["advantages"]}
    normalizer = batch["num_items_in_batch"] / 2
    out = erc.policy_loss(
        logits,
        seen["completion_ids"],
        mask=seen["completion_mask"],
        objective="dapo",
        normalizer=normalizer,
        backend="torch",
        **arguments,
    )
    logprob = erc.token_stats(logits, seen["completion_ids"], backend="torch").logprob
    nll = -(logprob * seen["nll_mask"]).sum() / (batch["nll_mask"].sum() / 2)
    (out.loss + 0.5 * nll).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 3e-2 * parameter.grad
        torch.testing.assert_close(parameters[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(batch["num_nll_in_batch"], batch["nll_mask"].sum())
    with pytest.raises(AssertionError):  # a term over all tokens would be seen
        torch.testing.assert_close(nll, -(logprob * seen["nll_mask"]).sum() / normalizer, rtol=1e-2, atol=1e-2)


def trained_rows(batch, path, given, first: slice) -> dict[str, torch.Tensor]:
    """The rows of the first update: TRL shuffles those of a generation."""
    seen: list[dict] = []

    def noting(trainer) -> None:
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: (seen.append(inputs), compute(model, inputs))[1]

    train(path / "again", ERCTrainer, ERCConfig, prepare=noting, optim="sgd", **given)
    names = [name for name, value in seen[0].items() if isinstance(value, torch.Tensor) and value.dim()]
    return {name: torch.cat([part[name] for part in seen])[first] for name in names}


def test_half_of_the_groups_are_trained_on_the_informative_ones_first(tmp_path):
    """Rewards of the first and the third group are all equal: the second and the fourth are kept."""
    options = {"per_device_train_batch_size": 16, "num_iterations": 2, "keep_groups": 0.5, "steps": 2}

    def verifier_of_groups(completions, **_):
        return [float(i % 4) if (i // 4) % 2 else 1.0 for i in range(len(completions))]

    batch, logs, _ = recorded_batch(tmp_path / "a", **options, trainer={"reward_funcs": verifier_of_groups})
    assert batch["completion_ids"].shape[0] == 8
    assert (batch["advantages"] != 0).sum() == 8 and batch["completion_mask"].any()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert logs[0]["informative_groups"] == 0.5 and logs[0]["grad_norm"] > 0

    def equal_rewards(completions, **_):
        return [1.0 if i // 4 else float(i % 4) for i in range(len(completions))]

    batch, _, _ = recorded_batch(tmp_path / "b", **options, trainer={"reward_funcs": equal_rewards})
    assert batch["completion_mask"][:4].any() and not batch["completion_mask"][4:].any(), "what fills up is masked"
    with pytest.raises(ValueError, match=r"keep_groups=0\.5 must leave whole groups of 4"):
        train(tmp_path / "c", ERCTrainer, ERCConfig, steps=1, keep_groups=0.5)


def test_in_context_needs_messages(tmp_path):
    with pytest.raises(ValueError, match="prompts that are messages"):
        train(tmp_path, ERCTrainer, ERCConfig, steps=1, trainer={"in_context": ROLLOUTS})


def test_what_the_objective_has_taken_over_is_refused(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    places = {
        "epsilon_high": (0.3, r"erc\.objective\('erc-dapo', ratio=erc\.PPOClip\(eps_low=0\.2, eps_high=0\.3, "),
        "delta": (4.0, r"ratio=erc\.PPOClip\(.*delta=4\.0\)"),
        "sapo_temperature_neg": (2.0, "another objective than 'erc-dapo', whose PPOClip has no tau_neg"),
        "top_entropy_quantile": (0.2, r"high_entropy=erc\.HighEntropyMask\(0\.2\)"),
        "importance_sampling_level": ("sequence", "an objective of sequences"),
    }
    for name, (value, place) in places.items():
        with pytest.raises(ValueError, match=f"{name} belongs to the objective: .*{place}"):
            ERCConfig(**given, **{name: value})
    for name in ("dppo-full-tv", "erc-dppo-full-kl"):
        with pytest.raises(ValueError, match="must not need old_divergence"):
            ERCConfig(**given, objective=name)
    with pytest.raises(ValueError, match=r"keep_groups must be in \(0, 1\]"):
        ERCConfig(**given, keep_groups=0.0)
    with pytest.raises(TypeError, match=r"pass an Objective to ERCTrainer\(objective=\.\.\.\)"):
        ERCConfig(**given, objective=erc.objective("erc-dapo"))
    with pytest.raises(ValueError, match="loss_type follows the objective"):
        ERCConfig(**given, loss_type="cispo")
    with pytest.raises(ValueError, match="objective must be one of"):
        ERCConfig(**given, objective="nothing")


def test_images_are_refused_by_name(tmp_path):
    def with_image(trainer) -> None:
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: compute(model, inputs | {"pixel_values": torch.ones(1)})

    with pytest.raises(ValueError, match="does not take pixel_values"):
        train(tmp_path, ERCTrainer, ERCConfig, steps=1, prepare=with_image)
