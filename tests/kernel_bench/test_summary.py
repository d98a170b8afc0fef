"""Summaries of a run by known numbers."""

from dataclasses import replace

import pytest

from fxc.kernel_bench import report, summary
from fxc.kernel_bench.run import Result, Row
from fxc.kernel_bench.shapes import regime


def line_of(rows, contender, regime="decode"):
    return next(line for line in summary.summarise(rows) if (line.contender, line.regime) == (contender, regime))


def test_a_summary_is_geometric_means_and_worst_cells():
    def row(contender, m, speedup, fraction, ours=True):
        return Row("x", 8, 16 * m, m, regime(m), "int8", contender, ours, False, us=1.0, speedup=speedup,
                   fraction={"datasheet": fraction, "measured": 0.9})  # fmt: skip

    rows = [
        row("fxc int8", 1, 4.0, 0.5), row("fxc int8", 2, 1.0, 0.125), row("fxc int8", 256, 3.0, 0.7),
        row("slow", 1, 1.5, 0.2, ours=False), row("fast", 1, 2.5, 0.4, ours=False),
    ]  # fmt: skip
    rows.append(replace(rows[0], us=None, state="wrong", speedup=None, fraction={}))
    decode = line_of(rows, "fxc int8")
    assert decode.cells == 2 and decode.peaks == "datasheet"
    assert decode.speedup == pytest.approx(2.0) and decode.worst_speedup == 1.0 and decode.worst_cell == "8 x 32, M=2"
    assert decode.fraction == pytest.approx(0.25) and decode.worst_fraction == 0.125
    assert line_of(rows, "fxc int8", "mid").speedup == pytest.approx(3.0)
    shown = summary.headlines(summary.summarise(rows))
    assert [line.contender for line in shown] == ["fxc int8", "fast", "fxc int8"]


def test_without_a_datasheet_fractions_are_of_what_was_measured():
    row = Row("x", 8, 16, 1, "decode", "int8", "a", True, False, us=1.0, fraction={"datasheet": None, "measured": 0.5})
    assert line_of([row], "a").fraction == pytest.approx(0.5) and line_of([row], "a").speedup is None


def test_shares_above_all_that_there_is_are_explained():
    def said(share):
        row = Row("x", 8, 16, 1, "decode", "int8", "a", True, False, us=1.0, fraction={"datasheet": None, "measured": share})
        return report.remarks(Result([row]))

    assert said(0.99) == [] and said(1.31)[0].startswith("shares above 100 %, up to 131%: a weight that stays in a cache")
