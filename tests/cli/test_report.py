"""`fxc report`: the page again, in the artifact or elsewhere, without reading weights."""

import shutil

from command import fxc, fxc_json

from fxc.artifact.manifest import PAGE
from fxc.cli import report


def test_the_page_is_written_again(folder, tmp_path):
    out = folder / "bert-int8"
    written = (out / PAGE).read_bytes()
    (out / PAGE).unlink()
    assert f"wrote {out / PAGE}" in fxc("report", out).stdout and (out / PAGE).read_bytes() == written
    made = fxc_json("report", out, "-o", tmp_path / "page.html")
    assert made["bytes"] == len(written) and (tmp_path / "page.html").read_bytes() == written


def test_an_old_artifact_and_one_whose_weights_are_elsewhere_have_a_page(folder, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(folder / "vit-int8", out)
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    assert "wrote" in fxc("report", out, "-o", tmp_path / "p.html").stdout


def test_times_of_layers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PEAK_SECONDS", 0.1)
    fxc("report", folder / "bert-int8", "--measure", "-o", tmp_path / "p.html")
    assert "µs" in (tmp_path / "p.html").read_text()


def test_report_fails_clearly(folder, tmp_path):
    assert "not an fxc artifact" in fxc("report", tmp_path, "-o", tmp_path / "p.html", code=3).stderr
    assert "own files" in fxc("report", folder / "vit-int8", "-o", folder / "vit-int8" / "fxc.json", code=2).stderr
    assert "a folder" in fxc("report", folder / "vit-int8", "-o", tmp_path, code=2).stderr
    (tmp_path / "file").touch()
    assert "in the way" in fxc("report", folder / "vit-int8", "-o", tmp_path / "file" / "p.html", code=2).stderr
