import pytest
import torch
from layers import hessian_of, layer
from torch import nn

from fxc.calibrate import runner
from fxc.calibrate.gptq import gptq
from fxc.calibrate.grid import nearest
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.journal import Journal, saving
from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.needs import needs_of
from fxc.calibrate.reconstruct import reconstruct
from fxc.calibrate.signround import Rounding, SignSGD, learn_rounding
from fxc.frontend.capture import capture
from fxc.ir.edit import call, constant
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.schemes.scheme import LINEAR


class Blocks(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.parts = nn.ModuleList(nn.ModuleList([nn.Linear(64, 96), nn.Linear(96, 64)]) for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for up, down in self.parts:
            x = x + down(torch.relu(up(x)))
        return x


def samples(count=10, rows=20):
    made = torch.Generator().manual_seed(1)
    return [[torch.randn(rows, 64, generator=made)] for _ in range(count)]


COARSE = Levels(2, 32)


def passages(program, given, see):
    """Runs the runner with weights rounded to nearest, and calls see(passage, {weight: (float, quantized)}) behind blocks."""
    starts = {}

    def compress(layers, statistics):
        for node in layers:
            name = node.args[1].target
            weight = program.constants[name]
            starts[name] = weight, nearest(weight, COARSE)
            made = constant(program, f"{name}_made", starts[name][1].dense(), node)
            call(program, LINEAR, (node.args[0], made, *node.args[2:]), replacing=node, by="test")

    def finish(passage):
        see(passage, {name: starts[name] for name in passage.own & starts.keys()})

    layers = [node for node in program.graph.nodes if node.target is LINEAR]
    runner.run(program, layers, given, compress, statistic=Hessian, finish=finish)


def test_a_passage_has_what_a_block_is_given_and_gave():
    program, given, model, at = capture(Blocks(), (torch.randn(3, 64),), check=False), samples(), Blocks(), [0]
    rounded = Blocks()

    def see(passage, starts):
        number = at[0]
        assert set(starts) == ({f"parts.{number - 1}.{part}.weight" for part in (0, 1)} if number else {"first.weight"})
        for n, [x] in enumerate(given):
            outputs = []
            for each in (model, rounded):
                y, ends = each.first(x), [x]
                for up, down in each.parts:
                    ends.append(y)
                    y = y + down(torch.relu(up(y)))
                outputs.append([*ends, y])
            torch.testing.assert_close(passage.gave(n)[0], outputs[0][number + 1])
            entered = list(passage.reads(n).values())[-1]
            torch.testing.assert_close(entered, outputs[1][number])
        for name, (_, start) in starts.items():
            rounded.get_parameter(name).data = start.dense()
        at[0] += 1

    passages(program, given, see=see)
    assert at == [3]


def test_gradients_are_those_of_the_model_and_the_best_is_kept():
    """Trained with the weights themselves as tensors, the loss falls, and a step that makes it worse is undone."""
    program, seen, made = capture(Blocks(1), (torch.randn(3, 64),), check=False), [], {}

    def see(passage, starts):
        # The runner computes without gradients.
        with torch.enable_grad():
            tensors = {name: start.dense().requires_grad_() for name, (_, start) in starts.items()}
        constants = {name: (lambda tensor=tensor: 1 * tensor) for name, tensor in tensors.items()}
        first = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        wild = reconstruct(passage, constants, torch.optim.SGD(tensors.values(), lr=1e6), steps=8, batch=2)
        assert wild.before == wild.after and all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
        fit = reconstruct(passage, constants, torch.optim.Adam(tensors.values(), lr=1e-2), steps=60, batch=4)
        assert fit.after < 0.7 * fit.before
        model = Blocks(1)
        for name, tensor in (tensors | made).items():
            model.get_parameter(name).data = tensor.detach()
        held_out = [n for n in range(passage.count) if n % 8 == 0]
        energy = sum(float(passage.gave(n)[0].square().sum()) for n in range(passage.count)) / passage.count
        lost = sum(float((model(*samples()[n]) - passage.gave(n)[0]).square().sum()) for n in held_out) / len(held_out)
        if seen:
            assert fit.after == pytest.approx(lost / energy, rel=1e-3)
        seen.append(fit)
        made.update({name: start.dense() for name, (_, start) in starts.items()})

    passages(program, samples(), see=see)
    assert len(seen) == 2


def test_one_sample_trains_nothing():
    program, seen = capture(Blocks(1), (torch.randn(3, 64),), check=False), []

    def see(passage, starts):
        roundings = {name: Rounding(*start) for name, start in starts.items()}
        seen.append(learn_rounding(passage, roundings))
        assert all(torch.equal(each.made().q, start.q) for each, (_, start) in zip(roundings.values(), starts.values()))

    passages(program, samples(1), see=see)
    assert seen == [None, None]


KINDS = [Levels(4, 32), Levels(3, 64, symmetric=False), Levels(8, -1, full_range=False, balanced=True)]


@pytest.mark.parametrize("levels", KINDS)
def test_a_rounding_begins_where_the_weight_is(levels):
    weight, inputs = layer()
    start = gptq(weight, hessian_of(inputs), levels)
    rounding = Rounding(weight, start)
    torch.testing.assert_close(rounding.dense().detach(), start.dense())
    made = rounding.made()
    assert torch.equal(made.q, start.q) and torch.equal(made.scale, start.scale)
    if start.zero is not None:
        assert torch.equal(made.zero, start.zero)


def test_what_is_trained_is_what_comes_out_and_rates_and_bounds_hold():
    weight, _ = layer()
    rounding = Rounding(weight, nearest(weight, Levels(4, 32)))
    optimizer = SignSGD([{"params": [rounding.v], "lr": 0.4, "bounds": (-1.0, 1.0)}])
    aim = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(4):
        optimizer.zero_grad()
        (rounding.dense() * aim).sum().backward()
        optimizer.step()
    assert rounding.v.abs().max() == 1.0
    made: Quantized = rounding.made()
    torch.testing.assert_close(made.dense(), rounding.dense().detach())
    assert (made.q != rounding.start.q).any() and int(made.q.max()) <= 15


def test_zeros_of_a_weight_stay():
    weight, _ = layer()
    weight[:, ::2] = 0
    rounding = Rounding(weight, nearest(weight, Levels(3, 32, symmetric=False)))
    with torch.no_grad():
        rounding.v.uniform_(-1, 1)
    assert not rounding.dense()[:, ::2].any() and not rounding.made().dense()[:, ::2].any()
    torch.testing.assert_close(rounding.made().dense(), rounding.dense().detach())


def test_gradients_stop_at_the_ends():
    weight, _ = layer()
    start = nearest(weight, Levels(2, 32))
    rounding = Rounding(weight, start)
    with torch.no_grad():
        rounding.v.fill_(1.0)
    rounding.dense().sum().backward()
    past = (rounding.about + rounding.v).round() > 3
    assert past.any() and not rounding.v.grad[past].any() and rounding.v.grad[~past].abs().min() > 0


@pytest.mark.parametrize("spec", ["int4:group=32:bits=2", "int4:group=32:symmetric=false", "int8:mode=weight_only"])
def test_the_pass_keeps_the_better_and_says_so(spec):
    program = capture(Blocks(2), (torch.randn(3, 64),), check=False)
    given = samples(20, 40)

    def run(algorithm):
        return run_passes(program, Context(samples=given), Options(f"{spec}:algorithm={algorithm}", verify=False))

    (qronos, _), (trained, steps), (again, _) = map(run, ("qronos", "round:steps=40", "round:steps=40"))
    assert all(torch.equal(tensor, again.constants[name]) for name, tensor in trained.constants.items())
    [note] = [each for each in steps[-1].notes if "rounding learned" in each]
    assert "of 3 blocks" in note
    changed = any(not torch.equal(tensor, trained.constants[name]) for name, tensor in qronos.constants.items())
    assert changed == ("in 0 of 3" not in note)
    assert {n: (t.shape, t.dtype) for n, t in qronos.constants.items()} == {
        n: (t.shape, t.dtype) for n, t in trained.constants.items()
    }


def test_layers_of_formats_that_are_packed_already_pass_gradients_on():
    """An int8 layer behind an int4 one."""
    program = capture(Blocks(2), (torch.randn(3, 64),), check=False)
    _, steps = run_passes(
        program,
        Context(samples=samples(20, 40)),
        Options("int8:only=*.0.1,int4:group=32:bits=2:algorithm=round:steps=20", verify=False),
    )
    assert any("rounding learned" in each for each in steps[-1].notes)


def test_weights_in_bfloat16_are_trained_too():
    program = capture(Blocks(1).bfloat16(), (torch.randn(3, 64).bfloat16(),), check=False)
    given = [[each.bfloat16()] for [each] in samples(16, 40)]
    after, steps = run_passes(program, Context(samples=given), Options("int4:group=32:bits=2:algorithm=round:steps=20"))
    assert any("rounding learned in" in each for each in steps[-1].notes)
    assert all(tensor.dtype != torch.float32 for tensor in after.constants.values())


def test_so_many_steps_are_made_as_are_asked_for():
    program, counts = capture(Blocks(1), (torch.randn(3, 64),), check=False), []

    def track(items, what, count):
        counts.extend([count] if what.startswith("learning to round") else [])
        return items

    context = Context(samples=samples(4), track=track)
    run_passes(program, context, Options("int4:group=32:algorithm=round:steps=3", verify=False))
    assert counts == [3, 3]


@pytest.mark.parametrize("in_memory", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_breaks_off_behind_any_block_goes_on_and_ends_as_if_it_had_not(in_memory, tmp_path, monkeypatch):
    program, given = capture(Blocks(2), (torch.randn(3, 64),), check=False), samples(16)
    options = Options("int4:group=32:bits=2:algorithm=round:steps=12", verify=False)
    learned, left = [], [10**9]

    def run(saves=None):
        learned.clear()

        def track(items, what, count):
            learned.extend([what] if what.startswith("learning to round") else [])
            return items

        after, steps = run_passes(program, Context(samples=given, saves=saves, track=track), options)
        return after, [note for note in steps[-1].notes if "rounding learned" in note]

    save = Journal.save_stage

    def broken(self, *values):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        save(self, *values)

    monkeypatch.setattr(Journal, "save_stage", broken)
    whole, said = run()
    assert len(learned) == 3 and len(said) == 1
    assert "learned in 0 of" not in said[0], "training that changes nothing could not be lost"
    # Stages: the first layer, and two in each of the two blocks, which are trained behind their second.
    for saved, to_learn in ((0, 3), (1, 2), (2, 2), (3, 1), (4, 1)):
        with saving(tmp_path / str(saved), in_memory=in_memory) as saves:
            left[0] = saved
            with pytest.raises(KeyboardInterrupt):
                run(saves)
            left[0] = 10**9
            again, repeated = run(saves)
        assert len(learned) == to_learn and repeated == said
        assert all(torch.equal(tensor, again.constants[name]) for name, tensor in whole.constants.items())


def test_what_training_takes_is_in_the_plan():
    program, given = capture(Blocks(2), (torch.randn(3, 64),), check=False), samples(4, 20)
    layers = [node for node in program.graph.nodes if node.target is LINEAR]
    without, trained = (needs_of(program, layers, given, finish=finish) for finish in (None, print))
    assert without.training == 0
    # Two matrices of 64 x 96 in float32, and of a sample what each of a block's four operators gives, with gradients, and gave.
    copies, rest = divmod(trained.training - trained.block - 2 * 4 * 20 * (96 + 96 + 64 + 64), 2 * 4 * 64 * 96)
    assert copies >= 8 and rest == 0
    assert trained.total >= trained.states + trained.training
    assert f"or {trained.training / 1e6:.1f} MB to train a block" in str(trained) and "to train" not in str(without)
