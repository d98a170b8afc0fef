"""Half-blocks beside those of the teacher: which stand for which, and that training one is training it alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from fxc.errors import ResourceError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.halves import cosine, recover_halves
from fxc.train.plain import Plain
from fxc.train.segments import segments
from fxc.train.trainable import Trainable

STEPS, BATCH, RATE = 6, 3, 0.02


class Blocks(nn.Module):
    def __init__(self, depth: int = 3, factor: float = 1.0) -> None:
        """factor: of each branch; with one it ends in no linear layer."""
        super().__init__()
        self.factor = factor
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.parts = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(32), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(depth)
        )

    def forward(self, x):
        x = self.first(x)
        for each in self.parts:
            inner = each["down"](torch.relu(each["up"](each["norm"](x))))
            x = x + (inner if self.factor == 1 else inner * self.factor)
        return x


def inputs(count: int = 12, seed: int = 1) -> list[list[torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 5, 32, generator=made)] for _ in range(count)]


def program_of(model: nn.Module, spec: str = "canonicalize"):
    program = capture(model.eval(), (torch.randn(2, 5, 32),), check=False)
    return run_passes(program, Context(samples=inputs()), Options(spec, verify=False))[0].copy()


def damaged(model: nn.Module) -> nn.Module:
    """The model with half of each inner weight zero."""
    made = copy.deepcopy(model)
    for each in made.parts:
        each["up"].weight.data[:, ::2] = 0
    return made


def test_each_part_is_trained_as_it_would_be_alone():
    """Against plain torch: the blocks one after another, each behind those that are trained, by the same steps on the same
    samples."""
    model, mine = Blocks(2, 2.0), damaged(Blocks(2, 2.0))
    samples, held_out = inputs(), inputs(3, seed=2)
    program = program_of(mine)
    student = Trainable(program)
    made = recover_halves(student, program_of(model), samples, held_out, steps=STEPS, batch=BATCH, rate=RATE)
    assert [*made.fits] == ["parts.0.up"] and made.unlike == []

    def forward(one, number, x):
        each = one.parts[number]
        return x + 2 * each["down"](torch.relu(each["up"](each["norm"](x))))

    # The first layer has lost nothing; the last part gives what the program gives, and is left.
    block, keep = mine.parts[0], mine.parts[0]["up"].weight != 0
    sizes = {name: float(p.detach().abs().sum() / (p != 0).sum().clamp(min=1)) for name, p in block.named_parameters()}
    typical = (sizes["up.weight"] + sizes["down.weight"]) / 2
    groups = [
        {"params": [p], "lr": (rate := RATE * (sizes[name] if p.ndim > 1 else max(sizes[name], typical))), "first": rate}
        for name, p in block.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    with torch.no_grad():
        energy = sum(float(forward(model, 0, model.first(x)).square().sum()) for [x] in samples + held_out) / 15
        gaps = [forward(mine, 0, mine.first(x)) - forward(model, 0, model.first(x)) for [x] in held_out]
    before = sum(float(gap.square().sum()) for gap in gaps)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * cosine(step / STEPS)
        x = torch.cat([samples[at][0] for at in torch.randperm(len(samples), generator=order)[:BATCH].tolist()])
        optimizer.zero_grad()
        (forward(mine, 0, mine.first(x).detach()) - forward(model, 0, model.first(x)).detach()).square().sum().div(
            energy * BATCH
        ).backward()
        block["up"].weight.grad *= keep
        optimizer.step()
    fit = made.fits["parts.0.up"]
    assert fit.before == pytest.approx(before / 3 / energy, rel=1e-4) and fit.after < fit.before
    student.write()
    for name, expected in mine.named_parameters():
        torch.testing.assert_close(program.constants[name], expected.data, rtol=1e-4, atol=1e-6)


def test_the_layer_that_a_part_ends_with_is_solved_for_first():
    model, mine = Blocks(), damaged(Blocks())
    student = Trainable(program_of(mine))
    made = recover_halves(student, program_of(model), inputs(100), inputs(3, seed=2), steps=0)
    fit = made.fits["parts.0.up"]
    assert fit.after < 0.9 * fit.before
    moved = {name for name, latent in student.latents.items() if not torch.equal(latent(), mine.state_dict()[name])}
    assert moved == {"parts.0.down.weight", "parts.1.down.weight"}


@pytest.mark.parametrize("spec", ["int4:bits=2:group=32", "sparse24", "sparsify:sparsity=0.6"])
def test_what_is_packed_is_recovered_and_zeros_stay(spec):
    program, teacher = program_of(Blocks(), spec), program_of(Blocks())
    student = Trainable(program)
    zeros = {name: latent() == 0 for name, latent in student.latents.items()}
    before = {name: latent().detach().clone() for name, latent in student.latents.items()}
    made = recover_halves(student, teacher, inputs(), inputs(3, seed=2), steps=30, rate=RATE)
    assert [*made.fits] == ["first", "parts.0.up", "parts.1.up"]
    better = {name.removesuffix("up") for name, fit in made.fits.items() if fit.after < fit.before}
    assert len(better) >= 2
    moved = {student.layers[name] for name, latent in student.latents.items() if (latent() != before[name]).any()}
    assert {re.sub("(norm|up|down)$", "", each) for each in moved} == better, "and the last part gives no hidden state"
    sparse = {name: each for name, each in zeros.items() if each.ndim > 1 and each.float().mean() >= 0.5}
    assert "spars" not in spec or len(sparse) == 7
    assert "spars" not in spec or all((student.latents[name]()[each] == 0).all() for name, each in sparse.items())


def test_memory_that_is_not_there_is_said_before_it_begins(monkeypatch):
    monkeypatch.setattr("fxc.calibrate.needs.available", lambda: 100_000)
    student = Trainable(program_of(damaged(Blocks())))
    with pytest.raises(ResourceError, match="shorter samples"):
        # 15 samples of 10 x 32 numbers in both: 38 kB; a part with 4.2 thousand numbers: 118 kB.
        recover_halves(student, program_of(Blocks()), inputs(), inputs(3), steps=1)


def test_what_there_is_no_time_for_is_said():
    student = Trainable(program_of(damaged(Blocks())))
    made = recover_halves(student, program_of(Blocks()), inputs(), inputs(3), steps=1, seconds=1e-9)
    assert not made.fits and made.late == 3 and "the last 3 were not begun" in str(made)


def test_what_there_is_no_time_to_train_is_solved_for():
    made, without = (
        (student := Trainable(program_of(damaged(Blocks()))),
         recover_halves(student, program_of(Blocks()), inputs(), inputs(3), **options))
        for options in ({"steps": 50, "training_seconds": 1e-9}, {"steps": 0})
    )  # fmt: skip
    assert made[1].solved == len(made[1].fits) == 2 and "the last layer of 2 was solved for" in str(made[1])
    assert without[1].solved == 0 and any(fit.after < fit.before for fit in made[1].fits.values())
    for one, other in zip(made[0].parameters(), without[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_frozen_parts_stay():
    program = program_of(damaged(Blocks()))
    student = Trainable(program)
    student.train_only(["vector"])
    made = recover_halves(student, program_of(Blocks()), inputs(), inputs(3, seed=2), steps=10, rate=0.1)
    before = dict(program.constants)
    student.write()
    changed = {name for name, each in before.items() if not torch.equal(each, program.constants[name])}
    assert changed and all(before[name].ndim == 1 for name in changed) and [*made.fits] == ["parts.0.up", "parts.1.up"]


def test_blocks_of_bfloat16_are_found_and_trained():
    program = captured_in(torch.bfloat16, "int4:bits=2:group=32")
    student = Trainable(program)
    made = recover_halves(student, captured_in(torch.bfloat16), halved(inputs()), halved(inputs(3, seed=2)), steps=10)
    assert [*made.fits] == ["first", "parts.0.up", "parts.1.up"] and made.unlike == []
    assert any(fit.after < fit.before for fit in made.fits.values())


def halved(samples):
    return [[each.bfloat16() for each in sample] for sample in samples]


def captured_in(dtype: torch.dtype, spec: str = "canonicalize"):
    program = capture(Blocks().to(dtype).eval(), (torch.randn(2, 5, 32, dtype=dtype),), check=False)
    return run_passes(program, Context(), Options(spec, verify=False))[0].copy()


def test_a_plain_program_gives_what_the_student_gives():
    for spec in ("canonicalize", "int8", "int4:group=32", "sparse24", "fp8"):
        student = Trainable(program_of(Blocks(), spec))
        plain = Plain(student).program
        for sample in inputs(2):
            assert torch.equal(plain.module()(*sample)[0], student(*sample)[0].detach())


def found(student, teacher):
    made = Trainable(student)
    plain = Plain(made).program
    return segments(plain, made.layers, teacher, inputs(1)[0], inputs(1)[0])


def test_a_part_that_is_gone_is_made_up_for_by_the_one_before():
    model = Blocks()
    shallow = copy.deepcopy(model)
    shallow.parts[1]["down"].weight.data.zero_()
    shallow.parts[1]["down"].bias.data.zero_()
    student = program_of(shallow, "dead_structure")
    assert not [name for name in student.constants if name.startswith("parts.1.")]
    made, unlike = found(student, program_of(model))
    assert [each.layers for each in made] == [["first"], ["parts.0.up", "parts.0.down"], ["parts.2.up", "parts.2.down"]]
    assert [len(each.theirs) > len(each.mine) for each in made] == [False, True, False] and unlike == []


def test_thinner_parts_stand_for_whole_ones():
    thin = copy.deepcopy(Blocks())
    thin.parts[1]["down"].weight.data[:, :20] = 0
    student = program_of(thin, "dead_structure")
    assert student.constants["parts.1.up.weight"].shape == (44, 32)
    made, unlike = found(student, program_of(Blocks()))
    assert len(made) == 4 and unlike == []


def test_what_is_turned_cannot_be_compared_and_is_left():
    turned = copy.deepcopy(Blocks())
    turned.first.weight.data.neg_()
    turned.first.bias.data.neg_()
    for each in turned.parts:
        each["norm"].weight.data.neg_()
        each["down"].weight.data.neg_()
        each["down"].bias.data.neg_()
    student, teacher = program_of(turned), program_of(Blocks())
    made, unlike = found(student, teacher)
    assert len(unlike) == 3 and "first leaves is nothing like what it was" in unlike[0]
    assert [each.inner for each in made] == [False]
    trained = Trainable(student)
    said = recover_halves(trained, teacher, inputs(), inputs(2), steps=3)
    assert not said.fits and "nothing like" in str(said)
    assert all(torch.equal(latent(), student.constants[name]) for name, latent in trained.latents.items())
