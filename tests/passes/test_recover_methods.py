"""How `recover` trains: by blocks, by the loss, or both, and it says what each gave."""

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


@pytest.mark.parametrize("spec", ["sparsify:sparsity=0.7", "int4:bits=2:group=32"])
def test_blocks_alone_and_then_the_loss(spec):
    before, _ = recovered(spec)
    blocks, steps = recovered(f"{spec},recover:method=blocks:block_steps=40")
    both, more = recovered(f"{spec},recover:block_steps=40:steps=20")
    assert error(blocks) < 0.8 * error(before) and error(both) < error(blocks)
    assert len(steps[-1].notes) == 1 and "half-blocks better" in steps[-1].notes[0]
    assert more[-1].notes[0].split(", in")[0] == steps[-1].notes[0].split(", in")[0] and "20 steps" in more[-1].notes[1]


def kinds_of(before, after) -> set[str]:
    return {name.rpartition(".")[2] for name, t in before.constants.items() if not torch.equal(t, after.constants[name])}


def test_weights_are_trained_by_the_loss_only_where_much_was_removed():
    blocks, _ = recovered("int4:group=32,recover:method=blocks:block_steps=2")
    both, _ = recovered("int4:group=32,recover:block_steps=2:steps=10:rate=0.01")
    assert kinds_of(blocks, both) == {"bias", "scale"}
    thin = "prune:ffn=0.25,recover:block_steps=2"
    (blocks, _), (both, _) = recovered(f"{thin}:method=blocks"), recovered(f"{thin}:steps=10:rate=0.01")
    assert "weight" in kinds_of(blocks, both)
    for spec in ("int4:bits=2:group=32", "sparsify:sparsity=0.7"):
        (blocks, _), (both, _) = (
            recovered(f"{spec},recover:block_steps=2:{more}") for more in ("method=blocks", "steps=40:rate=0.003")
        )
        assert kinds_of(blocks, both) & {"qweight", "weight"}, spec


def test_blocks_that_never_become_better_are_left():
    before, _ = recovered("int8")
    after, steps = recovered("int8,recover:method=blocks:block_steps=2:block_rate=1000")
    assert all(torch.equal(tensor, after.constants[name]) for name, tensor in before.constants.items())
    assert "nothing was changed" in steps[-1].notes[0] and steps[-1].changed == 0


def test_weights_are_trained_through_thin_matrices():
    before, _ = recovered("sparsify:sparsity=0.7")
    after, _ = recovered("sparsify:sparsity=0.7,recover:method=all:steps=30:rate=0.01:lora=4")
    assert error(after) < 0.9 * error(before)
    for name, tensor in before.constants.items():
        gap = after.constants[name] - tensor
        assert gap.any() and not gap[tensor == 0].any(), name
    with pytest.raises(UsageError, match="no fewer numbers"):
        recovered("sparsify:sparsity=0.7,recover:method=all:steps=3:lora=64")


def test_minutes_that_blocks_have_used_up_are_gone():
    _, steps = recovered("sparsify:sparsity=0.7,recover:block_steps=5:minutes=0.0001")
    assert "nothing is left of 0.0001 minutes" in steps[-1].notes[1]


OPTIONS = ["block_steps=-1", "block_rate=0", "method=some", "lora=-1", "lora=4:method=blocks", "lora=4:sparsity=0.5"]


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options_are_refused(option):
    with pytest.raises(UsageError):
        parse_passes(f"recover:{option}")
