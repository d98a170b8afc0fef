"""A program as a module that is trained: the same numbers, right gradients, and packed again what was trained."""

from __future__ import annotations

import families
import pytest
import torch
from formats import SPECS, captured, normal

from fxc.data.samples import samples
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.float64 import in_float64, widened
from fxc.pipeline import run_passes
from fxc.train.latent import zeros_of
from fxc.train.trainable import Trainable


def made(spec: str):
    return run_passes(captured(), Context(), Options(spec, verify=False))[0].copy()


def outputs(module, inputs):
    return [each.double() for each in module(*inputs)]


def apart(one, other) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("spec", ["", "int8", "int8:mode=weight_only", "sparsify", "sparsify,int4:group=32", *SPECS])
def test_it_begins_at_what_is_packed_and_what_is_trained_is_what_is_packed(spec):
    program = made(spec)
    floats = made(spec.split(",")[0]).constants if spec.startswith("spars") else captured().constants
    floats = {name: tensor for name, tensor in floats.items() if name not in program.constants}
    student, inputs = Trainable(program, floats), samples(program)[0]
    before = {name: tensor.clone() for name, tensor in program.constants.items()}
    with torch.no_grad():
        assert apart(outputs(student, inputs), outputs(program.module(), inputs)) < 2e-5
        student.write()
    assert all(torch.equal(before[name], tensor) for name, tensor in program.constants.items()), "nothing was trained yet"
    zeros = {name: latent() == 0 for name, latent in student.latents.items()}
    optimizer = torch.optim.SGD(student.named().values(), lr=1.0)
    sum(each.square().sum() for each in student(*inputs)).backward()
    assert [name for name, each in student.named().items() if each.grad is None or not each.grad.any()] == []
    for parameter in student.named().values():
        parameter.grad.mul_(0.05 * parameter.detach().norm() / parameter.grad.norm())
    optimizer.step()
    student.write()
    with torch.no_grad():
        assert apart(outputs(student, inputs), outputs(program.module(), inputs)) < 2e-5
    changed = [name for name in before if not torch.equal(before[name], program.constants[name])]
    assert len(changed) >= len(student.latents)
    sparse = {name: was for name, was in zeros.items() if was.ndim > 1 and was.float().mean() >= 0.4}
    assert len(sparse) == (5 if spec.startswith("sparse24") else 7 if spec.startswith("sparsify") else 0)
    for name in sparse:
        assert float((student.latents[name]() == 0).float().mean()) >= 0.5, f"{name} has numbers where it was pruned"


@pytest.mark.parametrize("name", [*families.FAMILIES])
def test_gradients_are_those_of_the_model(name):
    model, example = families.build(name)
    program = run_passes(capture(model, example, check=False), Context(), Options("canonicalize", verify=False))[0]
    wide = in_float64(program)
    if wide is None:
        pytest.skip("it does not run in float64")
    inputs = [widened(each) for each in samples(program)[0]]
    student = Trainable(wide)
    whole = wide.copy()
    reference = {fqn: wide.constants[fqn].detach().clone().requires_grad_() for fqn in student.latents}
    whole.constants |= reference
    directions = [normal(*each.shape, seed=at).double() for at, each in enumerate(whole.module()(*inputs))]

    def backward(given):
        sum((each * d).sum() for each, d in zip(given, directions, strict=True) if each.requires_grad).backward()

    backward(student(*inputs))
    backward(whole.module()(*inputs))
    for fqn, latent in student.latents.items():
        grad, expected = latent.weight.grad, reference[fqn].grad
        assert (grad is None) == (expected is None), fqn
        if grad is not None:
            kept = expected if latent.keep is None else expected * latent.keep
            assert (grad - kept).norm() <= 1e-10 * expected.norm() + 1e-12, fqn


def test_a_few_zeros_are_none_that_were_pruned():
    weight = normal(100, 50)
    weight[3, 4] = 0
    assert zeros_of(weight) is None
    weight[:, 7] = 0
    assert torch.equal(zeros_of(weight), weight != 0)
    assert zeros_of(torch.zeros(3, 4)) is None and zeros_of(torch.zeros(4)) is None
