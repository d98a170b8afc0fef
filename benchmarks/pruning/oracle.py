"""Whether the sliced model computes what the masked one does, in float64, where caches have lost heads too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxc.data.decoder import decoder_sample, without_past
from fxc.data.samples import samples
from fxc.ir.cache import as_past, has_cache, is_causal_lm, is_past, is_present
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.passes.float64 import in_float64
from fxc.verify.compare import relative_error

# Beyond this the masked and the sliced model are not the same function.
EXACT = 1e-10


def exactness(masked: Program, sliced: Program) -> tuple[float, int]:
    """The largest relative difference of the outputs in float64, and at how many sizes. The cache that the masked program is
    given loses the heads that the sliced program's cache has lost, and so does the cache that it returns."""
    wide = in_float64(masked), in_float64(sliced)
    if None in wide:
        raise ValueError("it has no form in float64")
    programs = [named(each) for each in wide]
    kept: dict[str, Tensor] = {}
    if has_cache(masked):
        empty = decoder_sample(masked, 2, 7, 0) if is_causal_lm(masked) else without_past(masked, samples(masked)[0])
        given = dict(zip((i.name for i in masked.signature.inputs), empty, strict=True))
        sizes = {n.target: n.meta["val"].shape for n in sliced.placeholders}
        outputs = programs[0](given), programs[1](fitted(given, sliced, {}, sizes))
        kept = {as_past(name): survivors(*(o[name] for o in outputs)) for name in outputs[1] if is_present(name)}
    worst, count = 0.0, 0
    for number, tensors in enumerate(samples(masked)):
        given = dict(zip((i.name for i in masked.signature.inputs), tensors, strict=True))
        try:
            expected = programs[0](given)
        except Exception:
            if number == 0:
                raise
            continue  # a size that the model itself does not take
        found = programs[1](fitted(given, sliced, kept))
        if lost := [name for name in expected.keys() - found.keys() if not is_present(name)]:
            raise ValueError(f"the sliced model has lost the outputs {', '.join(lost)}")
        expected = {name: chosen(as_past(name), tensor, kept) for name, tensor in expected.items()}
        worst = max(worst, relative_error(list(found.values()), [expected[name] for name in found]))
        count += 1
    return worst, count


def survivors(before: Tensor, after: Tensor) -> Tensor:
    """For each head of `after` [B, h, S, D], which one of `before` [B, H, S, D] it is: the one with its numbers."""
    rows = before.transpose(0, 1).flatten(1), after.transpose(0, 1).flatten(1)
    distance, nearest = torch.cdist(rows[1], rows[0], compute_mode="donot_use_mm_for_euclid_dist").min(1)
    if (distance > 1e-6 * rows[0].norm(dim=1).max()).any():
        raise ValueError("a head of the sliced model's cache is none of the masked model's")
    return nearest


def named(program: Program) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The program over tensors by name, those of floating point made float64."""

    def call(given: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = [given[i.name] for i in program.signature.inputs]
        outputs = run(program, [t.double() if t.is_floating_point() else t for t in flat])
        return dict(zip(program.signature.outputs, outputs, strict=True))

    return call


def chosen(name: str, tensor: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """`tensor`, of a cache only the heads that are `kept`."""
    return tensor[:, kept[name]] if name in kept else tensor


def fitted(given: dict[str, Tensor], program: Program, kept: dict[str, Tensor], empty: Any = None) -> dict[str, Tensor]:
    """The inputs of `program` out of those of a program whose cache has more heads. empty: the cache is, so that any heads
    do."""
    fit = {i.name: chosen(i.name, given[i.name], kept) for i in program.signature.inputs}
    if empty is not None:
        for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
            if is_past(declared.name):
                fit[declared.name] = fit[declared.name][:, : node.meta["val"].shape[1]]
    return fit
