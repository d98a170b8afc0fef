"""Linear layers and convolutions in whose weights a share of all numbers is zero, wherever they stand.

    constant @up.weight: f32[2, 4]
    values @up.weight[0] = 1
    values @up.weight[1] = 2
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.weight: f32[2, 4]
    values @up.weight[0] = 0
    values @up.weight[1] = 2
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from fxc.calibrate import gradients, prune
from fxc.calibrate.masks import keep_share, keep_share_of_pieces
from fxc.calibrate.needs import Needs
from fxc.calibrate.ranking import Ranking, relative
from fxc.calibrate.stages import Statistic
from fxc.errors import UsageError
from fxc.ir.names import layer_at, layer_name
from fxc.ir.program import Program
from fxc.mapped import pieces
from fxc.passes.base import Context, Fact, Result, check_data_is_given
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED
from fxc.passes.float_weights import CONVOLUTIONS, FloatWeights, checked
from fxc.passes.learned_linears import learned_note
from fxc.passes.learning import announce_backward, learn

# So much of a weight is looked at at once.
_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Sparsify(FloatWeights):
    """Set a share of the numbers to zero in the weights of linear layers, experts and convolutions, wherever they stand. The
    weights stay dense floats, as large and as fast as before: int4 and int8 keep the zeros, and pack stores them small.

    sparsity: the share that is zero afterwards, as 0.5.
    criterion: which go. magnitude: the smallest. From calibration data learn wanda: in each row the smallest times the norm of
    what they meet (Wanda, arXiv 2306.11695); sparsegpt: those whose going the others can best make up for, which they do
    (SparseGPT, arXiv 2301.00774), then all that stay are fitted once more to what the layer gave; gradual: as sparsegpt, in
    rounds, with a fit after each (arXiv 2401.02938), which takes some times as long and leaves less error; and taylor: those by
    whose going the loss changes least, to first order (Molchanov et al., CVPR 2019), which takes the memory of a gradient and a
    score for each number. wanda, sparsegpt and gradual take linear layers in the order in which they run, each by what it reads
    behind sparse ones, and leave convolutions as they are. A layer that no sample reaches loses its smallest numbers.
    scope: layer takes the same share of each layer. global ranks the numbers of all layers together, so that some lose more: by
    taylor as they are, by the others as LAMP does (arXiv 2010.07611), each squared score as a share of those in its layer that
    are not smaller; those three then see the data twice.
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in sparsify:only=*.mlp.
    """

    sparsity: float = 0.5
    criterion: Literal["magnitude", "wanda", "sparsegpt", "gradual", "taylor"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"

    name: ClassVar[str] = "sparsify"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS, UNSCALED})
    # How much goes is what the user says: it is measured, reported, and limited only by --budget.
    limits: ClassVar[tuple[float, float]] = (float("inf"), float("inf"))

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity={self.sparsity} is not between 0 and 1", where="sparsify", hint="0.5 is half of all")

    def uses_data(self) -> bool:
        return self.criterion != "magnitude"

    def needs_data(self) -> str | None:
        return f"criterion={self.criterion} is" if self.uses_data() else None

    def run(self, program: Program, context: Context) -> Result:
        result = Result()
        chosen = self.chosen(program, context, result)
        if self.scope == "layer":
            # Ranked together, all of them are one rewrite.
            chosen = {fqn: chosen[fqn] for fqn in context.rewrites.first(chosen, str, layer_name)}
        if program.is_on_meta:
            result.changed = len(chosen)
            return result
        check_data_is_given([self], not self.uses_data() or bool(context.samples))
        if self.criterion in prune.STATISTICS:
            self._learn(program, chosen, context, result)
        else:
            self._rank(program, chosen, context)
        result.changed = len(chosen)
        zeros, count = _zeros(program.constants[fqn] for fqn in chosen)
        if count:
            said = f"{zeros:,} of {count:,} numbers are zero ({zeros / count:.1%})"
            result.notes.append(f"{said}: by itself that saves neither bytes nor time, the weights are dense floats as before")
        return result

    def declines(self, node: fx.Node) -> str | None:
        if node.target in CONVOLUTIONS and self.criterion in prune.STATISTICS:
            return f"a convolution, and criterion={self.criterion} is of linear layers: use magnitude or taylor"
        return None

    def _rank(self, program: Program, chosen: dict[str, list[fx.Node]], context: Context) -> None:
        """Prune by scores that are known beforehand."""
        if self.criterion == "taylor":
            announce_backward(self, program, context, sum(program.constants[fqn].numel() for fqn in chosen))
            samples = context.track(context.samples, "scoring numbers by taylor", len(context.samples))
            scored = gradients.scores(program, chosen, samples, context.seed)
        ranking = Ranking()
        for fqn in chosen if self.scope == "global" else ():
            by = scored[fqn] if self.criterion == "taylor" else relative(checked(fqn, program.constants[fqn]).square())
            ranking.add(fqn, by)
        shares = ranking.shares(self.sparsity)
        for fqn in chosen:
            weight, share = program.constants[fqn], shares.get(fqn, self.sparsity)
            if self.criterion == "taylor":
                made = torch.where(keep_share(scored[fqn], share, by_row=False), weight, 0)
            else:
                made = _without_smallest(fqn, weight, share, Tensor.square)
            program.constants[fqn] = made

    def _learn(self, program: Program, chosen: dict[str, list[fx.Node]], context: Context, result: Result) -> None:
        """Prune by what the layers read in the samples, each behind layers that are sparse already."""
        layers = [node for nodes in chosen.values() for node in nodes]
        statistic, samples = prune.STATISTICS[self.criterion], context.samples
        ranking, errors, seen = Ranking(), {}, set()

        def rank(nodes: list[fx.Node], statistics: list[Statistic]) -> dict[str, Any]:
            fqns = list(dict.fromkeys(node.args[1].target for node in nodes))
            for fqn in fqns:
                for matrix, each in zip(_matrices(program.constants[fqn]), statistics, strict=True):
                    ranking.add(fqn, relative(prune.costs(self.criterion, matrix, each)))
            return {"counts": {fqn: ranking.counts[fqn] for fqn in fqns}}

        def restore_rank(nodes: list[fx.Node], found: dict[str, Any]) -> None:
            ranking.counts.update(found["counts"])

        def compress(nodes: list[fx.Node], statistics: list[Statistic]) -> dict[str, Any]:
            done: dict[str, Any] = {"weights": {}, "errors": {}}
            for fqn in dict.fromkeys(node.args[1].target for node in nodes):
                weight, made = program.constants[fqn], []
                for matrix, each in zip(_matrices(weight), statistics, strict=True):
                    share = shares.get(fqn, self.sparsity)
                    if not each.rows:
                        made.append(_without_smallest(fqn, matrix, share, Tensor.abs))
                        continue
                    found = prune.learned(self.criterion, matrix, each, sparsity=share)
                    made.append(found.weight.to(weight.dtype))
                    done["errors"][fqn] = max(found.error, done["errors"].get(fqn, 0.0))
                done["weights"][fqn] = torch.stack(made).view(weight.shape)
            restore(nodes, done)
            return done

        def restore(nodes: list[fx.Node], done: dict[str, Any]) -> None:
            program.constants.update(done["weights"])
            seen.update(done["weights"])
            errors.update(done["errors"])

        def run(*arguments: Any, what: str = "learns") -> Needs:
            return learn(self, program, layers, context, *arguments, statistic=statistic, lighter="criterion=wanda", what=what)

        if self.scope == "global":
            run(rank, restore_rank, what="ranks")
        shares = ranking.shares(self.sparsity)
        needs = run(compress, restore)
        for fqn in chosen.keys() - seen:
            # What reads it reads nothing but constants.
            program.constants[fqn] = _without_smallest(fqn, program.constants[fqn], self.sparsity, Tensor.abs)
        named = {fqn: layer_at(program, nodes[0]) for fqn, nodes in chosen.items()}
        if errors:
            result.notes.append(learned_note({named[fqn]: e for fqn, e in errors.items()}, len(samples), needs))
        if unreached := [fqn for fqn in chosen if fqn not in errors]:
            result.notes.append(f"no sample reached {', '.join(named[fqn] for fqn in unreached)}: the smallest numbers went")


def _matrices(weight: Tensor) -> Iterable[Tensor]:
    """[..., N, K] -> each [N, K]: one, or one for each expert."""
    return weight.reshape(-1, *weight.shape[-2:]).unbind(0)


def _without_smallest(fqn: str, weight: Tensor, share: float, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Looked at piece by piece: sorted it would take ten times its memory."""

    def scores() -> Iterable[Tensor]:
        return (score(checked(fqn, piece)) for piece in pieces(weight, _AT_ONCE))

    made, at = torch.empty_like(weight, memory_format=torch.contiguous_format), 0
    kept = keep_share_of_pieces(scores, share, weight.numel())
    for piece, keep in zip(pieces(weight, _AT_ONCE), kept, strict=True):
        made[at : at + len(piece)] = torch.where(keep, piece, 0)
        at += len(piece)
    return made


def _zeros(weights: Iterable[Tensor]) -> tuple[int, int]:
    """How many numbers are zero, and of how many."""
    others = count = 0
    for weight in weights:
        others += sum(int(piece.count_nonzero()) for piece in pieces(weight, _AT_ONCE))
        count += weight.numel()
    return count - others, count
