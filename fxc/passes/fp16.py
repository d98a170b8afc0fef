"""Weights that are still float32, and what is computed of them, in float16; norms and softmax in float32.

    constant @norm.weight: f32[8]
    constant @up.weight: f32[16, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 8] = aten.rms_norm(%0, [8], @norm.weight)  # norm
    %2: f32[s0, 16] = aten.linear(%1, @up.weight)  # up
    return "out" %2
    ---
    constant @norm.weight: f32[8]
    constant @up.weight: f16[16, 8]
    %0: f32[s0, 8] = input "x"
    %1: f32[s0, 8] = aten.rms_norm(%0, [8], @norm.weight)  # norm
    %2: f16[s0, 8] = aten.to.dtype(%1, f16)  # norm (fp16)
    %3: f16[s0, 16] = aten.linear(%2, @up.weight)  # up
    %4: f32[s0, 16] = aten.to.dtype(%3, f32)  # up (fp16)
    return "out" %4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxc.passes.half import Half


@dataclass(frozen=True)
class Fp16(Half):
    """Keep and compute in float16 what is still float32: half of the bytes, 11 bits of precision, numbers up to 65504; a weight
    above that is refused. Norms, softmax, sums and powers are computed in float32, inputs and outputs keep their types. After
    int8, int4 and the like it is for what they leave. (--dtype float16 casts the whole model before it is captured.)
    only: patterns of the layers that it is for, separated by ";", globs or "re:...", as in fp16:only=*.mlp.
    """

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16
