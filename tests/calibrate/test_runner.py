import gc
from functools import partial

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional

from fxc.calibrate import runner
from fxc.calibrate.blocks import blocks
from fxc.calibrate.hessian import Hessian, Squares
from fxc.calibrate.needs import needs_of
from fxc.data.decoder import decoder_sample
from fxc.frontend.capture import capture
from fxc.ir.cache import is_causal_lm
from fxc.ir.edit import call, constant, free_name
from fxc.ir.names import layer_at, weight_of
from fxc.ir.observe import inputs_of, observe
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.float64 import in_float64, widened
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR


def wide(width):
    return Hessian(width, dtype=torch.float64)


both = partial(Hessian, cross=True, dtype=torch.float64)


def prepared(model, example=None, float64=True):
    program = capture(model, example, check=False)
    Canonicalize().run(program, Context())
    return in_float64(program, typed=True) if float64 else program


def layers_of(program):
    return [node for node in program.graph.nodes if node.target in (LINEAR, GROUPED_LINEAR)]


def texts(program, count, length=12):
    """Samples of a language model: tokens from the whole vocabulary, and all that it reads besides."""
    made = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        sample = [widened(each) for each in inputs_for(program, length)]
        sample[0] = torch.randint(3, 320, (1, length), generator=made)
        found.append(sample)
    return found


def inputs_for(program, length):
    if is_causal_lm(program):
        return decoder_sample(program, 1, length, 0)
    return [torch.ones(1, length, dtype=each.meta["val"].dtype) for each in program.placeholders]


def rows(program, count):
    made = torch.Generator().manual_seed(0)
    return [[torch.randn(3, 40, generator=made).double()] for _ in range(count)]


class Shrinks:
    """Replaces every layer by one with rounded weights, and keeps a copy of what it was given: by the weight's name."""

    def __init__(self, program):
        self.program, self.seen, self.calls = program, {}, []

    def __call__(self, layers, statistics):
        self.calls.append([layer_at(self.program, layer) for layer in layers])
        made = {}
        for layer in layers:
            weight = weight_of(self.program, layer)
            self.seen[weight] = [(each.rows, each.mean.clone()) for each in statistics]
            if weight not in made:
                name = made[weight] = free_name(self.program, f"small{len(self.seen)}")
                small = constant(self.program, name, (4 * self.program.constants[weight]).round() / 4, layer)
            else:
                small = next(n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == made[weight])
            args = tuple(small if i == 1 else each for i, each in enumerate(layer.args))
            new = call(self.program, layer.target, args, replacing=layer, by="test")
            new.meta["weight"] = weight


def of_plain_run(program, samples):
    """The statistics of every replaced layer in a plain run of the whole program, whose layers are all compressed: what comes
    before a layer is the same."""
    layers = [node for node in program.graph.nodes if "weight" in node.meta]
    found = {}
    for sample in samples:

        def each(node, x):
            kept = found.setdefault(node.meta["weight"], Hessian(x.shape[-1], dtype=torch.float64))
            kept.add(x)

        observe(program.module(), sample, inputs_of(layers, each))
    return found


@pytest.mark.parametrize(("family", "inputs"), [("qwen2", texts), ("bert", texts), ("mlp", rows)])
def test_statistics_are_those_of_a_run_of_the_compressed_program(family, inputs):
    program = prepared(*build(family))
    samples = inputs(program, 3)
    shrinks = Shrinks(program)
    layers = layers_of(program)
    runner.run(program, layers, samples, shrinks, statistic=wide)
    assert len(shrinks.seen) == len(layers)
    plain = of_plain_run(program, samples)
    assert plain.keys() == shrinks.seen.keys()
    for weight, [(count, mean)] in shrinks.seen.items():
        assert count == plain[weight].rows
        torch.testing.assert_close(mean, plain[weight].mean, rtol=1e-10, atol=1e-12)


def test_layers_that_read_one_value_are_given_together_in_the_order_in_which_they_run():
    program = prepared(*build("qwen2"))
    shrinks = Shrinks(program)
    runner.run(program, layers_of(program), texts(program, 1), shrinks, statistic=wide)
    attention = [[f"self_attn.{each}_proj" for each in "qkv"], ["self_attn.o_proj"]]
    layer = [*attention, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    assert shrinks.calls == [[f"model.layers.{at}.{n}" for n in part] for at in range(2) for part in layer] + [["lm_head"]]


@pytest.mark.parametrize(("family", "inputs"), [("qwen2", texts), ("bert", texts), ("mlp", rows)])
def test_a_second_stream_has_what_layers_would_read_uncompressed(family, inputs):
    program = prepared(*build(family))
    before, samples = program.copy(), inputs(program, 3)
    crosses = {}

    class Keeps(Shrinks):
        def __call__(self, layers, statistics):
            crosses.update({weight_of(program, layer): statistics[0].cross.clone() for layer in layers})
            super().__call__(layers, statistics)

    shrinks = Keeps(program)
    runner.run(program, layers_of(program), samples, shrinks, statistic=both)
    alone = Shrinks(other := before.copy())
    runner.run(other, layers_of(other), samples, alone, statistic=wide)
    moved = 0
    for weight, cross in crosses.items():
        assert torch.equal(shrinks.seen[weight][0][1], alone.seen[weight][0][1])
        expected = Hessian(cross.shape[0], cross=True, dtype=torch.float64)
        layer = next(node for node in layers_of(before) if weight_of(before, node) == weight)
        small = next(node for node in program.graph.nodes if node.meta.get("weight") == weight)
        for sample in samples:
            seen = []
            for each, node in ((program, small), (before, layer)):
                observe(each.module(), sample, {node.args[0].name: seen.append})
            expected.add(*seen)
        torch.testing.assert_close(cross, expected.cross, rtol=1e-10, atol=1e-12)
        moved += not torch.allclose(cross, expected.mean)
    assert moved


def test_experts_are_given_one_stream_twice():
    program = prepared(*build("mixtral"))
    seen = []

    def compress(layers, statistics):
        seen.extend((layers[0].target, each.mean, each.cross) for each in statistics)
        Shrinks(program)(layers, statistics)

    runner.run(program, layers_of(program), texts(program, 2), compress, statistic=both)
    assert all(torch.equal(mean, cross) for target, mean, cross in seen if target is GROUPED_LINEAR)
    assert not all(torch.equal(mean, cross) for target, mean, cross in seen if target is LINEAR)


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList([nn.Linear(40, 24), nn.Linear(24, 40)]) for _ in range(depth))

    def forward(self, x):
        for up, down in self.parts:
            x = x + down(functional.gelu(up(x)))
        return x


@pytest.mark.slow
def test_hidden_states_that_are_alive_do_not_grow_with_depth():
    def most(depth, statistic=wide):
        torch.manual_seed(0)
        program = prepared(Deep(depth), (torch.randn(3, 40),))
        assert len(blocks(program)) >= depth
        samples = [[torch.randn(17, 40).double()] for _ in range(5)]
        alive = []

        def compress(layers, statistics):
            gc.collect()
            tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
            alive.append(sum(each.shape[:1] == (17,) for each in tensors))
            Shrinks(program)(layers, statistics)

        runner.run(program, layers_of(program), samples, compress, statistic=statistic)
        assert len(alive) == 2 * depth
        return max(alive)

    assert most(3) == most(9)
    assert most(3) < most(3, both) == most(9, both) <= 2 * most(3)


def test_what_samples_have_in_common_is_kept_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(40, 40) for _ in range(5))

        def forward(self, x):
            table = torch.cos(torch.arange(40, dtype=x.dtype) * x.shape[0])
            for part in self.parts:
                x = x + part(x * table)
            return x

    program = prepared(Shared(), (torch.randn(3, 40),))
    samples = [[torch.randn(3, 40).double()] for _ in range(4)]
    tables = []

    def compress(layers, statistics):
        gc.collect()
        tables.append(sum(type(each) is torch.Tensor and each.shape == (40,) for each in gc.get_objects()))

    runner.run(program, layers_of(program), samples, compress, statistic=wide)
    # Besides biases.
    assert len(set(tables[1:])) == 1 and tables[1] - tables[0] <= 1


class Twice(nn.Module):
    """One module that runs twice, with another between."""

    def __init__(self):
        super().__init__()
        self.same, self.other, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 20)

    def forward(self, x):
        return self.last(functional.gelu(self.same(self.other(self.same(x)))))


class Tied(nn.Module):
    """Two modules of one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.second = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = x + functional.gelu(self.first(x))
        x = x + functional.gelu(self.other(x))
        return x + functional.gelu(self.second(x))


@pytest.mark.fault(3)
@pytest.mark.parametrize("model", [Twice, Tied])
def test_a_weight_that_is_read_twice_is_compressed_once_by_all_that_it_meets(model):
    torch.manual_seed(0)
    program = prepared(model(), (torch.randn(3, 40),))
    before = program.copy()
    samples = rows(program, 4)
    shrinks = Shrinks(program)
    runner.run(program, layers_of(program), samples, shrinks, statistic=wide)
    assert sorted(map(len, shrinks.calls)) == ([1, 1, 2] if model is Twice else [1, 2])
    assert not any(node.target is LINEAR and node.users and "weight" not in node.meta for node in program.graph.nodes)
    name = "same.weight" if model is Twice else "first.weight"
    [(count, mean)] = shrinks.seen[name]
    assert count == 2 * 3 * 4
    # It is not compressed where it is met first, but the layer between is where it is met again.
    other = (4 * before.constants["other.weight"]).round() / 4
    before.constants["other.weight"] = other
    expected = Hessian(40, dtype=torch.float64)
    layers = [node for node in layers_of(before) if weight_of(before, node) == name]
    for sample in samples:
        observe(before.module(), sample, inputs_of(layers, lambda node, x: expected.add(x)))
    torch.testing.assert_close(mean, expected.mean, rtol=1e-10, atol=1e-12)


def test_a_layer_whose_result_is_kept_may_be_replaced_when_its_weight_is_met_again():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.other, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 20)

        def forward(self, x):
            first = self.same(x)
            y = first
            for _ in range(2):
                y = y + functional.gelu(self.other(y))
                y = self.same(y)
            return self.last(y + first)

    program = prepared(Kept(), (torch.randn(3, 40),))
    shrinks = Shrinks(program)
    runner.run(program, layers_of(program), rows(program, 2), shrinks, statistic=wide)
    assert len(shrinks.seen) == 3


def test_an_expert_that_no_token_reaches_has_empty_statistics():
    program = prepared(*build("mixtral"))
    experts = [node for node in layers_of(program) if node.target is GROUPED_LINEAR]
    assert experts
    sample = texts(program, 1, length=1)
    seen = []

    def compress(layers, statistics):
        seen.append([(each.rows, each.mean.clone()) for each in statistics])

    runner.run(program, experts, sample, compress, statistic=wide)
    for found in seen:
        counts = [count for count, _ in found]
        # A token is for two of four.
        assert sorted(counts) == [0, 0, 1, 1]
        assert all((mean == 0).all() == (count == 0) for count, mean in found)


def test_a_run_is_the_same_again():
    def found():
        program = prepared(*build("bert"), float64=False)
        shrinks = Shrinks(program)
        runner.run(program, layers_of(program), texts(program, 3), shrinks)
        return shrinks.seen

    first, second = found(), found()
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(first.values(), second.values(), strict=True))


def test_the_bytes_that_a_run_needs_are_known_before():
    program = prepared(Deep(4), (torch.randn(3, 40),))
    layers = layers_of(program)
    samples = [[torch.randn(count, 40).double()] for count in (3, 17)]
    needs = needs_of(program, layers, samples, wide)
    assert needs.states == 8 * 40 * (3 + 17)
    assert needs.statistics == 8 * 40 * 40
    assert needs.stages[:2] == [(["parts.0.0"], 8 * 40 * 40), (["parts.0.1"], 8 * 24 * 24)] and len(needs.stages) == 8
    assert needs_of(program, layers, samples, Squares).statistics == 3 * 4 * 40
    second = needs_of(program, layers, samples, both)
    assert (second.states, second.statistics) == (2 * needs.states, 3 * needs.statistics)
    # Of the larger sample in one block: what the first layer gives, its activation, the second's, their sum.
    assert 8 * 17 * (24 + 40) < needs.block <= 8 * 17 * (2 * 24 + 2 * 40)
    assert needs.total == needs.states + needs.statistics + needs.block + needs.work
    assert needs_of(program, layers, samples, wide, 7).total == needs.total + 7
    assert needs_of(program, layers, samples, wide, finish=print).states == 2 * needs.states


def test_layers_of_one_block_only_work():
    program = prepared(nn.Sequential(nn.Linear(40, 24)), (torch.randn(3, 40),))
    assert len(blocks(program)) == 1
    shrinks = Shrinks(program)
    runner.run(program, layers_of(program), rows(program, 2), shrinks, statistic=wide)
    assert len(shrinks.seen) == 1


def test_progress_is_shown_by_stage():
    program = prepared(Deep(2), (torch.randn(3, 40),))
    said = []

    def track(items, what, count):
        said.append((what, count))
        return items

    made = iter([{"errors": {"parts.0.0": 0.04, "x": 0.01}}, None, {}, {}])
    runner.run(program, layers_of(program), rows(program, 2), lambda *_: next(made), statistic=wide, track=track)
    assert said[0] == ("block 1 of 3, parts.0.0 (1 of 4)", 2) and len(said) == 4
    assert said[1][0].startswith("block 2 of 3, parts.0.1 (2 of 4), the error before 20.0%, ") and said[1][0].endswith(" left")
    assert "parts.1.0 (3 of 4), " in said[2][0] and "error" not in said[2][0]
