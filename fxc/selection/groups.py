"""Groups of layers that are given one format: those that lowering makes one product of, and those that share a weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fxc.ir.names import layer_at, layer_name, layer_read_by
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context, Pass
from fxc.passes.canonicalize import Canonicalize
from fxc.pipeline import run_passes
from fxc.schemes import int8
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import EMBEDDING, LINEAR, scheme_of
from fxc.selection.formats import FLOAT, Format

_LAYERS = (LINEAR, GROUPED_LINEAR, int8.CONV2D)


@dataclass(frozen=True)
class Group:
    """layers: their names, in the order in which they run; weights: the constants that they read as theirs; tables: those of
    the layers that are looked up."""

    layers: tuple[str, ...]
    weights: tuple[str, ...]
    tables: frozenset[str] = frozenset()

    def __str__(self) -> str:
        first, *others = self.layers
        return first if not others else f"{first} and {len(others)} more"


@dataclass(frozen=True)
class Space:
    """What there is to choose from. groups: those for which there is a choice; sizes: of each group the bytes of all that its
    layers read, in each of `formats` that takes all of them; fixed: bytes of everything else; left: layer -> why it stays
    float in every format; base: the program that the packing passes are given, by mechanisms made ready for them."""

    formats: list[Format]
    groups: list[Group]
    sizes: list[dict[int, int]]
    fixed: int
    base: Program
    left: dict[str, str] = field(default_factory=dict)

    def nbytes(self, choice: Sequence[int]) -> int:
        """Of the constants of the program in which group i has the format choice[i]."""
        return self.fixed + sum(sizes[form] for sizes, form in zip(self.sizes, choice, strict=True))


def canonical(program: Program) -> Program:
    """What passes see of it."""
    ready = program.copy()
    Canonicalize().run(ready, Context())
    return ready


def groups_of(program: Program, skip: Sequence[str] = ()) -> list[Group]:
    """The groups of a canonical program, in the order in which they run."""
    import networkx as nx  # here, so that loading a compiled model does not pay for it

    context = Context(skip=tuple(skip))
    joined = nx.utils.UnionFind()
    found: list[tuple[str, str, bool, object]] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in (*_LAYERS, EMBEDDING):
            continue
        weight = node.args[0] if node.target is EMBEDDING else node.args[1]
        if weight.op != "get_attr" or not program.constants[weight.target].is_floating_point():
            continue
        name = layer_name(weight.target) if node.target is EMBEDDING else layer_read_by(node)
        if context.skips(name):
            continue
        found.append((name, weight.target, node.target is EMBEDDING, weight.target))
        if node.target in (LINEAR, GROUPED_LINEAR):
            joined.union(weight.target, _reads(node))
    members: dict[object, list[tuple[str, str, bool, object]]] = defaultdict(list)
    for each in found:
        members[joined[each[3]]].append(each)
    return [
        Group(
            tuple(dict.fromkeys(name for name, *_ in some)), tuple(dict.fromkeys(weight for _, weight, *_ in some)),
            frozenset(name for name, _, is_table, _ in some if is_table),
        )
        for some in members.values()
    ]  # fmt: skip


def _reads(node: fx.Node) -> tuple:
    """What layers that are one product read: of experts their rows too."""
    return (node.args[0], node.args[2]) if node.target is GROUPED_LINEAR else (node.args[0],)


def space_of(
    program: Program, formats: Sequence[Format], skip: Sequence[str] = (), after: Sequence[Pass] = ()
) -> Space:
    """What may be chosen for `program`. formats: the first is float; after: passes that follow for all layers (bf16).

    Bytes are exact: each format is made of all layers, on meta, where nothing is computed, by the passes themselves.
    """
    ready = canonical(program)
    found = groups_of(ready, skip)
    owner = {layer: at for at, group in enumerate(found) for layer in group.layers}
    plain, fixed = _bytes_by(_planned(program, FLOAT, after, skip)[0], owner)
    planned = {number: _planned(program, form, after, skip) for number, form in enumerate(formats) if form != FLOAT}
    refused = {number: {layer for layer in why if layer in owner} for number, (_, why) in planned.items()}
    left = set(owner).intersection(*refused.values())
    sizes: list[dict[int, int]] = [{0: plain[at]} for at in range(len(found))]
    for number, (made, _) in planned.items():
        nbytes, _ = _bytes_by(made, owner)
        for at, group in enumerate(found):
            if at in nbytes and not refused[number].intersection(group.layers) - left:
                sizes[at][number] = nbytes[at]
    chosen = [at for at, group in enumerate(found) if set(group.layers) - left]
    fixed += sum(plain[at] for at in range(len(found)) if at not in chosen)
    why = {layer: next(iter(planned.values()))[1][layer] for layer in owner if layer in left}
    groups = [replace(found[at], layers=tuple(each for each in found[at].layers if each not in left)) for at in chosen]
    return Space(list(formats), groups, [sizes[at] for at in chosen], fixed, ready, why)


def _planned(
    program: Program, form: Format, after: Sequence[Pass], skip: Sequence[str]
) -> tuple[Program, dict[str, str]]:
    """`program` with every layer in the format, on meta, and why which layers are not."""
    meta = program.copy()
    meta.constants = {name: tensor.to("meta") for name, tensor in meta.constants.items()}
    # What scales are moved needs data, and bytes do not depend on it.
    passes = (*(replace(each, smooth=False) if hasattr(each, "smooth") else each for each in form.passes), *after)
    options = Options(passes or (Canonicalize(),), verify=False, allow_noop=True, skip=tuple(skip))
    made, steps = run_passes(meta, Context(skip=tuple(skip)), options)
    return made, {refusal.fqn: refusal.reason for step in steps for refusal in step.refusals}


def _bytes_by(program: Program, owner: dict[str, int]) -> tuple[dict[int, int], int]:
    """Of each group the bytes of what its layers read, and those of all else."""
    names: dict[int, set[str]] = defaultdict(set)
    for node in program.graph.nodes:
        if node.op == "call_function" and (node.target in (*_LAYERS, EMBEDDING) or scheme_of(node.target) is not None):
            at = owner.get(layer_at(program, node))
            if at is not None:
                names[at] |= {each.target for each in node.all_input_nodes if each.op == "get_attr"}
    nbytes = {name: tensor.numel() * tensor.element_size() for name, tensor in program.constants.items()}
    found = {at: sum(nbytes[name] for name in some) for at, some in names.items()}
    return found, sum(nbytes.values()) - sum(found.values())
