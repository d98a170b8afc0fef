"""What training takes of memory, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxc.calibrate.blocks import blocks
from fxc.calibrate.needs import nbytes_of, symbols_of
from fxc.errors import ResourceError
from fxc.ir.program import Program
from fxc.memory import available
from fxc.train.batches import is_batched


@dataclass(frozen=True)
class Needs:
    """Bytes, besides the program, its teacher and the samples. numbers: masters, gradients, two moments and the best state of
    what is trained, float32; values: what the program computes of as many samples as go together, all of it kept for the
    gradient; together: how many these are."""

    numbers: int
    values: int
    together: int

    @property
    def total(self) -> int:
        return self.numbers + self.values

    def __str__(self) -> str:
        samples = "one sample" if self.together == 1 else f"{self.together} samples"
        numbers, values, total = (each / 1e6 for each in (self.numbers, self.values, self.total))
        return (
            f"{numbers:.1f} MB for weights, gradients, moments and the best state and {values:.1f} MB for what {samples} give "
            f"in all layers: {total:.1f} MB of memory"
        )

    def check(self, where: str) -> None:
        """Raises `ResourceError` where there is not so much memory. where: what needs it."""
        left = available()
        if left is None or self.total <= left:
            return
        values = "accumulate=, which takes a batch in parts, " if self.together > 1 else ""
        values += "checkpointing=true, or shorter samples"
        numbers = "method=blocks, method=norms, or lora=, which train fewer numbers at once"
        raise ResourceError(
            f"training needs {self.total / 1e9:.2f} GB of memory and {left / 1e9:.2f} GB are left",
            where=where,
            why=self,
            hint=values if self.values > self.numbers else numbers,
        )


def needs_of(
    program: Program, numbers: int, samples: Sequence[Sequence[Tensor]], batch: int, in_blocks: bool = False
) -> Needs:
    """Of training so many numbers of `program`, with `batch` samples computed together where its batch varies. Of a size that
    depends on data nothing is known: it counts as 1. Weights that are rounded for each step come on top. in_blocks: of the
    values those between blocks are kept, and those of one block."""
    largest = max(samples, key=lambda sample: sum(each.numel() for each in sample))
    sizes = symbols_of(program, largest)

    def bytes_of(nodes: Iterable[fx.Node]) -> int:
        return sum(nbytes_of(node.meta.get("val"), sizes) for node in nodes if node.op == "call_function")

    cut = blocks(program, packed=True) if in_blocks else []
    if len(cut) > 1:
        between = dict.fromkeys(each for block in cut for each in block.reads)
        values = bytes_of(between) + max(bytes_of(block.nodes) for block in cut)
    else:
        values = bytes_of(program.graph.nodes)
    together = min(batch, len(samples)) if any(is_batched(program, largest)) else 1
    return Needs(5 * 4 * numbers, values * together, together)
