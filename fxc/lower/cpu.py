"""Lowering for the CPU: a Program becomes a callable module that uses what this processor is fast at."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fxc.errors import UsageError
from fxc.ir.names import layer_name, layer_of
from fxc.lower import choose, packed, traced
from fxc.lower.choose import Timing
from fxc.lower.groups import Group, LayerChoice, dynamic_dims, find_groups, module_of, relax_views, replace
from fxc.lower.inductor import CompiledGraph
from fxc.schemes import int4, int8, int8_sparse24
from fxc.schemes.scheme import LINEAR as _LINEAR
from fxc.schemes.scheme import products_for, scheme_of
from fxc_kernels.sparse24_linear import unpack as unpack_sparse24

# A float copy of a weight is kept beside its int8 form, for the row counts where it is faster, up to this many numbers.
SMALL_LAYER = 1 << 21
# int4 weights run as int8 ones when that makes the error of int4 larger by no more than this. Rows without outliers: 0.3 %.
INT4_AS_INT8 = 0.02

_INT8 = int8.LINEAR
_WEIGHT_ONLY = int8.WEIGHT_ONLY
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_ACTIVATIONS = (torch.ops.aten.gelu.default, torch.ops.aten.silu.default, torch.ops.aten.relu.default)

Measure = Callable[[int, int, torch.dtype], Timing]


def lower_cpu(
    program, backend: str = "eager", *, measure: Measure | None = None, bf16: bool = True
) -> tuple[nn.Module, list[LayerChoice]]:
    """Lower `program` (fxc.ir.Program, on the CPU) for `backend` "eager" or "inductor".

    Returns a module (flat input tensors positionally to a flat tuple of tensors) and a LayerChoice per rewritten node.
    The program is not changed; constants that no rewritten layer uses are shared with it.

    measure: (N, K, dtype) -> Timing, instead of timing the two forms of a layer on this machine; `choose.compressed` for
    the compressed form whatever its time.
    bf16: with inductor, allow bfloat16 where int8 activations already cost more precision than it does: attention whose
    query and key come from int8 layers. It never changes a dtype of the program, and nothing happens where the CPU has
    no bfloat16 instructions.
    Raises UsageError for an unknown backend, a program on meta, or inductor without a C++ compiler.
    """
    if backend not in ("eager", "inductor"):
        raise UsageError(f"unknown CPU backend {backend!r}", hint="use eager or inductor")
    if any(t.is_meta for t in program.constants.values()):
        raise UsageError("a program without weights cannot run", where="lowering")
    return _Lowering(program, backend, measure, bf16).run()


class _Lowering:
    def __init__(self, program, backend: str, measure: Measure | None, bf16: bool) -> None:
        self.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
        self.attributes: dict[str, Tensor | nn.Module] = dict(program.constants)
        self.backend = backend
        self.measure = measure
        self.bf16 = bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
        self.report: list[LayerChoice] = []
        self.expanded: set[str] = set()
        self.rounded: tuple[Group, tuple[Tensor, Tensor, float]] | None = None

    def run(self) -> tuple[nn.Module, list[LayerChoice]]:
        self._expand_sparse_int8()
        if self.bf16 and self.backend == "inductor":
            self._attention_in_bfloat16()
        for index, group in enumerate(self._groups()):
            self._lower_group(index, group)
        if self.backend == "eager":
            self._pack_dense_layers()
        relax_views(self.graph)
        if self.backend == "inductor":
            for node in self.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                node.target = traced.gelu
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)
        module = module_of(self.graph, self.attributes, "LoweredForCpu")
        if self.backend == "inductor":
            return CompiledGraph(module, dynamic_dims(self.graph)), self.report
        return module, self.report

    # groups

    def _groups(self) -> list[Group]:
        return find_groups(self.graph, self.attributes, products_for(_LINEAR))

    def _lower_group(self, index: int, group: Group) -> None:
        dtype = group.dtype
        if group.is_empty:
            self._note(group, "unchanged", "the weight is empty")
            return
        form, limit, reason = self._decide(group, dtype)
        name = f"lowered.group{index}"
        make = self._eager if self.backend == "eager" else self._traced
        with self.graph.inserting_before(group.nodes[0]):
            out = make(name, group, dtype, form, limit)
        replace(self.graph, group, out)
        self._note(group, form, reason)

    def _note(self, group: Group, op: str, reason: str) -> None:
        for each in group.choices(op, reason):
            expanded = "; 2:4 sparse as dense: no CPU kernel" if each.fqn in self.expanded else ""
            self.report.append(dataclasses.replace(each, reason=each.reason + expanded))

    def _decide(self, group: Group, dtype: torch.dtype) -> tuple[str, int, str]:
        """(form, limit, reason). int8 is used above `limit` rows, and as weight-only up to `limit` rows."""
        rows, columns = sum(group.sizes), group.columns
        if group.target not in (_INT8, _WEIGHT_ONLY, int4.LINEAR):
            return "dequantized", 0, f"dequantized: no CPU kernel for {scheme_of(group.target).label}"
        if not packed.int8_is_exact():
            return "dequantized", 0, "dequantized: int8 products saturate on this CPU, which has no VNNI"
        if dtype not in (torch.float32, torch.bfloat16):
            return "dequantized", 0, f"dequantized: no int8 product takes {dtype} to {dtype} on a CPU"
        keeps_activations, rounding = group.target is not _INT8, ""
        if group.target is int4.LINEAR:
            more = self._rounded(group)[2]
            if not more <= INT4_AS_INT8:
                return "dequantized", 0, f"dequantized: as int8 the error of int4 would be {more:.1%} larger, by steps"
            rounding = f"; int4 weights rounded once more, to int8: the error of int4 is {more:.1%} larger, by steps"
        if self.measure is None:
            # Inductor fuses what surrounds the int8 product, and beside a float32 product that is little. Beside a bfloat16
            # one it is not: MiniLM at 32x128 took 172 ms with int8 chosen by its product alone and 103 ms without int8.
            whole = self.backend == "eager" or dtype != torch.float32
            timing = choose.measure(rows, columns, dtype, keeps_activations, whole, torch.get_num_threads())
        else:
            timing = self.measure(rows, columns, dtype)
        if rows * columns > SMALL_LAYER:
            # A float copy for the row counts where int8 is slower would take more memory than was saved: one form for all.
            if choose.wins_on_the_whole(timing):
                return "int8", 0, choose.reason(timing) + rounding
            return "dequantized", 0, f"dequantized: int8 was slower, on the whole or for many rows ({choose.describe(timing)})"
        if keeps_activations:
            limit = choose.split_limit(timing)
            slower, always, mixed = limit == 0, limit is None, f"int8 up to M={limit}, float above"
        else:
            limit = choose.dense_limit(timing)
            slower, always, mixed = limit is None, limit == 0, f"int8 above M={limit}, float below"
        if slower:
            return "dequantized", 0, f"dequantized: int8 was slower ({choose.describe(timing)})"
        return "int8" if always else mixed, limit or 0, choose.reason(timing) + rounding

    def _int8_weight(self, group: Group) -> tuple[Tensor, Tensor]:
        """(int8 [N, K], scale [N]) of the group's layers: their own, or int4 ones rounded once more."""
        if group.target is int4.LINEAR:
            return self._rounded(group)[:2]
        return group.argument(1), group.argument(2)

    def _rounded(self, group: Group) -> tuple[Tensor, Tensor, float]:
        if self.rounded is None or self.rounded[0] is not group:
            self.rounded = group, packed.rounded_to_int8(group.dense(torch.float32), group.argument(2))
        return self.rounded[1]

    # forms

    def _eager(self, name: str, group: Group, dtype: torch.dtype, form: str, limit: int) -> fx.Node:
        absorbs = group.target is _INT8 and form != "dequantized" and dtype == torch.float32
        activation = self._absorb_activation(group) if absorbs else None
        module = dense = None
        if form != "int8":
            module = dense = packed.DenseLinear(group.dense(dtype), group.bias, activation)
        if form != "dequantized":
            kind = packed.Int8Linear if group.target is _INT8 else packed.SplitLinear
            module = kind(*self._int8_weight(group), group.bias, activation)
            if dense is not None:
                few, many = (dense, module) if group.target is _INT8 else (module, dense)
                module = packed.ByRows(few, many, limit)
        self.attributes[name] = module
        return self.graph.call_module(name, (group.x,))

    def _absorb_activation(self, group: Group) -> Callable[[Tensor], Tensor] | None:
        """The activation that alone reads a layer's result; its node leaves the graph."""
        if len(group.nodes) > 1 or len(group.nodes[0].users) != 1:
            return None
        (user,) = group.nodes[0].users
        if user.target not in _ACTIVATIONS or len(user.args) != 1:
            return None
        activation = functools.partial(user.target, **user.kwargs)
        user.replace_all_uses_with(group.nodes[0])
        self.graph.erase_node(user)
        return activation

    def _traced(self, name: str, group: Group, dtype: torch.dtype, form: str, limit: int) -> fx.Node:
        def constant(suffix: str, value: Tensor | None) -> fx.Node | None:
            if value is None:
                return None
            self.attributes[f"{name}.{suffix}"] = value
            return self.graph.get_attr(f"{name}.{suffix}")

        bias = None if group.bias is None else group.bias.to(dtype if form == "dequantized" else torch.float32)
        bias = constant("bias", bias)
        weight = None
        if form != "int8":
            weight = constant("weight", group.dense(dtype))
        if form == "dequantized":
            return self.graph.call_function(_LINEAR, (group.x, weight, bias))
        qweight, scale = self._int8_weight(group)
        zero_point = constant("zero_point", torch.zeros(qweight.shape[0], dtype=torch.int32))
        args = (group.x, constant("qweight", qweight), constant("scale", scale), zero_point, bias)
        if group.target is not _INT8:
            function = traced.split_linear if weight is None else traced.split_or_dense
            return self.graph.call_function(function, args if weight is None else (*args, weight, limit))
        args = (*args, constant("zero_point_term", packed.zero_point_term(qweight, scale)))
        if weight is None:
            return self.graph.call_function(traced.int8_linear, args)
        return self.graph.call_function(traced.int8_or_dense, (*args, weight, limit))

    # the rest of the graph

    def _expand_sparse_int8(self) -> None:
        """2:4 sparse int8 layers become int8 ones, with their zeros: the product is the same, and fast here."""
        for node in self.graph.find_nodes(op="call_function", target=int8_sparse24.LINEAR):
            x, qweight, meta, scale, bias = node.args
            name = layer_of(node, qweight.target)
            if name not in self.expanded:
                self.expanded.add(name)
                self.attributes[qweight.target] = unpack_sparse24(self.attributes[qweight.target], self.attributes[meta.target])
            node.target, node.args = _INT8, (x, qweight, scale, bias)

    def _pack_dense_layers(self) -> None:
        """Linear layers that stay bfloat16 get a weight packed by oneDNN."""
        for index, node in enumerate(self.graph.find_nodes(op="call_function", target=_LINEAR)):
            weight = node.args[1]
            value = self.attributes.get(weight.target) if weight.op == "get_attr" else None
            if value is None or value.dtype != torch.bfloat16 or value.numel() == 0 or not self.bf16:
                continue
            bias = node.args[2] if len(node.args) > 2 else None
            if bias is not None and bias.op != "get_attr":
                continue
            name = f"lowered.dense{index}"
            self.attributes[name] = packed.DenseLinear(value, None if bias is None else self.attributes[bias.target])
            with self.graph.inserting_before(node):
                new = self.graph.call_module(name, (node.args[0],))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)
            self.report.append(LayerChoice(layer_name(weight.target), "bf16 packed", "kept in bfloat16", *value.shape))

    def _attention_in_bfloat16(self) -> None:
        """float32 attention computes in bfloat16 when its query and key are int8 results, whose error is larger."""
        for node in self.graph.find_nodes(op="call_function", target=_ATTENTION):
            query, key, value = node.args[:3]
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            fits = all(t.meta["val"].dtype == torch.float32 for t in (query, key, value))
            if not fits or (mask is not None and mask.meta["val"].dtype != torch.bool):
                continue
            if not (_comes_from_int8(query) and _comes_from_int8(key)):
                continue
            with self.graph.inserting_before(node):
                casts = [self.graph.call_function(torch.ops.aten.to.dtype, (t, torch.bfloat16)) for t in node.args[:3]]
            node.args = (*casts, *node.args[3:])
            with self.graph.inserting_after(node):
                back = self.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)


def _comes_from_int8(node: fx.Node) -> bool:
    """True when every linear layer nearest above `node` quantizes its activations, and there is one."""
    seen, stack, found = set(), [node], False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target is _INT8:
            found = True
        elif current.target in (_LINEAR, _WEIGHT_ONLY):
            return False
        else:
            stack.extend(current.all_input_nodes)
    return found
