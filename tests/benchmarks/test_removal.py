"""The benchmark of removal: what it prunes, what it counts, and that its picture shows what was measured."""

from __future__ import annotations

import re

import pytest
import torch

import fxc
from benchmarks.python_source import python_source
from benchmarks.removal import measure
from benchmarks.removal.plot import svg
from benchmarks.workloads import PYLM
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes


def test_the_share_is_that_of_heads_and_ffn_alike():
    (only,) = parse_passes(measure.passes(0.25, "l2"))
    assert (only.heads, only.ffn, only.round_to, only.criterion) == (0.25, 0.25, 16, "l2")


def test_flops_fall_as_the_widths_do():
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    inputs = [torch.randn(4, 8)]
    program = fxc.capture(net, tuple(inputs), check=False)
    half, _ = run_passes(program, Context(), Options("prune:ffn=0.5"))
    assert measure.flops(program, inputs) == 2 * 4 * (8 * 64 + 64 * 8) == 2 * measure.flops(half, inputs)


@pytest.mark.slow
def test_the_calibration_text_shares_no_file_with_the_held_out_text():
    held_out = (PYLM / "heldout.txt").read_text(encoding="utf-8")
    source = python_source(100_000)
    chunks = [source[i : i + 400] for i in range(0, len(source) - 400, 4000)]
    assert len(source) > 20_000 and not any(chunk in held_out for chunk in chunks)


def test_the_picture_has_a_line_for_each_form_and_survives_an_outlier():
    def timed(speed: float, low: float) -> dict:
        return {"speedup": speed, "speedup_low": low, "speedup_high": speed * 1.1, "ms": 1.0, "low": 1.0, "high": 1.0}

    rows = [
        {"pruned": p, "flops": {"1x32": 100 * (1 - p)}, "forms": {"dense": {"times": {"eager": {"1x32": timed(1 + p, 0.01)}}}}}
        for p in (0.0, 0.5)
    ]
    picture = svg([{"title": "a net", "sizes": {"1x32": "ms"}, "backends": ["eager"], "rows": rows}])
    lines = re.findall(r'<polyline class="line[^"]*" points="([^"]*)"', picture)
    assert picture.startswith("<svg") and len(lines) == 1
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in lines[0].split())
    assert x1 > x0 and y1 < y0, "less work to the right, faster upwards"
