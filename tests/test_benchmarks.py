"""The benchmarks measure what they say, and the README says what they measured."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

for package in ("rich", "typer", "matplotlib"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}")
from typer.testing import CliRunner  # noqa: E402

from benchmarks import __main__, accuracy, compare, ours, readme, step_share, suite, timing  # noqa: E402
from benchmarks.peers.base import Runner  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.variants import all_variants  # noqa: E402
from benchmarks.workloads import OPERATORS, Case, Inputs  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks" / "cpu.json"


def test_the_readme_holds_the_results_file():
    expected = readme.block(Results.load(RESULTS), RESULTS, ROOT / "README.md")
    assert readme.current_block(ROOT / "README.md") == expected, (
        "run `python -m benchmarks readme results/benchmarks/cpu.json`"
    )


def test_the_checked_in_results_are_complete():
    results = Results.load(RESULTS)
    assert results.machine["cpu"] and results.commit and results.versions["torch"]
    assert {"stats", "policy-loss", "rules"} <= {m.operator for m in results.measurements}
    assert any(m.peak_extra_bytes is not None for m in results.measurements)
    ours_rows = [row for row in results.accuracy if row.implementation == "erc cpu"]
    assert ours_rows and all(row.flipped == 0 and row.entropy_max_error <= 2e-6 for row in ours_rows)
    uncentred = [row for row in results.accuracy if row.implementation == "float32, uncentred"]
    assert any(row.flipped > 0 for row in uncentred), "the comparison must show why it matters"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A run over every operator on a few rows."""
    path = tmp_path_factory.mktemp("benchmarks") / "tiny.json"
    plan = [
        suite.Entry(
            Case(operator, "float32", 8, 512, "" if "stats" in operator or "ratio" in operator else "erc-dapo", hidden),
            timing.Budget(seconds=0.05, min_rounds=2, max_rounds=2, max_repeats=1),
            variants=None
            if operator != "rules"
            else (ours.rule_name("cpu", "dapo"), ours.rule_name("cpu", "erc-dapo")),
            memory=operator == "policy-loss",
        )
        for operator in OPERATORS
        for hidden in ([16] if operator == "linear" else [0])
    ]
    selection = suite.Selection(backends=("cpu", "torch"), peers=False)
    results = suite.run("tiny", plan, selection, accuracy=False)
    results.save(path)
    return path


def test_a_run_writes_json_and_csv(tiny):
    results = Results.load(tiny)
    assert {m.operator for m in results.measurements} == set(OPERATORS)
    assert all(m.q1 <= m.median <= m.q3 and m.median > 0 and m.gbps > 0 for m in results.measurements)
    with tiny.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results.measurements)
    (in_place,) = results.find(operator="policy-loss", variant="erc cpu, in place")
    (fresh,) = results.find(operator="policy-loss", variant="erc cpu")
    assert fresh.peak_extra_bytes is not None and in_place.peak_extra_bytes is not None


def test_every_peer_is_measured_or_skipped_with_a_reason():
    for variant in all_variants():
        for operator in variant.operators:
            reason = variant.why_not(Case(operator, "float32", 4, 64))
            assert reason is None or len(reason) > 3


def test_the_command_line_reports_and_compares(tiny, tmp_path):
    runner = CliRunner()
    printed = runner.invoke(__main__.app, ["report", str(tiny)])
    assert printed.exit_code == 0 and "erc cpu" in printed.output and "policy loss" in printed.output
    slower = json.loads(tiny.read_text())
    for measurement in slower["measurements"]:
        if measurement["variant"] == "erc cpu" and measurement["operator"] == "stats":
            for name in ("median", "q1", "q3"):
                measurement[name] *= 10
    after = tmp_path / "after.json"
    after.write_text(json.dumps(slower))
    assert runner.invoke(__main__.app, ["compare", str(tiny), str(tiny)]).exit_code == 0
    found = runner.invoke(__main__.app, ["compare", str(tiny), str(after)])
    assert found.exit_code == 1 and "1 regressions" in found.output
    (worse,) = compare.regressions(compare.changes(Results.load(tiny), Results.load(after), relative=True), 0.1)
    assert worse.factor == pytest.approx(10)
    assert runner.invoke(__main__.app, ["run", "--operators", "nothing"]).exit_code != 0


def test_timing_takes_turns_and_survives_a_failing_variant():
    order = []

    def runner(name: str) -> Runner:
        return Runner(lambda: order.append(name) or time.sleep(0.001))

    def broken() -> None:
        raise RuntimeError("no such kernel")

    budget = timing.Budget(seconds=0, min_rounds=3, max_rounds=3, max_repeats=1)
    spreads, failed = timing.interleave({"a": runner("a"), "b": runner("b"), "c": Runner(broken)}, "cpu", budget)
    assert order == ["a", "a", "b", "b", *"ab", *"ba", *"ab"]
    assert failed == {"c": "RuntimeError: no such kernel"}
    assert all(spread.samples == 3 and spread.median >= 0.001 for spread in spreads.values())


def test_the_step_model_by_hand():
    model = step_share.Model("toy", params=1e9, layers=10, width=1000, vocab=100_000)
    device = step_share.Accelerator("toy", flops=100e12, bandwidth=1e12)
    traffic = step_share.LossTraffic("toy", loss_bytes=4, stats_bytes=2, how="")
    share = step_share.step_share(model, traffic, device, length=1000, mfu=0.5, efficiency=0.8, rollout_ratio=1.0)
    backbone = (6e9 + 12 * 10 * 1000 * 500) / 50e12
    head, loss = 6 * 1000 * 100_000 / 50e12, 4 * 100_000 / 0.8e12
    old = (2e9 + 4 * 10 * 1000 * 500 + 2 * 1000 * 100_000) / 50e12 + 2 * 100_000 / 0.8e12
    assert share.loss_us == pytest.approx(0.5)
    assert share.share_of_update == pytest.approx(loss / (backbone + head + loss))
    step = backbone + head + loss + old + backbone + head
    assert share.share_of_step == pytest.approx((loss + 2 * 100_000 / 0.8e12) / step)


def test_inputs_look_like_a_trained_policy_and_cost_no_logits_for_a_linear_case():
    inputs = Inputs(Case("stats", "float32", 64, 2048))
    assert inputs.entropy.median() < 1 < inputs.entropy.max()
    linear = Inputs(Case("linear", "float32", 8, 512, "dapo", 16))
    assert "logits_master" not in vars(linear)
    exact = torch.log_softmax(linear.hidden.double() @ linear.weight.double().t(), -1)
    torch.testing.assert_close(linear.logprob.double(), exact[torch.arange(8), linear.labels], rtol=1e-4, atol=1e-4)


def test_accuracy_counts_flips():
    rows = accuracy.measure_accuracy("cpu", ("cpu",), peers=False, rows=96, vocab=4099, dtypes=("bfloat16",))
    of = {row.implementation: row for row in rows if row.band == "all"}
    assert of["erc cpu"].flipped == 0 and of["erc cpu"].entropy_max_error < 2e-6
    assert of["eager, logits' dtype"].flipped > 0.05
    assert dataclasses.asdict(of["erc cpu"])["rows"] > 50
