"""Packing the weights of linear layers by what they meet in samples, each layer behind those that are packed already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxc.calibrate.hessian import Hessian
from fxc.calibrate.needs import Needs
from fxc.calibrate.reconstruct import Fit
from fxc.calibrate.signround import learn_rounding
from fxc.calibrate.stages import Statistic
from fxc.calibrate.stream import Passage
from fxc.ir.names import layer_name, layer_read_by
from fxc.ir.program import Program
from fxc.passes.base import Context, Result
from fxc.passes.learning import learn
from fxc.schemes.scheme import LINEAR

if TYPE_CHECKING:
    from fxc.passes.linears import PackLinears

# So many layers are named as the worst.
WORST = 3
Parts = dict[str, Any]
"""The parts of a weight, tensors, and what else of a product's arguments was learned with them, numbers."""


class Learning:
    """One run of a pass that packs by data. packed: of each weight its parts, by the names of their constants."""

    def __init__(
        self, of: PackLinears, program: Program, context: Context, packed: dict[str, Parts], result: Result
    ) -> None:
        self.of, self.program, self.context, self.packed, self.result = of, program, context, packed, result
        self.errors: dict[str, float] = {}
        self.unreached: list[str] = []
        self.few: list[str] = []
        self.fits: list[Fit] = []
        self.seen: set[str] = set()

    def run(self, chosen: list[fx.Node]) -> None:
        """Pack the weights of the layers `chosen`, and say in the result's notes what became of them."""
        planned = {node.args[1].target: node for node in chosen}
        needs = learn(
            self.of, self.program, chosen, self.context, self._compress, self._restore,
            statistic=self.of.statistic(), lighter=self.of.lighter, finish=self._finish if self.of.training() else None,
            result=sum(self.of.packed_bytes(self.of.weight(self.program, node)) for node in planned.values()),
        )  # fmt: skip
        for node in chosen:
            if node.name not in self.seen:
                # It reads nothing but constants.
                if self.of.is_lost_without_data(node, self.result):
                    continue
                self.unreached.append(layer_read_by(node))
                self.of.rewrite(self.program, node, self.packed, self.result, self.of.pack)
        self._note(needs)

    def _compress(self, layers: list[fx.Node], statistics: list[Statistic]) -> dict[str, Any]:
        reached = any(each.rows for each in statistics)
        made: dict[str, Any] = {"reached": reached, "parts": {}, "errors": {}, "few": [], "cut_off": {}}

        def pack(name: str, weight: Tensor) -> Parts:
            if not reached:
                made["parts"][name] = self.of.pack(weight)
            elif weight.ndim == 3:
                made["parts"][name], made["errors"][name] = learned_experts(self.of, name, weight, statistics, made["few"])
            else:
                parts, made["errors"][name] = self.of.learned(weight, statistics[0])
                made["parts"][name] = parts
                if (share := self.of.cut_off(parts, statistics[0])) is not None:
                    made["cut_off"][name] = share
            return made["parts"][name]

        self._put(layers, made, pack)
        return made

    def _restore(self, layers: list[fx.Node], made: dict[str, Any]) -> None:
        if layers:
            self._put(layers, made, lambda name, weight: made["parts"][name])
        else:
            self._settle(made)

    def _put(self, layers: Sequence[fx.Node], made: dict[str, Any], pack: Callable[[str, Tensor], Parts]) -> None:
        self.seen.update(node.name for node in layers)
        for node in layers:
            if not made["reached"] and self.of.is_lost_without_data(node, self.result):
                continue
            self.of.rewrite(self.program, node, self.packed, self.result, partial(pack, layer_read_by(node)))
        self.errors.update(made["errors"])
        self.result.cut_off.update(made["cut_off"])
        self.few.extend(made["few"])
        self.unreached.extend(name for name in made["parts"] if name not in made["errors"])

    def _finish(self, passage: Passage) -> dict[str, Any]:
        """Train how the weights of a block were rounded."""
        own, roundings = passage.own, {}
        layers = [node for node in passage.nodes if node.target is LINEAR]
        for weight in dict.fromkeys(each.args[1].target for each in layers if each.args[1].op == "get_attr"):
            if weight not in self.packed or weight not in own:
                continue
            named = self.packed[weight].items()
            parts = {p: self.program.constants[each] if isinstance(each, str) else each for p, each in named}
            if found := self.of.rounding(passage.program.constants[weight], parts):
                roundings[weight] = found
        what = f"learning to round {', '.join(map(layer_name, roundings))}"
        options = {"steps": self.of.training(), "seed": self.context.seed, "track": self.context.track, "what": what}
        fit = learn_rounding(passage, roundings, **options) if roundings else None
        weights = {weight: self.of.settled(each.made()) for weight, each in roundings.items()} if fit else {}
        made = {"weights": weights, "fit": vars(fit) if fit else None}
        self._settle(made)
        return made

    def _settle(self, made: dict[str, Any]) -> None:
        for weight, parts in made["weights"].items():
            self.program.constants.update({self.packed[weight][part]: tensor for part, tensor in parts.items()})
        if made["fit"]:
            self.fits.append(Fit(**made["fit"]))

    def _note(self, needs: Needs) -> None:
        notes, fits = self.result.notes, self.fits
        if self.errors:
            notes.append(learned_note(self.errors, len(self.context.samples), needs, self.of.error_of))
        if fits:
            better = [fit for fit in fits if fit.after < fit.before]
            shares = [(sum(each) / len(fits)) ** 0.5 for each in ([fit.before for fit in fits], [fit.after for fit in fits])]
            said = f"errors of blocks on held-out samples {shares[0]:.2%} -> {shares[1]:.2%}"
            notes.append(f"rounding learned in {len(better)} of {len(fits)} blocks, no better in the others: {said}")
        if self.unreached:
            notes.append(f"no sample reached {', '.join(self.unreached)}: as without data")
        if self.few:
            names = ", ".join(self.few)
            notes.append(f"experts that fewer tokens reach than they have columns, by {self.of.lighter}: {names}")


def learned_experts(
    of: PackLinears, name: str, weight: Tensor, statistics: list[Statistic], few: list[str]
) -> tuple[dict[str, Tensor], float]:
    """As `PackLinears.learned`, of the experts [E, N, K] one by one. few: takes the names of those that fewer rows reached than
    they have columns: what a Hessian of so few makes is worse than rounding to nearest, so that the lighter option is used."""
    made = []
    for at, (one, statistic) in enumerate(zip(weight, statistics, strict=True)):
        if not statistic.rows:
            few.append(f"{name}[{at}] (none: as without data)")
            made.append((of.pack(one), 0.0))
        elif isinstance(statistic, Hessian) and statistic.rows < one.shape[-1]:
            few.append(f"{name}[{at}] ({statistic.rows})")
            option, _, value = of.lighter.partition("=")
            made.append(replace(of, **{option: value}).learned(one, statistic.squares()))
        else:
            made.append(of.learned(one, statistic))
    parts = {part: torch.stack([each[part] for each, _ in made]) for part in made[0][0]}
    rows = [statistic.rows for statistic in statistics]
    return parts, sum(error * count for (_, error), count in zip(made, rows)) / sum(rows)


def learned_note(errors: dict[str, float], count: int, needs: Needs, error_of: str = "outputs") -> str:
    """What a report says of layers that were learned from `count` samples. errors: of their `error_of`, shares of energy."""
    worst = sorted(errors, key=errors.get, reverse=True)[:WORST]
    said = ", ".join(f"{name} {errors[name] ** 0.5:.1%}" for name in worst)
    return f"learned from {count} samples, with {needs}; the largest errors of {error_of}: {said}"
