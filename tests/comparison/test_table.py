"""The table and the pictures of a comparison, with names that somebody else has chosen."""

import xml.etree.ElementTree as ElementTree
from importlib import util

import pytest

from fxc.comparison import plots, table
from fxc.comparison.result import Comparison, Row, front, reason
from fxc.errors import UsageError
from fxc.measure.contenders import Latency, Measured
from fxc.measure.quality import Quality

HOSTILE = "<script>alert(1)</script> | `x` $\\frac{1}{0}$ ![a](http://b) \x1b[31m\u202e"
CONDITIONS = {
    "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "system": "Linux"}, "versions": {"fxc": "0"}, "threads": 2,
    "load_before": 0.0, "seed": 0, "rounds": 3, "backend": "eager",
}  # fmt: skip
FIRST = Quality("perplexity", "tokens", [10.0, 12.0, 9.0], [5, 5, 5])


def row(name, disk, ms, rise, baseline=FIRST):
    quality = Quality("perplexity", "tokens", [each * (1 + rise) for each in FIRST.totals], FIRST.counts)
    latencies = [Latency(1, 128, phase, [ms, 1.1 * ms, 1.2 * ms]) for phase in ("prefill", "decode")]
    return Row(name, ["int8"], name, Measured(name, "fxc eager", disk, 7, latencies, quality), quality.loss_against(baseline))


@pytest.fixture
def comparison():
    error = UsageError("the pass int8 changed nothing", why=HOSTILE, hint="leave it out")
    broken = Row("broken", ["int8"], why_not=error.as_json())
    rows = [row("original", 1000, 4.0, 0.0), row(HOSTILE, 500, 2.0, 0.1), broken]
    rows += [row("int8", 600, 3.0, 0.2), row("int4", 300, 5.0, 0.3)]
    return Comparison(HOSTILE, "heldout.txt", True, CONDITIONS, rows)


def test_nothing_is_on_the_front_that_another_beats(comparison):
    assert [each.strategy for each in comparison.by_size()] == ["int4", HOSTILE, "original"]
    assert [each.strategy for each in comparison.by_latency(("1x128", "decode"))] == [HOSTILE, "original"]
    twins = [row("a", 5, 1.0, 0.1), row("b", 5, 1.0, 0.1)]
    assert [each.strategy for each in front(twins, lambda each: each.measured.disk_bytes)] == ["a"]


def test_a_row_says_what_each_strategy_costs_or_why_there_is_none(comparison):
    heads, body = table.heads(comparison), table.body(comparison)
    assert [each.removeprefix(">") for each in heads[:3]] == ["strategy", "on disk", "loaded"]
    assert body[0][1:3] == ["1.00 kB (1.00)", "7 B"] and body[0][3].startswith("4.40 ± 0.20 (1.00x)")
    assert body[1][3].startswith("2.20 ± 0.10 (2.00x)") and "(+22.96% ± " in body[1][5]
    assert body[2] == ["broken", "-", "-", "-", "-", "the pass int8 changed nothing"]
    assert all(len(each) == len(heads) for each in body)
    assert "changed nothing; <script>" in reason(comparison.rows[2].why_not)


def test_accuracy_is_in_points_and_agreement_has_its_own_error():
    before = Quality("accuracy", "labels", [1.0, 1.0, 1.0, 0.0], [1] * 4)
    after = Quality("accuracy", "labels", [1.0, 1.0, 0.0, 0.0], [1] * 4)
    named = Row("int8", [], "int8", Measured("int8", "", 1, 1, [], after), after.loss_against(before))
    assert table.quality_text(named, is_first=False) == "50.00 % (-25.00 ± 25.00)"
    near = Quality("cosine", "samples", [0.5, 1.0], [1, 1])
    plain = Row("int8", [], "int8", Measured("int8", "", 1, 1, [], near), near.loss_against(near))
    assert table.quality_text(plain, is_first=False) == "0.7500 ± 0.2500"


def test_names_are_text_in_markdown(comparison):
    text = table.markdown(comparison, ["quality_by_size.svg"])
    assert "<script" not in text.replace("`<script", "") and "\x1b" not in text and "\u202e" not in text
    assert "![a]" not in text and text.count("](quality_by_size.svg)") == 1
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and {line.replace("\\|", "").count("|") for line in lines} == {7}


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_pictures_are_the_same_for_the_same_numbers_and_names_are_text_in_them(comparison):
    drawn = plots.pictures(comparison)
    assert drawn == plots.pictures(comparison) and sorted(drawn) == ["quality_by_latency.svg", "quality_by_size.svg"]
    for picture in drawn.values():
        root = ElementTree.fromstring(picture)
        kinds = {each.tag.rpartition("}")[2] for each in root.iter()}
        assert "script" not in kinds and "image" not in kinds and "foreignObject" not in kinds
        shown = "".join(root.itertext())
        assert "<script>alert(1)" in shown and "int4" in shown and "perplexity (less is better)" in shown


def test_without_matplotlib_there_are_no_pictures(comparison, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert plots.pictures(comparison) is None
