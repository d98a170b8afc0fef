"""Passes and formats of other packages: found where they are installed, imported by name, named in what they made."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from command import fxc as command
from command import fxc_json
from repo import REPO
from torch import nn

import fxc
from fxc import plugins
from fxc.errors import UsageError
from fxc.page.again import again
from fxc.passes.base import Pass, parse_passes
from fxc.schemes.scheme import SCHEMES, unregister

EXAMPLE = REPO / "examples" / "tanh_gelu"
BINARY = '''
"""A format of one bit, its operator and its pass."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.linears import PackLinears
from fxc.schemes.scheme import Product, Scheme, register

def quantize(weight):
    return (weight >= 0).to(torch.int8), weight.float().abs().mean(1).clamp(min=1e-12)

def dequantize(signs, scale):
    return (signs.float() * 2 - 1) * scale[:, None]

@torch.library.custom_op("fxc::one_bit_linear", mutates_args=())
def one_bit_linear(x: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(x, dequantize(signs, scale).to(x.dtype), bias)

@one_bit_linear.register_fake
def _(x, signs, scale, bias):
    return x.new_empty(*x.shape[:-1], signs.shape[0])

ONE_BIT = register(Scheme("one_bit", "one bit", {"signs": None, "scale": "scales"},
    (Product(torch.ops.fxc.one_bit_linear.default, "one_bit", "one bit linear"),), quantize, dequantize))

@dataclass(frozen=True)
class OneBit(PackLinears):
    """Keep signs."""
    name: ClassVar[str] = "one_bit"
    needs: ClassVar = frozenset({CANONICAL, FLOAT_WEIGHTS, DENSE_WEIGHTS})
    breaks: ClassVar = frozenset({FLOAT_WEIGHTS})
    limits: ClassVar = (float("inf"), float("inf"))
    scheme: ClassVar = ONE_BIT
'''


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What plugins register is for one test."""
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))
    monkeypatch.setattr(plugins, "FAILED", {})
    yield
    for name in ("tanh_gelu", "one_bit"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the example."""
    where = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    copied = where / "source"
    copied.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (copied / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", where / "to", copied], check=True)
    return where / "to"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def test_an_installed_package_brings_its_pass(installed):
    path = os.pathsep.join([str(installed), str(REPO), *sys.path])
    lines = ["import json, fxc, fxc.passes", "found = fxc.Pass.registry['tanh_gelu']",
             "from fxc.plugins import origin_of", "print(json.dumps(origin_of(found)))"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"module": "tanh_gelu", "package": "tanh-gelu", "version": "0.1.0"}


def test_its_pass_runs_and_the_report_names_it(installed, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(installed))
    plugins.import_installed()
    model, original = fxc.optimize(net(), (X,), "tanh_gelu,int8"), net()
    expected = original[2](nn.functional.gelu(original[0](X), approximate="tanh"))
    assert 'approximate="tanh"' in str(model.program) and (model(X) - expected).norm() < 0.02 * expected.norm()
    origin = {"module": "tanh_gelu", "package": "tanh-gelu", "version": "0.1.0"}
    steps = {step["name"]: step.get("plugin") for step in model.report["passes"]}
    assert steps["tanh_gelu"] == origin and steps["int8"] is None
    assert "--plugin tanh_gelu" in again(model.report).command
    model.save(tmp_path / "out")
    assert "plugins: tanh_gelu (tanh-gelu 0.1.0)" in command("inspect", tmp_path / "out").stdout
    # Nothing of the plugin is in the program, so that it is not missed.
    monkeypatch.delitem(sys.modules, "tanh_gelu")
    assert torch.equal(fxc.load(tmp_path / "out")(X), model(X))
    listed = {each["name"]: each.get("plugin") for each in fxc_json("passes")["passes"]}
    assert listed["tanh_gelu"] == origin and listed["int8"] is None


def test_one_that_fails_is_a_warning_and_named_where_it_is_missed(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("import nothing_of_this_name")
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[fxc.passes]\nit = broken_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [each.module for each in metadata.entry_points(group=plugins.GROUP)] == ["broken_plugin"]
    with pytest.warns(UserWarning, match="broken_plugin is left out: broken: ModuleNotFoundError"):
        plugins.import_installed()
    monkeypatch.setattr("fxc.passes.base.FAILED", plugins.FAILED)
    with pytest.raises(UsageError, match="no pass 'its_pass'") as caught:
        parse_passes("its_pass")
    assert "broken_plugin could not be imported: broken: ModuleNotFoundError" in caught.value.why


def test_no_plugin_takes_the_name_of_a_pass():
    with pytest.raises(UsageError, match="the pass int8 is fxc's own"):
        type("Int8", (Pass,), {"name": "int8", "__module__": "elsewhere"})
    assert Pass.registry["int8"].__module__ == "fxc.passes.int8"


def test_the_command_line_imports_it_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    assert "there is no pass 'tanh_gelu'" in command("passes", "--explain", "tanh_gelu", code=2).output
    told = command("passes", "--explain", "tanh_gelu,int8", "--plugin", "tanh_gelu").stdout
    assert "tanh_gelu" in told and str(EXAMPLE) not in sys.path
    refused = command("passes", "--plugin", "not_there", code=2).output
    assert "the plugin cannot be imported" in refused and "ModuleNotFoundError" in refused


def test_a_format_from_outside_is_missed_when_it_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "one_bit.py").write_text(BINARY)
    made = "def net():\n    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)), (torch.randn(4, 64),)\n"
    (tmp_path / "made.py").write_text(f"import torch\nfrom torch import nn\n{made}")
    monkeypatch.chdir(tmp_path)
    command("compile", "made:net", "--passes", "one_bit", "--plugin", "one_bit", "-o", "out", "--no-measure")
    module = sys.modules["one_bit"]
    assert fxc.load("out")(X).shape == (4, 32)
    # Another process, which has not imported it.
    lines = ["import fxc, sys", "try:\n    fxc.load('out')", "except fxc.FxcError as error:\n    print(error)",
             "import one_bit", "print(tuple(fxc.load('out')(__import__('torch').zeros(2, 64)).shape))"]  # fmt: skip
    path = os.pathsep.join([str(REPO), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "no operator fxc.one_bit_linear" in done.stdout and done.stdout.endswith("(2, 32)\n")
    assert "it was made with passes of one_bit, which this process has not imported" in done.stdout
    assert "import one_bit before fxc.load; on the command line --plugin one_bit" in done.stdout
    unregister(module.ONE_BIT)
    assert "one_bit" not in SCHEMES


@pytest.mark.parametrize("report", [None, [], {"passes": 3}, {"passes": [None, {"plugin": "x"}, {"plugin": {"module": 4}}]}])
def test_a_report_may_say_anything(report):
    assert plugins.named_in(report) == {} and plugins.not_imported(report) is None


def test_nothing_that_a_report_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    why, hint = plugins.not_imported({"passes": [{"name": "x", "plugin": {"module": "hostile"}}]})
    assert "passes of hostile" in why and "--plugin hostile" in hint and "hostile" not in sys.modules
