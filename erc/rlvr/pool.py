"""A pool of demonstrations out of problems with generated, verified solutions: `python -m erc.rlvr pool --help`."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erc.rlvr.demonstrations import Demonstration, DemonstrationPool, read_records

OPENED, CLOSED = re.compile(r"<think\w*>"), re.compile(r"</think\w*>\s*")


@dataclass(frozen=True)
class Candidate:
    """A problem with its solutions, the verifier's verdict on each, and the record that it came from."""

    query: str
    ground_truth: str
    solutions: tuple[str, ...]
    verified: tuple[bool, ...]
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolSplit:
    """The pool, the problems left for training (no question of the pool is among them), and what became of each
    problem: a count per reason."""

    pool: DemonstrationPool
    training: tuple[Candidate, ...]
    counts: dict[str, int]


def without_reasoning(solution: str) -> str | None:
    """What follows the last `</think>`; None where reasoning was opened and never closed."""
    answer = CLOSED.split(solution)[-1].strip()
    return None if OPENED.search(answer) else answer


def same_question(text: str) -> str:
    """The key by which questions are duplicates: the text without regard to white space and case."""
    return "".join(text.split()).casefold()


def build_pool(
    candidates: Iterable[Candidate],
    *,
    size: int | None = None,
    cut_reasoning: bool = False,
    min_length: int = 1,
    max_length: int | None = None,
    length: Callable[[str], int] = len,
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> PoolSplit:
    """Split problems into a pool of demonstrations and a training set that shares no question with it.

    Args:
        candidates: problems with solutions; of each, one verified solution that passes the filters is drawn.
        size: how many demonstrations at most (the paper's pool has 1,082); None takes all that qualify.
        cut_reasoning: keep what follows `</think>` alone, as chat templates of reasoning models do.
        min_length, max_length: bounds of a demonstration's answer, as `length` counts it (characters by default).
        exclude: questions that must stay out of the pool, such as those of an evaluation; they stay out of the training
            set too.
        seed: of the choice of problems and solutions.

    Raises:
        ValueError: naming the argument, or if no problem qualifies.

    >>> solved = Candidate("1+1?", "2", ("<think>hm</think>It is 2", "3"), (True, False))
    >>> build_pool([solved], cut_reasoning=True).pool.demonstrations[0].answer
    'It is 2'
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if max_length is not None and max_length < min_length:
        raise ValueError(f"max_length must be at least min_length={min_length}, got {max_length}")
    rng, counts = random.Random(seed), Counter[str]()
    excluded, seen, qualified, training = {same_question(query) for query in exclude}, set(), [], []
    for candidate in candidates:
        key = same_question(candidate.query)
        if key in excluded or key in seen:
            counts["excluded" if key in excluded else "duplicate"] += 1
            continue
        seen.add(key)
        answer, reason = _draw(candidate, cut_reasoning, lambda n: min_length <= n <= (max_length or n), length, rng)
        if answer is None:
            counts[reason] += 1
            training.append(candidate)
        else:
            qualified.append((candidate, Demonstration(candidate.query, answer, candidate.ground_truth)))
    if not qualified:
        raise ValueError(f"candidates hold no problem for the pool: {dict(counts)}")
    rng.shuffle(qualified)
    chosen, spare = qualified[:size], qualified[len(qualified) if size is None else size :]
    counts |= {"in the pool": len(chosen), "not needed": len(spare)}
    training += [candidate for candidate, _ in spare]
    return PoolSplit(DemonstrationPool(tuple(demo for _, demo in chosen)), tuple(training), dict(counts))


def _draw(
    candidate: Candidate,
    cut_reasoning: bool,
    fits: Callable[[int], bool],
    length: Callable[[str], int],
    rng: random.Random,
) -> tuple[str | None, str]:
    """A verified solution that passes the filters, or None and the filter that the last ones failed."""
    right = [text for text, good in zip(candidate.solutions, candidate.verified, strict=True) if good]
    if not right:
        return None, "no verified solution"
    answers = [without_reasoning(text) if cut_reasoning else text.strip() for text in right]
    finished = [answer for answer in answers if answer]
    if not finished:
        return None, "nothing after the reasoning"
    fitting = [answer for answer in finished if fits(length(answer))]
    return (rng.choice(fitting), "") if fitting else (None, "too short or too long")


def read_candidates(path: str | Path, fields: Mapping[str, str] | None = None) -> list[Candidate]:
    """Candidates from JSONL: a problem each line, with `query`, `ground_truth`, `solutions` (a text or a list of them)
    and `verified` (a bool, number or list, true above 0.5); `fields` maps these names to those of the file.

    Raises:
        ValueError: naming every bad line and what is wrong with it.
    """
    names = {name: name for name in ("query", "ground_truth", "solutions", "verified")} | dict(fields or {})

    def parse(record: dict[str, Any]) -> Candidate:
        missing = [name for name in names.values() if name not in record]
        if missing:
            raise ValueError(f"no field {missing[0]!r}")
        query, ground_truth, solutions, verified = (record[name] for name in names.values())
        solutions = solutions if isinstance(solutions, list) else [solutions]
        verified = verified if isinstance(verified, list) else [verified] * len(solutions)
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"{names['query']!r} must be a non-empty string")
        if not all(isinstance(text, str) for text in solutions):
            raise ValueError(f"{names['solutions']!r} must be a text or a list of texts")
        if len(verified) != len(solutions) or not all(isinstance(verdict, (bool, int, float)) for verdict in verified):
            raise ValueError(f"{names['verified']!r} must hold a bool or number for each solution")
        return Candidate(query, str(ground_truth), tuple(solutions), tuple(v > 0.5 for v in verified), record)

    return read_records(path, parse)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m erc.rlvr pool`."""
    parser.add_argument("source", type=Path, help="JSONL: query, ground_truth, solutions, verified in each line")
    parser.add_argument("pool", type=Path, help="JSONL to write: query, answer, ground_truth in each line")
    parser.add_argument("--training", type=Path, help="JSONL to write: the records that the pool did not take")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSONL whose queries stay out of both")
    parser.add_argument("--size", type=int, help="demonstrations at most; default: all that qualify")
    parser.add_argument("--cut-reasoning", action="store_true", help="keep what follows </think> alone")
    parser.add_argument("--min-length", type=int, default=1)
    parser.add_argument("--max-length", type=int, help="characters, or tokens with --tokenizer")
    parser.add_argument("--tokenizer", help="name or path for transformers' AutoTokenizer")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("query", "ground-truth", "solutions", "verified"):
        parser.add_argument(f"--{name}-field", default=name.replace("-", "_"), metavar="NAME")


def run(arguments: argparse.Namespace) -> None:
    """Read, split, write, and say what became of every problem."""
    fields = {n: getattr(arguments, f"{n}_field") for n in ("query", "ground_truth", "solutions", "verified")}

    def query_of(record: dict[str, Any]) -> str:
        if not isinstance(record.get(fields["query"]), str):
            raise ValueError(f"no field {fields['query']!r}")
        return record[fields["query"]]

    split = build_pool(
        read_candidates(arguments.source, fields),
        size=arguments.size,
        cut_reasoning=arguments.cut_reasoning,
        min_length=arguments.min_length,
        max_length=arguments.max_length,
        length=_token_counter(arguments.tokenizer) if arguments.tokenizer else len,
        exclude=[query for path in arguments.exclude for query in read_records(path, query_of)],
        seed=arguments.seed,
    )
    split.pool.to_jsonl(arguments.pool)
    if arguments.training:
        _write(arguments.training, [candidate.record for candidate in split.training])
    for reason, count in split.counts.items():
        print(f"{count:8,}  {reason}")
    print(f"{len(split.training):8,}  left for training")


def _token_counter(name: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
