"""Lowering for the CPU: a Program becomes a callable module that uses what this processor is fast at."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxc.errors import UsageError
from fxc.lower import choose, formats, packed, traced
from fxc.lower.choose import Timing
from fxc.lower.inductor import CompiledGraph
from fxc_kernels.sparse24_linear import unpack as unpack_sparse24

# A float copy of a weight is kept beside its int8 form, for the row counts where it is faster, up to this many numbers.
SMALL_LAYER = 1 << 21

_INT8 = torch.ops.fxc.int8_linear.default
_WEIGHT_ONLY = torch.ops.fxc.int8_weight_only_linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_LINEAR = torch.ops.aten.linear.default
_ACTIVATIONS = (torch.ops.aten.gelu.default, torch.ops.aten.silu.default, torch.ops.aten.relu.default)


@dataclass(frozen=True)
class LayerChoice:
    """How one layer was lowered. fqn: its name; op: the form chosen; reason: why, with numbers when it was measured."""

    fqn: str
    op: str
    reason: str
    out_features: int
    in_features: int


@dataclass
class _Group:
    """Layers of one op that read the same activation: one quantization and one product serve all of them.

    arguments: of each node, constants as tensors; qweight, scale: of all of them together, where the op is an int8 one.
    """

    target: object
    nodes: list[fx.Node]
    arguments: list[tuple]
    bias: Tensor | None
    sizes: list[int]
    columns: int
    names: list[str]
    qweight: Tensor | None = None
    scale: Tensor | None = None

    @property
    def x(self) -> fx.Node:
        return self.nodes[0].args[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights of all of them as numbers, [N, K]."""
        if self.qweight is not None:
            return choose.dequantized(self.qweight, self.scale, dtype)
        return _together([formats.dense_weight(self.target, args, dtype) for args in self.arguments])


Measure = Callable[[int, int, torch.dtype], Timing]


def lower_cpu(
    program, backend: str = "eager", *, measure: Measure | None = None, bf16: bool = True
) -> tuple[nn.Module, list[LayerChoice]]:
    """Lower `program` (fxc.ir.Program, on the CPU) for `backend` "eager" or "inductor".

    Returns a module (flat input tensors positionally to a flat tuple of tensors) and a LayerChoice per rewritten node.
    The program is not changed; constants that no rewritten layer uses are shared with it.

    measure: (N, K, dtype) -> Timing, instead of timing the two forms of a layer on this machine.
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

    def run(self) -> tuple[nn.Module, list[LayerChoice]]:
        self._expand_sparse_int8()
        if self.bf16 and self.backend == "inductor":
            self._attention_in_bfloat16()
        for index, group in enumerate(self._groups()):
            self._lower_group(index, group)
        if self.backend == "eager":
            self._pack_dense_layers()
        self._relax_views()
        if self.backend == "inductor":
            for node in self.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                node.target = traced.gelu
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        root = {name: value for name, value in self.attributes.items() if name in used}
        module = fx.GraphModule(root, self.graph, class_name="LoweredForCpu").eval().requires_grad_(False)
        if self.backend == "inductor":
            return CompiledGraph(module, self._dynamic_dims()), self.report
        return module, self.report

    def _dynamic_dims(self) -> list[frozenset[int]]:
        shapes = [node.meta["val"].shape for node in self.graph.find_nodes(op="placeholder")]
        return [frozenset(d for d, n in enumerate(shape) if not isinstance(n, int)) for shape in shapes]

    # groups

    def _groups(self) -> list[_Group]:
        found: dict[tuple[fx.Node, object], list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target not in (_INT8, _WEIGHT_ONLY, *formats.NAMES):
                continue
            if not all(a.op == "get_attr" for a in node.args[1:] if isinstance(a, fx.Node)):
                continue  # a bias that is computed: the op itself can run that
            # One kernel reads int4 weights of one layout.
            layout = (node.args[3] is None, node.args[5]) if node.target is formats.INT4 else None
            found.setdefault((node.args[0], node.target, layout), []).append(node)
        return [self._group(target, nodes) for (_, target, _), nodes in found.items()]

    def _group(self, target: object, nodes: list[fx.Node]) -> _Group:
        arguments = [
            tuple(self.attributes[a.target] if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args)
            for node in nodes
        ]
        sizes = [args[1].shape[0] for args in arguments]
        biases = [formats.bias_of(target, args) for args in arguments]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([torch.zeros(size) if b is None else b.float() for b, size in zip(biases, sizes)])
        group = _Group(
            target,
            nodes,
            arguments,
            bias,
            sizes,
            nodes[0].args[0].meta["val"].shape[-1],
            [node.args[1].target.rpartition(".")[0] or node.args[1].target for node in nodes],
        )
        if target in (_INT8, _WEIGHT_ONLY):
            group.qweight, group.scale = (_together([args[i] for args in arguments]) for i in (1, 2))
        return group

    def _lower_group(self, index: int, group: _Group) -> None:
        dtype = group.x.meta["val"].dtype
        if sum(group.sizes) * group.columns == 0:
            self._note(group, "unchanged", "the weight is empty")
            return
        form, limit, reason = self._decide(group, dtype)
        name = f"lowered.group{index}"
        make = self._eager if self.backend == "eager" else self._traced
        with self.graph.inserting_before(group.nodes[0]):
            out = make(name, group, dtype, form, limit)
            if len(group.nodes) == 1:
                parts = [out]
            else:
                starts = [sum(group.sizes[:i]) for i in range(len(group.sizes))]
                parts = [
                    self.graph.call_function(torch.narrow, (out, -1, start, size))
                    for start, size in zip(starts, group.sizes)
                ]
        for node, part in zip(group.nodes, parts):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            self.graph.erase_node(node)
        together = f"; one product with {', '.join(group.names)}" if len(group.nodes) > 1 else ""
        self._note(group, form, reason + together)

    def _note(self, group: _Group, op: str, reason: str) -> None:
        for name, size in zip(group.names, group.sizes):
            expanded = "; 2:4 sparse as dense: no CPU kernel" if name in self.expanded else ""
            self.report.append(LayerChoice(name, op, reason + expanded, size, group.columns))

    def _decide(self, group: _Group, dtype: torch.dtype) -> tuple[str, int, str]:
        """(form, limit, reason). int8 is used above `limit` rows; as weight-only, and int4, up to `limit` rows."""
        rows, columns = sum(group.sizes), group.columns
        if group.target in formats.NAMES:
            return self._decide_format(group, rows, columns, dtype)
        if self.measure is None and not choose.cpu_has_int8():
            return "dequantized", 0, "dequantized: this CPU has no int8 dot products (AVX512-VNNI, AMX)"
        if dtype not in (torch.float32, torch.bfloat16):
            return "dequantized", 0, f"dequantized: no int8 product takes {dtype} to {dtype} on a CPU"
        weight_only = group.target is _WEIGHT_ONLY
        if self.measure is None:
            # Inductor fuses what surrounds the int8 product, and beside a float32 product that is little. Beside a bfloat16
            # one it is not: MiniLM at 32x128 took 172 ms with int8 chosen by its product alone and 103 ms without int8.
            whole = self.backend == "eager" or dtype != torch.float32
            timing = choose.measure(rows, columns, dtype, weight_only, whole, torch.get_num_threads())
        else:
            timing = self.measure(rows, columns, dtype)
        if weight_only:
            limit = choose.split_limit(timing)
            if limit == 0:
                return "dequantized", 0, f"dequantized: int8 was slower ({choose.describe(timing)})"
            return f"int8 up to M={limit}, float above", limit, f"measured: {choose.describe(timing)}"
        limit = choose.dense_limit(timing)
        if limit is None or (limit > 0 and rows * columns > SMALL_LAYER):
            return "dequantized", 0, f"dequantized: int8 was slower ({choose.describe(timing)})"
        form = "int8" if limit == 0 else f"int8 above M={limit}, float below"
        return form, limit, f"measured: {choose.describe(timing)}"

    def _decide_format(self, group: _Group, rows: int, columns: int, dtype: torch.dtype) -> tuple[str, int, str]:
        """int4 has a kernel, which wins for few rows in bfloat16; the other formats are numbers in float."""
        kind = formats.NAMES[group.target]
        if group.target is not formats.INT4:
            return "dequantized", 0, f"dequantized: no CPU kernel for {kind}"
        if dtype != torch.bfloat16 or rows % packed.INT4_ROWS:
            what = f"{rows} outputs" if dtype == torch.bfloat16 else str(dtype)
            return "dequantized", 0, f"dequantized: no CPU kernel for {kind} that takes {what}"
        if self.backend != "eager":
            return "dequantized", 0, f"dequantized: no CPU kernel for {kind} under {self.backend}"
        measure = self.measure or (lambda n, k, _: choose.measure_int4(n, k, group.arguments[0][5], torch.get_num_threads()))
        timing = measure(rows, columns, dtype)
        limit = choose.split_limit(timing)
        described = choose.describe(timing, "int4")
        if limit == 0:
            return "dequantized", 0, f"dequantized: int4 was slower ({described})"
        return f"int4 up to M={limit}, float above", limit, f"measured: {described}"

    # forms

    def _eager(self, name: str, group: _Group, dtype: torch.dtype, form: str, limit: int) -> fx.Node:
        qweight, scale, bias = group.qweight, group.scale, group.bias
        absorbs = group.target is _INT8 and form != "dequantized" and dtype == torch.float32
        activation = self._absorb_activation(group) if absorbs else None
        dense = None
        if form != "int8":
            dense = packed.DenseLinear(group.dense(dtype), bias, activation)
        if form == "dequantized":
            module = dense
        elif group.target is formats.INT4:
            qweight, scale = (_together([args[i] for args in group.arguments]) for i in (1, 2))
            zeros = [args[3] for args in group.arguments]
            zero = None if zeros[0] is None else _together(zeros)
            few = packed.Int4Linear(qweight, scale, zero, bias, group.arguments[0][5])
            module = packed.ByRows(few, dense, limit)
        elif group.target is _WEIGHT_ONLY:
            module = packed.ByRows(packed.SplitLinear(qweight, scale, bias), dense, limit)
        else:
            module = packed.Int8Linear(qweight, scale, bias, activation)
            if dense is not None:
                module = packed.ByRows(dense, module, limit)
        self.attributes[name] = module
        return self.graph.call_module(name, (group.x,))

    def _absorb_activation(self, group: _Group) -> Callable[[Tensor], Tensor] | None:
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

    def _traced(self, name: str, group: _Group, dtype: torch.dtype, form: str, limit: int) -> fx.Node:
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
        zero_point = constant("zero_point", torch.zeros(group.qweight.shape[0], dtype=torch.int32))
        args = (group.x, constant("qweight", group.qweight), constant("scale", group.scale), zero_point, bias)
        if group.target is _WEIGHT_ONLY:
            return self.graph.call_function(traced.split_or_dense, (*args, weight, limit))
        args = (*args, constant("zero_point_term", packed.zero_point_term(group.qweight, group.scale)))
        if weight is None:
            return self.graph.call_function(traced.int8_linear, args)
        return self.graph.call_function(traced.int8_or_dense, (*args, weight, limit))

    # the rest of the graph

    def _expand_sparse_int8(self) -> None:
        """2:4 sparse int8 layers become int8 ones, with their zeros: the product is the same, and fast here."""
        for node in self.graph.find_nodes(op="call_function", target=formats.INT8_SPARSE24):
            x, qweight, meta, scale, bias = node.args
            name = qweight.target.rpartition(".")[0] or qweight.target
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
            fqn = weight.target.removesuffix(".weight")
            self.report.append(LayerChoice(fqn, "bf16 packed", "kept in bfloat16", *value.shape))

    def _relax_views(self) -> None:
        """Slices of one product are not contiguous, so what was a view may have to copy."""
        for target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            for node in self.graph.find_nodes(op="call_function", target=target):
                node.target = torch.ops.aten.reshape.default

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


def _together(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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
