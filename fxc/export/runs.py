"""What a program gives on made-up inputs, to compare with what another tool makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxc.data.samples import samples
from fxc.ir.observe import run
from fxc.ir.program import Program

TWO_BYTES = (torch.bfloat16, torch.float16)


def runs(program: Program, *, is_wide: bool = False) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """(inputs, outputs) at the sizes of capture and at others, as `samples` has them: those that the program takes. is_wide:
    whether it is `in_float32` of another, and takes float32 where that takes less."""
    for number, inputs in enumerate(samples(program)):
        if is_wide:
            inputs = [t.float() if t.dtype in TWO_BYTES else t for t in inputs]
        try:
            outputs = run(program, inputs)
        except Exception:
            # Sizes that vary one by one need not do so together: a flattened picture has one number of features.
            if number == 0:
                raise
            continue
        yield inputs, outputs
