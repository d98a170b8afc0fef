"""The smallest part of a program that shows what a rewrite broke.

What comes before the first node that the rewrite changed becomes inputs, with the values that it had, for there both programs
are the same; what comes after is left out node by node as long as the part still fails. Sizes are those of the inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc.artifact.staging import staged
from fxc.compiled.model import CompiledModel
from fxc.errors import FxcError
from fxc.ir.check import check
from fxc.ir.edit import retype, type_of
from fxc.ir.observe import values_at
from fxc.ir.program import Input, Program, Signature

Fails = Callable[[Program, Program, Sequence[Tensor]], bool]
"""Whether the second program fails on these inputs where the first does not."""


@dataclass(frozen=True)
class Reproduction:
    """before, after: what holds and what fails, after being None where a pass broke off; inputs: what both take."""

    before: Program
    after: Program | None
    inputs: list[Tensor]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the artifacts before/ and after/ (text and constants), inputs.safetensors and about.json, or nothing."""
        nbytes = self.before.nbytes() + (self.after.nbytes() if self.after else 0) + sum(t.nbytes for t in self.inputs)
        with staged(folder, nbytes=nbytes) as place:
            CompiledModel(self.before, {}).save(place / "before")
            if self.after is not None:
                CompiledModel(self.after, {}).save(place / "after")
            names = [declared.name for declared in self.before.signature.inputs]
            save_file({n: t.contiguous() for n, t in zip(names, self.inputs, strict=True)}, place / "inputs.safetensors")
            (place / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def reproduction(before: Program, after: Program, inputs: Sequence[Tensor], fails: Fails) -> Reproduction:
    """The part of `before` and `after`, which differ by one rewrite, with the fewest nodes found that still fails; the whole
    programs where no part does."""
    pairs = _pairs(before, after)
    changed = [at for at, node in enumerate(_calls(after)) if _is_changed(node, before, after, pairs)]
    calls = _calls(after)
    if changed:
        values = _values(before, inputs)
        first = changed[0]
        kept = {node for node in calls[:first] if node in pairs}
        for end in range(first, len(calls)):
            node = calls[end]
            if node not in pairs or not isinstance(node.meta["val"], Tensor):
                continue
            part = _part(before, after, node, kept, pairs, values)
            if part is not None and fails(*part):
                return Reproduction(*part)
    return Reproduction(before, after, list(inputs))


def _calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _pairs(before: Program, after: Program) -> dict[fx.Node, fx.Node]:
    """Nodes of `after` that stand for one of `before`, of the same type: by name, or by what they replace."""
    old = {node.name: node for node in before.graph.nodes if node.op in ("call_function", "placeholder")}
    found = {}
    for node in after.graph.nodes:
        one = old.get(node.name)
        one = old.get(node.meta.get("replaces", "")) if one is None or one.op != node.op else one
        is_value = node.op in ("call_function", "placeholder") and one is not None
        if is_value and type_of(one.meta["val"]) == type_of(node.meta["val"]):
            found[node] = one
    return found


def _is_changed(node: fx.Node, before: Program, after: Program, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether the call is another one than in `before`, or reads a constant that is."""
    one = pairs.get(node)
    if one is None or one.target is not node.target:
        return True

    def written(each: fx.Node) -> str:
        if each.op == "get_attr":
            return f"@{each.target}"
        return each.name if each not in pairs else pairs[each].name

    calls = [str(fx.map_arg((n.args, n.kwargs), written)) for n in (one, node)]
    read = [each.target for each in node.all_input_nodes if each.op == "get_attr"]
    return calls[0] != calls[1] or any(_is_other(before.constants.get(name), after.constants[name]) for name in read)


def _is_other(one: Tensor | None, other: Tensor) -> bool:
    if one is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return True
    return one is not other and not bool(((one == other) | ((one != one) & (other != other))).all())


def _values(program: Program, inputs: Sequence[Tensor]) -> dict[str, Any]:
    names = {node.name for node in program.graph.nodes if node.op in ("call_function", "placeholder")}
    return values_at(program.module(), inputs, names)


def _part(
    before: Program, after: Program, end: fx.Node, kept: set[fx.Node], pairs: dict[fx.Node, fx.Node], values: dict[str, Any]
) -> tuple[Program, Program, list[Tensor]] | None:
    """Both programs up to `end`, from the values `kept` on; None where they cannot be written so."""
    numbers = {node for node in pairs if not isinstance(node.meta["val"], Tensor | tuple | list)}
    cut = {node.name: pairs[node].name for node in {*kept, *numbers, *after.placeholders} if node in pairs}
    own = {name: name for name in cut.values()}
    read = _read(before, pairs[end], own) | {cut[name] for name in _read(after, end, cut)}
    names = [node.name for node in before.graph.nodes if node.name in read]
    tensors = {name: values[name] for name in names if isinstance(values[name], Tensor)}
    try:
        made = [
            _extract(before, pairs[end], own, tensors, values),
            _extract(after, end, cut, tensors, values),
        ]
        for each in made:
            check(each)
    except (FxcError, KeyError, RuntimeError, ValueError, TypeError):
        # Sizes that were free are numbers here, which not every operator takes.
        return None
    return made[0], made[1], list(tensors.values())


def _read(program: Program, end: fx.Node, cuts: Container[str]) -> set[str]:
    """The names of the values in `cuts` at which the way back from `end` stops."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    ahead = [end]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in cuts and node is not end:
            found.add(node.name)
        else:
            ahead.extend(node.all_input_nodes)
    return found


def _extract(
    program: Program, end: fx.Node, named: dict[str, str], tensors: dict[str, Tensor], values: dict[str, Any]
) -> Program:
    """The nodes that `end` needs. named: node at which it is cut -> name of its value; tensors: those that are inputs, in
    order; what is a number is written as it was."""
    stops = _read(program, end, named)
    needed: set[fx.Node] = set()
    ahead = [end]
    while ahead:
        node = ahead.pop()
        if node not in needed and not (node.name in stops and node is not end):
            needed.add(node)
            ahead.extend(node.all_input_nodes)
    graph, made = fx.Graph(), {}
    inputs = {name: graph.placeholder(f"x{number}") for number, name in enumerate(tensors)}

    def taken(node: fx.Node) -> Any:
        if node in made:
            return made[node]
        name = named[node.name]
        return inputs[name] if name in inputs else values[name]

    for node in program.graph.nodes:
        if node in needed and node.op in ("call_function", "get_attr"):
            made[node] = graph.node_copy(node, lambda each: each)
            made[node].args, made[node].kwargs = fx.map_arg((node.args, node.kwargs), taken)
            made[node].meta = dict(node.meta)
    graph.output((made[end],))
    names = {node.target for node in needed if node.op == "get_attr"}
    signature = Signature(
        [Input(f"x{number}") for number in range(len(inputs))], ["out"], {"args": list(range(len(inputs))), "kwargs": {}}, 0
    )
    metadata = {"class": "Part", "kind": "module", "parameters": [f"x{number}" for number in range(len(inputs))]}
    part = Program(graph, {name: program.constants[name] for name in sorted(names)}, {}, signature, metadata)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    retype(part, mode, [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors.values()])
    return part
