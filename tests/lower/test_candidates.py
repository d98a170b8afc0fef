"""The forms of a layer: which there are, and which is chosen by what was measured."""

import dataclasses

import pytest
import torch
from int8_programs import program_of
from lowered import on_cpu
from torch import nn

import fxc
from fxc.lower import candidates as forms
from fxc.lower import choose
from fxc.lower.candidates import FLOAT, INT8, SPLIT
from fxc.verify.compare import relative_error
from fxc_kernels.cpu import int8_product, int8_static

DOUBLE = dataclasses.replace(FLOAT, name="float64", timed_as="float64", kind="float64", targets=INT8.targets, rows=(1, 16))
BOTH = (INT8, DOUBLE, FLOAT)


def test_another_form_is_one_more_entry(monkeypatch):
    monkeypatch.setattr(forms, "CANDIDATES", (*forms.CANDIDATES, DOUBLE))
    x = torch.randn(3, 32)
    program = program_of(nn.Sequential(nn.Linear(32, 24)), x[None])
    seen = []

    def measure(able, rows, columns, dtype):
        seen.append((able, rows, columns, dtype))
        return {1: (0.9, 0.1, 1.0), 16: (0.9, 0.1, 1.0)}

    lowered, (layer,) = on_cpu(program, measure=measure, bf16=False)
    assert seen == [(BOTH, 24, 32, torch.float32)]
    assert layer.op == "float64" and "M=1: int8 900000 us, float64 100000 us, float 1000000 us" in layer.reason
    assert lowered.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)


@pytest.mark.parametrize(
    ("timing", "name"),
    [
        ({1: (1, 9, 2), 16: (1, 9, 2)}, "int8"),
        ({1: (9, 1, 2), 16: (9, 1, 2)}, "float64"),
        ({1: (1.5, 1, 2), 16: (1.5, 1, 2)}, "float64"),
        ({1: (1, 1.5, 2), 16: (1, 1.5, 2)}, "int8"),
        ({1: (9, 9, 2), 16: (9, 9, 2)}, "dequantized"),
        ({1: (9, 9, 2), 16: (0.1, 1, 2)}, "int8 above M=1, float below"),
    ],
)
def test_the_form_that_gains_most_over_float_is_chosen(timing, name):
    assert choose.choose(BOTH, timing, is_small=True).name == name


def test_what_a_machine_cannot_run_is_not_timed(monkeypatch):
    monkeypatch.setattr(forms, "CANDIDATES", (dataclasses.replace(INT8, why_not=lambda group: "it is Monday"), SPLIT))
    program = program_of(nn.Sequential(nn.Linear(32, 24)), torch.randn(1, 3, 32))
    _, (layer,) = on_cpu(program, measure=lambda *asked: pytest.fail("timed"))
    assert (layer.op, layer.reason) == ("dequantized", "dequantized: it is Monday")


def test_three_forms_are_timed_and_remembered_together(tmp_path, monkeypatch):
    monkeypatch.setenv("FXC_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "_noise", lambda *race: None)
    first = choose.measure(BOTH, 24, 16, torch.float32, True, 1)
    assert tuple(first) == INT8.rows and all(len(times) == 3 for times in first.values())
    choose.measure.cache_clear()
    monkeypatch.setattr(choose, "compare", lambda *asked: pytest.fail("measured again"))
    assert choose.measure(BOTH, 24, 16, torch.float32, True, 1) == first
    choose.measure.cache_clear()


@pytest.mark.parametrize("layer", [nn.Linear(32, 16), nn.Conv2d(3, 16, 3)], ids=["linear", "convolution"])
def test_in_floats_a_static_layer_reads_what_its_scale_reaches(layer, monkeypatch):
    monkeypatch.setattr(int8_product, "products_saturate", lambda: True)
    monkeypatch.setattr(int8_static, "conv2d_is_exact", lambda: False)
    shape = (4, 32) if isinstance(layer, nn.Linear) else (4, 3, 8, 8)
    torch.manual_seed(0)
    known, wide = torch.rand(shape), 5 * torch.randn(shape)
    model = fxc.optimize(layer.eval(), (known,), passes="int8:mode=static:observer=minmax:smooth=false", calib=[(known,)])
    expected = model.program.module()(wide)
    found = model(wide)
    assert {each.op for each in model.layers} == {"dequantized"}
    assert relative_error([found], expected) < 0.02
    assert relative_error([layer(wide)], expected) > 0.5


@pytest.mark.parametrize(("many", "name"), [(1.1, "dequantized"), (3.0, "dequantized"), (5.0, "int8")])
def test_a_large_layer_far_ahead_on_the_whole_may_lose_at_one_row(many, name):
    timing = {1: (1.0, 0.75), 16: (1.0, 1.5), 128: (1.0, many), 256: (1.0, many)}
    assert choose.choose((INT8, FLOAT), timing, is_small=False).name == name
