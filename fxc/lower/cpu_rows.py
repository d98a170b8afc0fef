"""The layers of an encoder as one call on a CPU, where programs run node by node: int8 products, norms and the attention
between them, `fxc_kernels.cpu.native_rows`. What is not such a step stays, before the call or behind it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxc.ir import edit
from fxc.ir.cache import is_causal_lm
from fxc.ir.call import Call
from fxc.ir.program import Program
from fxc.lower.remembered import Timing
from fxc_kernels.cpu import native_rows, ops
from fxc_kernels.cpu.native_between import DTYPES
from fxc_kernels.cpu.native_int8 import ACTIVATIONS
from fxc_kernels.cpu.native_rows import ATTENTION, LINEAR, NORM, Step

_NARROW = torch.ops.aten.narrow.default
_RESHAPE = torch.ops.aten.reshape.default
_TRANSPOSE = torch.ops.aten.transpose.int
_SIZE = torch.ops.aten.sym_size.int
_NORMS = {
    ops.LAYER_NORM: (False, False), ops.ADD_LAYER_NORM: (False, True),
    ops.RMS_NORM: (True, False), ops.ADD_RMS_NORM: (True, True),
}  # fmt: skip
"""Operator -> whether it is an RMS norm, and whether it gives the sum too."""


# Of the time of an int8 product that is called alone, what it takes in one call with others: MiniLM at 8x128 and 1x128 took
# 0.78 and 0.80 of its time on one thread of an AMD EPYC (Zen 5). Fewer rows than FEW are seldom in such a call.
IN_ROWS, FEW = 0.8, 16


def fuse(program: Program, bf16: bool) -> None:
    """Nothing on a machine that has no such kernel, and where no attention is among the steps: rows alone are few in a decoder.
    bf16: attention, which reads int8 products, may multiply in bfloat16."""
    if native_rows.why_not():
        return
    attentions = {found.result: found for found in _attentions(program, bf16)}
    seen: set[fx.Node] = set()
    while attentions and (chain := _next_chain(program, attentions, seen)) is not None:
        seen |= chain.nodes
        if any(step.kind == ATTENTION for step in chain.steps):
            _write(program, chain)
    edit.sweep(program)


def is_likely(program: Program) -> bool:
    """Whether layers of a program that is not lowered yet will be one call: it has attention that this machine's kernels
    compute, and no cache, as decoders have."""
    attention = program.graph.find_nodes(op="call_function", target=ops.ATTENTION)
    return bool(attention) and not is_causal_lm(program) and native_rows.why_not() is None


def as_in_rows(timing: Timing, at: int) -> Timing:
    """Times of the forms of a layer, those of int8 products in C++, form `at`, as they are in one call with others."""
    return {
        rows: tuple(IN_ROWS * time if form == at and rows >= FEW else time for form, time in enumerate(times))
        for rows, times in timing.items()
    }


@dataclass(frozen=True)
class _Attention:
    """Attention over parts of one product, and the reshapes around it; `result` [B, S, H * D] is the last of these."""

    node: fx.Node
    source: fx.Node
    result: fx.Node
    around: list[fx.Node]
    mask: fx.Node | None
    numbers: tuple[int, ...]
    scale: float


def _attentions(program: Program, bf16: bool) -> Iterator[_Attention]:
    for node in program.graph.find_nodes(op="call_function", target=ops.ATTENTION):
        call = Call(node)
        parts = [_heads(call[name]) for name in ("query", "key", "value")]
        back = _only_user(node, _TRANSPOSE)
        result = back and tuple(back.args[1:]) == (1, 2) and _only_user(back, _RESHAPE)
        if not all(parts) or not result or call["dropout_p"]:
            continue
        (source, q_at, heads, depth, shape), key, value = (each[1:] for each in parts)
        mask, lead = call["attn_mask"], shape[:2]
        others = {each[0] for each in (key, value)} == {source} and key[2:] == value[2:] and key[3] == depth
        flat = _shape(result) == (*lead, str(heads * depth))
        fits = mask is None or (mask.meta["val"].dim() == 4 and _shape(mask)[0] in (lead[0], "1"))
        if others and flat and fits and not heads % key[2]:
            numbers = (heads, key[2], depth, q_at, key[1], value[1])
            around = [*(each for part in parts for each in part[0]), node, back]
            scale = depth**-0.5 if call["scale"] is None else call["scale"]
            yield _Attention(node, source, result, around, mask, (*numbers, int(call["is_causal"]), int(bf16)), scale)


def _heads(node: fx.Node) -> tuple[list[fx.Node], fx.Node, int, int, int, tuple[str, ...]] | None:
    """(the reshapes that nothing else reads, x, the first column, heads, their width, the shape of x) where `node` [B, H, S, D]
    is columns of x [B, S, K]."""
    reshaped = node.args[0] if node.target is _TRANSPOSE and tuple(node.args[1:]) == (1, 2) else None
    narrowed = reshaped.args[0] if reshaped is not None and reshaped.target is _RESHAPE else None
    if narrowed is None or narrowed.target is not _NARROW or len(node.users) != 1 or len(reshaped.users) != 1:
        return None
    x, dim, start, size = narrowed.args
    heads, depth = reshaped.meta["val"].shape[2:] if reshaped.meta["val"].dim() == 4 else (None, None)
    shape = _shape(x)
    fits = len(shape) == 3 and dim in (-1, 2) and all(isinstance(each, int) for each in (start, size, heads, depth))
    if not fits or _shape(reshaped)[:2] != shape[:2] or heads * depth != size:
        return None
    return [node, reshaped, *([narrowed] if len(narrowed.users) == 1 else [])], x, start, heads, depth, shape


def _only_user(node: fx.Node, target: object) -> fx.Node | None:
    user = next(iter(node.users), None)
    return user if len(node.users) == 1 and user.target is target else None


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(size) for size in node.meta["val"].shape)


@dataclass
class _Chain:
    """Steps that read what is there before, `inputs`, and each other. registers: node -> its number; nodes: those that the
    steps are in the place of; behind: those that read what the steps make, in the order of the graph."""

    lead: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    steps: list[Step] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    made: list[list[fx.Node]] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)
    constants: list[fx.Node | None] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    nodes: set[fx.Node] = field(default_factory=set)
    behind: dict[fx.Node, None] = field(default_factory=dict)
    last: fx.Node | None = None

    def takes(self, *nodes: fx.Node | None) -> bool:
        """Whether steps can read these: of the same rows, and made by steps or before them."""
        for node in nodes:
            value = None if node is None else node.meta["val"]
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dim() != 3 or value.dtype not in DTYPES or node in self.behind:
                return False
            if self.steps and (_shape(node)[:2], value.dtype) != (self.lead, self.dtype):
                return False
        return True

    def register(self, node: fx.Node | None) -> int | fx.Node:
        """Where a step finds what `node` is: the number of what a step makes, else the node, which is an input."""
        return -1 if node is None else next((number for number, each in enumerate(self.made) if node in each), node)

    def add(self, step: Step, reads: tuple[fx.Node | None, ...], made: list[list[fx.Node]], nodes: list[fx.Node]) -> None:
        if not self.steps:
            self.lead, self.dtype = _shape(reads[0])[:2], reads[0].meta["val"].dtype
        self.inputs += [each for each in reads if isinstance(self.register(each), fx.Node) and each not in self.inputs]
        self.steps.append(step)
        self.made += made
        self.nodes.update(nodes)


def _next_chain(program: Program, attentions: dict[fx.Node, _Attention], seen: set[fx.Node]) -> _Chain | None:
    """The steps from the first node on that is one and not in `seen`; None where there is none left."""
    chain = _Chain()
    for node in program.graph.nodes:
        if node.op != "call_function" or node in seen or node in chain.nodes:
            continue
        if node.target is _SIZE and any(node.args[0] in each for each in chain.made) and node.args[1] in (0, 1):
            # A size that others need before the steps are through.
            same = edit.insert(program, _SIZE, (chain.inputs[0], node.args[1]), before=node, by="lower", fqn="")
            node.replace_all_uses_with(same)
        elif _add(chain, node, attentions):
            chain.last = node
        elif any(each in chain.behind or each in chain.nodes for each in node.all_input_nodes):
            chain.behind[node] = None
    return chain if chain.steps else None


def _add(chain: _Chain, node: fx.Node, attentions: dict[fx.Node, _Attention]) -> bool:
    """Whether `node` is a step of the chain, which it is then in. Registers are nodes in the steps until all are known."""
    if node.target is ops.NATIVE_INT8_LINEAR:
        call = Call(node)
        x, weights = call["x"], [call[name] for name in ("weight", "scale", "sums", "bias", "dense")]
        if call["split"] or not chain.takes(x, node):
            return False
        numbers = (x, ACTIVATIONS.index(call["activation"]), call["outputs"], call["limit"])
        chain.add(Step(LINEAR, numbers), (x,), [[node]], [node])
        chain.constants += weights
    elif node.target in _NORMS:
        is_rms, with_sum = _NORMS[node.target]
        call = Call(node)
        x, other, bias = call["x"], call.get("other"), call.get("bias")
        if not chain.takes(x, other) or (with_sum and any(user.target is not operator.getitem for user in node.users)):
            return False
        parts = [[user for user in node.users if user.args[1] == at] for at in (0, 1)] if with_sum else [[node]]
        nodes = [node, *(each for part in parts for each in part if each is not node)]
        chain.add(Step(NORM, (x, other, int(is_rms), int(with_sum))), (x, other), parts, nodes)
        chain.constants += [call["weight"], bias]
        chain.numbers.append(call["eps"])
    elif found := attentions.get(node):
        is_made = isinstance(chain.register(found.source), int)
        if not is_made or found.mask in chain.behind or found.mask in chain.nodes:
            return False
        mask = -1
        if found.mask is not None:
            chain.masks += [] if found.mask in chain.masks else [found.mask]
            mask = chain.masks.index(found.mask)
        numbers = (found.source, *found.numbers[:6], mask, *found.numbers[6:])
        chain.add(Step(ATTENTION, numbers), (found.source,), [[node]], [node, *found.around])
        chain.numbers.append(found.scale)
        for each in found.around:
            chain.behind.pop(each, None)
    else:
        return False
    return True


def _write(program: Program, chain: _Chain) -> None:
    number = {node: at for at, node in enumerate(chain.inputs)}
    number |= {node: len(chain.inputs) + at for at, nodes in enumerate(chain.made) for node in nodes}
    steps = [Step(kind, tuple(_numbered(each, number) for each in given)) for kind, given in chain.steps]
    made = {node for nodes in chain.made for node in nodes}
    read = [node for node in made if any(user not in chain.nodes for user in node.users)]
    results = sorted({number[node] for node in read})
    before = list(itertools.takewhile(lambda node: node is not chain.last, program.graph.nodes))
    names = dict.fromkeys(node.meta.get("fqn", "") for node in [*before, chain.last] if node in chain.nodes)
    place = {"before": chain.last.next, "by": "lower", "fqn": ", ".join(filter(None, names))}
    args = (chain.inputs, chain.masks, chain.constants, chain.numbers, native_rows.encoded(steps), results)
    whole = last = edit.insert(program, ops.ROWS, args, **place)
    taken = {}
    for at, each in enumerate(results):
        taken[each] = last = edit.insert(program, operator.getitem, (whole, at), **place)
    for node in read:
        edit.replace(node, taken[number[node]])
    for node in before:
        if node in chain.behind:
            last.append(node)
            last = node


def _numbered(given: object, number: dict[fx.Node, int]) -> int:
    return -1 if given is None else number[given] if isinstance(given, fx.Node) else given
