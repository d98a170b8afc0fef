"""A language model lowered for CUDA, its kernels run by the interpreter: lowered_interpreted.py PASSES DTYPE [PASSES DTYPE]...

A script, because the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, and for the whole process.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import mma_emulation
import torch
from families import _causal
from lowered import for_cuda

from fxc import optimize
from fxc.data.samples import samples

# Of the result's norm. Left out: fp8, because the interpreter's conversion to it is at fault (triton_interpreted.py).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check(passes: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _causal("Qwen2Config", num_hidden_layers=1).eval().to(dtype)
    program = optimize(model, passes=passes, verify=False, budget=9, layer_budget=9).program
    module, _ = for_cuda(program)
    for inputs in samples(program)[:1]:
        for got, expected in zip(module(*inputs), program.module()(*inputs), strict=True):
            error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
            assert error < TOLERANCE[dtype], (passes, dtype, error.item())


if __name__ == "__main__":
    mma_emulation.install()
    for passes, dtype in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        check(passes, getattr(torch, dtype))
