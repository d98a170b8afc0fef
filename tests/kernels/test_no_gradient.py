"""Operators that have no gradient run where one could be asked for, and refuse when it is."""

import pytest
import torch
from torch import nn
from torch._ops import OpOverload

import fxc
from fxc.schemes import fp8, int4, int4_sparse24, int8, int8_sparse24, ops, sparse24
from fxc.schemes.scheme import EMBEDDING, SCHEMES

N, K = 32, 64
SPECS = [
    "int8", "int8:mode=weight_only", "int4:group=32", "fp8", "fp8:mode=weight_only", "sparse24", "sparse24,int8",
    "sparse24,int4:group=32",
]  # fmt: skip


def arguments() -> dict[OpOverload, tuple]:
    """What follows x, [5, K] or of `SHAPES`, in a call of each operator that has no gradient."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    sparse = sparse24.mask_by_magnitude(weight)
    values, meta = sparse24.pack(sparse)
    q, scale = int8.quantize_weight(weight)
    q8, scale8 = fp8.quantize_weight(weight)
    low = {bits: int4.quantize_weight(weight, 32, True, bits=bits)[:2] for bits in int4.SCHEMES}
    sparse_q, sparse_scale = int8.quantize_weight(values)
    offsets = torch.tensor([3, 5], dtype=torch.int32)
    experts = torch.stack([weight, weight])
    return {
        int8.LINEAR: (q, scale, None),
        int8.WEIGHT_ONLY: (q, scale, None),
        int8.STATIC_CONV2D: (q[:, :, None, None], scale, None, [1, 1], [0, 0], [1, 1], 1, 0.04, 128),
        int8.STATIC: (q, scale, None, 0.04, 128),
        int8.GROUPED: (torch.stack([q, q]), torch.stack([scale, scale]), offsets),
        **{int4.SCHEMES[bits].products[0].operator: (q, scale, None, None, 32) for bits, (q, scale) in low.items()},
        fp8.LINEAR: (q8, scale8, None),
        fp8.WEIGHT_ONLY: (q8, scale8, None),
        fp8.STATIC: (q8, scale8, None, 0.0125),
        sparse24.LINEAR: (values, meta, None),
        int4_sparse24.LINEAR: (*int4_sparse24.quantize_weight(weight, 32, True), None, 32),
        int8_sparse24.LINEAR: (sparse_q, meta, sparse_scale, None),
        ops.GROUPED_MM: (experts.transpose(1, 2), offsets),
    }


ARGUMENTS = arguments()
SHAPES = {int8.STATIC_CONV2D: (2, K, 3, 3)}


@pytest.mark.parametrize("op", ARGUMENTS, ids=str)
def test_an_operator_runs_and_refuses_in_the_backward_pass(op):
    x = torch.randn(*SHAPES.get(op, (5, K)), requires_grad=True)
    out = op(x, *ARGUMENTS[op])
    assert torch.equal(out, op(x.detach(), *ARGUMENTS[op]))
    with pytest.raises(RuntimeError, match=f"{op.namespace}::{op._opname} has no gradient.*train the original model"):
        out.sum().backward()


def test_no_operator_is_forgotten():
    every = {p.operator for scheme in SCHEMES.values() for p in scheme.products if p.layer is not EMBEDDING}
    assert {ops.GROUPED_MM, *every} == set(ARGUMENTS), "ops.GROUPED_LINEAR has a true one, and lookups read integers"


@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_program_refuses_and_a_compiled_model_gives_no_gradient(spec):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    model = fxc.optimize(net, (torch.randn(4, K),), spec, budget=1.0, layer_budget=1.0)
    x = torch.randn(4, K, requires_grad=True)
    (out,) = model.program.module()(x)
    with pytest.raises(RuntimeError, match=r"fxc::.*has no gradient"):
        out.sum().backward()
    assert x.grad is None
    assert not model(x).requires_grad
