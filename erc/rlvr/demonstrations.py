"""In-Context RLVR (arXiv 2603.09803): demonstrations before a rollout, a change of the prompt and not of the loss.

K of the G rollouts of a prompt see demonstrations, the others none; all G form one advantage group. By Bayes' rule
this weighs rewards approximately by exponentiated Evidence Gain (`erc.rlvr.evidence_gain`, which says what is left out)
without ever computing it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from erc.rlvr.chat import Message, check_parts, encode, render

FIELDS = ("query", "answer", "ground_truth")


@dataclass(frozen=True)
class Demonstration:
    """A worked solution: the question, the expert's answer, and the verifier's ground truth."""

    query: str
    answer: str
    ground_truth: str


@dataclass(frozen=True)
class DemonstrationPool:
    """A held-out pool of demonstrations (the paper's has 1,082).

    >>> pool = DemonstrationPool((Demonstration("1+1?", "1+1 is 2", "2"),))
    >>> pool.sample(1, torch.Generator().manual_seed(0))[0].answer
    '1+1 is 2'
    """

    demonstrations: tuple[Demonstration, ...]

    def __len__(self) -> int:
        return len(self.demonstrations)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> DemonstrationPool:
        """Read one JSON object with `query`, `answer` and `ground_truth` (strings, not empty) from each line.

        Raises:
            ValueError: naming every bad line and what is wrong with it; nothing is dropped silently.
        """
        return cls(tuple(read_records(path, _demonstration)))

    def to_jsonl(self, path: str | Path) -> None:
        """Write what `from_jsonl` reads."""
        lines = [json.dumps(asdict(demo), ensure_ascii=False) for demo in self.demonstrations]
        Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def sample(self, k: int, generator: torch.Generator) -> list[Demonstration]:
        """`k` different demonstrations, in random order.

        Raises:
            ValueError: where the pool holds fewer than `k`.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"k must be in [0, {len(self)}], the size of the pool, got {k}")
        chosen = torch.randperm(len(self), generator=generator)[:k]
        return [self.demonstrations[i] for i in chosen.tolist()]


def _demonstration(record: dict[str, Any]) -> Demonstration:
    for name in FIELDS:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name!r} must be a non-empty string")
    return Demonstration(*(record[name] for name in FIELDS))


Record = TypeVar("Record")


def read_records(path: str | Path, parse: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """What `parse` makes of the JSON object in each line; empty lines are skipped.

    Raises:
        ValueError: naming every line that is no object or that `parse` refuses; or if there is no record.
    """
    records, problems = [], []
    # A line ends at \n alone: splitlines would cut at the other line separators, which JSON leaves inside strings.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            records.append(parse(record))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError(f"{path} has {len(problems)} bad record(s): " + "; ".join(problems))
    if not records:
        raise ValueError(f"{path} has no records")
    return records


@dataclass(frozen=True)
class InContextWording:
    """The words of the "in-context" template; `{number}`, `{query}` and `{answer}` are filled in, other braces stay.

    Raises:
        ValueError: if `example` has no place for query and answer, or `closing` none for the query.
    """

    opening: str = "Below you find problems that other solvers have worked out."
    example: str = "Problem {number}:\n{query}\n\nTheir solution:\n{answer}"
    closing: str = "Use what helps, reason more carefully than they did, and solve this problem yourself:\n{query}"

    def __post_init__(self) -> None:
        for name, needed in (("example", ("{query}", "{answer}")), ("closing", ("{query}",))):
            for place in needed:
                if place not in getattr(self, name):
                    raise ValueError(f"{name} must contain {place}, got {getattr(self, name)!r}")


def _fill(words: str, **values: str) -> str:
    """`words` with each `{name}` replaced, in one pass: the values may hold braces and names themselves."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], words)


def with_demonstrations(
    messages: Sequence[Message],
    demonstrations: Sequence[Demonstration],
    template: str = "in-context",
    *,
    wording: InContextWording | None = None,
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> list[Message]:
    """The conversation `messages` with demonstrations in front of its last user message; `messages` is left as it is.

    Args:
        messages: chat messages with "role" and "content"; the last one is the user's question.
        demonstrations: in the order in which they shall appear; none returns a plain copy.
        template: "multi-round" shows each demonstration as an earlier turn of question and answer; "in-context" lists
            them in the one user message as other solvers' work.
        wording: the words of "in-context".
        tokenizer, max_tokens: a budget for the whole prompt under the tokenizer's chat template. Whole demonstrations
            are left out from the end until it fits (`group_prompts` counts them); the question itself is never cut.

    Raises:
        ValueError: for a bad template or message list, a question that does not fit by itself, or (with a tokenizer) a
            chat template that cuts the demonstrations, as those of reasoning models cut what stands before `</think>`.

    >>> demo = Demonstration("1+1?", "2", "2")
    >>> [m["role"] for m in with_demonstrations([{"role": "user", "content": "2+2?"}], [demo], "multi-round")]
    ['user', 'assistant', 'user']
    """
    return _fitted(messages, demonstrations, template, wording, tokenizer, max_tokens)[0]


def _fitted(
    messages: Sequence[Message],
    demonstrations: Sequence[Demonstration],
    template: str,
    wording: InContextWording | None = None,
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> tuple[list[Message], int]:
    """The prompt of `with_demonstrations`, and how many demonstrations did not fit."""
    if template not in ("in-context", "multi-round"):
        raise ValueError(f'template must be "in-context" or "multi-round", got {template!r}')
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("messages must end with a user message: the question")
    if (tokenizer is None) != (max_tokens is None):
        raise ValueError("tokenizer and max_tokens must be given together")
    for count in range(len(demonstrations), -1, -1):
        prompt = _compose(messages, demonstrations[:count], template, wording or InContextWording())
        if tokenizer is not None and max_tokens is not None:
            text = render(tokenizer, prompt)
            if len(encode(tokenizer, text)) > max_tokens:
                continue
            answers = [("demonstrations", demo.answer) for demo in demonstrations[:count]]
            check_parts(text, answers, "cut the reasoning from the demonstrations, or use another template")
        return prompt, len(demonstrations) - count
    raise ValueError(f"max_tokens={max_tokens} is too small for the question without any demonstration")


def _compose(
    messages: Sequence[Message], demonstrations: Sequence[Demonstration], template: str, wording: InContextWording
) -> list[Message]:
    earlier, question = [dict(message) for message in messages[:-1]], dict(messages[-1])
    if not demonstrations:
        return [*earlier, question]
    if template == "multi-round":
        turns = [
            {"role": role, "content": content}
            for demo in demonstrations
            for role, content in (("user", demo.query), ("assistant", demo.answer))
        ]
        return [*earlier, *turns, question]
    parts = [wording.opening]
    for number, demo in enumerate(demonstrations, 1):
        parts.append(_fill(wording.example, number=str(number), query=demo.query, answer=demo.answer))
    parts.append(_fill(wording.closing, query=question["content"]))
    return [*earlier, {**question, "content": "\n\n".join(parts)}]


CONDITIONING = ("demonstrated", "original")


@dataclass(frozen=True)
class GroupPrompts:
    """The prompts of one advantage group of G rollouts, each list of G conversations.

    `rollout` is what the policy samples from, `train` and `old` what the current and the old log-probs are conditioned
    on. `left_out` counts, per rollout, the demonstrations that did not fit into `max_tokens`.
    """

    rollout: list[list[Message]]
    train: list[list[Message]]
    old: list[list[Message]]
    left_out: list[int]


def group_prompts(
    messages: Sequence[Message],
    demonstrations: Sequence[Demonstration],
    group_size: int = 8,
    demonstrated: int = 6,
    *,
    per_rollout: int = 1,
    template: str = "in-context",
    train: str = "demonstrated",
    old: str = "demonstrated",
    **options: Any,
) -> GroupPrompts:
    """Mix demonstrated and plain rollouts in one group: `demonstrated` of `group_size` see `per_rollout`
    demonstrations each.

    Args:
        demonstrations: `demonstrated * per_rollout` of them, drawn once for a generation batch and shared by its
            prompts (`DemonstrationPool.sample`); rollout i sees the i-th `per_rollout`.
        train, old: "demonstrated" conditions those log-probs on the prompt that the rollout saw (the paper's choice
            for both), "original" on the plain one: four modes in all.
        options: passed to `with_demonstrations`.

    Raises:
        ValueError: naming the argument.

    >>> question, demo = [{"role": "user", "content": "2+2?"}], Demonstration("1+1?", "2", "2")
    >>> group = group_prompts(question, [demo] * 2, 3, 2, template="multi-round", old="original")
    >>> [len(p) for p in group.rollout], [len(p) for p in group.old]
    ([3, 3, 1], [1, 1, 1])
    """
    if not 0 <= demonstrated <= group_size:
        raise ValueError(f"demonstrated must be in [0, group_size={group_size}], got {demonstrated}")
    needed = demonstrated * per_rollout
    if len(demonstrations) != needed:
        raise ValueError(f"demonstrations must be demonstrated * per_rollout = {needed}, got {len(demonstrations)}")
    for name, mode in (("train", train), ("old", old)):
        if mode not in CONDITIONING:
            raise ValueError(f"{name} must be one of {CONDITIONING}, got {mode!r}")
    plain = [dict(message) for message in messages]
    fitted = [
        _fitted(messages, demonstrations[i * per_rollout : (i + 1) * per_rollout], template, **options)
        for i in range(demonstrated)
    ] + [(plain, 0)] * (group_size - demonstrated)
    rollout, left_out = [prompt for prompt, _ in fitted], [count for _, count in fitted]
    conditioned = {"demonstrated": rollout, "original": [plain] * group_size}
    return GroupPrompts(rollout, conditioned[train], conditioned[old], left_out)
