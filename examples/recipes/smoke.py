"""Stand-ins for `--smoke`: a random model of a few thousand parameters whose tokens hold whole boxed answers, so that
it is right by chance and can learn to be right more often, problems, and demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from examples.model import character_tokenizer, small_decoder

ANSWERS = 3  # of ten boxed digits


def write(folder: Path) -> None:
    """`model`, `problems.jsonl` and `demonstrations.jsonl` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = character_tokenizer("0123456789+=?")
    tokenizer.add_tokens([f"\\boxed{{{digit}}}" for digit in range(10)])
    small_decoder(tokenizer, width=32, layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sums = [(a, b) for a in range(ANSWERS) for b in range(ANSWERS - a)]
    problems = [{"problem": f"{a}+{b}=?", "answer": str(a + b)} for a, b in sums] * 40
    shown = [{"query": f"{a}+{b}=?", "answer": f"\\boxed{{{a + b}}}", "ground_truth": str(a + b)} for a, b in sums]
    for name, rows in (("problems", problems), ("demonstrations", shown)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
