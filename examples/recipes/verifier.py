"""The verifier of both papers: the last `\\boxed{}` of an answer, compared with the truth by math-verify."""

from __future__ import annotations

import threading
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
SECONDS = 5


def question(problem: str) -> list[dict[str, str]]:
    """A problem as messages."""
    return [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` whose braces close, the command included.

    >>> last_boxed("so \\\\boxed{1} or rather \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\boxed{\\\\frac{1}{2}}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start : end + 1]
    return None


def is_right(text: str, answer: str) -> bool:
    """Whether the last boxed answer of `text` equals `answer`."""
    boxed = last_boxed(text)
    if boxed is None:
        return False
    # math-verify's time limits are signals, which only the main thread may set.
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    extraction = [LatexExtractionConfig()]
    truth, found = (parse(part, extraction, parsing_timeout=limit) for part in (f"\\boxed{{{answer}}}", boxed))
    return bool(verify(truth, found, timeout_seconds=limit))


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """TRL's form: 1 or 0 for each completion, text or messages."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_right(text, truth)) for text, truth in zip(texts, answer, strict=True)]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """verl's form."""
    return float(is_right(solution_str, ground_truth))
