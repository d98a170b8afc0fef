"""What the passes share that pack the weights of linear layers: which layers, why not, packing once, rewriting.

A subclass says which format it packs to (`scheme`), by which of its operators (`operator`), and what else it declines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc import ranks
from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.signround import STEPS, Rounding
from fxc.calibrate.stages import Statistic
from fxc.errors import InputRefused, UsageError
from fxc.ir.call import Call
from fxc.ir.edit import call, constant, is_free, read, sweep
from fxc.ir.names import is_ambiguous, layer_name, layer_read_by
from fxc.ir.program import Program, users_of
from fxc.ir.store import saved
from fxc.passes.base import Context, Pass, Refusal, Result, check_data_is_given
from fxc.passes.facts import packed_weight
from fxc.passes.learned_linears import Learning, Parts
from fxc.passes.patterns import patterns_in
from fxc.passes.turns import Turns
from fxc.schemes.ops import GROUPED_LINEAR as GROUPED
from fxc.schemes.scheme import LINEAR, Scheme, product_of, products_for, scheme_of

MIN_OUTPUTS = 16
BEYOND = "beyond the limit of rewrites"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_SHAPES = {
    torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.view.default,
    torch.ops.aten.reshape.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.select.int,
    torch.ops.aten.expand.default, torch.ops.aten.slice.Tensor, torch.ops.aten.unbind.int, torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor, torch.ops.aten.contiguous.default, torch.ops.aten.clone.default,
}  # fmt: skip
_KINDS = {
    "embedding": "looked up by number", "conv": "a convolution", "lstm": "a recurrent layer", "gru": "a recurrent layer",
    "rnn": "a recurrent layer", "bilinear": "a bilinear layer", "index": "looked up by number", "gather": "looked up by number",
    "mm": "multiplied by something else than a linear layer", "matmul": "multiplied by something else than a linear layer",
    "einsum": "multiplied by something else than a linear layer",
}  # fmt: skip


@dataclass(frozen=True)
class PackLinears(Pass):
    """Base of the passes that replace the float weights of linear layers by packed ones. Options that are called like those of
    the format are given to it."""

    is_policy: ClassVar[bool] = True
    scheme: ClassVar[Scheme]
    only: str = field(default="", kw_only=True)
    """Patterns of the layers to pack, separated by ";", globs or "re:..." regular expressions; all where there is none."""

    lighter: ClassVar[str | None] = None
    """The option with which it learns from fewer statistics."""
    error_of: ClassVar[str] = "outputs"
    """What the error is of that `learned` gives."""
    layers: ClassVar[tuple[OpOverload, ...]] = (LINEAR, GROUPED)
    """The operators it looks at. The second argument of each is the weight, which ends in rows of K numbers."""

    def operator(self, layer: OpOverload) -> OpOverload | None:
        """What stands for `layer`, one of `layers`, when its weight is packed; None where nothing does."""
        return next((product.operator for product in self.scheme.products if product.layer is layer), None)

    def declines(self, node: fx.Node, weight: Tensor) -> str | None:
        """Why this pass has no form for `node` and its weight, with what to do, or None."""
        if self.operator(node.target) is None:
            others = " and ".join(scheme_of(operator).name for operator in products_for(node.target))
            return f"there is no {self.scheme.label} form of the experts of a mixture: {others} has one"
        return None

    def weight(self, program: Program, node: fx.Node) -> Tensor:
        """The float weight of a layer that is to be packed."""
        return program.constants[node.args[1].target]

    def stored(self, program: Program, node: fx.Node, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands in the place of `weight` when it was packed to `parts`."""
        return parts

    def options(self, columns: int) -> dict[str, Any]:
        """The format's options for a weight with rows of so many numbers."""
        return {option: getattr(self, option) for option in self.scheme.options}

    def levels(self, weight: Tensor) -> Levels | None:
        """What the numbers of `weight` [..., K] are rounded to, where that is levels."""
        return None

    def limited_to(self) -> tuple[str, ...]:
        return patterns_in(self.only)

    def statistic(self) -> Callable[[int], Statistic] | None:
        """Of what the pass, with its options, learns a weight's numbers; None where it needs no data."""
        return None

    def learned(self, weight: Tensor, statistic: Statistic) -> tuple[Parts, float]:
        """The parts of `weight` [N, K] by the statistic of what it meets, what else of the operator's arguments is learned with
        them, and the error (of the layer's `error_of`), a share of its energy."""
        raise NotImplementedError

    def cut_off(self, parts: Parts, statistic: Statistic) -> float | None:
        """The share of what a layer with these `parts` reads that lies beyond the range learned for it; None where activations
        have no such range."""
        return None

    def prepare(self, program: Program, chosen: list[fx.Node], context: Context) -> None:
        """Replace the weights of the layers `chosen`, constants of `program`, before they are packed as without data."""

    def settled(self, made: Quantized) -> Parts:
        """The parts of a weight whose levels are known."""
        raise NotImplementedError

    def rounding(self, weight: Tensor, parts: Parts) -> Rounding | None:
        """What training may change of the `parts` that `weight` [N, K] was packed to by `settled`; None where it may not."""
        return None

    def training(self) -> int:
        """For so many steps what was packed is trained at the end of each block."""
        return 0

    def uses_data(self) -> bool:
        return self.statistic() is not None

    def pack_tables(self, program: Program, context: Context, result: Result) -> tuple[set[str], set[fx.Node]]:
        """Pack what is looked up, before the layers: the constants that it said something about, and the nodes that it made."""
        return set(), set()

    def follow(self, program: Program, packed: dict[str, Parts], result: Result) -> None:
        """Let what else reads the weights of layers that were packed read their parts."""

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        told: set[str | None]
        told, done = self.pack_tables(program, context, result)
        chosen: list[fx.Node] = []
        for node in program.graph.nodes:
            if node in done or (node.target not in self.layers and packed_weight(node) is None):
                continue
            fqn = layer_read_by(node)
            pattern = context.skips(fqn) if self.covers(fqn) else None
            if reason := f"skipped by the pattern {pattern}" if pattern else self._refusal(program, node):
                weight = node.args[1].target if node.args[1].op == "get_attr" else None
                nbytes = 0 if weight is None or weight in told else nbytes_of(program.constants[weight])
                told.add(weight)
                result.refusals.append(Refusal(fqn, reason, nbytes))
            else:
                chosen.append(node)
        wanted, chosen = chosen, context.rewrites.first(chosen, lambda node: node.args[1].target, layer_read_by)
        kept = set(chosen)
        for weight, node in {n.args[1].target: n for n in wanted if n not in kept}.items():
            told.add(weight)
            result.refusals.append(Refusal(layer_read_by(node), BEYOND, nbytes_of(program.constants[weight])))
        packed: dict[str, Parts] = {}
        weights = {node.args[1].target for node in chosen}
        if self.statistic() is not None and not program.is_on_meta:
            check_data_is_given([self], bool(context.samples))
            Learning(self, program, context, packed, result).run(chosen)
        else:
            if not program.is_on_meta:
                self.prepare(program, chosen, context)
            turns = Turns(program, chosen, self)
            for node in chosen:
                self._pack_in_turn(program, node, turns, packed, result, context)
        self.follow(program, packed, result)
        sweep(program)
        for name, tensor in program.constants.items():
            if name not in told | weights and (reason := self._left_alone(program, name, tensor)):
                fqn = layer_name(name)
                pattern = context.skips(fqn)
                reason = f"skipped by the pattern {pattern}" if pattern else reason
                result.refusals.append(Refusal(fqn, reason, nbytes_of(tensor)))
        return result

    def _pack_in_turn(
        self, program: Program, node: fx.Node, turns: Turns, packed: dict[str, Parts], result: Result, context: Context
    ) -> None:
        """Pack the weight of a layer and have it judged, or take both from the process whose turn it is."""
        name = node.args[1].target
        weight = program.constants[name] if context.on_layer else None
        is_new = name not in packed
        turn = turns.next() if is_new else 0
        if turn == 0 and turns.is_first:
            made = self.rewrite(program, node, packed, result, self.pack)
            if context.on_layer:
                context.on_layer(program, node, weight, made)
        elif turns.is_first:
            parts, error = turns.receive(turn)
            made = self.rewrite(program, node, packed, result, lambda _: parts)
            if context.on_layer:
                context.on_layer.note(program, made, error)
        elif turn == ranks.number():
            parts: dict[str, Tensor] = {}

            def pack(weight: Tensor) -> Parts:
                parts.update(self.pack(weight))
                return parts

            with turns.told():
                made = self.rewrite(program, node, packed, result, pack)
                error = context.on_layer(program, node, weight, made) if context.on_layer else 0.0
            turns.send(parts, error)
        else:
            made = self.rewrite(program, node, packed, result, lambda weight: self.pack(weight.to("meta")))
            if context.on_layer:
                context.on_layer.note(program, made, 0.0)
        if is_new and not turns.is_first:
            program.constants.leave_out(each for each in packed[name].values() if isinstance(each, str))

    def is_lost_without_data(self, node: fx.Node, result: Result) -> bool:
        """Whether the product with it needs arguments that data alone tells; it is refused then."""
        if not product_of(self.operator(node.target)).learned:
            return False
        nbytes = nbytes_of(node.args[1].meta["val"])
        why = "no sample reached it, so that nothing is known of what it reads"
        result.refusals.append(Refusal(layer_read_by(node), why, nbytes))
        return True

    def rewrite(
        self,
        program: Program,
        node: fx.Node,
        packed: dict[str, Parts],
        result: Result,
        pack: Callable[[Tensor], Parts],
    ) -> fx.Node:
        """Replace `node` by the product with its packed weight, which is returned. pack: of a weight that is not in `packed`
        yet, its parts. packed: of each weight its parts, by the names of their constants."""
        weight = node.args[1].target
        if weight not in packed:
            # What is packed already was counted by the pass that packed it.
            result.covered_bytes += 0 if scheme_of(node.target) else nbytes_of(program.constants[weight])
            base = layer_read_by(node)
            whole = lambda _: self.stored(program, node, pack(self.weight(program, node)))  # noqa: E731
            again = self._saved(program, base) if pack == self.pack else None
            packed[weight] = self.add_parts(program, weight, base, node, whole if again is None else lambda _: again)
        parts = {part: read(program, each, node) if isinstance(each, str) else each for part, each in packed[weight].items()}
        operator = self.operator(node.target)
        columns = node.args[0].meta["val"].shape[-1]
        given = {**product_of(operator).learned, **_arguments(node), **self.options(columns), **parts, "x": node.args[0]}
        args = tuple(given.get(argument.name) for argument in operator._schema.arguments)
        made = call(program, operator, args, replacing=node, by=self.name)
        result.changed += 1
        return made

    def _saved(self, program: Program, base: str) -> Parts | None:
        """The parts of the weight of the module `base`, if a process that was killed has packed it."""

        def is_part(name: str) -> bool:
            prefix, _, part = name.rpartition(".")
            return part in self.scheme.parts and (prefix == base or prefix.startswith(f"{base}.{self.name}"))

        return {name.rpartition(".")[2]: tensor for name, tensor in saved(program.constants, is_part).items()} or None

    def _left_alone(self, program: Program, name: str, tensor: Tensor) -> str | None:
        """Why the constant `name`, which is no linear layer's weight, stays as it is; None for vectors, for what is not
        floating point, and for what is packed already."""
        if tensor.dtype not in FLOATS or tensor.ndim < 2:
            return None
        readers = list(users_of(program, name))
        while readers and readers[0].target in _SHAPES and readers[0].users:
            readers[:1] = readers[0].users
        targets = [r.target for r in readers if isinstance(r.target, OpOverload)]
        if not targets or any(t.namespace == "fxc" and t not in self.layers for t in targets):
            return None
        operator = targets[0]
        kind = next((text for mark, text in _KINDS.items() if mark in operator._opname), "read")
        return f"{kind} ({operator}), and {self.name} packs the weights of linear layers"

    def _refusal(self, program: Program, node: fx.Node) -> str | None:
        if not self.covers(layer_read_by(node)):
            return f"outside of only={self.only}"
        if node.target not in self.layers:
            return f"already {node.meta.get('by') or 'packed'}"
        weight = node.args[1]
        if weight.op != "get_attr":
            return "its weight is computed while the model runs"
        tensor = self.weight(program, node)
        if tensor.dtype not in FLOATS:
            return f"its weight is {tensor.dtype}"
        if tensor.numel() == 0:
            return "its weight is empty"
        if not all(self.may_read(user, weight.target) for user in users_of(program, weight.target)):
            return "its weight is tied to another use (an embedding)"
        if reason := self.declines(node, tensor):
            return reason
        if (outputs := tensor.shape[0 if tensor.ndim == 4 else -2]) < MIN_OUTPUTS:
            return f"it has only {outputs} outputs: nothing to gain, and such heads and routers are sensitive"
        if self.packed_bytes(tensor) >= nbytes_of(tensor):
            return f"{self.name} with its scales would not be smaller than {tensor.dtype}{list(tensor.shape)}"
        return None

    def may_read(self, user: fx.Node, fqn: str) -> bool:
        """Whether `user` is one of the layers, and reads the constant `fqn` as its weight and as nothing else."""
        reads = [i for i, a in enumerate(user.args) if isinstance(a, fx.Node) and a.op == "get_attr" and a.target == fqn]
        return user.target in self.layers and reads == [1]

    def packed_bytes(self, weight: Tensor) -> int:
        matrix = weight.flatten(1) if weight.ndim == 4 else weight
        return sum(map(nbytes_of, self.scheme.planned(matrix, **self.options(matrix.shape[-1])).values()))

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim < 4:
            return self.scheme.pack(weight, **self.options(weight.shape[-1]))
        # Of a convolution: a row is all that an output channel sums over.
        parts = self.scheme.pack(weight.flatten(1), **self.options(weight[0].numel()))
        return parts | {self.scheme.numbers: parts[self.scheme.numbers].view(weight.shape)}

    def add_parts(
        self, program: Program, weight: str, base: str, before: fx.Node, pack: Callable[[Tensor], Parts]
    ) -> Parts:
        """Add the parts of the constant `weight`, which will go, to the module `base`: part -> the name of its constant."""
        try:
            parts = pack(program.constants[weight])
        except InputRefused as error:
            raise InputRefused(error.what, where=error.where or weight, why=error.why, hint=error.hint) from None
        tensors = {part: tensor for part, tensor in parts.items() if isinstance(tensor, Tensor)}
        names = {part: self._free_name(program, weight, base, part) for part in tensors}
        for part, name in names.items():
            constant(program, name, parts[part], before)
        return parts | names

    def _free_name(self, program: Program, weight: str, base: str, part: str) -> str:
        """`base.part`, or `base.int8.part`, `base.int8_2.part`, ... where the module has something of that name already, or is
        called like that itself."""
        own = f"{base}.{self.name}"
        prefixes = itertools.chain([] if is_ambiguous(base) else [base], [own], (f"{own}_{n}" for n in itertools.count(2)))
        return next(name for p in prefixes if is_free(program, name := f"{p}.{part}", weight))


def check_steps(steps: int, algorithm: str, where: str) -> None:
    """Raises UsageError where the option `steps` is none, or one of an algorithm that takes no steps."""
    if steps < 1:
        raise UsageError(f"steps={steps} is no number of steps", where=where, hint="steps=200, or algorithm=qronos for none")
    if steps != STEPS and algorithm != "round":
        raise UsageError(f"algorithm={algorithm} takes no steps", where=where, hint="algorithm=round, or leave steps out")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a layer by their names, those too that were left out."""
    return {argument.name: Call(node)[argument.name] for argument in node.target._schema.arguments}


def nbytes_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
