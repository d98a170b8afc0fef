"""The gate of a program that is larger than memory: each layer is judged alone, as soon as it is packed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxc.errors import VerificationFailed
from fxc.ir.names import layer_at, parts_of
from fxc.ir.program import Program
from fxc.mapped import LARGE, passed
from fxc.passes.base import Pass
from fxc.schemes.scheme import LINEAR, product_of, scheme_of

ROWS = 8
# So many numbers of a weight are looked at together: what that makes of them stays in the cache.
_AT_ONCE = 1 << 20


@dataclass
class LayerGate:
    """step: the pass that packs; limit: the largest relative error of a layer; errors: FQN -> what was measured."""

    step: Pass
    limit: float
    errors: dict[str, float] = field(default_factory=dict)

    def __call__(self, program: Program, layer: fx.Node, weight: Tensor, made: fx.Node) -> float:
        """layer: as it was, over the float `weight`; made: what stands in its place. A linear layer is compared on rows drawn
        from a normal distribution, any other by its weight. Returns the error. Raises `VerificationFailed` beyond the limit."""
        name = layer_at(program, made)
        if layer.target is LINEAR or (scheme_of(layer.target) and product_of(layer.target).layer is LINEAR):
            x = layer.args[0].meta["val"]
            rows = torch.randn(ROWS, x.shape[-1], generator=torch.Generator().manual_seed(len(self.errors))).to(x.dtype)
            pairs = zip(_outputs(program, made, rows), _outputs(program, layer, rows), strict=True)
        else:
            pairs = _weights(program, weight, made)
        error = _relative(pairs)
        self.note(program, made, error)
        if not error <= self.limit:
            raise VerificationFailed(
                f"the pass {self.step} did not go through the gate 'layers': alone it differs by {error:.3f}, the budget of a "
                f"layer is {self.limit}",
                where=name,
                hint="nothing was written; leave that layer out with --skip, or raise --layer-budget",
            )

        return error

    def note(self, program: Program, made: fx.Node, error: float) -> None:
        """The error of a layer that was measured."""
        name = layer_at(program, made)
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def outcome(self) -> str:
        if not self.errors:
            return "not measured: no layer was packed"
        most = max(self.errors.values())
        within = f"budget {self.limit}" if math.isfinite(self.limit) else "which no budget limits"
        return f"ok: {len(self.errors)}, each on drawn rows, the largest error {most:.2e}, {within}"


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|found - expected| / |expected| of (found, expected) together; infinite where a number is none."""
    distance = size = 0.0
    for found, expected in pairs:
        distance += float((found.float() - expected.float()).square().sum(dtype=torch.float64))
        size += float(expected.float().square().sum(dtype=torch.float64))
    if not math.isfinite(distance + size):
        return math.inf
    return math.sqrt(distance / size) if size else math.inf if distance else 0.0


def _outputs(program: Program, node: fx.Node, rows: Tensor) -> Iterator[Tensor]:
    """What the linear layer `node` gives for `rows`, so many outputs at once that they take little memory: whatever it reads of
    constants has an output for each of its first indices."""
    constants = {each: program.constants[each.target] for each in node.all_input_nodes if each.op == "get_attr"}
    count = max(len(each) for each in constants.values())
    some = max(_AT_ONCE // rows.shape[-1], 1)
    for start in range(0, count, some):
        known = {each: tensor[start : start + some] for each, tensor in constants.items()} | {node.args[0]: rows}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            outputs = node.target(*args, **kwargs)
        yield outputs  # outside: who takes turns with another one would leave gradients off
        for tensor in constants.values():
            if tensor.nbytes > LARGE:
                passed(tensor[start : start + some])


def _weights(program: Program, weight: Tensor, made: fx.Node) -> Iterator[tuple[Tensor, Tensor]]:
    """What the packed weight of `made` stands for, and what it was; of experts [E, N, K] one by one."""
    scheme = scheme_of(made.target)
    parts = {part: program.constants[name] for part, name in parts_of(made).items()}
    if weight.ndim == 3:
        for at in range(len(weight)):
            yield scheme.dense({part: each[at] for part, each in parts.items()}), weight[at]
    else:
        yield scheme.dense(parts | {scheme.numbers: parts[scheme.numbers].flatten(1)}), weight.flatten(1)
