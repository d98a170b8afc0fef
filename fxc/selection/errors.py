"""What each format costs each layer, in the norm of what the layer gives: from one pass over calibration data.

    e = tr(D H D^T) / tr(W H W^T)       H = 2/n X^T X of what the layer reads, D what the format changes of its weight W
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxc.calibrate import runner
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.levels import energy, lost
from fxc.calibrate.stages import Statistic
from fxc.ir.names import layer_name, layer_read_by
from fxc.ir.observe import inputs_of, observe
from fxc.passes.linears import PackLinears
from fxc.progress import Track, untracked
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR, product_of
from fxc.selection.formats import FLOAT, Format
from fxc.selection.groups import Group, Space

ACTIVATIONS = 4
"""On so many samples it is measured what rounding activations costs."""


@dataclass
class Errors:
    """by_weight: constant -> format's number -> e, for the formats that take it; of_noise: constant -> e of the noise that
    `noise` gives; unreached: layers that no sample reached. Of their weights, of tables and of convolutions all directions
    count alike; what static formats round of activations is in none."""

    by_weight: dict[str, dict[int, float]] = field(default_factory=dict)
    of_noise: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)


def noise(name: str, weight: Tensor, size: float, seed: int) -> Tensor:
    """Gaussian noise for the weight `name` [..., K], float32: in each row (of a convolution: output channel) of `size` times
    the root of its mean square. The same for the same name and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
    row = (1, 2, 3) if weight.ndim == 4 else -1
    return drawn * (size * weight.float().square().mean(row, keepdim=True).sqrt())


@torch.no_grad()
def errors_of(
    space: Space, samples: Sequence[Sequence[Tensor]], size: float, seed: int, track: Track = untracked
) -> Errors:
    """size: of the noise. The layers before one are as they came, whatever the format: what errors add up to is left to
    be measured."""
    program, found = space.base, Errors()
    forms = {
        weight: [number for number in space.sizes[at] if space.formats[number] != FLOAT]
        for at, group in enumerate(space.groups)
        for weight in group.weights
    }
    layers = [
        node for node in program.graph.nodes
        if node.target in (LINEAR, GROUPED_LINEAR) and node.args[1].op == "get_attr" and node.args[1].target in forms
    ]  # fmt: skip

    def compress(nodes: list[fx.Node], statistics: list[Statistic]) -> dict[str, Any]:
        for weight in dict.fromkeys(node.args[1].target for node in nodes):
            dense = program.constants[weight]
            if not any(each.rows for each in statistics):
                continue
            found.of_noise[weight] = _lost(dense, dense.float() + noise(weight, dense, size, seed), statistics)
            found.by_weight[weight] = _errors_of_one(space, forms[weight], dense, statistics)
        return {}

    runner.run(program, layers, samples, compress, track=track)
    for weight, more in _of_activations(space, layers, samples[:ACTIVATIONS]).items():
        for number, error in more.items():
            if number in found.by_weight.get(weight, ()):
                found.by_weight[weight][number] += error
    names = {node.args[1].target: layer_read_by(node) for node in layers}
    for weight, numbers in forms.items():
        if weight not in found.by_weight:
            # A table that no layer is tied to, or a layer that nothing reached.
            dense = program.constants[weight]
            width = dense[0].numel() if dense.ndim == 4 else dense.shape[-1]
            alike = [_Alike(width)] * (len(dense) if dense.ndim == 3 else 1)
            found.of_noise[weight] = _lost(dense, dense.float() + noise(weight, dense, size, seed), alike)
            found.by_weight[weight] = {n: _lost(dense, _made(space.formats[n], dense, None), alike) for n in numbers}
            found.unreached += [names.get(weight, layer_name(weight))] if weight in names else []
    return found


def _of_activations(
    space: Space, layers: Sequence[fx.Node], samples: Sequence[Sequence[Tensor]]
) -> dict[str, dict[int, float]]:
    """Weight -> format's number -> e of what the format rounds of activations as it runs."""
    kinds = {
        number: {target: product.rounded for target in (LINEAR, GROUPED_LINEAR)
                 if (product := product_of(form.passes[-1].operator(target))) and product.rounded and not product.learned}
        for number, form in enumerate(space.formats) if form != FLOAT
    }  # fmt: skip
    sums: dict[tuple[str, int], list[float]] = {}

    def watch(node: fx.Node, x: Tensor) -> None:
        weight = space.base.constants[node.args[1].target]
        # Which rows an expert reads is not asked: of experts it is the error of what they read.
        through = weight.float() if weight.ndim == 2 else torch.eye(x.shape[-1])
        for number, rounded in kinds.items():
            if node.target in rounded:
                x = x.float().flatten(0, -2)
                off = (rounded[node.target](x) - x) @ through.t()
                both = sums.setdefault((node.args[1].target, number), [0.0, 0.0])
                both[0] += off.square().sum(dtype=torch.float64).item()
                both[1] += (x @ through.t()).square().sum(dtype=torch.float64).item()

    if any(kinds.values()):
        module = space.base.module()
        for sample in samples:
            observe(module, sample, inputs_of(layers, watch))
    found: dict[str, dict[int, float]] = {}
    for (weight, number), (off, whole) in sums.items():
        found.setdefault(weight, {})[number] = off / whole if whole else 0.0
    return found


def _errors_of_one(
    space: Space, numbers: Sequence[int], weight: Tensor, statistics: Sequence[Statistic]
) -> dict[int, float]:
    """Format's number -> e. Of formats that differ in the size of groups alone the first is learned, for that takes long, and
    the others are taken to be better than rounding to nearest by the same share."""
    better: dict[object, float] = {}
    found = {}
    for number in numbers:
        form = space.formats[number]
        alike = tuple(map(_without_groups, form.passes))
        plain = Format(tuple(map(_unlearned, form.passes)))
        learns = plain != form
        if not learns or alike not in better:
            found[number] = _lost(weight, _made(form, weight, statistics), statistics)
        if learns:
            nearest = _lost(weight, _made(plain, weight, None), statistics)
            if number in found:
                better[alike] = found[number] / nearest if nearest > 0 else 1.0
            else:
                found[number] = better[alike] * nearest
    return found


def _without_groups(of: PackLinears) -> str:
    return ":".join(each for each in str(of).split(":") if not each.startswith("group="))


def _unlearned(of: PackLinears) -> PackLinears:
    return replace(of, algorithm="rtn") if hasattr(of, "algorithm") else of


class _Alike:
    """Stands for a statistic in which all directions count alike."""

    def __init__(self, width: int) -> None:
        self.rows, self.mean = 1, torch.ones(width)


def _lost(weight: Tensor, made: Tensor, statistics: Sequence[Any]) -> float:
    """e of a weight, or of experts [E, N, K] together, each by the rows that reached it."""
    if weight.ndim == 2:
        return lost(weight.float(), made, statistics[0].mean)
    if weight.ndim == 4:
        return lost(weight.float().flatten(1), made.flatten(1), statistics[0].mean)
    off = whole = 0.0
    for one, other, statistic in zip(weight.float(), made, statistics, strict=True):
        if statistic.rows:
            whole += statistic.rows * energy(one, statistic.mean)
            off += statistic.rows * energy(other - one, statistic.mean)
    return off / whole if whole > 0 else 0.0


def _made(form: Format, weight: Tensor, statistics: Sequence[Statistic] | None) -> Tensor:
    """The numbers that `weight` has in the format, float32. statistics: None where there is nothing to learn from."""
    if weight.ndim == 3:
        given = statistics or [None] * len(weight)
        return torch.stack([_matrix(form, each, known) for each, known in zip(weight, given, strict=True)])
    if weight.ndim == 4:
        return _matrix(form, weight.flatten(1), None).view(weight.shape)
    return _matrix(form, weight, statistics[0] if statistics else None)


def _matrix(form: Format, weight: Tensor, statistic: Statistic | None) -> Tensor:
    made = weight
    for each in form.passes:
        kind = each.statistic()
        if kind is None or statistic is None or not statistic.rows or each.fits_data():
            parts = each.pack(made)
        elif kind is Squares or (isinstance(statistic, Hessian) and statistic.rows < weight.shape[-1]):
            parts, _ = _lighter(each).learned(made, statistic.squares())
        else:
            parts, _ = _of_one_stream(each).learned(made, statistic)
        made = each.scheme.dense(parts).to(weight.dtype)
    return made.float()


def _lighter(of: PackLinears) -> PackLinears:
    option, _, value = of.lighter.partition("=")
    return replace(of, **{option: value})


def _of_one_stream(of: PackLinears) -> PackLinears:
    """What of `of` one pass over the model as it was can tell: of algorithms that also make up for the layers before, gptq."""
    return replace(of, algorithm="gptq") if getattr(of.statistic()(1), "cross", None) is not None else of


def group_errors(group: Group, errors: Errors, weights: dict[str, float]) -> dict[int, float]:
    """The loss that each format is predicted to cost a group: the sum over its weights of e, each times its own weight."""
    forms = set.intersection(*(set(errors.by_weight[each]) for each in group.weights))
    return {n: sum(weights[each] * errors.by_weight[each][n] for each in group.weights) for n in sorted(forms)}
