"""2:4 sparse layers, alone and as int8."""

from __future__ import annotations

import pytest
import torch
from formats import Net, compiled, normal, sparse, targets

import fxc
from fxc.errors import UsageError
from fxc.ir import print_program
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.order import order
from fxc.pipeline import run_passes
from fxc.schemes import sparse24
from fxc.schemes.int8 import quantize_weight


@pytest.mark.parametrize("spec", ["sparse24,int8", "int8,sparse24", "int8,sparse24,prune:ffn=0.5"])
def test_sparse24_goes_before_int8_and_after_prune(spec):
    names = [p.name for p in order(parse_passes(spec)).passes]
    assert [n for n in names if n in ("prune", "sparse24", "int8")] == ["prune", "sparse24", "int8"][-spec.count(",") - 1 :]
    assert "dead_structure" not in names or names.index("dead_structure") < names.index("sparse24")


def test_sparse24_and_int8_are_one_operator_in_either_order():
    one, steps = compiled("sparse24,int8")
    other, _ = compiled("int8,sparse24")
    assert print_program(one) == print_program(other)
    assert targets(one) == {"fxc.int8_sparse24_linear": 5, "fxc.int8_linear": 1}, "what is not 2:4 is int8 all the same"
    assert {n for n in one.constants if n.startswith("q.")} == {"q.qweight", "q.scale", "q.meta", "q.bias"}
    sparse_only, _ = compiled("sparse24")
    assert torch.equal(one.constants["q.meta"], sparse_only.constants["q.meta"])
    assert torch.equal(one.constants["q.qweight"], quantize_weight(sparse_only.constants["q.values"])[0])
    weights = sum(p.numel() * 4 for n, p in Net().named_parameters() if n.endswith("weight") and not n.startswith("head"))
    assert sum(s.covered_bytes for s in steps) == weights, "no weight is covered twice"
    with pytest.raises(UsageError, match="changed nothing") as caught:
        run_passes(sparse_only, Context(skip=("odd",)), Options("int8:mode=weight_only"))
    assert "q: 2:4 sparse layers have no weight-only form" in str(caught.value)


def test_a_mask_that_is_there_is_kept():
    net = Net()
    with torch.no_grad():
        net.q.weight.copy_(sparse(32, 64, 5, share=0.7))
    program = fxc.capture(net, (normal(3, 5, 64),))
    after, steps = run_passes(program, Context(), Options("sparse24"))
    assert steps[-1].layer_errors["q"] < 1e-6
    assert torch.equal(sparse24.unpack(after.constants["q.values"], after.constants["q.meta"]), net.q.weight)
