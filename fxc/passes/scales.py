"""What the passes share that move scales of channels out of an activation: x / s is what layers read where they read x.

The weights that read x become w * s, and what gives x gives x / s: the gain and bias of a norm, the rows of a linear layer,
a vector that multiplies. Nothing that the program computes changes but x itself. Where that can be done is found on the graph
(`analysis/channels.py`); the subclass says s. What a norm gives that others read too, as a residual sum behind it does, a
product of its own divides in front of the layers, for a subclass that has it so (`apart`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxc.analysis.channels import Reach, comes_from, reach
from fxc.analysis.channels import said as named
from fxc.calibrate.hessian import Squares
from fxc.errors import InputRefused
from fxc.ir.call import Call
from fxc.ir.edit import constant, free_name, insert, sweep
from fxc.ir.names import layer_at
from fxc.ir.observe import inputs_of, observe
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Pass, Refusal, Result, check_data_is_given
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED
from fxc.passes.linears import GROUPED, LINEAR

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


@dataclass(frozen=True)
class MoveScales(Pass):
    """Base of the passes that learn a scale of each channel of what linear layers read."""

    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({UNSCALED})
    rounds: ClassVar[bool] = True
    apart: ClassVar[bool] = False
    """Whether what a norm gives is divided by a product of its own where others than linear layers read it too."""

    def uses_data(self) -> bool:
        return True

    def needs_data(self) -> str | None:
        return "its scales are"

    def scale(self, program: Program, context: Context, found: Reach, read: dict[fx.Node, Squares]) -> Tensor | str:
        """s [C], or why there is none. found: where the channels go, some of which are not blocked; read: of each layer what
        it reads, of those in `found` at least one row. What it says of blocked channels is not used."""
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> Result:
        check_data_is_given([self], bool(context.samples))
        result = Result()
        layers = [n for n in program.graph.nodes if n.target in (LINEAR, GROUPED) and n.args[1].op == "get_attr"]
        read = _observed(program, layers, context)
        why: dict[fx.Node, str] = {}
        stopped: dict[fx.Node, str] = {}
        done: set[fx.Node] = set()
        # From the end: what is nearest to a layer takes its scale, and weights are looked at when their rows are scaled.
        for source in reversed(list(_sources(program))):
            found = reach(program, source)
            readers = found.readers.keys()
            if found.blocked:
                stopped[source] = next(iter(found.blocked.values()))
            if not readers or readers & done:
                continue
            if apart := self.apart and _others_read(source, found):
                found = Reach(found.size, found.readers)
            declined = self._declined(program, context, source, found, read, apart)
            scale = declined or self.scale(program, context, found, read)
            if isinstance(scale, str):
                why |= {reader: scale for reader in readers if reader not in why}
                continue
            if not context.rewrites.may(layer_at(program, next(iter(readers)))):
                break
            scale = scale.double().index_fill(0, torch.tensor(list(found.blocked), dtype=torch.long), 1.0)
            done |= readers
            if apart:
                scale = self._divide_apart(program, source, scale, readers)
            else:
                _divide(program, source, scale)
            for vector, channels in found.added.items():
                _multiply(program, vector.target, 1 / scale[channels])
            for reader, channels in found.readers.items():
                _multiply(program, reader.args[1].target, scale[channels])
            result.changed += 1
        sweep(program)
        for layer in layers:
            if layer not in done:
                said = why.get(layer) or stopped.get(comes_from(layer)) or _unreached(layer)
                result.refusals.append(Refusal(layer_at(program, layer), said))
        if result.changed:
            program.metadata["scaled"] = True
            result.notes.append(f"{len(done)} layers read scaled channels, learned from {len(context.samples)} samples")
        return result

    def _declined(
        self, program: Program, context: Context, source: fx.Node, found: Reach, read: dict[fx.Node, Squares], apart: bool
    ) -> str | None:
        """Why no scale can be moved from what `source` gives, or None."""
        if len(found.blocked) == found.size:
            return next(iter(found.blocked.values()))
        if not apart and (why := _kept(program, source)):
            return why
        names = [layer_at(program, each) for each in (source, *found.readers)]
        if pattern := next(filter(None, map(context.skips, names)), None):
            return f"skipped by the pattern {pattern}"
        return None if all(read[reader].rows for reader in found.readers) else "no sample reached it"

    def _divide_apart(self, program: Program, source: fx.Node, scale: Tensor, readers: Iterable[fx.Node]) -> Tensor:
        """Let `readers` read x / scale where they read x. Returns the scale by which that divides."""
        before, fqn = source.next, source.meta.get("fqn", "")
        factor = (1 / scale).to(source.meta["val"].dtype)
        vector = constant(program, free_name(program, f"{fqn or source.name}.factor"), factor, before)
        product = insert(program, aten.mul.Tensor, (source, vector), before=before, by=self.name, fqn=fqn)
        for reader in readers:
            reader.replace_input_with(source, product)
        return 1 / factor.double()


def by_channel(found: Reach, values: dict[fx.Node, Tensor]) -> Tensor:
    """[C]: of each channel the largest of `values`, [K] of each reader; 0 where none is read."""
    largest = torch.zeros(found.size)
    for reader, index in found.readers.items():
        largest.scatter_reduce_(0, index, values[reader].float(), "amax")
    return largest


def matrices(program: Program, reader: fx.Node) -> list[Tensor]:
    """The weight of a layer, [N, K], or those of its experts."""
    weight = program.constants[reader.args[1].target]
    return list(weight.reshape(-1, *weight.shape[-2:]))


def _unreached(layer: fx.Node) -> str:
    return f"it reads what {named(comes_from(layer))} gives, which no scale of a norm or linear layer goes through"


def _others_read(source: fx.Node, found: Reach) -> bool:
    """Whether layers read what a norm gives, as it is, and others besides, so that no channel of it can be scaled."""
    is_norm = source.target in _NORMS and len(found.blocked) == found.size
    return is_norm and all(reader.args[0] is source for reader in found.readers)


@torch.no_grad()
def _observed(program: Program, layers: list[fx.Node], context: Context) -> dict[fx.Node, Squares]:
    """What each of `layers` reads in the samples."""
    by_value = {layer.args[0]: Squares(layer.args[0].meta["val"].shape[-1]) for layer in layers}
    first = {layer.args[0]: layer for layer in layers}
    module, dtypes = program.module(), [node.meta["val"].dtype for node in program.placeholders]

    def add(layer: fx.Node, x: Tensor) -> None:
        try:
            by_value[layer.args[0]].add(x)
        except InputRefused as error:
            raise InputRefused(error.what, where=layer_at(program, layer), why=error.why, hint=error.hint) from None

    watches = inputs_of(first.values(), add)
    for sample in context.track(context.samples, "what layers read", len(context.samples)):
        observe(module, [t.to(dtype) for t, dtype in zip(sample, dtypes, strict=True)], watches)
    return {layer: by_value[layer.args[0]] for layer in layers}


def _sources(program: Program) -> Iterator[fx.Node]:
    """The nodes whose channels can be divided by numbers."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        is_norm = node.target in _NORMS and len(Call(node)["normalized_shape"]) == 1
        is_linear = node.target in (LINEAR, GROUPED) and node.args[1].op == "get_attr"
        if is_norm or is_linear or (node.target is aten.mul.Tensor and _vector(node) is not None):
            yield node


def _vector(node: fx.Node) -> int | None:
    """Which argument of a product is a vector of constants along its last dimension, where the other is a value."""
    value = node.meta["val"]
    for place, other in ((0, 1), (1, 0)):
        vector, x = node.args[place], node.args[other]
        if not (isinstance(vector, fx.Node) and isinstance(x, fx.Node)) or value.ndim < 2 or _is_constant(x):
            continue
        if _is_constant(vector) and vector.meta["val"].ndim == 1 and vector.meta["val"].shape == value.shape[-1:]:
            return place
    return None


def _is_constant(node: fx.Node) -> bool:
    """Whether it is computed of constants alone."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_constant, node.all_input_nodes)))


def _evaluated(program: Program, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        return program.constants[node.target]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluated(program, n))
    return node.target(*args, **kwargs)


def _parameters(source: fx.Node) -> list[fx.Node]:
    """What is divided where `source` gives less."""
    if source.target is aten.mul.Tensor:
        return [source.args[_vector(source)]]
    call = Call(source)
    return [p for p in (call["weight"], call.get("bias")) if p is not None]


def _kept(program: Program, source: fx.Node) -> str | None:
    """Why the parameters of `source` cannot be changed, or None."""
    for parameter in _parameters(source):
        if source.target is not aten.mul.Tensor and parameter.op != "get_attr":
            return f"the parameters of {layer_at(program, source)} are computed"
        if parameter.op == "get_attr" and users_of(program, parameter.target) != [source]:
            return f"{parameter.target}, which gives it, is read by others too"
    return None


def _divide(program: Program, source: fx.Node, scale: Tensor) -> None:
    """Let `source` give x / scale where it gave x."""
    name = source.meta.get("fqn") or source.name
    if source.target is aten.mul.Tensor and source.args[place := _vector(source)].op != "get_attr":
        # A gain that is computed of constants, as 1 + weight, becomes a constant of its own.
        gain = _evaluated(program, source.args[place])
        fixed = constant(program, free_name(program, f"{name}.gain"), gain, before=source)
        source.args = tuple(fixed if i == place else a for i, a in enumerate(source.args))
    elif source.target in _NORMS and Call(source)["weight"] is None:
        value = source.meta["val"]
        ones = torch.ones(value.shape[-1], dtype=value.dtype)
        Call(source).set("weight", constant(program, free_name(program, f"{name}.weight"), ones, before=source))
    for parameter in _parameters(source):
        is_matrix = program.constants[parameter.target].ndim > 1
        _multiply(program, parameter.target, (1 / scale).unsqueeze(1) if is_matrix else 1 / scale)


def _multiply(program: Program, fqn: str, factor: Tensor) -> None:
    tensor = program.constants[fqn]
    program.constants[fqn] = (tensor.double() * factor).to(tensor.dtype)
