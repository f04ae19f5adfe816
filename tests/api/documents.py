"""The Python blocks of README and docs, and the names that they take for granted."""

from __future__ import annotations

import json
import re
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import erc

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
VOCAB = 61
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A block, the line of its document that it starts at, and why it is not run, None where it is."""

    line: int
    code: str
    reason: str | None


def blocks(document: Path) -> list[Block]:
    """The Python blocks of a document. `<!-- not run: reason -->` above one says what it would need."""
    text = document.read_text()
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def is_there(name: str) -> bool:
    """Whether the repository has the file or folder; the package's may be that of an installation."""
    return (ROOT / name).exists() or (Path(erc.__file__).parents[1] / name).exists()


def small_model() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    return transformers.Qwen3ForCausalLM(config)


def names_of_tokens() -> dict[str, Any]:
    """What a trainer has of a batch: the names that documents take for granted."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 128, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0  # padded on the left
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1).masked_fill(mask == 0, -100)
    logits = torch.randn(2, 7, 128, generator=generator, requires_grad=True)
    old = erc.token_stats(logits.detach(), labels)
    hidden = torch.randn(2, 7, 16, generator=generator, requires_grad=True)
    return {
        "erc": erc, "torch": torch, "generator": generator, "tokens": tokens, "mask": mask, "labels": labels,
        "logits": logits, "rollout_logits": logits.detach(), "rollout_logprob": old.logprob, "old": old,
        "advantages": torch.tensor([1.0, -1.0]), "hidden": hidden,
        "lm_head": torch.nn.Linear(16, 128, bias=False),
        "rollout": {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.tensor([1.0, -1.0])},
    }  # fmt: skip


def sampling_mask(labels: torch.Tensor) -> SimpleNamespace:
    """What vLLM reports of a sampler: the ids that each generated token was drawn from, and where they start."""
    kept = [sorted({label, *range(0, 128, 5)}) for label in labels[labels != -100].tolist()]
    offsets = torch.tensor([0, *(len(ids) for ids in kept)]).cumsum(0)
    return SimpleNamespace(token_ids=torch.tensor([token for ids in kept for token in ids]), offsets=offsets)


def names_of_models() -> dict[str, Any]:
    """What needs transformers: a model, its tokenizer, and reward functions of trainers."""
    from examples.model import character_tokenizer

    def reward_funcs(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(completion)) % 3) for completion in completions]

    return {"model": small_model(), "tokenizer": character_tokenizer(), "reward_funcs": reward_funcs}


def names_of_demonstrations(folder: Path) -> dict[str, Any]:
    """A pool, in the files that documents name and as an object, a question and answers to it."""
    records = [
        {"query": f"{a}+{b}?", "answer": f"{a} and {b} is {a + b}", "ground_truth": str(a + b)}
        for a in range(1, 6)
        for b in range(1, 25)
    ]
    for name in ("demonstrations.jsonl", "pool.jsonl"):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    question = "2+2?"
    return {
        "pool": erc.rlvr.DemonstrationPool.from_jsonl(folder / "pool.jsonl"),
        "question": question,
        "messages": [{"role": "user", "content": question}],
        "traces": ["two and two is 4", "fish"],
    }


def names_of_trl(folder: Path, monkeypatch: Any) -> dict[str, Any]:
    """What TRL's trainers take, on a machine without a GPU, where TRL's own defaults are refused."""
    from datasets import Dataset

    from erc.integrations import trl

    here = {"use_cpu": True, "bf16": False, "report_to": [], "output_dir": str(folder)}
    monkeypatch.setattr(trl.ERCConfig, "__init__", partialmethod(trl.ERCConfig.__init__, **here))
    return {"data": Dataset.from_list([{"prompt": [{"role": "user", "content": f"{a}+2?"}]} for a in range(1, 9)])}
