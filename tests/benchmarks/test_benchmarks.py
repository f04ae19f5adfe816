"""The benchmarks measure what they say, and the README says what they measured."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from pathlib import Path

import pytest
import torch

for package in ("rich", "typer", "matplotlib"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}")
from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import erc  # noqa: E402
from benchmarks import __main__, accuracy, compare, ours, plans, readme, report, roofline, step_share, suite, timing  # noqa: E402
from benchmarks.docs_page import docs_block  # noqa: E402
from benchmarks.hardware import GPUS  # noqa: E402
from benchmarks.markdown import current_block  # noqa: E402
from benchmarks.peers.base import Runner  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.workloads import OPERATORS, Case, Inputs  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "benchmarks" / "cpu.json"
REGENERATE = "run `python -m benchmarks readme results/benchmarks/cpu.json`"


def test_the_readme_holds_the_results_file():
    expected = readme.block(Results.load(RESULTS), RESULTS, ROOT / "README.md")
    assert current_block(ROOT / "README.md") == expected, REGENERATE


def test_figures_in_the_readme_s_sentences_are_the_measured_ones():
    (usual,) = (
        row.flipped
        for row in Results.load(RESULTS).accuracy
        if (row.implementation, row.dtype, row.band) == ("eager, logits' dtype", "bfloat16", "all")
    )
    presets = {name.removeprefix("erc-") for name in erc.objectives() if f"erc-{name}" in erc.objectives()}
    text = (ROOT / "README.md").read_text()
    assert f"flips {100 * usual:.0f} % of these decisions" in text
    assert f"PPO, GRPO, DAPO, GSPO, CISPO and {len(presets) - 5} more" in text
    assert len(text.splitlines()) <= 110


def test_the_page_of_the_benchmarks_holds_what_lies_beside_the_results_file():
    document = ROOT / "docs" / "benchmarks.md"
    assert current_block(document) == docs_block(RESULTS.parent, document), REGENERATE
    for model in ("Qwen2.5-1.5B", "Qwen2.5-7B"):
        assert model in current_block(document)


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
        plans.Entry(
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
    selection = plans.Selection(backends=("cpu", "torch"), peers=False)
    results = suite.run("tiny", plan, selection, accuracy=False)
    results.save(path)
    return path


def test_a_run_writes_json_and_csv(tiny):
    results = Results.load(tiny)
    assert {m.operator for m in results.measurements} == set(OPERATORS)
    assert all(m.q1 <= m.median <= m.q3 and m.median > 0 and m.gbps > 0 for m in results.measurements)
    with tiny.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.measurements)
    assert rows[0]["commit"] == results.commit and rows[0]["cpu"] == results.machine["cpu"]
    assert f"torch {torch.__version__}" in rows[0]["versions"]
    (in_place,) = results.find(operator="policy-loss", variant="erc cpu, in place")
    (fresh,) = results.find(operator="policy-loss", variant="erc cpu")
    assert fresh.peak_extra_bytes is not None and in_place.peak_extra_bytes is not None


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
    assert Results.load(tiny).commit in found.output
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
    device = dataclasses.replace(step_share.H100, flops=100e12, bandwidth=1e12)
    traffic = step_share.LossTraffic("toy", loss_bytes=4, stats_bytes=2, how="")
    share = step_share.step_share(model, traffic, device, length=1000, mfu=0.5, efficiency=0.8, rollout_ratio=1.0)
    backbone = (6e9 + 12 * 10 * 1000 * 500) / 50e12
    head, loss = 6 * 1000 * 100_000 / 50e12, 4 * 100_000 / 0.8e12
    old = (2e9 + 4 * 10 * 1000 * 500 + 2 * 1000 * 100_000) / 50e12 + 2 * 100_000 / 0.8e12
    assert share.loss_us == pytest.approx(0.5)
    assert share.share_of_update == pytest.approx(loss / (backbone + head + loss))
    step = backbone + head + loss + old + backbone + head
    assert share.share_of_step == pytest.approx((loss + 2 * 100_000 / 0.8e12) / step)


def test_the_demo_prints_the_share_of_the_loss():
    demo = pytest.importorskip("examples.report", reason="the demo's requirements are missing")
    history = demo.History(steps=[{"reward": 0.0, "entropy": 1.0, "clip_fraction": 0.0, "erc_fraction": 0.0}])
    history.before = history.after = {"greedy": 0.0, "sampled": 0.0}
    history.seconds |= {"loss": 1.0, "model forward": 3.0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.summary("demo", history))
    (line,) = (line for line in console.export_text().splitlines() if "step time: loss" in line)
    assert "25.0%" in line


def test_inputs_look_like_a_trained_policy_and_cost_no_logits_for_a_linear_case():
    inputs = Inputs(Case("stats", "float32", 64, 2048))
    assert inputs.entropy.median() < 1 < inputs.entropy.max()
    linear = Inputs(Case("linear", "float32", 8, 512, "dapo", 16))
    assert "logits_master" not in vars(linear)
    exact = torch.log_softmax(linear.hidden.double() @ linear.weight.double().t(), -1)
    torch.testing.assert_close(linear.logprob.double(), exact[torch.arange(8), linear.labels], rtol=1e-4, atol=1e-4)


def test_accuracy_counts_flips():
    rows, failed = accuracy.measure_accuracy("cpu", ("cpu",), peers=False, rows=96, vocab=4099, dtypes=("bfloat16",))
    assert not failed
    of = {row.implementation: row for row in rows if row.band == "all"}
    assert of["erc cpu"].flipped == 0 and of["erc cpu"].entropy_max_error < 2e-6
    assert of["eager, logits' dtype"].flipped > 0.05
    certain = [row for row in rows if row.implementation == "eager, logits' dtype" and row.band == "1e-05 to 0.0001"]
    assert certain[0].flipped > of["eager, logits' dtype"].flipped, "tokens of small entropy flip first"
    assert dataclasses.asdict(of["erc cpu"])["rows"] > 50


def test_flipped_decisions_stand_in_table_json_and_plot_by_entropy_band(tmp_path):
    path = tmp_path / "accuracy.json"
    sizes = ("--rows", "96", "--vocab", "1031", "--no-peers", "--output", str(path))
    printed = CliRunner().invoke(__main__.app, ["accuracy", *sizes])
    assert printed.exit_code == 0 and "ERC decisions flipped, bfloat16 logits" in printed.output
    table = Results.load(path).accuracy
    assert {row.dtype for row in table} == {"float32", "bfloat16"}
    assert len({row.band for row in table if row.implementation == "erc cpu"}) >= 6
    assert path.with_name("accuracy_flips_by_entropy.png").stat().st_size > 20_000


def test_an_implementation_that_fails_is_left_out_of_the_accuracy_with_its_reason(monkeypatch):
    def broken(logits: torch.Tensor, labels: torch.Tensor) -> None:
        raise RuntimeError("no such kernel")

    both = [("broken", broken), ("eager", accuracy.eager.statistics)]
    monkeypatch.setattr(accuracy, "implementations", lambda *arguments: iter(both))
    rows, failed = accuracy.measure_accuracy("cpu", rows=32, vocab=257, dtypes=("float32",))
    assert {row.implementation for row in rows} == {"eager"}
    assert [(skip.variant, skip.reason) for skip in failed] == [("broken", "RuntimeError: no such kernel")]


def test_the_main_case_is_the_one_where_most_variants_meet(tiny):
    results = Results.load(tiny)
    (few,) = results.find(operator="stats", variant="erc cpu")
    results.measurements.append(dataclasses.replace(few, rows=4096))
    main = {key[2]: key[3] for key in report.main_cases(results, "stats").values()}
    assert main == {"float32": 8}


def test_the_roofline_counts_logits_by_necessary_traffic(tiny, tmp_path):
    results = Results.load(tiny)
    (reading,) = results.find(operator="stats", variant="erc cpu")
    (writing,) = results.find(operator="policy-loss", variant="erc cpu")
    assert roofline.logits_per_byte(reading) == pytest.approx(1 / 4)
    assert roofline.logits_per_byte(writing) == pytest.approx(1 / 8)
    assert roofline.measured_roofline(results, tmp_path / "roofline.png").stat().st_size > 20_000
    results.measurements.clear()
    assert roofline.measured_roofline(results, tmp_path / "none.png") is None


def test_the_machine_code_beside_a_results_file_joins_its_report(tiny):
    loop = {"instructions": 6.1, "load_bits": [128], "store_bits": [], "barriers": 0, "shuffles": 0}
    kernel = {"name": "stats", "source": "cuda", "arch": "sm_90", "registers": 64, "shared_bytes": 0, "spills": False}
    reachable = {gpu.name: {"share": 1.0, "resource": "issue", "headroom": 1.25} for gpu in GPUS if gpu.arch == "sm_90"}
    kernel |= {
        "occupancy": None,
        "whole": None,
        "device_barriers": 0,
        "threads": 256,
        "statistics": loop,
        "gradient": None,
        "instructions": 6.1,
        "mufu": 1.0,
        "reachable": reachable,
    }
    figures = tiny.with_name("machine_code.json")
    figures.write_text(json.dumps({"toolchain": {"nvcc": "V12.9"}, "kernels": [kernel]}))
    try:
        printed = CliRunner().invoke(__main__.app, ["report", str(tiny)])
        assert printed.exit_code == 0 and "cuda: stats" in printed.output and "1.25x" in printed.output
        assert tiny.with_name("machine_code_roofline.png").stat().st_size > 10_000
        assert "(machine_code_roofline.png)" in docs_block(tiny.parent, tiny.parent / "page.md")
    finally:
        figures.unlink()
