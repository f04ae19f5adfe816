"""The pool builder: what enters the pool, what is left for training, and that every problem is accounted for."""

from __future__ import annotations

import json

import pytest

from erc.rlvr import DemonstrationPool
from erc.rlvr.__main__ import main
from erc.rlvr.pool import Candidate, build_pool, without_reasoning


def candidates(count: int) -> list[Candidate]:
    return [
        Candidate(f"{i}+1?", str(i + 1), ("no", f"<think>hm</think>It is {i + 1}."), (False, True))
        for i in range(count)
    ]


def test_pool_and_training_share_no_question_and_every_problem_is_counted():
    problems = [
        *candidates(20),
        Candidate(" 3 +1? ", "4", ("4",), (True,)),
        Candidate("never solved", "1", ("2",), (False,)),
        Candidate("cut off", "1", ("<think>and so",), (True,)),
        Candidate("long", "1", ("1" * 99,), (True,)),
        Candidate("evaluated", "1", ("1",), (True,)),
    ]
    split = build_pool(problems, size=12, cut_reasoning=True, max_length=40, exclude=["Evaluated"])
    assert split.counts == {
        "duplicate": 1,
        "no verified solution": 1,
        "nothing after the reasoning": 1,
        "too short or too long": 1,
        "excluded": 1,
        "in the pool": 12,
        "not needed": 8,
    }
    assert sum(split.counts.values()) == len(problems)
    shown, trained = ({demo.query for demo in split.pool.demonstrations}, {c.query for c in split.training})
    assert len(shown) == 12 and len(trained) == 11 and not shown & trained
    assert all(demo.answer == f"It is {demo.ground_truth}." for demo in split.pool.demonstrations)
    assert split == build_pool(problems, size=12, cut_reasoning=True, max_length=40, exclude=["Evaluated"])
    assert split.pool != build_pool(problems, size=12, cut_reasoning=True, max_length=40, seed=1).pool


@pytest.mark.parametrize(
    ("solution", "kept"),
    [
        ("<think>a</think>\n\nb", "b"),
        ("a</think>b", "b"),
        ("<think>a</think>b<think>c</think> d", "d"),
        ("plain", "plain"),
        ("<think>a", None),
        ("<think>a</think>b<thinking>c", None),
    ],
)
def test_reasoning_is_cut_as_templates_cut_it(solution, kept):
    assert without_reasoning(solution) == kept


def test_verified_solutions_alone_are_drawn_and_reasoning_stays_unless_it_is_to_be_cut():
    for seed in range(8):
        (demo,) = build_pool(candidates(1), seed=seed).pool.demonstrations
        assert demo.answer == "<think>hm</think>It is 1."


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_command_line_writes_the_pool_and_the_rest(tmp_path, capsys):
    records = [
        {"problem": f"{i}+1?\u2028", "gold": i + 1, "generations": [f"It is {i + 1}", "?"], "ok": [1.0, 0], "id": i}
        for i in range(6)
    ]
    source = write(tmp_path / "source.jsonl", records)
    evaluated = write(tmp_path / "evaluated.jsonl", [{"problem": "5+1?"}])
    pool, rest = str(tmp_path / "pool.jsonl"), tmp_path / "training.jsonl"
    fields = [
        "--query-field=problem",
        "--ground-truth-field=gold",
        "--solutions-field=generations",
        "--verified-field=ok",
    ]
    assert main(["pool", source, pool, "--training", str(rest), "--exclude", evaluated, "--size", "3", *fields]) == 0
    demos = DemonstrationPool.from_jsonl(pool).demonstrations
    assert [demo.answer for demo in demos] == [f"It is {demo.ground_truth}" for demo in demos]
    left = [json.loads(line) for line in rest.read_text(encoding="utf-8").split("\n") if line]
    assert left and all(record in records[:5] for record in left)
    assert {demo.query for demo in demos} | {r["problem"] for r in left} == {r["problem"] for r in records[:5]}
    printed = capsys.readouterr().out
    assert "3  in the pool" in printed and "1  excluded" in printed and "2  left for training" in printed


def test_bad_lines_and_arguments_are_named(tmp_path, capsys):
    good = {"query": "q", "ground_truth": "1", "solutions": "1", "verified": True}
    bad = [{"query": "q"}, good | {"verified": [1, 0]}, good | {"query": " "}, good | {"verified": None}]
    source = write(tmp_path / "source.jsonl", [good, *bad, good | {"solutions": 1}])
    assert main(["pool", source, str(tmp_path / "pool.jsonl")]) == 2
    message = capsys.readouterr().err
    named = ["5 bad record(s)", "line 2: no field 'ground_truth'", "line 3: 'verified'", "line 4: 'query'"]
    assert [part for part in [*named, "line 5: 'verified'", "line 6: 'solutions'"] if part not in message] == []
    assert not (tmp_path / "pool.jsonl").exists()
    with pytest.raises(ValueError, match="size"):
        build_pool(candidates(1), size=0)
    with pytest.raises(ValueError, match="max_length"):
        build_pool(candidates(1), min_length=3, max_length=2)
    with pytest.raises(ValueError, match=r"no problem for the pool.*too long"):
        build_pool(candidates(1), min_length=999)
