"""How much each unit of a group matters, by the criteria of the literature. Larger is more important.

l1, l2: the magnitude of all weights that belong to a unit (Li et al. 2017, "Pruning Filters for Efficient ConvNets"; over the
  coupled group as in DepGraph, Fang et al. 2023)
bn_scale: |gamma| of its batch norms (Liu et al. 2017, "Network Slimming")
wanda: |weight| times the norm of the activation that it multiplies, over calibration data (Sun et al. 2024, "A Simple and
  Effective Pruning Approach for Large Language Models"; summed over a unit's weights)
mask_gradient: |dL/dm| of a mask m = 1 on the unit, averaged over the samples (Michel et al. 2019, "Are Sixteen Heads Really
  Better than One?"), each group divided by its norm as there
taylor: (dL/dm)^2 averaged over the samples: by the chain rule dL/dm is the sum of gradient x weight over the weights that read
  the unit (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning")

wanda runs forward only: each value of a sample is freed after its last use, so that besides the weights the memory is that of
one block, and a number for each channel. mask_gradient and taylor need gradients through the whole model: what a backward pass
reads of one sample is kept of all blocks at once, and grows with the depth of the model and the length of a sample; shorter
samples (--calib-length) need less, and more of them do not need more.

L is the loss of the next token where the program is a causal language model, and else a fixed random combination of the
outputs, whose squared gradients are those of the outputs themselves in expectation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from fxc.analysis.groups import Group, WeightedSite
from fxc.calibrate.gradients import loss
from fxc.ir.observe import observe
from fxc.ir.program import Program
from fxc.mapped import pieces
from fxc.progress import Track, untracked

aten = torch.ops.aten
Criterion = Literal["l2", "l1", "bn_scale", "taylor", "wanda", "mask_gradient"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
NEED_DATA = ("taylor", "wanda", "mask_gradient")
NEED_GRADIENTS = ("taylor", "mask_gradient")
# So much of a weight is summed up at once.
_AT_ONCE = 1 << 25


def scores(
    program: Program,
    groups: Sequence[Group],
    criterion: str,
    samples: Sequence[Sequence[Tensor]] = (),
    track: Track = untracked,
    seed: int = 0,
) -> dict[Group, Tensor]:
    """[size] float64 for each group that the criterion can tell something about. samples: flat inputs of the program, which the
    criteria in `NEED_DATA` need."""
    if not groups:
        return {}
    samples = track(samples, f"scoring units by {criterion}", len(samples)) if criterion in NEED_DATA else ()
    if criterion in ("l1", "l2"):
        return {g: _magnitude(program, g, 1 if criterion == "l1" else 2) for g in groups}
    if criterion == "bn_scale":
        return _batch_norm_scales(program, groups)
    if criterion == "wanda":
        return _weight_times_activation(program, groups, samples)
    gradients = mask_gradients(program, groups, samples, seed)
    if criterion == "taylor":
        return {g: each.square().mean(0) for g, each in gradients.items()}
    assert criterion == "mask_gradient", f"{criterion} has no branch here"
    means = {g: each.abs().mean(0) for g, each in gradients.items()}
    return {g: mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny) for g, mean in means.items()}


def by_unit(units: Tensor, values: Tensor, size: int) -> Tensor:
    """[size] float64: `values` [positions] summed over the positions of each unit."""
    inside = units >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, units[inside], values[inside].double())


def _magnitude(program: Program, group: Group, p: int) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        tensor = program.constants[member.fqn]
        # Vectors are biases and the parameters of norms, whose size is no measure of what a unit does.
        if tensor.ndim > 1 and tensor.is_floating_point():
            others = [d for d in range(tensor.ndim) if d != member.dim]
            sums = [piece.float().abs().pow(p).sum(others) for piece in pieces(tensor, _AT_ONCE)]
            total += by_unit(member.units, torch.stack(sums).sum(0) if member.dim else torch.cat(sums), group.size)
    return total.pow(1 / p)


def _batch_norm_scales(program: Program, groups: Sequence[Group]) -> dict[Group, Tensor]:
    scales = {
        node.args[1].target
        for node in program.graph.nodes
        if node.target is aten.batch_norm.default and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    }
    found = {}
    for group in groups:
        its = [m for m in group.members if m.fqn in scales]
        if its:
            found[group] = sum(by_unit(m.units, program.constants[m.fqn].abs(), group.size) for m in its)
    return found


def _weight_times_activation(
    program: Program, groups: Sequence[Group], samples: Iterable[Sequence[Tensor]]
) -> dict[Group, Tensor]:
    wanted: dict[str, dict[str, int]] = {}
    for site in (s for g in groups for s in g.sites):
        wanted.setdefault(site.node.args[site.operand].name, {})[_key(site)] = site.dim
    squares: dict[str, Tensor] = {}

    def add(value: Tensor, sites: dict[str, int]) -> None:
        """Sum the squares of what each site reads, position by position."""
        for key, dim in sites.items():
            flat = value.movedim(dim, -1).reshape(-1, value.shape[dim])
            squares[key] = squares.get(key, 0) + flat.double().square().sum(0)

    module = program.module()
    with torch.no_grad():
        for inputs in samples:
            observe(module, inputs, {name: partial(add, sites=sites) for name, sites in wanted.items()})
    found = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for site in group.sites:
            weight = program.constants[site.weight.fqn]
            others = [d for d in range(weight.ndim) if d != site.weight.dim]
            read = weight.float().abs().sum(others).double()
            norms = squares[_key(site)].sqrt()
            # A grouped convolution reads several channels by one position of its weight.
            norms = norms.reshape(-1, len(read)).sum(0)
            total += by_unit(site.weight.units, read * norms, group.size)
        found[group] = total
    return found


def _key(site: WeightedSite) -> str:
    return f"{site.node.name}.{site.operand}"


def mask_gradients(
    program: Program, groups: Sequence[Group], samples: Iterable[Sequence[Tensor]], seed: int = 0
) -> dict[Group, Tensor]:
    """[samples, size] float64: the gradient of the loss of each sample by a mask of ones on the units of each group. seed: of
    the loss, where it draws a direction."""
    masked, masks = with_masks(program, groups)
    module = masked.module()
    # The module reads these very tensors.
    parameters = {g: masked.constants[name] for g, name in masks.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found: dict[Group, list[Tensor]] = {g: [] for g in groups}
    for inputs in samples:
        with torch.enable_grad():
            total = loss(program, module(*inputs), inputs, seed)
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for group, gradient in zip(parameters, gradients, strict=True):
            found[group].append(torch.zeros(group.size) if gradient is None else gradient)
    return {g: torch.stack(each).double() for g, each in found.items()}


def with_masks(program: Program, groups: Sequence[Group]) -> tuple[Program, dict[Group, str]]:
    """A copy in which what each site reads is first multiplied by a constant of ones, one number for each unit."""
    copy = program.copy()
    nodes = {node.name: node for node in copy.graph.nodes}
    masks = {}
    for number, group in enumerate(groups):
        name = f"unit_mask_{number}"
        copy.constants[name] = torch.ones(group.size)
        masks[group] = name
        for position, site in enumerate(group.sites):
            consumer = nodes[site.node.name]
            source = consumer.args[site.operand]
            value = source.meta["val"]
            # Of a grouped convolution the weight has the inputs of one group, and each group the same units.
            units = site.weight.units.repeat(value.shape[site.dim] // len(site.weight.units))
            copy.constants[f"{name}_at_{position}"] = units.clamp(min=0)
            copy.constants[f"{name}_in_{position}"] = (units >= 0).float()
            with copy.graph.inserting_before(consumer):

                def then(target: Any, *args: Any) -> fx.Node:
                    return copy.graph.call_function(target, args)

                mask, at, inside = (
                    copy.graph.create_node("get_attr", fqn) for fqn in (name, f"{name}_at_{position}", f"{name}_in_{position}")
                )
                # 1 outside of the group: 1 + inside * (mask - 1)
                change = then(aten.mul.Tensor, then(aten.sub.Tensor, then(aten.index_select.default, mask, 0, at), 1), inside)
                shape = [-1 if d == site.dim else 1 for d in range(value.ndim)]
                factor = then(aten.reshape.default, then(aten.add.Tensor, change, 1), shape)
                product = then(aten.mul.Tensor, source, then(aten.to.dtype, factor, value.dtype))
            # Another group may be masked at the same place.
            product.meta["val"] = value
            consumer.args = tuple(product if i == site.operand else a for i, a in enumerate(consumer.args))
    return copy, masks
