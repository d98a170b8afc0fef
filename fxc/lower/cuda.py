"""Lowering for CUDA: a Program becomes a callable module whose compressed layers run fxc's Triton kernels.

Layers that read the same activation become one product with one quantization of it; activations, silu(gate) * up, and RMSNorm
with the residual sum before it move into the kernels. Nothing is timed here: which layers stay dense, and which configuration a
kernel runs in, is read from the table that was measured on the chip (`fxc_kernels.cuda.dispatch`).
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx, nn

from fxc.errors import UsageError
from fxc.ir.names import layer_of
from fxc.ir.program import Program
from fxc.lower.cuda_fusion import activation_after, fuse_float_norms, fuse_norms, fuse_rope, gated_pair
from fxc.lower.groups import Group, LayerChoice, dynamic_dims, find_groups, module_of, relax_views, replace
from fxc.lower.inductor import CompiledGraph
from fxc.schemes import fp8, int4, int8, int8_sparse24, sparse24
from fxc.schemes.scheme import Product, product_of
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


def lower_cuda(
    program: Program,
    device: torch.device | str,
    backend: str = "eager",
    *,
    compressed: bool = False,
    capability: int | None = None,
) -> tuple[nn.Module, list[LayerChoice]]:
    """Lower `program` for `device` and `backend` "eager" or "inductor".

    Returns a module (flat input tensors positionally to a flat tuple of tensors) and a LayerChoice for each compressed layer.
    compressed: keep layers compressed where a table says that the dense product is faster.
    capability: the chip's, as 90 for an H100 or H200; by default the device's. On the CPU, where operators compute their own
    definitions, a graph can be lowered for any chip.

    Raises UsageError for a layer whose format the chip has no product for.
    """
    return _Lowering(program, torch.device(device), compressed, capability).run(backend)


class _Lowering:
    def __init__(self, program: Program, device: torch.device, compressed: bool, capability: int | None) -> None:
        if program.is_on_meta:
            raise UsageError("a program without weights cannot run", where="lowering")
        self.graph = program.graph_on(device)
        self.device = device
        self.chip = dispatch.chip_of(device)
        self.capability = capability or dispatch.capability_of(torch.empty(0, device=device))
        self.compressed = compressed
        self.attributes: dict[str, Tensor] = dict(program.constants)
        self.quantized: dict[tuple[fx.Node, object], list[fx.Node]] = {}
        self.report: list[LayerChoice] = []

    def run(self, backend: str) -> tuple[nn.Module, list[LayerChoice]]:
        for index, group in enumerate(find_groups(self.graph, self.attributes, _OPERATORS)):
            self._lower_group(f"lowered.group{index}", group)
        fuse_norms(self.graph)
        if backend == "eager":  # Inductor fuses these itself, with what is around them
            fuse_float_norms(self.graph)
            fuse_rope(self.graph)
        relax_views(self.graph)
        self.graph.eliminate_dead_code()
        self._note_the_rest()
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        on_device = {name: self.attributes[name].to(self.device) for name in sorted(used)}
        module = module_of(self.graph, on_device, "LoweredForCuda")
        if backend == "inductor":
            return CompiledGraph(module, dynamic_dims(self.graph), freezing=False), self.report
        return module, self.report

    def _lower_group(self, name: str, group: Group) -> None:
        product = product_of(group.target)
        scheme = product.name.format(**product.arguments(group.arguments[0]))
        why_not = self._why_not(group, product)
        if why_not:
            self.report += group.choices("unchanged", why_not)
            return
        dense, reason = self._dense(group, scheme)
        if dense:
            with self.graph.inserting_before(group.nodes[0]):
                weight = self._constant(name, "weight", group.dense(group.dtype))
                bias = self._constant(name, "bias", None if group.bias is None else group.bias.to(group.dtype))
                out = self.graph.call_function(torch.ops.aten.linear.default, (group.x, weight, bias))
            replace(self.graph, group, out)
            self.report += group.choices("dequantized", reason)
            return
        self.report += group.choices(f"triton {scheme}", reason)
        pair = gated_pair(group)
        if pair is not None:
            self._lower_pair(name, group, pair)
            return
        activation = None
        if len(group.nodes) == 1 and (activation := activation_after(group.nodes[0])):
            activation[1].replace_all_uses_with(group.nodes[0])
            self.graph.erase_node(activation[1])
        with self.graph.inserting_before(group.nodes[0]):
            out = self._product(name, group, group.argument, group.bias, activation[0] if activation else "none")
        replace(self.graph, group, out)

    def _lower_pair(self, name: str, group: Group, pair) -> None:
        def alternating(position: int) -> Tensor | None:
            both = [group.arguments[at][position] for at in (pair.gate, pair.up)]
            return None if both[0] is None else interleave(*both)

        bias = None
        if group.bias is not None:
            halves = group.bias.split(group.sizes)
            bias = interleave(halves[pair.gate], halves[pair.up])
        with self.graph.inserting_before(group.nodes[0]):
            out = self._product(name, group, alternating, bias, "silu_mul")
        out.meta = dict(pair.result.meta)
        pair.result.replace_all_uses_with(out)
        # Back to front: what reads goes before what it reads.
        (activated,) = group.nodes[pair.gate].users
        for node in (pair.result, activated, *group.nodes):
            self.graph.erase_node(node)

    def _why_not(self, group: Group, product: Product) -> str | None:
        """Why no kernel takes this group. Raises UsageError where the chip has no such product at all."""
        if why_not := product.why_not(self.capability):
            raise UsageError(why_not, where=group.names[0], hint=product.instead)
        if group.is_empty:
            return "the weight is empty"
        if group.dtype not in _DTYPES:
            return f"no kernel takes {group.dtype}"
        if product.activations is torch.int8 and group.columns > INT32_COLUMNS:
            return f"a row of {group.columns} does not fit the kernel"
        return None

    def _dense(self, group: Group, scheme: str) -> tuple[bool, str]:
        """(whether the dense product is to be used, why)."""
        outputs = sum(group.sizes)
        try:
            entries = dispatch.measured(self.chip, scheme, outputs, group.columns)
        except ValueError as error:
            raise UsageError("the measurements of this chip cannot be read", where=self.chip, why=error) from error
        if not entries or group.dtype == torch.float32:
            what = "in float32" if entries else f"at {outputs} x {group.columns}"
            return False, f"{self.chip} was not measured {what}: a rule of thumb"
        ratios = {rows: each.dense_us / each.us for rows, each in sorted(entries.items())}
        described = ", ".join(f"M={rows}: {ratio:.2f}x" for rows, ratio in ratios.items())
        mean = math.prod(ratios.values()) ** (1 / len(ratios))
        if mean < 1 and not self.compressed:
            return True, f"slower than dense on {self.chip} ({described})"
        return False, f"measured on {self.chip} against dense ({described})"

    # forms

    def _product(self, name: str, group: Group, constants, bias: Tensor | None, activation: str) -> fx.Node:
        """One product of the group. constants: position among the operator's arguments -> the tensor of all layers."""
        on_device = lambda position: _to(constants(position), self.device)  # noqa: E731
        target, call = group.target, self.graph.call_function
        bias = self._constant(name, "bias", bias)
        if target in (int8.WEIGHT_ONLY, fp8.WEIGHT_ONLY):
            weight = self._constant(name, "qweight", on_device(1))
            scale = self._constant(name, "scale", on_device(2))
            return call(_OPS.weight_only_linear.default, (group.x, weight, scale, bias, activation))
        if target is int4.LINEAR:
            group_size = group.arguments[0][5]
            weight = self._constant(name, "packed", int4_linear.prepack(on_device(1), group_size))
            scale, zero = (self._constant(name, what, on_device(at)) for what, at in (("scale", 2), ("zero", 3)))
            return call(_OPS.int4_linear.default, (group.x, weight, scale, zero, bias, group_size, activation))
        if target is fp8.LINEAR:
            weight = self._constant(name, "qweight", on_device(1))
            scale = self._constant(name, "scale", on_device(2))
            rows = self._quantized(group.x, _OPS.quantize_fp8.default, 2)
            return call(_OPS.fp8_mm.default, (*rows, weight, scale, bias, group.dtype, activation))
        if target is sparse24.LINEAR and group.dtype == torch.float32:
            values, meta = (self._constant(name, what, on_device(at)) for what, at in (("values", 1), ("meta", 2)))
            return call(_OPS.sparse24_linear_float32.default, (group.x, values, meta, bias, activation))
        outputs = sum(group.sizes)
        if target is sparse24.LINEAR:
            weight = self._prepacked(name, on_device(1), on_device(2))
            return call(_OPS.sparse24_linear.default, (group.x, *weight, outputs, bias, activation))
        qweight = on_device(1)
        column_sum = self._constant(name, "column_sum", qweight.sum(dim=1, dtype=torch.int32))
        scale = self._constant(name, "scale", on_device(2 if target is int8.LINEAR else 3))
        rows = self._quantized(group.x, _OPS.quantize_int8.default, 3)
        rest = (scale, column_sum, bias, group.dtype, activation)
        if target is int8.LINEAR:
            return call(_OPS.int8_mm.default, (*rows, self._constant(name, "qweight", qweight), *rest))
        return call(_OPS.int8_sparse24_mm.default, (*rows, *self._prepacked(name, qweight, on_device(2)), outputs, *rest))

    def _prepacked(self, name: str, values: Tensor, meta: Tensor) -> tuple[fx.Node, fx.Node]:
        weight = prepack(values, meta)
        return self._constant(name, "values", weight.values), self._constant(name, "meta", weight.meta)

    def _constant(self, name: str, suffix: str, value: Tensor | None) -> fx.Node | None:
        if value is None:
            return None
        self.attributes[f"{name}.{suffix}"] = value.to(self.device)
        return self.graph.get_attr(f"{name}.{suffix}")

    def _quantized(self, x: fx.Node, target: object, count: int) -> list[fx.Node]:
        """The parts of x quantized by `target`: once, right after x, whoever else reads it."""
        if (x, target) not in self.quantized:
            with self.graph.inserting_after(_last_of_inputs(x)):
                made = self.graph.call_function(target, (x,))
            parts, last = [], made
            for at in range(count):
                with self.graph.inserting_after(last):
                    last = self.graph.call_function(operator.getitem, (made, at))
                parts.append(last)
            self.quantized[x, target] = parts
        return self.quantized[x, target]

    def _note_the_rest(self) -> None:
        """Say which of fxc's operators still run by their own definition."""
        for node in self.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "fxc":
                name = next((layer_of(node, a.target) for a in node.args if getattr(a, "op", "") == "get_attr"), node.name)
                if name not in {each.fqn for each in self.report}:
                    sizes = node.meta["val"].shape[-1], node.args[0].meta["val"].shape[-1]
                    self.report.append(LayerChoice(name, "unchanged", f"{node.target} has no kernel for CUDA", *sizes))


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _last_of_inputs(x: fx.Node) -> fx.Node:
    """Where something that reads x may be inserted: placeholders stay together."""
    while x.op == "placeholder" and x.next.op == "placeholder":
        x = x.next
    return x
