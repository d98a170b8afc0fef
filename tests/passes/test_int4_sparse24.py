"""What is left of 2:4 sparse and of pruned layers, rounded to int4."""

from __future__ import annotations

import pytest
import torch
from formats import captured, compiled, directed, learned, targets

from fxc.ir import print_program
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.schemes import int4, int4_sparse24, sparse24


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_in_either_order_the_numbers_that_are_left_are_those_of_int4(symmetric):
    options = f"int4:group=32:symmetric={symmetric}"
    one, steps = compiled(f"sparse24,{options}")
    other, _ = compiled(f"{options},sparse24")
    assert print_program(one) == print_program(other)
    assert targets(one) == {"fxc.int4_sparse24_linear": 5}
    sparse, _ = compiled("sparse24")
    assert torch.equal(one.constants["q.meta"], sparse.constants["q.meta"])
    whole = sparse24.unpack(sparse.constants["q.values"], sparse.constants["q.meta"])
    dense = int4.SCHEME.pack(whole, group=32, symmetric=symmetric == "true", full_range=True)
    parts = {part: one.constants.get(f"q.{part}") for part in int4_sparse24.SCHEME.parts}
    assert torch.equal(int4_sparse24.SCHEME.dense(parts), int4.SCHEME.dense(dense))
    # 2 bits of values, 1 of places, 1 of a float32 scale for 32 numbers
    assert sum(one.constants[f"q.{part}"].nbytes for part in ("qweight", "meta", "scale")) == 32 * 64 * 4 // 8
    weights = [captured().constants[f"{name}.weight"].nbytes for name in ("q", "k", "v", "up", "down")]
    assert sum(step.covered_bytes for step in steps) == sum(weights), "no weight is covered twice"


@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_that_are_not_stored_stand_for_zero_when_they_are_filled_in(symmetric):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    parts = int4_sparse24.SCHEME.pack(weight, group=32, symmetric=symmetric, full_range=True)
    zero = parts.get("zero")
    whole = int4_sparse24.densified(parts["qweight"], parts["meta"], parts["scale"], zero)
    dense = int4.SCHEME.dense({"qweight": whole, "scale": parts["scale"], "zero": zero})
    assert torch.equal(dense, int4_sparse24.SCHEME.dense(parts))
    assert torch.equal(int4_sparse24.thinned(whole, parts["meta"]), parts["qweight"])


def off(program, sparse) -> float:
    """How far apart the outputs are on inputs like the calibration data, which rounding alone has a part in."""
    pairs = [(program.module()(*x)[0], sparse.module()(*x)[0]) for x in directed(8, seed=99)]
    return sum((a - b).square().sum().item() for a, b in pairs) ** 0.5


@pytest.mark.parametrize("algorithm", ["grid", "gptq", "qronos"])
@pytest.mark.parametrize("first", ["sparse24:criterion=sparsegpt", "sparsify:criterion=sparsegpt"])
def test_one_solve_keeps_the_zeros_and_makes_up_for_both(first, algorithm):
    sparse, _ = learned(first)
    both, [*_, step] = learned(f"{first},int4:group=32:algorithm={algorithm}")
    nearest, _ = learned(f"{first},int4:group=32")
    for name in ("q", "k", "v", "up"):
        if first.startswith("sparse24"):
            kept = sparse24.unpack(sparse.constants[f"{name}.values"], sparse.constants[f"{name}.meta"])
            scheme = int4_sparse24.SCHEME
        else:
            kept, scheme = sparse.constants[f"{name}.weight"], int4.SCHEME
        found = scheme.dense({part: both.constants.get(f"{name}.{part}") for part in scheme.parts})
        assert not found[kept == 0].any() and (found != 0).float().mean() > 0.4
    assert off(both, sparse) < (1.05 if algorithm == "grid" else 0.9) * off(nearest, sparse)
    assert any(note.startswith("learned from 16 samples") for note in step.notes)


def test_other_bits_have_no_2_of_4_form():
    sparse, _ = compiled("sparse24")
    _, [*_, step] = run_passes(sparse, Context(), Options("int4:group=32:bits=3", allow_noop=True))
    assert {r.reason for r in step.refusals if r.fqn == "q"} == {"there is no 2:4 form of 3 bits: use bits=4"}
