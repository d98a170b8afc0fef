"""What runs on a CPU: fxc's layers as its lowering chooses them, and torch's own operators."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fxc.ir import parse_program
from fxc.ir.targets import name_of
from fxc.ir.text import DTYPE_NAMES, tensor_type
from fxc.kernel_bench.contender import EXACT, HALF, INT8, Bind, Contender, int8pack, of_function
from fxc.kernel_bench.weights import Weights, format_of, group_of, known, quantize_symmetric
from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable
from fxc.schemes import int4, int8, int8_sparse24
from fxc_kernels import int4_linear
from fxc_kernels.cpu.packed_linear import dense_linear, packed_where_it_helps


def contenders(schemes: tuple[str, ...]) -> list[Contender]:
    """The dense baselines and everything that computes one of `schemes`."""
    found = [
        Contender("torch float32", "float32", "dense", _float32, EXACT, torch.float32, holds=4),
        Contender("torch bf16", "bf16", "dense", _bf16, HALF, baseline=True),
        Contender("oneDNN bf16, prepacked", "bf16", "dense", _bf16_packed, HALF, baseline=True),
    ]
    for scheme in schemes:
        found += _ours(scheme)
        if scheme == "int8":
            found.append(Contender("torch._int_mm + scale", scheme, "int8", _int_mm, INT8, holds=1))
        elif scheme == "int8_weight_only":
            found.append(Contender("torch _weight_int8pack_mm", scheme, "int8", int8pack, HALF, holds=1))
        elif scheme.startswith("int4"):
            found.append(Contender("torch _weight_int4pack_mm_for_cpu", scheme, scheme, _int4pack, HALF, holds=0.6))
    return found


def _ours(scheme: str) -> list[Contender]:
    """In a bfloat16 and, where that runs otherwise, in a float32 model. Activations may be rounded to int8, and so may int4
    weights be, once more."""
    found = known(scheme)
    rounds = found.product.activations is torch.int8 or found.format in int4.SCHEMES.values()
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.bfloat16 or found.format in (int8.SCHEME, int8_sparse24.SCHEME, *int4.SCHEMES.values()):
            name = f"fxc {scheme}" + ("" if dtype == torch.bfloat16 else ", float32")
            tolerance = INT8 if rounds else HALF if dtype == torch.bfloat16 else EXACT
            build = partial(_lowered, scheme, dtype)
            made.append(Contender(name, scheme, format_of(scheme), build, tolerance, dtype, form=_form, ours=True,
                                  holds=1.0 + dtype.itemsize))  # fmt: skip
    return made


class _Lowered:
    """One layer as `lower_cpu` lowers it in a program of that dtype."""

    def __init__(self, module: nn.Module, form: str):
        self.module, self.form = module, form

    def __call__(self, x: Tensor):
        return lambda: self.module(x)[0]


_PROGRAM = """fxc program 1
metadata {{}}
call {{"args": [0], "kwargs": {{}}}}
result 0
symbol s0 = 2
{constants}
%0: {dtype}[s0, {k}] = input "x"
%1: {dtype}[s0, {n}] = {operator}({arguments})
return "y" %1
"""


def _lowered(scheme: str, dtype: torch.dtype, weights: Weights) -> Bind:
    # 2:4 values and int4 scales have the dtype of the model that they belong to.
    parts = [part.to(dtype) if part.dtype == torch.bfloat16 else part for part in weights.parts]
    found = known(scheme)
    constants = {f"layer.{part}": tensor for part, tensor in zip(found.format.parts, parts)}
    given = {"x": "%0", **{part: f"@layer.{part}" for part, _ in zip(found.format.parts, parts)}, **found.options}
    given |= found.product.learned
    operator = found.product.operator
    arguments = [str(given.get(argument.name)) for argument in operator._schema.arguments]
    program = parse_program(
        _PROGRAM.format(
            constants="\n".join(f"constant @{name}: {tensor_type(t.dtype, t.shape)}" for name, t in constants.items()),
            dtype=DTYPE_NAMES[dtype], k=weights.k, n=weights.n, operator=name_of(operator), arguments=", ".join(arguments),
        ), constants
    )  # fmt: skip
    lowered, choices = lower_cpu(program)
    return _Lowered(runnable(lowered, "cpu", "eager"), choices[0].op if choices else "as the program has it")


def _form(bind: Bind) -> str:
    return bind.form


def _float32(weights: Weights) -> Bind:
    weight = weights.dense()
    return of_function(lambda x: linear(x, weight))


def _bf16(weights: Weights) -> Bind:
    weight = weights.dense().bfloat16()
    return of_function(lambda x: linear(x, weight))


def _bf16_packed(weights: Weights) -> Bind:
    weight = packed_where_it_helps(weights.dense().bfloat16())
    return of_function(lambda x: dense_linear(x, weight, None))


def _int_mm(weights: Weights) -> Bind:
    qweight, scale = weights.parts
    transposed = qweight.t()

    def product(x: Tensor) -> Tensor:
        q, row_scale = quantize_symmetric(x)
        return (torch._int_mm(q, transposed) * scale * row_scale).to(x.dtype)

    return of_function(product)


def _int4pack(weights: Weights) -> Bind:
    qweight, scale = weights.parts[:2]
    group = group_of(weights.format)
    converted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(int4_linear.unpack(qweight).int(), 1)
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
    return of_function(lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, converted, group, scale_and_zero))
