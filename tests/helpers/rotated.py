"""Programs before and after the pass rotate, in float64."""

from __future__ import annotations

import families
import torch
from torch import nn

import fxc
from fxc.data.samples import samples
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.passes.base import Context, Result
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.float64 import in_float64, widened
from fxc.passes.rotate.rotate import Rotate
from fxc.verify.compare import relative_error


def family(name: str) -> Program:
    """Canonical, in float64, with norms whose gains and biases are not all alike."""
    model, example = families.build(name)
    return family_of(model, *(example or ()))


def family_of(model: nn.Module, *example: torch.Tensor) -> Program:
    program = fxc.capture(model, example or None, check=False)
    Canonicalize().run(program, Context())
    torch.manual_seed(0)
    for fqn, tensor in program.constants.items():
        if tensor.ndim == 1 and tensor.is_floating_point() and ("norm" in fqn.lower() or "ln_" in fqn):
            program.constants[fqn] = torch.rand_like(tensor) + 0.5
    return in_float64(program)


def rotated(program: Program, **options) -> tuple[Program, Result]:
    after = program.copy()
    return after, Rotate(**options).run(after, Context())


def differs(program: Program, after: Program, result: Result) -> float:
    """The largest relative error over the sizes that a gate tries."""
    errors = []
    for inputs in samples(program):
        inputs = [widened(each) for each in inputs]
        expected = result.interface.outputs(program, run(program, inputs))
        errors.append(relative_error(run(after, result.interface.inputs(program, inputs)), expected))
    return max(errors)
