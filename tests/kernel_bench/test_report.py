"""The files that a run writes."""

from importlib import util

import pytest
from toy_bench import Fixed, Toy, dense, sweep

from fxc.kernel_bench import plots, report
from fxc.kernel_bench.limits import Peaks
from fxc.kernel_bench.run import run


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_pictures_are_small_pngs(tmp_path):
    times = {"dense": [20.0], "fxc int8": [10.0], "rival": [12.0]}
    given = [dense(baseline=True), dense("fxc int8", scheme="int8", ours=True), dense("rival", scheme="int8")]
    peaks = (None, Peaks("measured", bandwidth=1e9, float32=1e9, bf16=1e12, int8=2e12))
    result = run(sweep(rounds=1, rows=(1, 16)), Toy(given, Fixed(times)), peaks=peaks)
    paths, missing = plots.draw(tmp_path / "x", result, peaks)
    assert [path.name for path in paths] == ["x-roofline.png", "x-speedup.png"] and missing is None
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000 for path in paths)


def test_without_matplotlib_a_note_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.util, "find_spec", lambda name: None)
    result = run(sweep(), Toy([dense(ours=True)]))
    about = {"name": "toy", "timing": "none", "weights": "none"}
    written, missing = report.write(tmp_path / "x", report.Report(result, about, {}, (None, None)))
    assert [path.suffix for path in written] == [".json", ".csv", ".md"] and "pip install matplotlib" in missing
