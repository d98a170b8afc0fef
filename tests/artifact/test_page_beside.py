"""report.html beside an artifact: in no manifest, of no matter to loading; and an artifact read without its weights."""

import pytest
import torch
from torch import nn

import fxc
from fxc.artifact import store
from fxc.artifact.manifest import MANIFEST, PAGE, read_manifest, replaceable
from fxc.errors import InputRefused, UsageError


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("beside") / "out"
    fxc.optimize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (torch.randn(2, 64),), passes="int8").save(out)
    return out


def test_a_changed_or_missing_page_is_no_damage(out):
    page, x = out / PAGE, torch.randn(3, 64)
    expected, written = fxc.load(out)(x), page.read_bytes()
    assert PAGE not in read_manifest(out)["files"] and written.startswith(b"<!doctype html>")
    page.write_text("something else")
    assert torch.equal(fxc.load(out)(x), expected) and replaceable(out) is None
    page.unlink()
    assert torch.equal(fxc.load(out)(x), expected) and replaceable(out) is None
    fxc.load(out).save(out, overwrite=True)
    assert page.read_bytes() == written, "what was saved again has its page again"


def test_an_outline_reads_no_weights(out, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (MANIFEST, store.TEXT):
        (tmp_path / "out" / name).write_bytes((out / name).read_bytes())
    outline, whole = store.read_outline(tmp_path / "out"), store.read(out)
    assert outline.program.is_on_meta and str(outline.program) == str(whole.program) and outline.manifest == whole.manifest
    text = tmp_path / "out" / store.TEXT
    text.write_text(text.read_text().replace("64", "65", 1))
    with pytest.raises(InputRefused, match="hash"):
        store.read_outline(tmp_path / "out")
    text.unlink()
    with pytest.raises(InputRefused, match="missing"):
        store.read_outline(tmp_path / "out")


def test_the_page_is_no_extra_file(out, tmp_path):
    with pytest.raises(UsageError, match="extra file"):
        store.save(store.read(out).program, tmp_path / "x", manifest={}, extra_files={PAGE: b"x"})
