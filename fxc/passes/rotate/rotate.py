"""The residual stream in other coordinates, in which no channel stands out: what is rounded afterwards loses less.

    constant @table.weight: f32[5, 2]
    constant @n.weight: f32[2]
    constant @head.weight: f32[3, 2]
    values @n.weight[:] = 2
    %0: i64[s0] = input "ids"
    %1: f32[s0, 2] = aten.embedding(@table.weight, %0)  # table
    %2: f32[s0, 2] = aten.rms_norm(%1, [2], @n.weight)  # n
    %3: f32[s0, 3] = aten.linear(%2, @head.weight)  # head
    return "out" %3
    ---
    constant @head.weight: f32[3, 2]
    constant @table.weight: f32[5, 2]
    %0: i64[s0] = input "ids"
    %1: f32[s0, 2] = aten.embedding(@table.weight, %0)  # table
    %2: f32[s0, 2] = aten.rms_norm(%1, [2])  # n (rotate)
    %3: f32[s0, 3] = aten.linear(%2, @head.weight)  # head
    return "out" %3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from fxc.ir.edit import sweep
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Pass, Refusal, Result
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS, FULL_PRECISION, UNSCALED
from fxc.passes.rotate.find import heads, streams
from fxc.passes.rotate.hadamard import rotation
from fxc.passes.rotate.stream import Stays, Stream
from fxc.passes.rotate.turn import check_dense, turn

# Of a cache input, [B, heads, P, width].
WIDTH = 3


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate channels by a randomised Hadamard matrix (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406, without
    training): what writes them and what reads them turn together, so that nothing changes but which numbers are rounded.

    stream: the residual stream. The gains of norms become a part of the layers that read them. Before layer norms the layers
    that write lose their mean, which the norms would subtract. A table that is tied to a head has a copy then. heads: the
    values of attention, each head by the same matrix, where layers write and read them. A decoder's cache holds them rotated
    then, which no other model can read. What something else than linear maps, norms and attention touches, or what the model
    returns, stays as it is.
    of: stream, heads, or all of it. seed: of the signs of the Hadamard matrix, and of the rotation that stands in where a width
    is no power of two; the seed of the compilation is added to it.
    """

    of: Literal["all", "stream", "heads"] = "all"
    seed: int = 0

    name: ClassVar[str] = "rotate"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FULL_PRECISION, DENSE_WEIGHTS, UNSCALED})
    rounds: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        result, copies = Result(), Counter()
        if self.of in ("all", "stream"):
            self._rotate(program, context, streams, "the stream of {} channels", result, copies)
        if self.of in ("all", "heads"):
            self._rotate(program, context, heads, "values in heads of {}", result, copies)
        sweep(program)
        if copies:
            more = sum(copies.values()) / 1e6
            result.notes.append(f"{', '.join(copies)}: read in ways that now differ, one copy for each: {more:.2f} MB more")
        if result.interface.turned:
            result.notes.append(f"the cache holds rotated values in {len(result.interface.turned)} layers")
        return result

    def _rotate(
        self, program: Program, context: Context, find: Callable[[Program], list[Stream]], what: str, result: Result,
        copies: Counter[str],
    ) -> None:  # fmt: skip
        for stream in find(program):
            try:
                stream.trace()
                check_dense(program, stream)
            except Stays as why:
                result.refusals.append(Refusal(stream.named(), f"{what.format(stream.atom.size)}: not rotated: {why}"))
                continue
            if not context.rewrites.may(stream.named()):
                break
            matrix = rotation(stream.atom.size, self.seed + context.seed)
            copies += turn(program, stream, matrix.to("meta") if program.is_on_meta else matrix)
            result.interface.turn({name: {WIDTH: matrix} for name in stream.cached})
            result.changed += len(stream.writers) + len(stream.readers)
