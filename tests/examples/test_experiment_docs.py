"""The docs say what the checked-in results of the experiments say."""

import json
import re

import pytest

pytest.importorskip("typer")

from examples.experiments import tables
from examples.experiments.compare import shown

DOCUMENTS = ("README.md", "docs/entropy_ratio_clipping.md", "docs/in_context_rlvr.md")
QUOTED = re.compile(r"[+-]\d*\.\d+ \[[^]]*\]")


def intervals(value):
    """Every (mean, low, high) in a results file, as the docs write it."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(item, (int, float)) for item in value):
        yield shown(tuple(value))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from intervals(item)


@pytest.mark.parametrize("name", tables.BLOCKS)
def test_tables_are_those_of_the_results(name):
    text = tables.BLOCKS[name][0].read_text()
    assert tables.with_table(text, name) == text, "run python -m examples.experiments.tables"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_quoted_intervals_stand_in_the_results(document):
    known = {found for path in tables.RESULTS.glob("*.json") for found in intervals(json.loads(path.read_text()))}
    quoted = QUOTED.findall((tables.ROOT / document).read_text())
    assert [value for value in quoted if value not in known] == []
    assert quoted or document == "README.md", "a document without a single interval"


def test_a_table_that_is_out_of_date_is_seen():
    document, _ = tables.BLOCKS["drift"]
    text = document.read_text()
    stale = text.replace("| sgd, dapo |", "| sgd, dapo, stale |")
    assert stale != text
    assert tables.with_table(stale, "drift") == text
    with pytest.raises(ValueError, match="drift:begin"):
        tables.with_table("no markers", "drift")
