"""Packed products in what ONNX has for them: the same levels and scales, in other words at most.

    fxc                            ONNX, w [K, N] a constant
    int8                           x rounded row by row, as fxc does, in standard operators; MatMulInteger(u8, s8)
    int8, mode=static              QuantizeLinear, DequantizeLinear of x, DequantizeLinear of w, MatMul or Conv
    int8, mode=weight_only         MatMulNBits, bits=8: q + 128 in blocks, each with the scale of its row
    int4, int3, int2               MatMulNBits, bits=4: q + (8 - middle) in blocks of a group, zero points likewise
    int8 and int4 embeddings       Gather of packed rows, then the scales

MatMulNBits (https://github.com/microsoft/onnxruntime, domain com.microsoft) has `accuracy_level=4`: as it runs it rounds x to
int8 in blocks, which is what makes it fast. All else is of the standard, opset 20.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxc.errors import UsageError
from fxc.export.packed import Packed, packed_weights, refused
from fxc.ir.call import Call
from fxc.ir.edit import free_name
from fxc.ir.names import layer_at, parts_of
from fxc.ir.program import Program
from fxc.schemes import int4, int8
from fxc.schemes.scheme import EMBEDDING, product_of, scheme_of

TOOL = "ONNX"
ACCURACY_LEVEL = 4
"""What MatMulNBits multiplies in: 4 is int8, 1 is float32 (which is checked, and is slow)."""

_BITS = {scheme.name: bits for bits, scheme in int4.SCHEMES.items()}


def written_out(program: Program) -> Program:
    """The program, which computes in float32, with functions that `torch.onnx.export` writes as ONNX in the place of its packed
    products. Its graph holds Python functions, and runs nowhere else. Raises `UsageError` for a product that ONNX has not."""
    program = program.copy()
    for each in packed_weights(program).values():
        _check(each)
    nodes = [node for node in program.graph.nodes if scheme_of(node.target)]
    layouts: _Layouts = {}
    # A table that a head reads too is stored as the head has it.
    for node in sorted(nodes, key=lambda node: product_of(node.target).layer is EMBEDDING):
        _WRITERS[product_of(node.target).operator](program, node, layouts)
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", None) == "fxc":
            raise UsageError(
                f"ONNX has no operator for {node.target}", where=layer_at(program, node),
                why="the experts of a mixture are products over rows sorted by expert, which it has not",
                hint="fxc.load reads the artifact as it is",
            )  # fmt: skip
    program.graph.eliminate_dead_code()
    read = {node.target for node in program.graph.find_nodes(op="get_attr")}
    program.constants = {fqn: tensor for fqn, tensor in program.constants.items() if fqn in read}
    return program


def _check(each: Packed) -> None:
    for node in each.readers:
        if node.target in _WRITERS:
            continue
        if product_of(node.target).operator is int8.GROUPED:
            raise refused(each, TOOL, "it has no products over rows sorted by expert", "leave the experts out with --skip")
        why = "it has no 2:4 sparsity" if each.scheme.is_sparse else "ONNX Runtime multiplies no such numbers"
        raise refused(each, TOOL, why, "compile with int8 or int4 instead")


# ----------------------------------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class _Layout:
    """How a packed weight is stored. kind: "columns" [K, N], "blocks" [N, blocks, bytes] or "kernels" [N, C, h, w]; columns: K;
    bits: of a number in blocks; names: of its constants, None for zero points that it has not."""

    kind: str
    columns: int
    bits: int
    names: tuple[str | None, ...]


_Layouts = dict[str, _Layout]
"""Name of the numbers in the program -> how they are stored."""


def _stored(
    program: Program, node: fx.Node, layouts: _Layouts, kind: str, make: Callable[..., dict[str, Tensor | None]], bits: int = 8
) -> _Layout:
    """The constants of the weight that `node` reads, made by `make` of its parts where no product has them yet."""
    fqns = parts_of(node)
    numbers = fqns["qweight"]
    if numbers in layouts and layouts[numbers].kind == kind:
        return layouts[numbers]
    parts = {part: program.constants[fqn] for part, fqn in fqns.items()}
    bits_before = _BITS.get(scheme_of(node.target).name, 8)
    columns = parts["qweight"].shape[1] if bits_before == 8 else int4.columns_of(parts["qweight"], bits_before)
    names: list[str | None] = []
    for part, tensor in make(**parts).items():
        base = numbers.rpartition(".")[0]
        name = None if tensor is None else free_name(program, f"{base}.{part}" if base else part)
        if name is not None:
            program.constants[name] = tensor.contiguous()
        names.append(name)
    layouts[numbers] = _Layout(kind, columns, bits, tuple(names))
    return layouts[numbers]


def _columns(program: Program, node: fx.Node, layouts: _Layouts) -> _Layout:
    return _stored(program, node, layouts, "columns", _int8_columns)


def _blocks(program: Program, node: fx.Node, layouts: _Layouts) -> _Layout:
    if scheme_of(node.target) is int8.SCHEME:
        return _stored(program, node, layouts, "blocks", _int8_blocks)
    make = functools.partial(_int4_blocks, _BITS[scheme_of(node.target).name])
    return _stored(program, node, layouts, "blocks", make, bits=4)


def _int8_columns(qweight: Tensor, scale: Tensor) -> dict[str, Tensor | None]:
    """int8 [K, N], scale [N], and the sums of the columns, float32 [N]."""
    return {"numbers": qweight.t(), "scales": scale.float(), "sums": qweight.sum(dim=1, dtype=torch.int64).float()}


def _int8_blocks(qweight: Tensor, scale: Tensor) -> dict[str, Tensor | None]:
    """uint8 [N, blocks, block] and scales [N * blocks], as MatMulNBits has them."""
    block = next((size for size in (128, 64, 32) if qweight.shape[1] % size == 0), 32)
    padded = functional.pad((qweight.short() + 128).to(torch.uint8), (0, -qweight.shape[1] % block), value=128)
    numbers = padded.unflatten(1, (-1, block))
    return {"numbers": numbers, "scales": scale.float()[:, None].expand(-1, numbers.shape[1]).flatten(), "zeros": None}


def _int4_blocks(bits: int, qweight: Tensor, scale: Tensor, zero: Tensor | None = None) -> dict[str, Tensor | None]:
    """uint8 [N, groups, group / 2], scales [N * groups], zero points two in a byte, a row of them from a byte on."""
    shift = 8 - (1 << bits - 1)
    if shift:
        qweight = int4.pack(int4.unpack(qweight, bits) + shift)
    if zero is not None:
        zero = int4.pack(functional.pad(zero + shift, (0, scale.shape[1] % 2))).flatten()
    return {"numbers": qweight.unflatten(1, (scale.shape[1], -1)), "scales": scale.float().flatten(), "zeros": zero}


# ------------------------------------------------------------------------------------------------------------------ functions


def _put(program: Program, node: fx.Node, function: Callable, args: tuple, layout: _Layout) -> None:
    """Let `function(args[0], *constants of the layout, *args[1:])` take the place of `node`."""
    with program.graph.inserting_before(node):
        constants = [name if name is None else program.graph.create_node("get_attr", name) for name in layout.names]
        made = program.graph.call_function(function, (args[0], *constants, *args[1:]))
    made.meta["fqn"] = node.meta.get("fqn", "")
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def _write_int8(program: Program, node: fx.Node, layouts: _Layouts) -> None:
    call = Call(node)
    _put(program, node, rows_times_int8, (call.get("x"), call.get("bias")), _columns(program, node, layouts))


def rows_times_int8(x: Tensor, numbers: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """`fxc::int8_linear` by its formula (fxc_kernels.int8_linear), with levels from 0 on."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    span = high - low
    step = torch.where(span <= 1e-30, 1.0, span / 255)
    inverse = step.reciprocal()
    zero = (-low * inverse).round()
    q = ((x * inverse).round() + zero).clamp(0, 255).to(torch.uint8)
    total = symbolic("MatMulInteger", (q, numbers), torch.int32, (*x.shape[:-1], numbers.shape[1]))
    out = (total.to(torch.float32) - zero * sums) * step * scale
    return out if bias is None else out + bias


def _write_blocks(program: Program, node: fx.Node, layouts: _Layouts) -> None:
    call, layout = Call(node), _blocks(program, node, layouts)
    _put(program, node, times_blocks, (call.get("x"), call.get("bias"), layout.columns, layout.bits), layout)


def times_blocks(
    x: Tensor, numbers: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, columns: int, bits: int
) -> Tensor:
    """x [..., K] float32 times a weight in blocks, by MatMulNBits."""
    rows, _, nbytes = numbers.shape
    attributes = {
        "K": columns, "N": rows, "bits": bits, "block_size": nbytes * 8 // bits, "accuracy_level": ACCURACY_LEVEL
    }  # fmt: skip
    inputs = (x, numbers, scales) if zeros is None else (x, numbers, scales, zeros)
    out = symbolic("com.microsoft::MatMulNBits", inputs, x.dtype, (*x.shape[:-1], rows), attributes, version=1)
    return out if bias is None else out + bias


def _write_static(program: Program, node: fx.Node, layouts: _Layouts) -> None:
    call = Call(node)
    args = (call.get("x"), call.get("bias"), float(call.get("x_scale")), int(call.get("x_zero")))
    if node.target is int8.STATIC:
        _put(program, node, linear_between_scales, args, _columns(program, node, layouts))
        return
    layout = _stored(program, node, layouts, "kernels", lambda qweight, scale: {"numbers": qweight, "scales": scale.float()})
    more = tuple(call.get(name) for name in ("stride", "padding", "dilation", "groups"))
    _put(program, node, conv2d_between_scales, args + more, layout)


def linear_between_scales(
    x: Tensor, numbers: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, x_scale: float, x_zero: int
) -> Tensor:
    """`fxc::int8_static_linear` as the pairs of QuantizeLinear and DequantizeLinear that tools know."""
    out = _through_levels(x, x_scale, x_zero) @ _weight(numbers, scale, axis=1)
    return out if bias is None else out + bias


def conv2d_between_scales(
    x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, x_scale: float, x_zero: int,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """`fxc::int8_static_conv2d` in the same way."""
    q, weight = _through_levels(x, x_scale, x_zero), _weight(numbers, scale, axis=0)
    return functional.conv2d(q, weight, bias, stride, padding, dilation, groups)


def _through_levels(x: Tensor, x_scale: float, x_zero: int) -> Tensor:
    by = torch.tensor(x_scale, dtype=torch.float32), torch.tensor(x_zero, dtype=torch.uint8)
    q = symbolic("QuantizeLinear", (x, *by), torch.uint8, x.shape)
    return symbolic("DequantizeLinear", (q, *by), torch.float32, x.shape)


def _weight(numbers: Tensor, scale: Tensor, axis: int) -> Tensor:
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    return symbolic("DequantizeLinear", (numbers, scale, zero), torch.float32, numbers.shape, {"axis": axis})


def _write_lookup(program: Program, node: fx.Node, layouts: _Layouts) -> None:
    known, indices = layouts.get(parts_of(node)["qweight"]), Call(node).get("indices")
    if scheme_of(node.target) is int8.SCHEME and (known is None or known.kind == "columns"):
        _put(program, node, rows_of_columns, (indices,), _columns(program, node, layouts))
    else:
        layout = _blocks(program, node, layouts)
        _put(program, node, rows_of_blocks, (indices, layout.columns, layout.bits), layout)


def rows_of_columns(indices: Tensor, numbers: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
    """`fxc::int8_embedding` of a table [K, N]."""
    flat = indices.flatten()
    rows = numbers.index_select(1, flat).t().to(torch.float32) * scale.index_select(0, flat)[:, None]
    return rows.reshape(*indices.shape, numbers.shape[0])


def rows_of_blocks(
    indices: Tensor, numbers: Tensor, scales: Tensor, zeros: Tensor | None, columns: int, bits: int
) -> Tensor:
    """`fxc::int8_embedding` and `fxc::int4_embedding` of a table in blocks."""
    flat = indices.flatten()
    rows, blocks, _ = numbers.shape
    q = numbers.index_select(0, flat).to(torch.int32)
    if bits == 4:
        q = torch.stack([q % 16, q // 16], dim=-1).flatten(-2)
    middle: Any = 1 << bits - 1
    if zeros is not None:
        pairs = zeros.reshape(rows, -1).index_select(0, flat).to(torch.int32)
        middle = torch.stack([pairs % 16, pairs // 16], dim=-1).flatten(-2)[:, :blocks, None]
    scale = scales.reshape(rows, blocks).index_select(0, flat)[..., None]
    dense = (q - middle).to(torch.float32) * scale
    return dense.flatten(1)[:, :columns].reshape(*indices.shape, columns)


def symbolic(
    name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, attributes: dict | None = None,
    version: int | None = None,
) -> Tensor:  # fmt: skip
    """One node of ONNX."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=list(shape), version=version)


_WRITERS: dict[Any, Callable[[Program, fx.Node, _Layouts], None]] = {
    int8.LINEAR: _write_int8,
    int8.WEIGHT_ONLY: _write_blocks,
    int8.STATIC: _write_static,
    int8.STATIC_CONV2D: _write_static,
    int8.LOOKUP: _write_lookup,
    int4.LOOKUP: _write_lookup,
    **{scheme.products[0].operator: _write_blocks for scheme in int4.SCHEMES.values()},
}
