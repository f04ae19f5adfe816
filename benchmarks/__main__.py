"""`python -m benchmarks --help`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

try:
    import typer
    from rich.console import Console
    from rich.markdown import Markdown
except ImportError as missing:
    sys.exit(f"the benchmarks need {missing.name}: pip install 'erc-rl[bench]'")

from benchmarks import linear_plans as plans_of_heads
from benchmarks import loss_forms, ours, plans, suite
from benchmarks.accuracy import BANDS, measure_accuracy
from benchmarks.call import HEADINGS as CALL_HEADINGS
from benchmarks.call import __doc__ as call_doc
from benchmarks.call import call_rows
from benchmarks.compare import change_table, changes, regressions
from benchmarks.docs_page import docs_block
from benchmarks.hidden_states import measure_hidden_states
from benchmarks.host import __doc__ as host_doc
from benchmarks.host import host_rows
from benchmarks.machine_code.report import machine_code_table
from benchmarks.markdown import markdown_table, rewrite
from benchmarks.plots import save_plots
from benchmarks.readme import block
from benchmarks.report import accuracy_table, full_report
from benchmarks.results import Results, new_results
from benchmarks.roofline import machine_code_roofline
from benchmarks.step_share import EFFICIENCY, H100, HEADINGS, LENGTH, MFU, ROLLOUT_RATIO, TRAFFIC, step_share_rows
from benchmarks.step_share import __doc__ as step_share_doc
from benchmarks.workloads import DTYPES, OPERATORS

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_ROOT = Path(__file__).parents[1]
_console = Console(width=None if sys.stdout.isatty() else 150)

Output = Annotated[Path | None, typer.Option(help="JSON file; CSV and plots are written beside it")]
Names = Annotated[str, typer.Option(help="comma-separated; default: all")]


def _names(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...] | None:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        suite.check_names(names, known, option)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return names or None


def _run(name: str, plan: list[plans.Entry], selection: plans.Selection, output: Path | None, accuracy: bool) -> None:
    """Measure, keeping what there is after every case, and report; Ctrl-C ends the measuring, not the report."""
    entries = selection.apply(plan)
    path = output or _ROOT / "build" / "benchmarks" / f"{name}.json"
    minutes = sum(entry.expected_seconds() for entry in entries) / 60
    expected = f", on 2 cores about {minutes:.0f} minutes" if all(e.case.device == "cpu" for e in entries) else ""
    _console.print(f"{len(entries)} cases{expected}; {path} has the results so far")
    kept: list[Results] = []

    def keep(results: Results) -> None:
        kept[:] = [results]
        results.save(path)

    interrupted = False
    with _console.status("starting") as status:
        tell = status.update if _console.is_terminal else _console.print
        try:
            suite.run(name, entries, selection, accuracy=accuracy, progress=tell, keep=keep)
        except KeyboardInterrupt:
            interrupted = True
    if not kept:
        raise typer.Exit(130 if interrupted else 0)
    figures = save_plots(kept[0], path)
    _show(full_report(kept[0]), *_machine_code(path))
    _console.print(f"wrote {path}, {path.with_suffix('.csv').name}" + "".join(f", {figure.name}" for figure in figures))
    if interrupted:
        _console.print("interrupted: the cases above were measured")
        raise typer.Exit(130)


def _show(*texts: str) -> None:
    """Reports in Markdown, on the terminal."""
    _console.print(*map(Markdown, texts), sep="\n\n")


def _machine_code(path: Path) -> list[str]:
    """The machine-code report that lies beside a results file, made by `machine-code --json`; its roofline is drawn."""
    figures = path.with_name("machine_code.json")
    if not figures.exists():
        return []
    document = json.loads(figures.read_text())
    machine_code_roofline(document, path.with_name("machine_code_roofline.png"))
    return [machine_code_table(document)]


Rows = Annotated[int | None, typer.Option(help="N for every case")]
Vocab = Annotated[int | None, typer.Option(help="V for every case")]
Seconds = Annotated[float | None, typer.Option(help="time budget of a case")]
Peers = Annotated[bool, typer.Option(help="whether peers take part")]
Accuracy = Annotated[bool, typer.Option(help="whether accuracy is measured too")]


def _plan(quick: bool, linear: bool) -> str:
    if quick and linear:
        raise typer.BadParameter("--quick and --linear exclude each other")
    return "quick" if quick else "linear" if linear else "full"


def _selection(operators: str, backends: str, dtypes: str, **sizes: Any) -> plans.Selection:
    return plans.Selection(
        operators=_names(operators, tuple(OPERATORS), "--operators"),
        backends=_names(backends, ours.BACKENDS, "--backends"),
        dtypes=_names(dtypes, tuple(DTYPES), "--dtypes"),
        **sizes,
    )


@app.command()
def run(
    quick: Annotated[bool, typer.Option("--quick", help="the CPU targets, under 5 minutes on 2 cores")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="only the loss from hidden states, over N and D")] = False,
    operators: Names = "",
    backends: Names = "",
    dtypes: Names = "",
    peers: Peers = True,
    accuracy: Accuracy = True,
    rows: Rows = None,
    vocab: Vocab = None,
    seconds: Seconds = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice")] = None,
    output: Output = None,
) -> None:
    """Measure on the CPU: speed, memory and accuracy beside every peer that is installed. Half an hour on 2 cores."""
    if threads:
        torch.set_num_threads(threads)
    selection = _selection(operators, backends, dtypes, peers=peers, rows=rows, vocab=vocab, seconds=seconds)
    form = _plan(quick, linear)
    _run("cpu" if form == "full" else f"cpu-{form}", plans.PLANS[form](), selection, output, accuracy)


@app.command()
def gpu(
    quick: Annotated[bool, typer.Option("--quick", help="the short form")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="only the loss from hidden states, over N and D")] = False,
    operators: Names = "",
    backends: Names = "",
    dtypes: Names = "",
    peers: Peers = True,
    accuracy: Accuracy = True,
    rows: Rows = None,
    vocab: Vocab = None,
    seconds: Seconds = None,
    output: Output = None,
) -> None:
    """The same on the GPU of this machine."""
    if not torch.cuda.is_available():
        _console.print(
            "no GPU here: torch.cuda.is_available() is False. `python -m benchmarks run` measures the CPU backend."
        )
        raise typer.Exit(2)
    selection = _selection(operators, backends, dtypes, peers=peers, rows=rows, vocab=vocab, seconds=seconds)
    form = _plan(quick, linear)
    _run("gpu" if form == "full" else f"gpu-{form}", plans.PLANS[form]("cuda"), selection, output, accuracy)


@app.command()
def accuracy(
    rows: Annotated[int, typer.Option(help="rows of every dtype")] = 768,
    vocab: Annotated[int, typer.Option(help="V")] = 50_257,
    peers: Annotated[bool, typer.Option(help="whether peers take part")] = True,
    output: Output = None,
) -> None:
    """Error against float64, and the ERC decisions that each implementation flips, by entropy band."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = new_results("accuracy")
    results.accuracy, results.skipped = measure_accuracy(device, peers=peers, rows=rows, vocab=vocab)
    for dtype in dict.fromkeys(row.dtype for row in results.accuracy):
        _show(accuracy_table(results, dtype))
    _console.print(
        f"bands from {BANDS[0]:g} to {BANDS[-1]:g} nats; H_old is exact, so every flip is the implementation's own"
    )
    if output is not None:
        results.save(output)
        _console.print("wrote " + ", ".join(str(path) for path in [output, *save_plots(results, output)]))


@app.command("hidden-states")
def hidden_states(
    peers: Annotated[bool, typer.Option(help="whether peers take part")] = True, output: Output = None
) -> None:
    """ERC decisions flipped from bfloat16 hidden states on, by entropy band: what a head's product decides."""
    results = new_results("hidden")
    results.accuracy = measure_hidden_states("cuda" if torch.cuda.is_available() else "cpu", peers)
    _show(accuracy_table(results, "bfloat16", "hidden states"))
    if output is not None:
        results.save(output)
        _console.print("wrote " + ", ".join(str(path) for path in [output, *save_plots(results, output)]))


@app.command()
def report(results: Path) -> None:
    """Print the tables of a results file, and draw its plots again."""
    loaded = Results.load(results)
    save_plots(loaded, results)
    _show(full_report(loaded), *_machine_code(results))


@app.command()
def compare(
    before: Path,
    after: Path,
    threshold: Annotated[float, typer.Option(help="a slow-down beyond this share is a regression")] = 0.1,
    relative: Annotated[bool, typer.Option(help="measure against the plain read or copy of each run")] = True,
) -> None:
    """Compare two results files; exit status 1 where erc became slower."""
    pair = Results.load(before), Results.load(after)
    for path, loaded in zip((before, after), pair, strict=True):
        _console.print(f"{path.name}: {loaded.machine['gpu'] or loaded.machine['cpu']}, {loaded.commit}, {loaded.date}")
    found = changes(*pair, relative=relative)
    if not found:
        _console.print("the two files have no case in common")
        raise typer.Exit(2)
    _show(change_table(found, threshold))
    worse = regressions(found, threshold)
    _console.print(f"{len(worse)} regressions of {len(found)} comparisons")
    raise typer.Exit(1 if worse else 0)


@app.command()
def readme(
    results: Path,
    path: Annotated[Path, typer.Option(help="the README")] = _ROOT / "README.md",
    docs: Annotated[Path, typer.Option(help="the page of the benchmarks")] = _ROOT / "docs" / "benchmarks.md",
    kernels: Annotated[Path, typer.Option(help="the page of the kernels")] = _ROOT / "docs" / "kernels.md",
) -> None:
    """Rewrite the generated blocks of the README and of the docs from a results file and its neighbours."""
    try:
        rewrite(path, block(Results.load(results), results, path))
        _machine_code(results)
        rewrite(docs, docs_block(results.parent, docs))
        figures = results.with_name("machine_code.json")
        if figures.exists():
            from benchmarks.machine_code import document  # needs Triton

            rewrite(kernels, document.block(json.loads(figures.read_text())))
    except ValueError as error:
        _console.print(str(error))
        raise typer.Exit(2) from None
    _console.print(f"rewrote the generated blocks of {path.name}, {docs.name} and {kernels.name}")


@app.command()
def call() -> None:
    """Launches, bytes and memory of every public call, counted on meta tensors, with modelled GPU times."""
    _console.print(call_doc, highlight=False)
    _show(markdown_table(CALL_HEADINGS, call_rows()))


@app.command()
def host(calls: Annotated[int, typer.Option(min=100, help="calls of each kind")] = 3000) -> None:
    """Host time of one loss, station by station, beside F.cross_entropy."""
    _console.print(host_doc, highlight=False)
    _show(markdown_table(("station", "microseconds", "x F.cross_entropy"), host_rows(calls)))


@app.command("linear-plans")
def linear_plans(output: Output = None) -> None:
    """The loss from hidden states by plan, ours and the peers': counted on meta tensors, with modelled GPU times."""
    _console.print(plans_of_heads.__doc__, highlight=False)
    _show(
        markdown_table(plans_of_heads.HEADINGS, plans_of_heads.time_rows()),
        markdown_table(plans_of_heads.COUNT_HEADINGS, plans_of_heads.count_rows()),
    )
    if output is not None:
        plans_of_heads.save(output)
        _console.print(f"wrote {output}")


@app.command("step-share")
def step_share(
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = LENGTH,
    mfu: Annotated[float, typer.Option(help="share of the peak flops that the model reaches")] = MFU,
    efficiency: Annotated[
        float, typer.Option(help="share of the data-sheet bandwidth that a kernel reaches")
    ] = EFFICIENCY,
    rollout_ratio: Annotated[float, typer.Option(help="time of generation over time of the update")] = ROLLOUT_RATIO,
) -> None:
    """What share of a training step the loss is, by a documented model."""
    _console.print(step_share_doc, highlight=False)
    assumed = f"MFU {mfu:g}, bandwidth efficiency {efficiency:g}, T = {length:,}, rollout ratio {rollout_ratio:g}"
    _console.print(f"{H100.name}, microseconds per token; {assumed}\n")
    for traffic in TRAFFIC:
        _console.print(f"{traffic.name}: {traffic.loss_bytes} bytes per logit ({traffic.how})", highlight=False)
    rows = step_share_rows(length=length, mfu=mfu, efficiency=efficiency, rollout_ratio=rollout_ratio)
    _show(markdown_table(HEADINGS, rows, left=2))


@app.command("machine-code")
def machine_code(
    arch: Annotated[list[str] | None, typer.Option(help="an architecture; may be repeated; default: all")] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the logits")] = "bfloat16",
    output: Annotated[Path | None, typer.Option("--json", help="also write the figures as JSON; - prints them")] = None,
    cubin: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:ARCH:FUNCTION:ELEMENTS:PATH, a kernel of a cubin to report on too; FUNCTION may be empty (the "
            "only one), ELEMENTS counts those of a main-loop iteration and may be empty (read off the loads)"
        ),
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="unpacked wheels of trl and liger-kernel; default: where they are installed")
    ] = None,
    model: Annotated[bool, typer.Option(help="whether blocks in flight are modelled, which takes minutes")] = True,
) -> None:
    """What the GPU kernels' machine code says of their speed: instructions, registers, roofline. Needs no GPU.

    Exit status 1 where a kernel of ours spills."""
    from benchmarks.machine_code import cli  # Triton compiles: nothing else here needs it

    as_text = str(output) == "-"
    say = partial(print, file=sys.stderr) if as_text else partial(_console.print, highlight=False)
    try:
        report = cli.document(arch or cli.ARCHS, dtype, cubin or (), peers, model, say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    figures = json.dumps(report, indent=1)
    if as_text:
        print(figures)
    else:
        Console(width=None if sys.stdout.isatty() else 230).print(Markdown(machine_code_table(report)))
    if output is not None and not as_text:
        output.write_text(figures + "\n")
    if cli.spilling(report):
        raise typer.Exit(1)


@app.command("loss-forms")
def write_loss_forms(
    report: Path,
    table: Annotated[Path, typer.Option(help="the sources with the table")] = loss_forms.TABLE,
) -> None:
    """Put what `make gpu-report` measured (its summary.md) into the table of CUDA's fused loss: cluster or block."""
    measured = loss_forms.read_lines(report.read_text())
    if not measured:
        _console.print(
            f"{report} has no line of the table: on a GPU with clusters `make gpu-report PART=forms` measures it"
        )
        raise typer.Exit(2)
    table.write_text(loss_forms.with_lines(table.read_text(), measured))
    _console.print("\n".join(map(str, measured)), highlight=False)
    _console.print(f"wrote {table}: build again, and rewrite the docs by `python -m benchmarks readme`")


@app.command("cpu-loops")
def cpu_loops(
    rounds: Annotated[int, typer.Option(help="calls of erc and of the plain read or copy, in turns")] = 40,
    write: Annotated[bool, typer.Option(help="rewrite the table of docs/benchmarks.md")] = False,
) -> None:
    """What the CPU's main loops are made of, and how near that lets a loss come to a plain read or copy."""
    from benchmarks.cpu_loops import cpu_loops_block  # needs a C++ compiler and objdump: nothing else here does

    text = cpu_loops_block(rounds)
    print(text)
    if write:
        rewrite(_ROOT / "docs" / "benchmarks.md", text)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
