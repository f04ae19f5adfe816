"""The table of cluster and block form: read, written, compiled, and measured here on the host's kernels."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

pytest.importorskip("typer", reason="the command line needs it")
pytest.importorskip("matplotlib", reason="the command line draws")
from typer.testing import CliRunner

from benchmarks import __main__, loss_forms
from benchmarks.loss_forms import FormLine, line_of, read_lines, with_lines
from erc.backend import register_namespace
from tests.backends import CUDA_HOST
from tests.cuda_host import build

SOURCES = loss_forms.TABLE.read_text()
MEASURED = [
    FormLine(100, 512, "kCluster", "measured: a GPU, 2048 rows: cluster 300 us, block 340 us"),
    FormLine(100, 64, "kBlock", "measured: a GPU, 16384 rows: cluster 410 us, block 390 us"),
    FormLine(103, 297, "kBlock", "measured: another"),
]


def test_measured_lines_take_the_place_of_their_gpu_s_lines_and_of_no_others():
    before = read_lines(SOURCES)
    assert {line.capability for line in before} >= {90, 100}
    text = with_lines(SOURCES, MEASURED)
    kept = [line for line in before if line.capability == 90]
    assert read_lines(text) == [*kept, MEASURED[1], MEASURED[0], MEASURED[2]], "by GPU, then by size"
    assert with_lines(text, MEASURED) == text and with_lines(SOURCES, before) == SOURCES
    again = [line for line in before if line.capability == 100]
    assert read_lines(with_lines(text, again)) == [*kept, *again, MEASURED[2]]
    with pytest.raises(ValueError, match="no table"):
        with_lines("int x;", MEASURED)
    with pytest.raises(ValueError, match="got kBloc"):
        read_lines(str(MEASURED[0]._replace(form="kBloc")))


def test_the_command_writes_what_a_report_says(tmp_path):
    table, report = tmp_path / "forms.cpp", tmp_path / "summary.md"
    table.write_text(SOURCES)
    report.write_text("# GPU report\n\n## forms\n\n" + "\n".join(str(line).strip() for line in MEASURED) + "\n")
    command = ["loss-forms", str(report), "--table", str(table)]
    done = CliRunner().invoke(__main__.app, command)
    assert done.exit_code == 0, done.output
    assert table.read_text() == with_lines(SOURCES, MEASURED)
    report.write_text("forms: skipped, no GPU\n")
    done = CliRunner().invoke(__main__.app, command)
    assert done.exit_code == 2 and "no line" in done.output and table.read_text() == with_lines(SOURCES, MEASURED)


@pytest.mark.skipif(build.compiler() is None, reason="needs g++")
def test_the_launcher_reads_a_written_table_as_the_docs_do(tmp_path):
    lines, source, library = tmp_path / "forms.cpp", tmp_path / "probe.cpp", tmp_path / "probe.so"
    lines.write_text(with_lines(SOURCES, MEASURED))
    probe = 'extern "C" int probe(int gpu, long bytes) { return int(erc::cuda::loss_form(gpu, bytes)); }\n'
    source.write_text('#include "forms.cpp"\n' + probe)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{build.ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    chosen, written, seen = ctypes.CDLL(str(library)).probe, read_lines(lines.read_text()), set()
    chosen.argtypes = [ctypes.c_int, ctypes.c_long]
    for gpu in (80, 90, 100, 103):
        for size in (1, 64 * 1024, 64 * 1024 + 1, 297 * 1024, 512 * 1024, 512 * 1024 + 1, 1 << 40):
            line = line_of(written, gpu, size)
            form = line.form if line else "kCluster"
            assert loss_forms.FORMS[chosen(gpu, size)] == form, (gpu, size)
            seen.add(form)
    assert seen == set(loss_forms.FORMS)


@pytest.mark.skipif(build.compiler() is None, reason="needs g++")
@pytest.mark.parametrize("faster", loss_forms.FORMS)
def test_a_line_says_which_form_was_faster(faster):
    """On the host's kernels, by times that the test makes up; every timed call takes its form."""
    host = build.load()
    register_namespace(CUDA_HOST, build.NAMESPACE)

    def seconds(runners):
        for form, runner in runners.items():
            host.configure(clusters=True)
            runner.call()
            *_, rows, _ = host.launches()  # then the summary
            assert (rows[2] > 1) == (form == "kCluster")
        return {form: 2e-3 - 5e-4 * (form == faster) for form in runners}

    host.configure(clusters=True)
    line = loss_forms.measured_line(90, 48, host.library, 2, "a GPU", CUDA_HOST, "cpu", seconds)
    assert line[:3] == (90, 48, faster) and "1500 us" in line.source and "2000 us" in line.source
    assert read_lines(str(line)) == [line]


@pytest.mark.skipif(build.compiler() is None, reason="needs g++")
def test_forms_that_differ_are_not_timed(monkeypatch):
    host = build.load()
    register_namespace(CUDA_HOST, build.NAMESPACE)
    host.configure(clusters=True)
    results, honest = [], loss_forms._with_gradient

    def spoilt(*arguments):
        results.append(honest(*arguments))
        results[-1][2][0, 1] += 1e-6 * (len(results) == 2)
        return results[-1]

    monkeypatch.setattr(loss_forms, "_with_gradient", spoilt)
    with pytest.raises(ArithmeticError, match="differ"):
        loss_forms.measured_line(90, 48, host.library, 2, "a GPU", CUDA_HOST, "cpu", lambda _: pytest.fail("timed"))
