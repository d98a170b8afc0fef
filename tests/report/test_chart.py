"""A curve as text."""

from __future__ import annotations

import math

from fxc.report.chart import chart, curve
from fxc.train.fit import Fit, Point


def test_bars_are_as_high_as_their_values():
    lines = chart([(0, 2.0), (10, 1.0), (20, 0.0)], height=2)
    assert lines == ["2 |██ ▁▁", "0 |██ ██ ▁▁", "   0     20 steps"]


def test_what_is_not_finite_has_no_bar_and_a_flat_curve_is_low():
    assert chart([(0, math.nan), (1, 1.0)]) == []
    assert chart([(0, 1.0), (1, 1.0), (2, math.inf)], height=1) == ["1 |▁▁ ▁▁", "   0      2 steps"]


def test_of_a_fit_the_held_out_loss():
    fit = Fit(4.0, 1.0, 20, curve=[Point(10, 1.0, 9.0, 2.0), Point(20, 2.0, 8.0, 1.0)])
    assert curve(fit) == chart([(0, 4.0), (10, 2.0), (20, 1.0)])
