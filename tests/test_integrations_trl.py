"""`ERCTrainer` against TRL's own `GRPOTrainer`: the same losses and the same parameters, step for step."""

from __future__ import annotations

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

CHARACTERS = ["<pad>", "<eos>", "<unk>", *"0123456789+-=. "]
TASK = reasoning_gym.create_dataset("chain_sum", size=32, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


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
        text = text.strip()
        digits = sum(character.isdigit() for character in text) / 8
        scores.append(TASK.score_answer(text, TASK[i]) + digits)
    return scores


def train(path, trainer_class, config_class, steps: int = 3, trainer: dict | None = None, resume=None, **options):
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
    rows = [{"prompt": TASK[i]["question"].split("?")[0][-8:], "index": i} for i in range(len(TASK))]
    model = make_model()
    if options.get("beta"):  # TRL loads the reference from where the model came from
        model.save_pretrained(path / "reference")
        model.config._name_or_path = str(path / "reference")
    trainer = trainer_class(
        model,
        verifier,
        args=config_class(**(settings | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **(trainer or {}),
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    after = {name: value.detach() for name, value in trainer.model.named_parameters()}
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, after, moved


def assert_same_training(ours, theirs) -> None:
    assert len(ours[0]) == len(theirs[0]) > 0
    for name in ("loss", "grad_norm", "entropy"):
        a, b = ([entry[name] for entry in logs[0]] for logs in (ours, theirs))
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5), name
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=2e-3, atol=2e-4, msg=name)
    assert theirs[2] > 1e-3, "a training that moves nothing compares nothing"


CASES = {
    "iterations": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "kl": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.02, "gradient_accumulation_steps": 2},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_dapo_without_a_gate_reproduces_grpo_trainer(tmp_path, case):
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, objective="dapo", optim="sgd", **CASES[case])
    rule = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, optim="sgd", **rule, **CASES[case])
    assert_same_training(ours, theirs)


@pytest.mark.parametrize(("name", "loss_type"), [("grpo", "grpo"), ("dr-grpo", "dr_grpo")])
def test_sequence_reductions_take_trls_normalisers(tmp_path, name, loss_type):
    accumulate = {"gradient_accumulation_steps": 2, "optim": "sgd"}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, objective=name, **accumulate)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, loss_type=loss_type, **accumulate)
    assert_same_training(ours, theirs)


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


def test_lora_trains_the_adapters_only(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    rule = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.1}
    ours = train(tmp_path / "a", ERCTrainer, ERCConfig, trainer=lora, objective="dapo", beta=0.1)
    theirs = train(tmp_path / "b", GRPOTrainer, GRPOConfig, trainer=lora, **rule)
    assert_same_training(ours, theirs)


def test_bf16_trains(tmp_path):
    logs, _, moved = train(tmp_path, ERCTrainer, ERCConfig, objective="erc-dapo", bf16=True)
    assert moved > 1e-3 and all(entry["loss"] == entry["loss"] for entry in logs)


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    # 4 and 8 are multiples of num_iterations: a checkpoint holds no buffered rollouts.
    saves = {"save_strategy": "steps", "save_steps": 4, "objective": "erc-dapo"}
    whole = train(tmp_path / "a", ERCTrainer, ERCConfig, steps=8, **saves)
    resumed = train(
        tmp_path / "b", ERCTrainer, ERCConfig, steps=8, resume=str(tmp_path / "a" / "checkpoint-4"), **saves
    )
    assert [entry["loss"] for entry in resumed[0]] == [entry["loss"] for entry in whole[0]]
    for name, value in whole[1].items():
        assert torch.equal(resumed[1][name], value), name


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
    rule = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}
    theirs = corrected_loss(GRPOTrainer, GRPOConfig, tmp_path / "b", ratio, **rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in theirs[1]) > 1e-3


def test_what_the_objective_has_taken_over_is_refused(tmp_path):
    with pytest.raises(ValueError, match="epsilon_high belongs to the objective"):
        ERCConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, epsilon_high=0.3)
    with pytest.raises(ValueError, match="objective must be one of"):
        ERCConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, objective="nothing")
    assert erc.objective("erc-dapo").entropy_ratio is not None
