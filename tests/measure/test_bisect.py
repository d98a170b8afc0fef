"""A rewrite that breaks a check is found and named, whatever the check is, and the smallest part that shows it is written."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from command import fxc as run_fxc
from command import fxc_json
from safetensors.torch import load_file
from tiny import save
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.measure.bisect import Bisection, bisect
from fxc.options import Options
from fxc.passes.int8 import Int8

X = (torch.randn(4, 48, generator=torch.Generator().manual_seed(0)),)


class Deep(nn.Module):
    """Twelve layers, each beside a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@dataclass(frozen=True)
class Wrong(Int8):
    """int8, with the scales of one layer doubled."""

    name: ClassVar[str] = ""

    def add_parts(self, program, weight, base, before, pack):
        parts = super().add_parts(program, weight, base, before, pack)
        if base == "layers.7":
            program.constants[parts["scale"]] = 2 * program.constants[parts["scale"]]
        return parts


@pytest.fixture
def wrong() -> Wrong:
    made = Wrong()
    object.__setattr__(made, "name", "int8")
    return made


def test_a_wrong_layer_is_named_in_logarithmic_time(wrong, tmp_path):
    search = Bisection(Deep(), X, Options([wrong]), tolerance=0.05)
    found = search.find()
    assert (found.rewrite.by, found.rewrite.place) == ("int8", "layers.7")
    assert found.tries <= 2 + math.ceil(math.log2(found.total))
    difference = found.difference()
    assert "-%" in difference and "aten.linear" in difference and "+%" in difference and "fxc.int8_linear" in difference
    assert next(line for line in difference.splitlines() if line.startswith("-%")).endswith("# layers.7")
    # The part: one layer, and its input.
    search.reproduce(found).save(tmp_path / "part", found.as_json())
    texts = [(tmp_path / "part" / side / "program.fxc").read_text() for side in ("before", "after")]
    assert [text.count("linear(") for text in texts] == [1, 1] and "layers.7" in texts[0] and "tanh" not in texts[0]
    models = [fxc.load(tmp_path / "part" / side) for side in ("before", "after")]
    given = list(load_file(tmp_path / "part" / "inputs.safetensors").values())
    expected, made = (model(*given) for model in models)
    assert (made - expected).norm() / expected.norm() > 0.05
    about = json.loads((tmp_path / "part" / "about.json").read_text())
    assert about["place"] == "layers.7" and about["number"] == found.number


def test_the_gates_are_a_check_too(wrong):
    found = bisect(Deep(), X, Options([wrong], layer_budget=0.2, budget=0.9))
    assert found.rewrite.place == "layers.7" and "layers.7" in found.why


def test_a_pass_that_breaks_off_is_found():
    @dataclass(frozen=True)
    class Crash(Wrong):
        def add_parts(self, program, weight, base, before, pack):
            if base == "layers.3":
                raise ZeroDivisionError("oops")
            return super().add_parts(program, weight, base, before, pack)

    crash = Crash()
    object.__setattr__(crash, "name", "int8")
    search = Bisection(Deep(), X, Options([crash]), tolerance=0.5)
    found = search.find()
    assert found.rewrite.place == "layers.3" and "oops" in found.why and found.after is None and found.difference() == ""
    assert search.reproduce(found).after is None


def test_where_the_check_holds_there_is_nothing_to_find():
    assert bisect(Deep(), X, Options("int8"), tolerance=0.5) is None


@pytest.mark.parametrize("how", [{"check": "a", "tolerance": 1.0}, {"tolerance": -1.0}, {"check": "'"}, {"check": " "}])
def test_a_check_has_to_be_one(how):
    with pytest.raises(UsageError):
        Bisection(Deep(), X, Options("int8"), **how)


def test_a_check_that_fails_without_any_rewrite_is_a_mistake():
    with pytest.raises(UsageError, match="before any rewrite"):
        bisect(Deep(), X, Options("int8"), check=f"{sys.executable} -c 'raise SystemExit(3)'")
    with pytest.raises(UsageError, match="cannot be run"):
        bisect(Deep(), X, Options("int8"), check="there-is-no-such-command {}")


def test_the_programs_of_two_numbers_differ_by_one_rewrite():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32)).eval()
    x = (torch.randn(2, 3, 8, 8),)
    passes = "fold_batch_norm,sparsify:sparsity=0.5,int8"
    whole = fxc.optimize(net, x, passes, budget=9.0, layer_budget=9.0).program
    seen = []
    for limit in range(40):
        made = fxc.optimize(net, x, passes, limit=limit, verify=False)
        if made.report["passes"]:
            seen.append((made.report["passes"][-1]["name"], str(made.program)))
        same = str(made.program) == str(whole)
        if same and all(torch.equal(t, whole.constants[n]) for n, t in made.program.constants.items()):
            break
    else:
        pytest.fail("the whole was never reached")
    names = list(dict.fromkeys(name for name, _ in seen))
    assert names[-1] == "int8" and "fold_batch_norm" in names and any(n.startswith("sparsify") for n in names)
    assert fxc.optimize(net, x, passes, limit=0).report["passes"] == []


COMMAND = """import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
text = (out / "program.fxc").read_text()
assert str(out) == __import__("os").environ["FXC_OUT"]
sys.exit("q_proj is packed" if "layers.1.self_attn.q_proj.qweight" in text else 0)
"""


def test_a_command_decides_on_the_command_line(tmp_path):
    model = save("llama", tmp_path / "model")
    script = tmp_path / "judge.py"
    script.write_text(COMMAND)
    said = fxc_json("bisect", model, "--passes", "int8", "--check", f"{sys.executable} {script} {{}}")["found"]
    assert said["place"] == "model.layers.1.self_attn.q_proj" and "q_proj is packed" in said["why"]
    number = str(said["number"])
    run_fxc("compile", model, "--passes", "int8", "--limit", number, "-o", tmp_path / "out", "--no-measure")
    assert "layers.1.self_attn.q_proj.qweight" in (tmp_path / "out" / "program.fxc").read_text()
    assert "layers.1.self_attn.k_proj.qweight" not in (tmp_path / "out" / "program.fxc").read_text()


def test_a_gate_offers_the_command_that_bisects(tmp_path):
    model = save("llama", tmp_path / "model")
    refused = run_fxc("compile", model, "--passes", "int8", "--budget", "1e-6", "--skip", "lm_head", "--no-measure", code=5)
    line = " ".join(refused.stderr.split())
    assert "fxc bisect" in line and "--budget 1e-06" in line and "--skip lm_head" in line
    said = run_fxc("bisect", model, "--passes", "int8", "--budget", "1e-6", "--skip", "lm_head",
                   "--reproduce", tmp_path / "part").stdout  # fmt: skip
    assert "rewrite " in said and "int8, model.layers.0" in said and "smallest part" in said
    assert (tmp_path / "part" / "after" / "program.fxc").exists()


def test_what_is_cut_off_is_not_resumed(tmp_path):
    with pytest.raises(UsageError, match="not resumed"):
        fxc.optimize(Deep(), X, "int8", limit=3, resume=tmp_path / "saved")
    with pytest.raises(UsageError, match="no number of rewrites"):
        fxc.optimize(Deep(), X, "int8", limit=-1)
