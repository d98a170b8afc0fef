"""Packed products as functions of plain torch, by the definition that their format gives (`Scheme.dense`, `Product.rounded`):
for compilers that know nothing of fxc's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.ir.names import layer_at, parts_of
from fxc.ir.program import Program
from fxc.schemes import int8
from fxc.schemes.scheme import EMBEDDING, LINEAR, product_of, scheme_of


def by_definition(program: Program) -> Program:
    """The program with such functions in the place of packed products. Its graph holds Python functions, and is to be traced.
    Raises `UsageError`, with the layer, for products and other operators of fxc that have none."""
    program = program.copy()
    for node in list(program.graph.nodes):
        if product_of(node.target) is not None:
            _replace(program, node)
        elif getattr(node.target, "namespace", None) == "fxc":
            raise UsageError(
                f"a package holds no {node.target}", where=layer_at(program, node),
                why="operators of fxc are there where fxc is, and the package is for where it is not",
                hint="fxc.load reads the artifact as it is",
            )  # fmt: skip
    return program


def definition(node: fx.Node) -> Callable[..., Tensor] | None:
    """What a packed product is written as, or None."""
    product = product_of(node.target)
    if node.target is int8.LINEAR:
        return times_int8
    return {LINEAR: linear, EMBEDDING: lookup, int8.CONV2D: conv2d}.get(product.layer)


def _replace(program: Program, node: fx.Node) -> None:
    call, function = Call(node), definition(node)
    scheme, product = scheme_of(node.target), product_of(node.target)
    if function is None:
        raise UsageError(
            f"no compiled code multiplies {scheme.label} experts", where=layer_at(program, node),
            why="products over rows sorted by expert have no operator of plain torch", hint="use backend=eager",
        )  # fmt: skip
    parts = {part: call.get(part) for part in parts_of(node)}
    names = [argument.name for argument in node.target._schema.arguments]
    more = {name: call.get(name) for name in names if name not in parts and name not in scheme.parts and name != "group"}

    def written(*tensors: Tensor, **others: Any) -> Tensor:
        return function(scheme, product, dict(zip(parts, tensors, strict=True)), **others)

    written.__name__ = function.__name__
    with program.graph.inserting_before(node):
        made = program.graph.call_function(written, tuple(parts.values()), more)
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def linear(scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None, **learned: Any) -> Tensor:
    """x @ w^T + bias in float32, with x as the product rounds it."""
    read = x.float() if product.rounded is None else product.rounded(x, **learned)
    return functional.linear(read, scheme.dense(parts).float(), None if bias is None else bias.float()).to(x.dtype)


def times_int8(scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """`fxc::int8_linear` as a product of integers (fxc_kernels.int8_linear)."""
    rows = x.reshape(-1, x.shape[-1])
    q, step, zero = int8.quantize_rows(rows)
    weight = parts["qweight"]
    total = torch._int_mm(q, weight.t()) - zero * weight.sum(dim=1, dtype=torch.int32)
    out = total.float() * parts["scale"] * step
    return (out if bias is None else out + bias.float()).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def lookup(scheme: Any, product: Any, parts: dict[str, Tensor], indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table."""
    flat = indices.flatten()
    rows = scheme.dense({part: tensor.index_select(0, flat) for part, tensor in parts.items()})
    return rows.to(dtype).reshape(*indices.shape, rows.shape[-1])


def conv2d(
    scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, **learned: Any,
) -> Tensor:  # fmt: skip
    """A convolution in float32, with x as the product rounds it."""
    numbers = parts[scheme.numbers]
    weight = scheme.dense({**parts, scheme.numbers: numbers.flatten(1)}).view(numbers.shape)
    read = x.float() if product.rounded is None else product.rounded(x, **learned)
    wide = None if bias is None else bias.float()
    return functional.conv2d(read, weight, wide, stride, padding, dilation, groups).to(x.dtype)
