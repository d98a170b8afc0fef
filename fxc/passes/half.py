"""What bf16 and fp16 share: what is still float32 becomes a type of half the size, where its range and precision suffice.

Products (linear layers, convolutions, attention, lookups) read and give the small type, packed layers too (not their scales).
Norms, softmax and other sums and powers are computed in float32, and their gains stay float32: in fp16 squares overflow above
256, in bf16 sums lose their small terms. Everything else is computed in the type of what it is given, float32 where that
differs. Inputs and outputs keep their types, a decoder's cache too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxc.errors import InputRefused
from fxc.ir.call import Call
from fxc.ir.edit import insert, sweep
from fxc.ir.infer import fake_constant, fake_mode_of, infer
from fxc.ir.names import layer_at, parts_of
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Refusal, Result
from fxc.passes.facts import CANONICAL, FULL_PRECISION
from fxc.passes.float_weights import CONVOLUTIONS
from fxc.passes.linears import GROUPED, LINEAR
from fxc.passes.patterns import patterns_in
from fxc.schemes.scheme import scheme_of

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = CONVOLUTIONS | {
    LINEAR, GROUPED, _ATTENTION, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.embedding.default,
}  # fmt: skip
_WIDE = {
    aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default,
    aten.instance_norm.default, aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.logsumexp.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.square.default,
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.exp.default, aten.expm1.default, aten.log.default,
    aten.sin.default, aten.cos.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.var.correction, aten.var_mean.correction, aten.std.correction, aten.prod.default, aten.cumsum.default,
    aten.cumprod.default, aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default, aten.softplus.default,
    aten.cosine_similarity.default,
}  # fmt: skip
_CASTS = {aten.to.dtype, aten._to_copy.default}


@dataclass(frozen=True)
class Half(Pass):
    """Base of bf16 and fp16."""

    is_policy: ClassVar[bool] = True
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    breaks: ClassVar[frozenset[Fact]] = frozenset({FULL_PRECISION})
    limits: ClassVar[tuple[float, float]] = (0.1, 0.05)
    dtype: ClassVar[torch.dtype]
    only: str = field(default="", kw_only=True)
    """Patterns of the layers to take, separated by ";", globs or "re:..." regular expressions; all where there is none."""

    def limited_to(self) -> tuple[str, ...]:
        return patterns_in(self.only)

    def may_change_nothing(self) -> bool:
        return True  # a model may be of the small type already

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        kept = [node.meta["val"].dtype for node in program.results]
        retyped: set[fx.Node] = set()
        casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            wanted = self._wanted(program, node, context, result)
            cast = partial(self._cast, program, wanted, casts, node)
            args = fx.map_arg((node.args, node.kwargs), cast)
            if args != (node.args, node.kwargs) or any(n in retyped for n in node.all_input_nodes):
                node.args, node.kwargs = args
                node.meta["val"] = infer(fake_mode_of(program.graph), node.target, *args)
                retyped.add(node)
        output = program.graph.output_node()
        made = [self._cast(program, {n: t}, {}, output, n) for n, t in zip(program.results, kept, strict=True)]
        output.args = (type(output.args[0])(made),)
        self._store(program, result)
        sweep(program)
        if result.changed:
            program.metadata["half"] = self.name
            result.notes.append("norms, softmax and sums are computed in float32; inputs and outputs keep their types")
        return result

    def _wanted(self, program: Program, node: fx.Node, context: Context, result: Result) -> dict[fx.Node, torch.dtype]:
        """What `node` reads that is of float32 or the small type, and which of the two it has to be."""
        floats = [n for n in node.all_input_nodes if _dtype(n) in (torch.float32, self.dtype)]
        scheme = scheme_of(node.target)
        if node.target in _CASTS or not floats:
            return {}
        if node.target in _PRODUCTS or scheme is not None:
            name = layer_at(program, node)
            pattern = context.skips(name)
            if pattern or not self.covers(name):
                why = f"skipped by the pattern {pattern}" if pattern else f"outside of only={self.only}"
                result.refusals.append(Refusal(name, why))
                return dict.fromkeys(floats if scheme is None else [n for n in floats if n.op != "get_attr"], torch.float32)
            # The scales of a packed weight stay as they are; what 2:4 leaves of one is a weight.
            parts = parts_of(node)
            stay = {name for part, name in parts.items() if scheme.is_quantized or part != scheme.numbers} if scheme else set()
            given = Call(node)
            learned = {given.get("x_scale"), given.get("bias")} if scheme and scheme.is_quantized else set()
            return {n: self.dtype for n in floats if n not in learned and not (n.op == "get_attr" and n.target in stay)}
        values = {_dtype(n) for n in floats if n.op != "get_attr"}
        if not values:
            return {}
        wide = node.target in _WIDE or torch.float32 in values
        return dict.fromkeys(floats, torch.float32 if wide else self.dtype)

    def _cast(
        self,
        program: Program,
        wanted: dict[fx.Node, torch.dtype],
        casts: dict[tuple[fx.Node, torch.dtype], fx.Node],
        user: fx.Node,
        node: fx.Node,
    ) -> fx.Node:
        """`node` in the type that `user`, which comes after it, wants."""
        dtype = wanted.get(node)
        if dtype is None or _dtype(node) == dtype:
            return node
        if (node, dtype) not in casts:
            x, fqn = node, node.meta.get("fqn", "")
            if user.target is _ATTENTION and Call(user)["attn_mask"] is node:
                # The lowest float32 would become infinite, and a row of such numbers has no softmax.
                low = torch.finfo(dtype).min
                x = insert(program, aten.clamp.default, (node, low), before=user, by=self.name, fqn=fqn)
            casts[node, dtype] = insert(program, aten.to.dtype, (x, dtype), before=user, by=self.name, fqn=fqn)
        return casts[node, dtype]

    def _store(self, program: Program, result: Result) -> None:
        """Constants that are read in the small type alone are kept in it."""
        for fqn, tensor in list(program.constants.items()):
            users = users_of(program, fqn)
            if tensor.dtype != torch.float32 or not users or any(
                user.target is not aten.to.dtype or user.args[1:] != (self.dtype,) or user.kwargs for user in users
            ):
                continue
            small = tensor.to(self.dtype)
            if not tensor.is_meta and (over := int((small.isinf() & tensor.isfinite()).sum())):
                reader = next(iter(users[0].users))
                most = f"{over} of its numbers are above {torch.finfo(self.dtype).max:g}"
                raise InputRefused(
                    f"a weight does not fit {self.name}", where=layer_at(program, reader), why=f"{most} ({fqn})",
                    hint="use bf16, which has the range of float32, or leave the layer out with --skip",
                )  # fmt: skip
            program.constants[fqn] = small
            for node in [n for n in program.graph.find_nodes(op="get_attr") if n.target == fqn]:
                node.meta["val"] = fake_constant(fake_mode_of(program.graph), small)
                for user in list(node.users):
                    user.replace_all_uses_with(node)
                    program.graph.erase_node(user)
            result.changed += 1
            result.covered_bytes += tensor.numel() * tensor.element_size()


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
