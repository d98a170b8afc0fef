"""benchmarks.quality: what is compared with what, and that a contender that fails is a row and no end."""

import json
import subprocess
import sys

import pytest
import torch
from repo import REPO
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.output import earlier
from benchmarks.quality import __main__ as quality
from benchmarks.quality.contenders import CONTENDERS, FXC, Contender
from benchmarks.quality.environment import _torch
from benchmarks.quality.report import markdown
from benchmarks.quality.score import losses
from fxc.passes.base import parse_passes


def test_every_format_has_fxc_and_a_peer_and_every_pass_line_is_one():
    formats = {each.format for each in CONTENDERS}
    for title in formats:
        assert {each.is_ours for each in CONTENDERS if each.format == title} == {True, False}
    for each in CONTENDERS:
        if each.is_ours:
            assert parse_passes(each.recipe["passes"])
    names = [(each.format, each.name) for each in CONTENDERS]
    assert len(names) == len(set(names))


def test_losses_are_those_of_the_model(pylm_dir):
    model = AutoModelForCausalLM.from_pretrained(pylm_dir, dtype=torch.float32).eval()
    windows = torch.randint(0, 4096, (9, 12), generator=torch.Generator().manual_seed(0))
    found = losses(model, windows)
    with torch.no_grad():
        expected = [model(input_ids=row[None], labels=row[None]).loss.item() * 11 for row in windows]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_change_is_paired_by_window():
    entry = quality.compared([100.0, 200.0], {"losses": [101.0, 201.0], "seconds": 1.0})
    assert entry["change"] == pytest.approx(torch.expm1(torch.tensor(1 / 255)).item(), rel=1e-6)
    assert entry["spread"] == pytest.approx(0, abs=1e-12) and "losses" not in entry


def test_a_process_knows_its_own_peak():
    code = "from benchmarks.quality.score import peak; b = bytearray(700_000_000); del b; print(peak())"
    found = int(subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout)
    assert 7e8 < found < 1.5e9


def test_a_process_says_its_result_and_a_failure_its_last_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint('noise')\nprint(json.dumps({'got': json.load(open(sys.argv[1]))}))")
    assert quality.run([sys.executable, str(script)], {"a": 1}, tmp_path, 1) == {"got": {"a": 1}}
    script.write_text("raise SystemExit('it does not work')")
    with pytest.raises(RuntimeError, match=r"status 1: .*it does not work"):
        quality.run([sys.executable, str(script)], {}, tmp_path, 1)


def test_a_failure_is_a_row_that_can_be_read(tmp_path, pylm_dir):
    save_file({"calibration": torch.zeros(2, 8, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    job = {"model": str(pylm_dir), "tokens": str(tmp_path / "tokens.safetensors")}
    entry = quality.measure(Contender("one", "fxc none", {"tool": FXC, "passes": "no_such_pass"}), job, tmp_path, 1)
    assert "no_such_pass" in entry["failed"]
    entry["load"] = 1.5
    report = {
        "hardware": {"cpu": "a CPU", "cores": 2}, "versions": {}, "formats": {"one": {"fxc none": entry}},
        "protocol": {"threads": 1, "window": 256, "calibration": 8, "evaluated": 8},
    }  # fmt: skip
    assert "no_such_pass" in markdown(report) and "seconds are upper bounds" in markdown(report) and json.dumps(report)


def test_rows_are_added_in_order_to_a_run_under_the_same_conditions(tmp_path):
    report = {"hardware": {"cpu": "a"}, "versions": {}, "protocol": {"threads": 1}, "formats": {}}
    path = tmp_path / "quality-a.json"
    parts = ("hardware", "versions", "protocol")
    assert earlier(path, report, parts) == {}
    first, second, *_ = [each for each in CONTENDERS if each.format == "2:4 sparse"]
    rows = {"2:4 sparse": {second.name: {"load": 2}, first.name: {"load": 1}, "gone": {}}, "no format": {}}
    path.write_text(json.dumps({**report, "formats": rows}), encoding="utf-8")
    ordered = quality.in_order(earlier(path, report, parts)["formats"])
    assert [(name, list(entries)) for name, entries in ordered.items()] == [("2:4 sparse", [first.name, second.name])]
    with pytest.raises(RuntimeError, match="its protocol are"):
        earlier(path, {**report, "protocol": {"threads": 2}}, parts)


def test_the_peers_get_the_torch_of_the_project():
    assert _torch() == f"torch=={torch.__version__.partition('+')[0]}"


@pytest.mark.slow
def test_a_format_from_end_to_end(monkeypatch, capsys):
    only = "2:4 sparse: fxc sparse24:criterion=wanda"
    monkeypatch.setattr(sys, "argv", ["quality", "--quick", "--no-peers", "--threads", "1", "--only", only])
    assert quality.main() == 0
    out = capsys.readouterr().out
    assert "## 2:4 sparse" in out and "fxc sparse24:criterion=wanda" in out and "failed" not in out
