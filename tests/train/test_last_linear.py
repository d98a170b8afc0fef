"""What a half-block ends with, beside normal equations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxc.calibrate.stream import Stream
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.last_linear import DAMP, ends_of, solve
from fxc.train.plain import Plain
from fxc.train.trainable import Trainable

WIDTH = 16


class Part(nn.Module):
    """x + down(relu(up(x))), with a norm behind the sum, a second branch, or a factor, if asked for."""

    def __init__(self, behind: bool = False, second: bool = False, factor: float | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH) if second else None
        self.norm = nn.LayerNorm(WIDTH) if behind else nn.Identity()
        self.factor = factor

    def sum(self, x: Tensor) -> Tensor:
        inner = self.down(self.hidden(x))
        inner = inner if self.factor is None else inner * self.factor
        return x + inner + self.other(x) if self.other is not None else x + inner

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.sum(x))


def two(**options) -> tuple[Part, Part]:
    """A part, and one with another first layer."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(0)
        part = Part(**options)
        torch.manual_seed(seed)
        nn.init.normal_(part.up.weight, std=0.3)
        made.append(part.eval())
    return made[0], made[1]


def inputs(count: int = 12) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(3, 7, WIDTH, generator=draw) for _ in range(count)]


def program_of(model: nn.Module, spec: str = "canonicalize"):
    program = capture(model, (inputs()[0],), check=False)
    return run_passes(program, Context(samples=[[x] for x in inputs()]), Options(spec, verify=False))[0]


def solved(student: Part, teacher: Part, spec: str = "canonicalize") -> Trainable | None:
    """The student with its last layers solved for; None where that is no sum of linear layers."""
    mine, theirs = Trainable(program_of(student, spec)), program_of(teacher)
    plain = Plain(mine)
    ends = ends_of(plain.program.results[0], theirs.results[0], set(plain.program.graph.nodes), plain.gives)
    if ends is None:
        return None
    samples = [[x] for x in inputs()]
    streams = Stream(plain.program, samples), Stream(theirs, samples)
    aims = streams[1].reader([ends.aim])
    solve(ends, plain, streams[0].states, [aims(state)[ends.aim] for state in streams[1].states])
    return mine


def weights(student: Trainable) -> dict[str, Tensor]:
    """By layer."""
    return {student.layers[name]: latent().detach() for name, latent in student.latents.items() if latent().ndim > 1}


def statistics(student: Part, teacher: Part) -> tuple[Tensor, Tensor]:
    """In float64, what the last layer is given times itself, damped, and times what the sum lacks."""
    x = torch.cat(inputs()).flatten(0, 1).double()
    student, teacher = student.double(), teacher.double()
    with torch.no_grad():
        hidden, gap = student.hidden(x), teacher.sum(x) - student.sum(x)
    curvature = hidden.T @ hidden
    student.float(), teacher.float()
    return curvature + DAMP * curvature.diagonal().mean() * torch.eye(len(curvature)), gap.T @ hidden


@pytest.mark.parametrize("behind", [False, True], ids=["norm before", "norm behind"])
def test_it_is_least_squares(behind):
    student, teacher = two(behind=behind)
    curvature, slope = statistics(student, teacher)
    expected = student.down.weight + torch.linalg.solve(curvature, slope.T).T.float()
    made = solved(student, teacher)
    torch.testing.assert_close(made.latents["down.weight"](), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.latents["up.weight"](), student.up.weight)


def test_zeros_stay_and_the_others_make_up_for_them():
    student, teacher = two()
    student.down.weight.data[torch.rand(WIDTH, 48, generator=torch.Generator().manual_seed(3)) < 0.6] = 0
    curvature, slope = statistics(student, teacher)
    made = solved(student, teacher).latents["down.weight"]()
    for row, weight, change in zip(made, student.down.weight.detach(), slope, strict=True):
        keep = weight != 0
        assert not row[~keep].any()
        expected = weight[keep] + torch.linalg.solve(curvature[keep][:, keep], change[keep]).float()
        torch.testing.assert_close(row[keep], expected, rtol=1e-2, atol=1e-3)


def test_what_is_packed_as_2_of_4_is_solved_for_at_its_places():
    student, teacher = two()
    before, after = weights(Trainable(program_of(student, "sparse24"))), weights(solved(student, teacher, "sparse24"))
    assert torch.equal(before["up"], after["up"])
    up, before, after = before["up"], before["down"], after["down"]
    assert ((after != 0) == (before != 0)).all() and (after != before).any()
    x = torch.cat(inputs())
    with torch.no_grad():
        hidden = torch.relu(x @ up.T + student.up.bias)
        gaps = [(x + hidden @ each.T + student.down.bias - teacher(x)).square().sum() for each in (before, after)]
    assert gaps[1] < 0.7 * gaps[0]


def test_of_two_branches_one_is_solved_for_after_the_other():
    student, teacher = two(second=True)
    made = solved(student, teacher)
    x = torch.cat(inputs())
    gaps = [float((made(x)[0] - teacher(x)).detach().square().sum())]
    for name in ("down.weight", "other.weight"):
        assert (made.latents[name]() != student.state_dict()[name]).any()
        made.latents[name].weight.data.copy_(student.state_dict()[name])
        gaps.append(float((made(x)[0] - teacher(x)).detach().square().sum()))
    assert gaps[0] < gaps[1] < gaps[2]


def test_levels_and_what_is_not_trained_stay():
    student, teacher = two()
    before, made = Trainable(program_of(student, "int8")), solved(student, teacher, "int8")
    assert all(torch.equal(made.latents[name](), latent()) for name, latent in before.latents.items())


def test_what_is_multiplied_is_no_sum():
    student, teacher = two(factor=2.0)
    assert solved(student, teacher) is None
