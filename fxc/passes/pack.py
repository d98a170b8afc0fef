"""Constants that an artifact holds coded, and weights whose numbers share the few values of a codebook.

The program's metadata say that its "storage" is "coded"; what it computes with are constants as before.

    passes pack:codebook=16
    constant @up.weight: f32[2, 4]
    values @up.weight[0] = 1
    values @up.weight[1] = 2
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.weight: f32[2, 4]
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxc.calibrate.codebook import clustered
from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.ir.names import layer_name
from fxc.ir.program import Program, users_of
from fxc.passes.base import Context, Fact, Result
from fxc.passes.facts import CANONICAL, DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.float_weights import FloatWeights, checked

SIZES = (16, 256)
# A bias with so many times the numbers of a codebook shares values too.
LONG = 3


@dataclass(frozen=True)
class Pack(FloatWeights):
    """Store the constants small, and expand them when they are loaded: this saves bytes on disk and nothing else, in memory and
    in time the model is as before (Deep Compression, Han et al., arXiv 1510.00149).

    What is not zero is stored with its place, and all of it in Huffman codes, without loss; packed weights of other passes too.
    codebook: before that, let the weights of linear layers, experts and convolutions that are still floats, and biases that are
    long beside it, share so many values each, 16 to 256: the centroids of their numbers by k-means, zeros aside. 0 leaves the
    numbers as they are.
    only: patterns of the layers that share values, separated by ";", globs or "re:...". Stored small is everything.
    """

    codebook: int = 0

    name: ClassVar[str] = "pack"
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    # What prunes or quantizes floats does so before.
    breaks: ClassVar[frozenset[Fact]] = frozenset({FLOAT_WEIGHTS, DENSE_WEIGHTS})

    def __post_init__(self) -> None:
        if self.codebook and not SIZES[0] <= self.codebook <= SIZES[1]:
            raise UsageError(f"codebook={self.codebook} is not from {SIZES[0]} to {SIZES[1]}", where="pack", hint="0 for none")
        if self.only and not self.codebook:
            raise UsageError("only= is of a codebook", where="pack", hint="give codebook=32, or leave only= out")

    def run(self, program: Program, context: Context) -> Result:
        result = Result(changed=0 if program.is_stored_coded else len(program.constants))
        program.metadata["storage"] = "coded"
        result.notes.append("smaller on disk alone: once loaded the model is as large and as fast as before")
        chosen = self.chosen(program, context, result) if self.codebook else {}
        chosen = {fqn: chosen[fqn] for fqn in context.rewrites.first(chosen, str, layer_name)}
        for fqn in [*chosen, *self._biases(program, chosen)]:
            if not program.is_on_meta:
                checked(fqn, program.constants[fqn])
                program.constants[fqn] = clustered(program.constants[fqn], self.codebook)
        result.changed += len(chosen)
        return result

    def _biases(self, program: Program, chosen: dict[str, list[fx.Node]]) -> list[str]:
        """The biases of the layers that share values: those that are many times longer than a codebook."""
        read = (Call(node).get("bias") for nodes in chosen.values() for node in nodes)
        names = dict.fromkeys(bias.target for bias in read if isinstance(bias, fx.Node) and bias.op == "get_attr")
        alone = (fqn for fqn in names if len(users_of(program, fqn)) == 1)
        return [fqn for fqn in alone if program.constants[fqn].numel() >= LONG * self.codebook]
