"""The rivals of fxc's kernels, found by `fxc bench kernels --peers`: those that are here compute what they are timed for."""

import json
from importlib import util

import torch
from command import fxc
from toy_bench import Toy, quick_cpu

from benchmarks import kernel_peers
from benchmarks.kernel_peers import cuda
from fxc.kernel_bench import peers
from fxc.kernel_bench.weights import all_schemes


def test_the_command_times_the_rivals_that_are_here_and_names_the_others(monkeypatch):
    quick_cpu(monkeypatch)
    size = ("--shapes", "64,256", "--m", "1", "--rounds", 1, "--device", "cpu", "--scheme", "int8,int4")
    found = json.loads(fxc("bench", "kernels", *size, "--peers", "benchmarks.kernel_peers", "--json").stdout)
    right = [row["contender"] for row in found["rows"] if row["state"] == "ok"]
    for name, module in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        installed = util.find_spec(module) is not None and (module != "onnxruntime" or util.find_spec("onnx") is not None)
        assert any(each.startswith(name) for each in (right if installed else found["absent"]))
        assert (found["versions"][module] is not None) == (util.find_spec(module) is not None)
    # Each with those that compute the same.
    schemes = [row["scheme"] for row in found["rows"]]
    assert list(dict.fromkeys(schemes)) == ["float32", "bf16", "int8", "int4_g128"] and schemes == sorted(
        schemes, key=["float32", "bf16", "int8", "int4_g128"].index
    )


def test_a_gpu_has_rivals_of_its_own_and_what_is_not_there_has_a_reason(monkeypatch):
    platform = Toy([])
    platform.device, platform.capability = torch.device("cuda"), 80
    found = {each.name: each for each in kernel_peers.contenders(tuple(all_schemes()), platform)}
    assert {"gemlite int4", "torchao int8", "cuSPARSELt", "cuSPARSELt int8"} <= set(found)
    assert not any(each.ours or each.baseline for each in found.values())
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert found["gemlite int4"].missing() == "not installed: gemlite"
    assert found["torchao fp8"].absent == "this chip has no float8 products: compute capability 8.0, and they need 8.9"
    monkeypatch.setattr(torch.backends, "cusparselt", None)
    assert "no cuSPARSELt" in cuda.contenders(("sparse24",), 80)[0].missing()


def test_a_module_of_rivals_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "toy_rivals.py").write_text("def contenders(schemes, platform):\n    return [*schemes, platform]\n")
    monkeypatch.chdir(tmp_path)
    assert peers.load("toy_rivals", ("int8",), "here") == ["int8", "here"]
