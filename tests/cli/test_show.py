"""`fxc inspect`, `diff`, `passes` and `doctor`: what they show."""

import pytest
import torch
from command import fxc, fxc_json

from fxc_kernels.cpu import native, native_int8


def test_inspect_shows_bytes_that_add_up_and_the_program(folder):
    shown = fxc_json("inspect", folder / "qwen2-int8")
    assert sum(shown["bytes_by_kind"].values()) == sum(each["nbytes"] for each in shown["layers"]) == shown["bytes"]
    assert shown["operators"]["fxc.int8_linear"] == 15 and shown["bytes_by_kind"]["scales"] > 0
    assert "and 7 smaller ones" in fxc("inspect", folder / "qwen2-int8").stdout
    assert "layers.1.input_layernorm" in fxc("inspect", folder / "qwen2-int8", "--all").stdout
    text = fxc("inspect", folder / "qwen2-int8", "--text").stdout
    assert text == (folder / "qwen2-int8" / "program.fxc").read_text()
    assert "linear" in fxc_json("inspect", folder / "bert")["bytes_by_kind"]


def test_inspect_shows_what_runs_on_a_device(folder):
    text = fxc("inspect", folder / "qwen2-int8", "--lowered").stdout
    assert "fxc.int8_linear(" not in text and "symbol s0 = " in text and "  # model.layers.0.mlp.down_proj (lower)" in text
    assert "\nlayers: " in text
    assert "there is no backend" in fxc("inspect", folder / "qwen2-int8", "--lowered", "--backend", "tvm", code=2).stderr


def test_inspect_shows_what_would_run_on_a_gpu(folder):
    pytest.importorskip("triton", reason="no Triton on this platform")
    cuda = fxc_json("inspect", folder / "qwen2-int8", "--lowered", "--device", "cuda")
    assert cuda["text"].count("= fxc_cuda.int8_mm(") == 9 and '"silu_mul")' in cuda["text"]
    assert {each["op"] for each in cuda["layers"]} == {"triton int8"} and len(cuda["layers"]) == 15
    assert "fxc_cuda.rope(" in cuda["text"]
    fused = fxc_json("inspect", folder / "qwen2-int8", "--lowered", "--device", "cuda", "--backend", "inductor")
    assert "fxc_cuda.rope(" not in fused["text"]


def test_diff_shows_the_rewrite(folder):
    found = fxc_json("diff", folder / "bert", folder / "bert-int8")
    assert not found["same"] and found["bytes_b"] < found["bytes_a"]
    changed = [line for line in found["diff"].splitlines() if line.startswith("+") and "fxc.int8_linear(" in line]
    assert len(changed) == 13
    assert "the programs are the same" in fxc("diff", folder / "bert", folder / "bert").stdout


def test_passes_are_listed_and_explained():
    listed = {each["name"]: each for each in fxc_json("passes")["passes"]}
    assert listed["int8"]["kind"] == "policy" and listed["int8"]["options"][0]["name"] == "mode"
    assert "int8 (policy)" in fxc("passes").stdout
    explained = fxc_json("passes", "--explain", "int8")["order"]
    assert [each["name"] for each in explained] == ["canonicalize", "int8"] and explained[0]["reasons"]
    assert "given twice" in fxc("passes", "--explain", "int8,int8", code=2).stderr
    explained = fxc_json("passes", "--explain", "int8,prune")["order"]
    assert [each["name"] for each in explained] == ["canonicalize", "prune", "dead_structure", "int8"]


def test_doctor_says_what_there_is():
    found = {(f["group"], f["name"]): f for f in fxc_json("doctor")["findings"]}
    assert found["software", "torch"]["value"] == torch.__version__
    assert found["cpu", "int8 layers"]["ok"] == (torch.cpu._is_vnni_supported() or native_int8.why_not() is None)
    assert torch.cuda.is_available() or found["cuda", "device"]["note"]
    assert "int8 layers" in fxc("doctor").stdout


def test_doctor_builds_kernels_for_an_image_or_says_why_not(monkeypatch, tmp_path):
    assert "built" not in fxc_json("doctor")
    monkeypatch.setattr(native, "build_all", lambda: {"avx2": {"between": tmp_path / "between.so"}})
    assert fxc_json("doctor", "--build")["built"] == {"avx2": {"between": str(tmp_path / "between.so")}}
    assert f"built for avx2: between, in {tmp_path}" in " ".join(fxc("doctor", "--build").stdout.split())

    def refused():
        raise native.NotBuilt("no C++ compiler")

    monkeypatch.setattr(native, "build_all", refused)
    assert "why: no C++ compiler" in fxc("doctor", "--build", code=6).stderr


def test_inspect_tells_which_weights_share_an_axis(folder):
    shown = fxc("inspect", folder / "qwen2", "--axes").stdout
    for said in ("4 heads", "2 KV heads", "FFN channels", "down_proj.weight[1]", "rows are looked up by number"):
        assert said in shown
    groups = fxc_json("inspect", folder / "qwen2", "--axes")["groups"]
    head = next(g for g in groups if g["kind"] == "head")
    assert head["reads"]["indices"] == [0, 0, 1, 1] and head["pinned"] is None
