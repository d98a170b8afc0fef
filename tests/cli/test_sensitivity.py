"""fxc sensitivity: a table with bars, JSON, and plain words where there is nothing to measure."""

from importlib import util

import pytest
from command import fxc, fxc_json

PASSES = "int4:only='re:layers.0.mlp'"


@pytest.fixture(scope="module")
def text(tmp_path_factory, repo):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((repo / "examples" / "pylm" / "heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


def test_a_table_with_bars_and_json(pylm_dir, text):
    given = ("sensitivity", pylm_dir, "--passes", PASSES, "--calib", text, "--calib-samples", "2", "--calib-length", "32")
    done = fxc(*given)
    assert all(f"model.layers.0.mlp.{each}_proj" in done.stdout for each in ("gate", "up", "down"))
    assert "█" in done.stdout and "all at once: error" in done.stdout and "nats a token" in done.stdout
    found = fxc_json(*given)
    assert len(found["layers"]) == 3 and found["samples"] == 2 and found["together"]["loss"] is not None


def test_what_cannot_be_measured_is_said(pylm_dir):
    done = fxc("sensitivity", pylm_dir, "--passes", "int8", code=2)
    assert "measured on data" in done.stderr and "--calib" in done.stderr


@pytest.mark.skipif(util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_without_matplotlib_there_is_no_chart_and_nothing_is_measured(pylm_dir, text):
    assert "pip install" in fxc("sensitivity", pylm_dir, "--calib", text, "-o", "chart.svg", code=2).stderr
