"""What passes are given besides the program: the program before the first of them, and a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from families import Mlp, build

import fxc
from fxc.analysis.groups import groups
from fxc.data.decoder import decoder_inputs, decoder_sample
from fxc.data.samples import drawn
from fxc.options import Options
from fxc.passes.base import Context, Pass, Result, parse_passes
from fxc.passes.interface import Interface
from fxc.passes.prune.prune import Prune
from fxc.passes.prune.scores import scores
from fxc.pipeline import run_passes


@dataclass(frozen=True)
class Look(Pass):
    """Keeps what it is given."""

    given: list = field(default_factory=list)

    def run(self, program, context):
        self.given.append((program, context))
        return Result()

    def __str__(self):
        return "look"


@pytest.mark.parametrize("spec", ["prune:drop=model.layers.0.self_attn/heads/0+1", "prune:drop=model.layers.0"])
def test_a_pass_can_ask_the_original(spec):
    """What distillation does: the teacher runs on what the student is given, and their outputs are compared."""
    program = fxc.capture(build("qwen2")[0], check=False)
    samples = [decoder_inputs(program, torch.arange(n, n + 9)[None]) for n in (3, 60)] + [decoder_sample(program, 2, 5, 4)]
    look = Look()
    run_passes(program, Context(samples=samples), Options([*parse_passes(spec), look], verify=False))
    ((student, context),) = look.given
    teacher = context.original
    assert teacher.program is program and teacher.samples is samples
    for own, theirs in zip(teacher.samples, context.samples, strict=True):
        assert [t.shape for t in theirs] != [t.shape for t in own], "something of the cache is gone"
        restored = teacher.inputs(theirs)
        assert [t.shape for t in restored] == [t.shape for t in own]
        again = teacher.interface.inputs(teacher.program, restored)
        assert all(map(torch.equal, again, theirs))
        with torch.no_grad():
            found, expected = student.module()(*theirs), teacher.program.module()(*own)
            if not own[-1].numel():
                assert all(map(torch.equal, teacher.program.module()(*restored), expected)), "an empty cache lacks nothing"
        assert [t.shape for t in found] == [t.shape for t in teacher.outputs(expected)]
        assert 0 < (found[0] - expected[0]).norm() < 2 * expected[0].norm()


def test_what_two_passes_made_of_the_inputs_is_one_interface():
    first, second = Interface(), Interface()
    first.cut({"past.0.key": {1: torch.tensor([0, 2, 3])}})
    second.cut({"past.0.key": {1: torch.tensor([1]), 3: torch.tensor([0, 5])}})
    second.drop(["past.1.key"])
    both = first.then(second)
    assert {dim: kept.tolist() for dim, kept in both.kept["past.0.key"].items()} == {1: [2], 3: [0, 5]}
    assert both.dropped == ["past.1.key"]
    assert first.kept["past.0.key"].keys() == {1} and not first.dropped, "neither is changed"


def test_a_callers_context_is_not_changed():
    context = Context()
    run_passes(fxc.capture(Mlp(), (torch.randn(2, 40),)), context, Options([Look()], verify=False))
    assert context.original is None


def test_a_seed_gives_other_random_numbers_and_0_the_usual_ones():
    for program in (fxc.capture(Mlp(), (torch.randn(2, 40),)), fxc.capture(build("qwen2")[0], check=False)):
        usual = drawn(program)
        made = {seed: drawn(program, seed=seed) for seed in (0, 7)}
        assert all(torch.equal(a[0], b[0]) for a, b in zip(made[0], usual, strict=True))
        assert not any(torch.equal(a[0], b[0]) for a, b in zip(made[7], usual, strict=True))
        assert [t.shape for t in made[7][0]] == [t.shape for t in usual[0]]


def test_how_much_may_go_is_judged_on_what_the_seed_draws(monkeypatch):
    seeds = []
    monkeypatch.setattr("fxc.passes.prune.amount.drawn", lambda p, seed: seeds.append(seed) or drawn(p, seed=seed))
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    run_passes(program, Context(seed=7), Options("prune", verify=False, allow_noop=True))
    assert seeds == [7]


def test_pruning_draws_by_the_seed():
    """The loss of what is no language model is a random direction of its outputs."""
    torch.manual_seed(0)
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    (group,) = [g for g in groups(program) if g.size == 96]
    data = [[torch.randn(3, 40)] for _ in range(4)]
    masked = {}
    for seed in (0, 1):
        after = program.copy()
        Prune(ffn=0.25, criterion="taylor").run(after, Context(samples=data, seed=seed))
        dead = (after.constants["down.weight"] == 0).all(0)
        found = scores(program, [group], "taylor", data, seed=seed)[group]
        assert dead.nonzero().flatten().tolist() == sorted(found.argsort()[:24].tolist())
        masked[seed] = dead
    assert not torch.equal(masked[0], masked[1])


def test_optimize_takes_a_seed():
    seeds = []

    @dataclass(frozen=True)
    class Draws(Look):
        def run(self, program, context):
            seeds.append(context.seed)
            return Result()

    for given in ({}, {"seed": 5}):
        fxc.optimize(Mlp(), (torch.randn(2, 40),), passes=[Draws()], **given)
    assert seeds == [0, 5]
