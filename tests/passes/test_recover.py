"""Training as a pass: what is left comes nearer to what the model did, or nothing is changed."""

from __future__ import annotations

import pytest
import torch
from formats import captured, directed, error

from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes


def recovered(spec: str):
    samples = directed(40)
    return run_passes(captured(), Context(samples=samples[:32], held_out=samples[32:]), Options(spec))


@pytest.mark.parametrize("spec", ["sparse24", "sparsify:sparsity=0.7", "int4:bits=2:group=32", "int8,sparse24"])
def test_it_halves_the_error_on_samples_that_nobody_has_seen(spec):
    before, _ = recovered(spec)
    after, steps = recovered(f"{spec},recover:method=all:steps=60:rate=0.003")
    assert error(after) < 0.5 * error(before)
    assert steps[-1].changed > 0 and "60 steps" in steps[-1].notes[0]
    assert {name: t.dtype for name, t in after.constants.items()} == {name: t.dtype for name, t in before.constants.items()}


def test_zeros_stay_zero_and_the_same_seed_gives_the_same_bytes():
    before, _ = recovered("sparsify:sparsity=0.7")
    spec = "sparsify:sparsity=0.7,recover:method=all:steps=10"
    (after, _), (again, _) = recovered(spec), recovered(spec)
    for name, tensor in before.constants.items():
        if tensor.ndim > 1:
            assert (after.constants[name][tensor == 0] == 0).all() and not torch.equal(after.constants[name], tensor)
        assert torch.equal(after.constants[name], again.constants[name])


@pytest.mark.parametrize(("method", "kinds"), [("norms", {"bias"}), ("scales", {"bias", "scale"})])
def test_what_is_not_to_be_trained_stays_as_it_is(method, kinds):
    before, _ = recovered("int4:group=32")
    after, _ = recovered(f"int4:group=32,recover:steps=20:rate=0.01:method={method}")
    changed = {name.rpartition(".")[2] for name, t in before.constants.items() if not torch.equal(t, after.constants[name])}
    assert changed == kinds


def test_what_never_becomes_better_is_left():
    before, _ = recovered("int8")
    after, steps = recovered("int8,recover:method=all:steps=3:rate=10")
    assert all(torch.equal(tensor, after.constants[name]) for name, tensor in before.constants.items())
    assert "nothing was changed" in steps[-1].notes[0] and steps[-1].changed == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("recover:loss=kll", "is no loss"), ("recover:steps=0", "not at least 1"), ("recover:rate=0", "above 0"),
        ("recover:temperature=0:loss=kl", "not above 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_runs(spec, said):
    with pytest.raises(UsageError, match=said):
        parse_passes(spec)


def test_it_needs_data():
    with pytest.raises(UsageError, match="calibration data"):
        Options("recover").check()


def test_float16_is_refused_for_a_model_in_bfloat16():
    samples = [[each.bfloat16() for each in sample] for sample in directed(8)]
    with pytest.raises(UsageError, match="in bfloat16"):
        run_passes(captured(torch.bfloat16), Context(samples=samples), Options("recover:steps=2:precision=float16"))
