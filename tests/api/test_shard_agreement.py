"""`validate=True` of vocabulary shards: whatever differs between the ranks, each gets an error; none hangs or dies."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import erc
from tests import processes

ROWS, WIDTH, COLUMNS, WORLD = 4, 3, 10, 2
VOCAB = COLUMNS * WORLD
FORMS = ("token_stats", "policy_loss", "linear_token_stats", "linear_policy_loss")


def _call(form: str, rank: int, **changes) -> None:
    """A sharded call that is right on every rank but for `changes`."""
    linear = form.startswith("linear")
    tensors = {"hidden": torch.ones(ROWS, WIDTH), "weight": torch.ones(COLUMNS, WIDTH)}
    tensors = tensors if linear else {"logits": torch.ones(ROWS, COLUMNS)}
    arguments = tensors | {"labels": torch.zeros(ROWS, dtype=torch.long)}
    if form.endswith("loss"):
        arguments |= {"old_logprob": torch.zeros(ROWS), "advantages": torch.ones(ROWS), "objective": "dapo"}
    arguments |= {"vocab_shard": erc.VocabShard(None, rank * COLUMNS, VOCAB), "validate": True}
    getattr(erc, form)(**(arguments | changes))


def _rows(linear: bool, value) -> dict:
    return {"hidden" if linear else "logits": value}


def changes_of_rank_1(form: str) -> dict[str, tuple[dict, str]]:
    """What rank 1 passes otherwise, and what rank 0 is told."""
    linear, loss = form.startswith("linear"), form.endswith("loss")
    first = (ROWS, WIDTH if linear else COLUMNS)
    doubles = _rows(linear, torch.ones(first, dtype=torch.float64))
    if linear:
        doubles |= {"weight": torch.ones(COLUMNS, WIDTH, dtype=torch.float64)}
    failed = "rank(s) [1] did not pass their checks"
    cases = {
        "nothing": ({}, "no error"),
        "dtype": (doubles, "dtype must be the same on every rank"),
        "no tensor": (_rows(linear, [[1.0]]), failed),
        "None": (_rows(linear, None), failed),
        "integers": (_rows(linear, torch.ones(first, dtype=torch.long)), failed),
        "nested": (_rows(linear, torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged)), failed),
        "rows": ({**_rows(linear, torch.ones(ROWS + 1, first[1])), "labels": None}, "rows must be the same"),
        "temperature": ({"temperature": 0.5}, "scaling must be the same"),
        "temperatures": ({"temperature": torch.full((ROWS,), 0.5)}, "must be the same"),
        "softcap": ({"softcap": 3.0}, "scaling must be the same"),
        "logit_scale": ({"logit_scale": 2.0}, "scaling must be the same"),
        "labels": ({"labels": torch.tensor([0, 1, 0, 0])}, "labels must be the same"),
        "ignore_index": ({"ignore_index": -1}, "ignore_index must be the same"),
        "a label out of range": ({"labels": torch.full((ROWS,), VOCAB)}, failed),
        "backend": ({"backend": "torch"}, failed),
        "unknown backend": ({"backend": "tpu"}, failed),
    }
    if loss:
        cases |= {
            "objective": (
                {"objective": erc.objective("dapo", ratio=erc.PPOClip(0.1, 0.1))},
                "objective must be the same",
            ),
            "no objective": ({"objective": 3}, failed),
            "mask": ({"mask": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "mask must be the same"),
            "advantages": ({"advantages": torch.full((ROWS,), float("nan"))}, failed),
        }
        cases["rows"] = ({"advantages": torch.ones(ROWS + 1)}, failed)
    if linear:
        cases |= {
            "memory_budget": ({"memory_budget": 40}, "memory_budget must be the same"),
            "num_active": ({"num_active": ROWS + 3}, "num_active must be the same"),
            "num_active too small": ({"num_active": 1}, failed),
            "gradient of hidden": (
                {"hidden": torch.ones(ROWS, WIDTH, requires_grad=True)},
                "hidden_requires_grad must be the same",
            ),
            "bias": ({"bias": torch.zeros(COLUMNS)}, "has_bias must be the same"),
        }
    return cases


def _messages(rank: int) -> dict[tuple[str, str], str]:
    messages = {}
    for form in FORMS:
        for name, (changes, _) in changes_of_rank_1(form).items():
            try:
                _call(form, rank, **(changes if rank == 1 else {}))
                messages[form, name] = "no error"
            except (ValueError, TypeError, IndexError) as error:
                messages[form, name] = str(error)
    return messages


@cache
def messages() -> list[dict[tuple[str, str], str]]:
    """What every case says on each rank; the processes start once."""
    return processes.on_ranks(WORLD, _messages)


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FORMS for name in changes_of_rank_1(form)])
def test_every_rank_gets_an_error(form, name):
    first, second = (rank[form, name] for rank in messages())
    expected = changes_of_rank_1(form)[name][1]
    assert expected in first
    assert (second == "no error") == (expected == "no error")
    if "must be the same" in expected:
        assert second == first, "a difference has no culprit"
    elif expected != "no error":
        assert second in first, "the other ranks are told why"
