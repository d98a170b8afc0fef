"""Weights trained through thin matrices: what is merged is what was trained, in every format."""

from __future__ import annotations

import families
import pytest
import torch
from formats import captured, directed

from fxc.data.samples import samples
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.latent import Float
from fxc.train.lora import BASE, adapt, merge
from fxc.train.trainable import Trainable

RANK = 3


def made(spec: str):
    """A student, with a step of training through thin matrices, and the weights before it."""
    program = run_passes(captured(), Context(), Options(spec, verify=False))[0].copy()
    student = Trainable(program)
    before = {name: latent().detach().clone() for name, latent in student.latents.items()}
    adapted = adapt(student, RANK)
    student.train_only(["weight"])
    return student, before, adapted


def stepped(student: Trainable, inputs: list[torch.Tensor], size: float) -> None:
    for _ in range(2):
        optimizer = torch.optim.SGD(student.named().values(), lr=1.0)
        optimizer.zero_grad()
        sum(each.square().sum() for each in student(*inputs)).backward()
        for parameter in student.named().values():
            parameter.grad.mul_(size / parameter.grad.abs().mean().clamp(min=1e-12))
        optimizer.step()


@pytest.mark.parametrize("spec", ["canonicalize", "sparsify:sparsity=0.6", "sparse24", "int4:bits=2:group=32", "int8", "fp8"])
def test_it_begins_at_the_weight_and_merged_it_is_what_was_trained(spec):
    student, before, adapted = made(spec)
    [inputs] = directed(1)
    assert len(adapted) == 7 and all(torch.equal(latent(), before[name]) for name, latent in student.latents.items())
    assert {own.rpartition(":")[2].rpartition(".")[2] for own in student.named()} == {"a", "b"}
    stepped(student, inputs, 0.05)
    with torch.no_grad():
        trained, given = {name: latent() for name, latent in student.latents.items()}, student(*inputs)[0]
        merge(student, adapted)
        assert all(torch.equal(latent(), trained[name]) for name, latent in student.latents.items())
        assert torch.equal(student(*inputs)[0], given)
    assert all(not torch.equal(trained[name], before[name]) for name in adapted)
    assert all("parametrizations" not in own for latent in student.latents.values() for own in latent.kind)
    student.write()
    torch.testing.assert_close(student.program.module()(*inputs)[0], given, rtol=1e-4, atol=1e-4)
    for name in adapted if spec.startswith("spars") else []:
        assert not trained[name][before[name] == 0].any()


def test_what_is_added_has_the_rank_and_the_weight_itself_stays():
    student, before, adapted = made("canonicalize")
    base = {own for latent in student.latents.values() for own, kind in latent.kind.items() if kind == BASE}
    stepped(student, directed(1)[0], 0.05)
    assert base == {"parametrizations.weight.original"}
    for name in adapted:
        latent = student.latents[name]
        assert torch.equal(latent.parametrizations.weight.original, before[name])
        assert int(torch.linalg.matrix_rank((latent() - before[name]).double(), rtol=1e-5)) == RANK


def test_of_2_to_4_weights_it_is_the_whole_matrix_at_their_places():
    student, before, adapted = made("sparse24")
    thin = [name for name in adapted if not isinstance(student.latents[name], Float)]
    assert len(thin) == 5
    for name in thin:
        latent = student.latents[name]
        low = latent.numbers.parametrizations.weight[0]
        with torch.no_grad():
            low.b.normal_(generator=torch.Generator().manual_seed(1))
            added = (low.b @ low.a)[0]
            expected = torch.where(before[name] != 0, before[name] + added, 0.0)
            torch.testing.assert_close(latent(), expected)


@pytest.mark.slow
def test_experts_have_each_their_own():
    model, example = families.build("mixtral")
    program = run_passes(capture(model, example, check=False), Context(), Options("canonicalize", verify=False))[0]
    student = Trainable(program)
    adapted = adapt(student, 2)
    experts = [name for name in adapted if program.constants[name].ndim == 3]
    assert experts
    for name in experts:
        low = student.latents[name].parametrizations.weight[0]
        number, rows, columns = program.constants[name].shape
        assert low.b.shape == (number, rows, 2) and low.a.shape == (number, 2, columns)
    assert all(torch.isfinite(each).all() for each in student(*samples(program)[0]) if each.is_floating_point())


def test_a_rank_that_saves_nothing_is_refused_and_small_weights_are_trained_as_they_are():
    student = Trainable(captured().copy())
    adapted = adapt(student, 8)
    assert len(adapted) == 6 and "head.weight" not in adapted
    with pytest.raises(UsageError, match="no fewer numbers"):
        adapt(Trainable(captured().copy()), 40)
