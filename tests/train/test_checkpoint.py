"""Checkpointing: the same gradients, of what is kept between blocks alone."""

from __future__ import annotations

import families
import pytest
import torch
from formats import normal

import fxc
from fxc.data.samples import samples
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes
from fxc.train.checkpoint import Piece
from fxc.train.needs import needs_of
from fxc.train.trainable import Trainable


def trained(program, inputs, **options):
    """Outputs, gradients, the bytes that were kept for them besides weights, and the student."""
    student, kept = Trainable(program, **options).train(), {}
    there = {each.untyped_storage().data_ptr() for each in (*student.parameters(), *student.buffers())}

    def pack(tensor):
        if (at := tensor.untyped_storage().data_ptr()) not in there:
            kept[at] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = student(*inputs)
    total = sum((each * normal(*each.shape, seed=at)).sum() for at, each in enumerate(outputs) if each.requires_grad)
    total.backward()
    return outputs, {name: each.grad for name, each in student.named().items()}, sum(kept.values()), student


@pytest.mark.parametrize("name", ["qwen2", "bert", "resnet", "mixtral"])
@pytest.mark.parametrize("spec", ["canonicalize", "int8"])
def test_gradients_are_the_same_and_less_is_kept(name, spec):
    model, example = families.build(name)
    program = run_passes(capture(model, example, check=False), Context(), Options(spec, verify=False))[0]
    inputs = samples(program)[0]
    whole, gradients, everything, _ = trained(program, inputs)
    pieces, same, kept, student = trained(program, inputs, checkpointing=True)
    assert sum(isinstance(each, Piece) for each in student.modules()) > 1
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    for fqn, grad in gradients.items():
        assert (grad is None) == (same[fqn] is None) and (grad is None or torch.allclose(grad, same[fqn], atol=1e-6)), fqn
    assert kept < everything
    now = needs_of(program, 0, samples(program), 1, in_blocks=True)
    assert now.values < needs_of(program, 0, samples(program), 1).values


def test_what_is_left_out_at_random_is_left_out_again():
    model, _ = families.build("qwen2")
    program = run_passes(capture(model, check=False), Context(), Options("canonicalize", verify=False))[0]
    inputs = samples(program)[0]
    _, gradients, *_ = trained(program, inputs, dropout=0.3)
    _, same, *_ = trained(program, inputs, dropout=0.3, checkpointing=True)
    assert all(torch.allclose(grad, same[fqn], atol=1e-6) for fqn, grad in gradients.items() if grad is not None)


def test_one_block_is_run_as_it_is():
    program = fxc.capture(torch.nn.Linear(8, 4).eval(), (torch.randn(2, 8),), check=False)
    student = Trainable(program, checkpointing=True)
    assert not any(isinstance(each, Piece) for each in student.modules())


def test_statistics_of_batches_would_count_twice():
    with pytest.raises(UsageError, match="without batch_statistics"):
        parse_passes("recover:checkpointing=true:batch_statistics=true")
