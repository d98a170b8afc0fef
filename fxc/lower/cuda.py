"""Lowering for CUDA: passes from a Program to one whose compressed layers call fxc's Triton kernels, the operators fxc_cuda::*.

Layers that read the same activation become one product with one quantization of it; activations, silu(gate) * up, and RMSNorm
with the residual sum before it move into the kernels. Nothing is timed here: which layers stay dense, and which configuration a
kernel runs in, is read from the table that was measured on the chip (`fxc_kernels.cuda.dispatch`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxc.errors import UsageError
from fxc.ir import edit
from fxc.ir.check import check
from fxc.ir.names import layer_of, parts_of
from fxc.ir.program import Program
from fxc.lower.cuda_fusion import fuse_float_norms, fuse_norms, fuse_rope
from fxc.lower.fusion import GatedPair, activation_after, gated_pair
from fxc.lower.siblings import LayerChoice, Place, Siblings, find_siblings, module_name, relax_views, replace
from fxc.lower.sparse_as_dense import sparse_int4_as_dense
from fxc.schemes import fp8, int4, int8, int8_sparse24, sparse24
from fxc.schemes.scheme import EMBEDDING, Product, product_of
from fxc_kernels.cuda import dispatch, int4_linear
from fxc_kernels.cuda.interleaved import interleave
from fxc_kernels.cuda.sparse24_prepacked import prepack
from fxc_kernels.int8_linear import INT32_COLUMNS

_OPS = torch.ops.fxc_cuda
# The operators that have a kernel.
_OPERATORS = (
    int8.LINEAR, int8.WEIGHT_ONLY, fp8.LINEAR, fp8.WEIGHT_ONLY, int4.LINEAR, sparse24.LINEAR, int8_sparse24.LINEAR,
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def lower_cuda(
    program: Program,
    device: torch.device | str,
    backend: str = "eager",
    *,
    compressed: bool = False,
    capability: int | None = None,
) -> tuple[Program, list[LayerChoice]]:
    """Lower `program` for `device` and `backend` "eager" or "inductor".

    Returns the lowered program, with its constants on the device (`fxc.lower.runnable` makes it callable), and
    a LayerChoice for each compressed layer. The given program is not changed.
    compressed: keep layers compressed where a table says that the dense product is faster.
    capability: the chip's, as 90 for an H100 or H200; by default the device's. On the CPU, where operators compute their own
    definitions, a graph can be lowered for any chip.

    Raises UsageError for a layer whose format the chip has no product for.
    """
    if program.is_on_meta:
        raise UsageError("a program without weights cannot run", where="lowering")
    device = torch.device(device)
    capability = capability or dispatch.capability_of(torch.empty(0, device=device))
    program = program.copy()
    for node in program.graph.nodes:
        # A head that is tied to a packed table shares its numbers on the device too.
        if (product := product_of(node.target)) and product.layer is EMBEDDING:
            program.constants |= {fqn: program.constants[fqn].to(device) for fqn in parts_of(node).values()}
    expanded = sparse_int4_as_dense(program)
    report = lower_layers(program, Chip(device, dispatch.chip_of(device), capability), compressed)
    sparse = "; 2:4 sparse as dense int4: no kernel of its own"
    report = [dataclasses.replace(each, reason=each.reason + sparse) if each.fqn in expanded else each for each in report]
    fuse_norms(program)
    if backend == "eager":  # Inductor fuses these itself, with what is around them
        fuse_float_norms(program)
        fuse_rope(program)
    relax_views(program)
    edit.sweep(program)
    program.constants = {name: tensor.to(device) for name, tensor in program.constants.items()}
    check(program, lowered=True)
    return program, report + _unchanged(program, {each.fqn for each in report})


@dataclass(frozen=True)
class Chip:
    """name: as its table of measurements is called; capability: 90 for 9.0."""

    device: torch.device
    name: str
    capability: int


@dataclass(frozen=True)
class _Place(Place):
    """quantized: what was quantized already, by what: the parts, for whoever reads it too."""

    device: torch.device
    quantized: dict[tuple[fx.Node, object], list[fx.Node]] = field(repr=False)

    def constant(self, part: str, value: Tensor | None) -> fx.Node | None:
        return super().constant(part, _to(value, self.device))

    def quantize(self, group: Siblings, target: object, count: int) -> list[fx.Node]:
        """The parts of what the group reads, quantized by `target`: once, right after it, whoever else reads it."""
        x = group.x
        if (x, target) not in self.quantized:
            at = {"before": _last_of_inputs(x).next, "by": "lower", "fqn": x.meta.get("fqn", "")}
            made = edit.insert(self.program, target, (x,), **at)
            parts = [edit.insert(self.program, operator.getitem, (made, part), **at) for part in range(count)]
            self.quantized[x, target] = parts
        return self.quantized[x, target]


def lower_layers(program: Program, chip: Chip, compressed: bool) -> list[LayerChoice]:
    """Layers with packed weights run in the kernel for their format, those that read one activation as one, with the activation
    behind them; in floats where a table says that this is faster, unless `compressed`."""
    report: list[LayerChoice] = []
    quantized: dict[tuple[fx.Node, object], list[fx.Node]] = {}
    for group in find_siblings(program, _OPERATORS):
        product = product_of(group.target)
        scheme = product.name.format(**product.arguments(group.arguments[0]))
        if why_not := _why_not(group, product, chip):
            report += group.choices("unchanged", why_not)
            continue
        place = _Place(program, group.nodes[0], module_name(program, group.names[0]), chip.device, quantized)
        is_dense, reason = _is_dense(group, scheme, chip, compressed)
        if is_dense:
            weight = place.constant("weight", group.dense(group.dtype))
            bias = place.constant("bias", None if group.bias is None else group.bias.to(group.dtype))
            replace(program, group, place.call(torch.ops.aten.linear.default, (group.x, weight, bias), group))
            report += group.choices("dequantized", reason)
            continue
        report += group.choices(f"triton {scheme}", reason)
        if pair := gated_pair(group):
            edit.replace(pair.result, _pair_product(place, group, pair))
            edit.sweep(program)
            continue
        activation, last = activation_after(group.nodes[0], _ACTIVATIONS) if len(group.nodes) == 1 else ("none", None)
        out = _product(place, group, group.argument, group.bias, activation)
        if activation != "none":
            edit.replace(last, out)
            edit.sweep(program)
        else:
            replace(program, group, out)
    return report


def _pair_product(place: _Place, group: Siblings, pair: GatedPair) -> fx.Node:
    """silu(gate) * up as one product, its weight with rows of both in turns."""

    def alternating(position: int) -> Tensor | None:
        both = [group.arguments[at][position] for at in (pair.gate, pair.up)]
        return None if both[0] is None else interleave(*both)

    bias = None
    if group.bias is not None:
        halves = group.bias.split(group.sizes)
        bias = interleave(halves[pair.gate], halves[pair.up])
    return _product(place, group, alternating, bias, "silu_mul")


def _why_not(group: Siblings, product: Product, chip: Chip) -> str | None:
    """Why no kernel takes this group. Raises UsageError where the chip has no such product at all."""
    if why_not := product.why_not(chip.capability):
        raise UsageError(why_not, where=group.names[0], hint=product.instead)
    if group.is_empty:
        return "the weight is empty"
    if group.dtype not in _DTYPES:
        return f"no kernel takes {group.dtype}"
    if product.activations is torch.int8 and group.columns > INT32_COLUMNS:
        return f"a row of {group.columns} does not fit the kernel"
    return None


def _is_dense(group: Siblings, scheme: str, chip: Chip, compressed: bool) -> tuple[bool, str]:
    """(whether the dense product is to be used, why)."""
    outputs = sum(group.sizes)
    try:
        entries = dispatch.measured(chip.name, scheme, outputs, group.columns)
    except ValueError as error:
        raise UsageError("the measurements of this chip cannot be read", where=chip.name, why=error) from error
    if not entries or group.dtype == torch.float32:
        what = "in float32" if entries else f"at {outputs} x {group.columns}"
        return False, f"{chip.name} was not measured {what}: a rule of thumb"
    ratios = {rows: each.dense_us / each.us for rows, each in sorted(entries.items())}
    described = ", ".join(f"M={rows}: {ratio:.2f}x" for rows, ratio in ratios.items())
    mean = math.prod(ratios.values()) ** (1 / len(ratios))
    if mean < 1 and not compressed:
        return True, f"slower than dense on {chip.name} ({described})"
    return False, f"measured on {chip.name} against dense ({described})"


def _product(
    place: _Place, group: Siblings, constants: Callable[[int], Tensor | None], bias: Tensor | None, activation: str
) -> fx.Node:
    """One product of the group. constants: position among the operator's arguments -> the tensor of all layers."""
    on_device = lambda position: _to(constants(position), place.device)  # noqa: E731
    target, constant = group.target, place.constant
    call = lambda operator, args: place.call(operator, args, group)  # noqa: E731
    bias = constant("bias", bias)
    if target in (int8.WEIGHT_ONLY, fp8.WEIGHT_ONLY):
        weight, scale = constant("qweight", on_device(1)), constant("scale", on_device(2))
        return call(_OPS.weight_only_linear.default, (group.x, weight, scale, bias, activation))
    if target is int4.LINEAR:
        group_size = group.arguments[0][5]
        weight = constant("packed", int4_linear.prepack(on_device(1), group_size))
        scale, zero = (constant(what, on_device(at)) for what, at in (("scale", 2), ("zero", 3)))
        return call(_OPS.int4_linear.default, (group.x, weight, scale, zero, bias, group_size, activation))
    if target is fp8.LINEAR:
        weight, scale = constant("qweight", on_device(1)), constant("scale", on_device(2))
        rows = place.quantize(group, _OPS.quantize_fp8.default, 2)
        return call(_OPS.fp8_mm.default, (*rows, weight, scale, bias, group.dtype, activation))
    if target is sparse24.LINEAR and group.dtype == torch.float32:
        values, meta = (constant(what, on_device(at)) for what, at in (("values", 1), ("meta", 2)))
        return call(_OPS.sparse24_linear_float32.default, (group.x, values, meta, bias, activation))
    outputs = sum(group.sizes)
    if target is sparse24.LINEAR:
        weight = _prepacked(place, on_device(1), on_device(2))
        return call(_OPS.sparse24_linear.default, (group.x, *weight, outputs, bias, activation))
    qweight = on_device(1)
    column_sum = constant("column_sum", qweight.sum(dim=1, dtype=torch.int32))
    scale = constant("scale", on_device(2 if target is int8.LINEAR else 3))
    rows = place.quantize(group, _OPS.quantize_int8.default, 3)
    rest = (scale, column_sum, bias, group.dtype, activation)
    if target is int8.LINEAR:
        return call(_OPS.int8_mm.default, (*rows, constant("qweight", qweight), *rest))
    return call(_OPS.int8_sparse24_mm.default, (*rows, *_prepacked(place, qweight, on_device(2)), outputs, *rest))


def _prepacked(place: _Place, values: Tensor, meta: Tensor) -> tuple[fx.Node, fx.Node]:
    weight = prepack(values, meta)
    return place.constant("values", weight.values), place.constant("meta", weight.meta)


def _unchanged(program: Program, known: set[str]) -> list[LayerChoice]:
    """Which of fxc's operators still run by their own definition, where another would be faster: lookups gather rows."""
    report = []
    for node in program.graph.nodes:
        product = product_of(node.target)
        if getattr(node.target, "namespace", "") == "fxc" and not (product and product.layer is EMBEDDING):
            name = next((layer_of(node, a.target) for a in node.args if getattr(a, "op", "") == "get_attr"), node.name)
            if name not in known:
                known.add(name)
                sizes = node.meta["val"].shape[-1], node.args[0].meta["val"].shape[-1]
                report.append(LayerChoice(name, "unchanged", f"{node.target} has no kernel for CUDA", *sizes))
    return report


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _last_of_inputs(x: fx.Node) -> fx.Node:
    """Where something that reads x may be inserted: placeholders stay together."""
    while x.op == "placeholder" and x.next.op == "placeholder":
        x = x.next
    return x
