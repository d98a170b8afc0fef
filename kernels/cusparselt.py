"""Products of many rows with 2:4 sparse weights through cuSPARSELt, where this build of torch has it.

It reads a form of its own, another 0.56 of a dense copy (0.63 for int8), so it is made only when asked for: `compress`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE_ROWS = 512
"""From so many rows (tokens) on it is used. Published measurements on an H100 put the crossover with dense bfloat16 between 256
and 512 rows; this project has not measured it."""
# What torch.sparse's SparseSemiStructuredTensorCUSPARSELT asks of the weight's rows and columns, and of the rows of x.
MULTIPLES = {torch.bfloat16: (16, 8), torch.float16: (16, 8), torch.int8: (32, 16)}


def is_available() -> bool:
    return torch.backends.cusparselt.is_available()


def fits(outputs: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt multiplies a weight [outputs, columns] of `dtype`."""
    return dtype in MULTIPLES and outputs % MULTIPLES[dtype][0] == 0 and columns % MULTIPLES[dtype][0] == 0


def compress(weight: Tensor) -> Tensor:
    """A dense 2:4 weight [N, K] on a GPU -> cuSPARSELt's form of it [N, ...], of the same dtype.

    Raises ValueError for a shape or dtype that `fits` declines, RuntimeError where there is no cuSPARSELt.
    """
    if not fits(*weight.shape, weight.dtype):
        raise ValueError(
            f"cuSPARSELt takes bfloat16, float16 (rows and columns multiples of 16) and int8 (of 32), not {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    if not is_available():
        raise RuntimeError("this build of torch has no cuSPARSELt: leave the weight as it is")
    return torch._cslt_compress(weight.contiguous())


def product(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ W^T -> [M, N]: x's dtype with the bias added, or for int8 the int32 sums (and no bias)."""
    missing = -x.shape[0] % MULTIPLES[x.dtype][1]
    rows = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    sums = {"out_dtype": torch.int32} if x.dtype == torch.int8 else {}
    bias = None if bias is None else bias.to(x.dtype)
    out = torch._cslt_sparse_mm(compressed, rows.t(), bias=bias, transpose_result=True, **sums)
    return out[: x.shape[0]]
