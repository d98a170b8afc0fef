"""What changes while a program is trained: zeros that grow, scales that fall, branches left out, rounding that begins late."""

from __future__ import annotations

import pytest
import torch
from formats import captured, directed, error
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.latent import Float
from fxc.train.schedules import ROUNDS, Sparser
from fxc.train.trainable import Trainable


def recovered(spec: str, program=None, samples=None):
    samples = samples or directed(40)
    return run_passes(program or captured(), Context(samples=samples[:32], held_out=samples[32:]), Options(spec, verify=False))


def test_zeros_grow_by_the_cubic_schedule_and_never_come_back():
    student = Trainable(captured())
    sparser = Sparser(student, 0.8, ramp=0.5)
    latent = next(each for each in student.latents.values() if isinstance(each, Float) and each.weight.ndim == 2)
    was = torch.zeros_like(latent.weight, dtype=torch.bool)
    for at in range(11):
        sparser(at / 10)
        zero = latent() == 0
        drawn = int(min(at / 5, 1) * ROUNDS) / ROUNDS
        assert float(zero.float().mean()) == pytest.approx(0.8 * (1 - (1 - drawn) ** 3), abs=1e-3)
        assert (zero | ~was).all(), "a zero came back"
        was = zero
        with torch.no_grad():
            latent.weight.add_(torch.randn_like(latent.weight))


def test_gradual_pruning_ends_at_its_share_and_beats_pruning_at_once():
    at_once, _ = recovered("sparsify:sparsity=0.8")
    program, steps = recovered("recover:sparsity=0.8:steps=80:rate=0.003")
    for name, tensor in program.constants.items():
        if tensor.ndim == 2:
            assert float((tensor == 0).float().mean()) == pytest.approx(0.8, abs=1e-2), name
    assert steps[-1].changed and error(program) < 0.6 * error(at_once)


class Slim(nn.Module):
    """Two convolutions with batch norms, of whose channels half say nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.other = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.other(self.second(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def slim():
    model = Slim().eval()
    return fxc.capture(model, (torch.randn(4, 1, 8, 8),), check=False)


def images(count: int):
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(4, 1, 8, 8, generator=generator)] for _ in range(count)]


def test_a_penalty_makes_the_scales_of_batch_norms_small_and_channels_go_by_them(slim):
    plain, _ = recovered("recover:steps=30:rate=0.02", slim, images(20))
    thin, _ = recovered("recover:steps=30:rate=0.02:l1=0.1", slim, images(20))
    assert thin.constants["norm.weight"].abs().sum() < 0.8 * plain.constants["norm.weight"].abs().sum()
    spec = "recover:steps=5:l1=0.01,prune:criterion=bn_scale:channels=0.5,recover:steps=10"
    program, steps = recovered(spec, slim, images(20))
    assert [step.name.partition(":")[0] for step in steps if step.name.startswith(("recover", "prune"))] == [
        "recover", "prune", "recover",
    ]  # fmt: skip
    assert program.constants["first.weight"].shape[0] == 16


def test_a_penalty_needs_batch_norms():
    with pytest.raises(UsageError, match="no batch norm"):
        recovered("recover:l1=0.1")


@pytest.mark.parametrize("follows", [True, False])
def test_statistics_of_batch_norms_follow_where_that_is_asked_for(slim, follows):
    program, _ = recovered(f"recover:steps=10:rate=0.01:batch_statistics={str(follows).lower()}:l1=0.001", slim, images(20))
    same = torch.equal(program.constants["norm.running_mean"], slim.constants["norm.running_mean"])
    assert same != follows


def test_statistics_are_those_that_torch_keeps(slim):
    student = Trainable(slim, batch_statistics=True).train()
    model = Slim().train()
    for (x,) in images(3):
        assert torch.allclose(student(x)[0], model(x), atol=1e-4)
    student.write(after := slim.copy())
    assert torch.allclose(after.constants["norm.running_var"], model.norm.running_var, atol=1e-5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3))

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


def test_branches_are_left_out_in_training_alone():
    program = fxc.capture(Residual().eval(), (torch.randn(3, 16),), check=False)
    x = torch.randn(3, 16)
    whole = program.module()(x)[0]
    student = Trainable(program, layer_drop=0.5)
    assert torch.allclose(student(x)[0], whole)
    student.train()
    found = set()
    for seed in range(30):
        torch.manual_seed(seed)
        found.add(round(float(student(x)[0].detach().sum()), 4))
    assert 2 < len(found) <= 8, "three branches, each there or not"
    torch.manual_seed(0)
    noisy = Trainable(program, dropout=0.3).train()
    mean = torch.stack([noisy(x)[0].detach() for _ in range(300)]).mean(0)
    assert (mean - whole).norm() / whole.norm() < 0.25 and not torch.allclose(noisy(x)[0], whole)


def test_rounding_may_begin_late():
    program, _ = recovered("int4:bits=2:group=32")
    student = Trainable(program, captured().constants)
    x = directed(1)[0]
    student.rounds(False)
    near = (student(*x)[0] - captured().module()(*x)[0]).norm() / captured().module()(*x)[0].norm()
    student.rounds(True)
    assert torch.allclose(student(*x)[0], program.module()(*x)[0], atol=1e-4)
    assert float(near) < 0.9
    after, steps = recovered("int4:bits=2:group=32,recover:steps=60:rate=0.003:quantize_after=0.3")
    assert error(after) < 0.7 * error(program) and steps[-1].changed
