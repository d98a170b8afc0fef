"""Layers in every format as a CPU runs them."""

from __future__ import annotations

import shutil

import pytest
import torch
from formats import SPECS, compiled, normal
from lowered import on_cpu
from torch import nn

import fxc
from fxc.lower.candidates import rounded_to_int8
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.report.lowering import describe
from fxc.schemes import int4

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


def timing(as_int8: float):
    return lambda *size: {rows: (as_int8, 1.0) for rows in (1, 8, 32)}


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).float().norm() <= tolerance * b.float().norm()


# A lowered fp8 layer keeps its activations, which the operator rounds.
LIKE = {"fp8": "fp8:mode=weight_only"}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lowered_layers_compute_what_the_operators_say(spec, dtype):
    program, _ = compiled(spec, dtype)
    expected, _ = compiled(LIKE.get(spec, spec), dtype)
    lowered, report = on_cpu(program, "eager", measure=timing(0.1), bf16=dtype == torch.bfloat16)
    assert {c.fqn for c in report} >= {"q", "k", "v", "up", "down"}
    assert "one product with q, k, v" in report[0].reason
    assert [n.target for n in lowered.graph.nodes if getattr(n.target, "namespace", "") == "fxc"] == []
    for shape in [(3, 5), (1, 1), (2, 1), (0, 4)]:
        x = normal(*shape, 64, seed=7, dtype=dtype)
        # int4 weights run as int8 ones, rounded once more.
        tolerance = 1e-2 if "int4" in spec else 1e-4
        close(lowered(x), expected.module()(x), tolerance if dtype == torch.float32 else 3e-2)
    close(lowered(x), program.module()(x), 0.1)
    dequantized = {c.fqn for c in report if c.op == "dequantized"}
    if spec == "sparse24,int8":
        assert "2:4 sparse as dense: no CPU kernel" in report[0].reason and dequantized == set()
    elif "int4" in spec:
        assert report[0].op == "int8" and "rounded once more, to int8: the error of int" in report[0].reason
        assert dequantized == set()
    else:
        assert dequantized >= {"q", "k", "v", "up", "down"} and "no CPU kernel for" in report[0].reason
        said = describe(report)
        assert sum("no CPU kernel for" in line for line in said) == 1, "one example stands for all"


@needs_compiler
@pytest.mark.parametrize("as_int8", [0.1, pytest.param(2.0, marks=pytest.mark.slow)])
def test_under_inductor_too(as_int8):
    program, _ = compiled("int4:group=32")
    lowered, report = on_cpu(program, "inductor", measure=timing(as_int8), bf16=False)
    assert {choice.op for choice in report} == {"int8" if as_int8 < 1 else "dequantized"}
    x = normal(3, 5, 64, seed=7)
    close(lowered(x), program.module()(x), 1e-2 if as_int8 < 1 else 1e-4)


def test_int4_is_measured_and_left_where_it_is_slower():
    program, _ = compiled("int4:group=32", torch.bfloat16)
    _, report = on_cpu(program, "eager", measure=timing(2.0))
    assert {c.op for c in report} <= {"dequantized", "bf16 packed"} and "int8 was slower" in report[0].reason
    _, report = on_cpu(program, "eager")
    assert "M=1: int8" in report[0].reason and "M=128: int8" in report[0].reason


def test_rows_of_zeros_do_not_keep_int4_from_int8():
    weight = normal(64, 256)
    weight[:20] = 0
    qweight, scale, _ = int4.quantize_weight(weight, 64, True)
    dense = int4.dequantize(qweight, scale, None, 64)
    q, row_scale, more = rounded_to_int8(dense, scale)
    grown = (q * row_scale[:, None] - weight).norm() / (dense - weight).norm() - 1
    assert abs(grown - more) < 1e-3 and 1e-3 < more < 5e-3


def test_int4_rows_with_outliers_are_not_rounded_again():
    class Spiky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 64)
            with torch.no_grad():
                self.layer.weight[:, :32] *= 100  # groups keep scales of their own, and a row of int8 has one

        def forward(self, x):
            return self.layer(x)

    program = fxc.capture(Spiky(), (normal(3, 256),))
    program, _ = run_passes(program, Context(), Options("int4:group=32"))
    lowered, report = on_cpu(program, "eager", measure=timing(0.1))
    x = normal(3, 256, seed=9)
    assert report[0].op == "dequantized" and "as int8 the error of int4 would be" in report[0].reason
    close(lowered(x), program.module()(x), 1e-4)


def test_a_bias_that_is_computed_runs_by_the_operator():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(32, 64))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, x.mean((0, 1))[:32])

    program = fxc.capture(Moving(), (normal(3, 5, 64),))
    for spec in SPECS:
        after, _ = run_passes(program, Context(), Options(spec))
        x = normal(3, 5, 64, seed=9)
        close(on_cpu(after)[0](x), after.module()(x), 1e-3)
