"""The sizes and values that a program is exported with, and what it gives for them, which another tool has to give too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxc.data.samples import samples
from fxc.export.packed import without_rounding
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.verify.compare import difference

TWO_BYTES = (torch.bfloat16, torch.float16)
_AT_LEAST, _AT_MOST = 0.02, 0.1


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


def rounded_apart(program: Program) -> float:
    """The relative error that outputs may have in another tool because activations are rounded as the model runs: the order of
    a sum decides where a number is rounded to, and that what comes after it. Both have noise of one size, perhaps two draws of
    it: the square root of 2 times what rounding does to the outputs. Wrong numbers or scales give some tenths."""
    plain = without_rounding(program)
    noise = max(difference(outputs, run(plain, inputs)).error for inputs, outputs in runs(program, is_wide=True))
    return min(max(_AT_LEAST, 1.5 * noise), _AT_MOST)
