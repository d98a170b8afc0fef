"""2:4 sparse layers, alone and as int8."""

from __future__ import annotations

import pytest
import torch
from formats import DTYPES, Net, captured, compiled, directed, error, learned, normal, sparse, targets

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


@pytest.mark.fault(13)
def test_a_mask_that_is_there_is_kept():
    net = Net()
    with torch.no_grad():
        net.q.weight.copy_(sparse(32, 64, 5, share=0.7))
    program = fxc.capture(net, (normal(3, 5, 64),))
    after, steps = run_passes(program, Context(), Options("sparse24"))
    assert steps[-1].layer_errors["q"] < 1e-6
    assert torch.equal(sparse24.unpack(after.constants["q.values"], after.constants["q.meta"]), net.q.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_criterion_is_better_than_the_one_before(dtype):
    kinds = ("magnitude", "wanda", "sparsegpt")
    magnitude, wanda, sparsegpt = (error(learned(f"sparse24:criterion={each}", dtype)[0], dtype) for each in kinds)
    assert sparsegpt < 0.7 * wanda and wanda < magnitude


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_what_is_learned_is_2_of_4_the_same_again_and_said(criterion):
    spec = f"sparse24:criterion={criterion}"
    (program, steps), (again, _) = learned(spec), learned(spec)
    assert all(torch.equal(tensor, again.constants[name]) for name, tensor in program.constants.items())
    plain, _ = compiled("sparse24")
    assert program.constants.keys() == plain.constants.keys()
    assert not torch.equal(program.constants["q.meta"], plain.constants["q.meta"])
    [note] = steps[-1].notes
    assert note.startswith("learned from 16 samples")
    kept = sparse24.unpack(program.constants["q.values"], program.constants["q.meta"])
    whole = captured().constants["q.weight"]
    assert ((kept == whole) | (kept == 0)).all() == (criterion == "wanda"), "what stays is as it was, or fitted"
    quantized, _ = learned(f"{spec},int8")
    assert torch.equal(quantized.constants["q.meta"], program.constants["q.meta"])


def test_wanda_keeps_what_counts_in_the_mean_square_of_the_input():
    program, _ = learned("sparse24:criterion=wanda")
    x = torch.cat([sample[0].flatten(0, 1) for sample in directed(16)])
    counts = captured().constants["q.weight"].abs() * x.square().mean(0).sqrt()
    best = counts.unflatten(1, (-1, 4)).topk(2, dim=-1).values.sum()
    kept = sparse24.unpack(program.constants["q.values"], program.constants["q.meta"]) != 0
    torch.testing.assert_close((counts * kept).sum(), best)


def test_layers_that_no_sample_reaches_lose_their_smaller_numbers():
    program, steps = learned("sparse24:criterion=sparsegpt", calibration=[[torch.zeros(0, 5, 64)]])
    plain, _ = compiled("sparse24")
    assert all(torch.equal(tensor, plain.constants[name]) for name, tensor in program.constants.items())
    assert any("no sample reached q, k, v" in note for note in steps[-1].notes)


def test_a_criterion_that_learns_needs_data():
    with pytest.raises(UsageError, match="criterion=wanda is measured on calibration data"):
        run_passes(captured(), Context(), Options("sparse24:criterion=wanda"))
