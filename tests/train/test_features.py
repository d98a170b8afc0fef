"""Features: which ends of blocks belong together, what is computed there, and maps between widths."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import build
from formats import normal
from torch import fx, nn

from fxc.data.decoder import decoder_inputs
from fxc.data.samples import drawn
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.features import Projection, ends, pairs
from fxc.train.losses import Loss
from fxc.train.taught import Taught
from fxc.train.trainable import Trainable


@cache
def teacher():
    return capture(*build("qwen2"), check=False)


def student(spec: str):
    return run_passes(teacher(), Context(), Options(f"canonicalize,{spec}", verify=False))[0]


def drawn_for(program, inputs):
    """The same tokens as inputs of a decoder with another cache."""
    return decoder_inputs(program, inputs[0], inputs[1])


def values_of(program, nodes, inputs) -> list[torch.Tensor]:
    """What the interpreter of torch.fx computes at these nodes."""
    module, kept = program.module(), {}
    names = {copy.name: node for node, copy in zip(program.graph.nodes, module.graph.nodes, strict=True)}

    class Watched(fx.Interpreter):
        def run_node(self, node):
            kept[names[node.name]] = made = super().run_node(node)
            return made

    with torch.no_grad():
        Watched(module).run(*inputs)
    return [kept[node] for node in nodes]


@pytest.mark.parametrize("spec", ["int4:group=32", "prune:heads=0.5:ffn=0.5", "int8,prune:ffn=0.25"])
def test_ends_are_alike_by_the_layers_before_them(spec):
    made = student(spec)
    names = [end.after for end in ends(teacher())]
    assert [name for name in names if "layers" in name] == [
        f"model.layers.{at}.{part}" for at in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert [end.after for end in ends(made)] == names
    assert [theirs for _, theirs in pairs(made, teacher())] == [end.node for end in ends(teacher())]


def test_without_a_layer_the_others_still_belong_together():
    made = student("prune:drop=model.layers.0")
    mine, named = ends(made), {end.after: end.node for end in ends(teacher())}
    assert {end.after for end in mine} < set(named) and "model.layers.1.mlp.down_proj" in {end.after for end in mine}
    assert pairs(made, teacher()) == [(end.node, named[end.after]) for end in mine]
    # Of another model the places count, and the last is like the last.
    theirs = [end.node for end in ends(teacher())]
    found = pairs(made, teacher(), in_order=True)
    assert [node for node, _ in found] == [end.node for end in mine] and found[-1][1] is theirs[-1]
    places = [theirs.index(node) for _, node in found]
    assert places == sorted(set(places)) and len(places) == len(mine) < len(theirs)


@pytest.mark.parametrize("spec", ["int4:group=32", "prune:heads=0.5:ffn=0.5", "prune:drop=model.layers.0"])
def test_the_loss_is_of_what_both_compute_there(spec):
    program = student(spec)
    inputs = drawn(program, 1)[0]
    taught = Taught(
        Trainable(program), teacher(), Loss.parse("features"), as_teacher=lambda given: drawn_for(teacher(), given),
        as_student=lambda given: given[: len(program.signature.outputs)],
    )  # fmt: skip
    found = pairs(program, teacher())
    mine = values_of(program, [node for node, _ in found], inputs)
    theirs = values_of(teacher(), [node for _, node in found], drawn_for(teacher(), inputs))
    shares = [(a - b).square().sum() / b.square().sum() for a, b in zip(mine, theirs, strict=True)]
    loss = taught.lost(inputs)
    torch.testing.assert_close(loss.detach(), torch.stack(shares).mean(), rtol=1e-3, atol=1e-7)
    loss.backward()
    reached = [each.grad is not None and bool(each.grad.any()) for each in taught.student.named().values()]
    assert sum(reached) > len(reached) / 2


class Wide(nn.Module):
    def __init__(self, width: int, convolution: bool = False) -> None:
        super().__init__()
        torch.manual_seed(width)
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if convolution else nn.Linear
        self.first, self.second, self.last = make(8, width), make(width, width), make(width, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def of_widths(mine: int, theirs: int, convolution: bool = False):
    example = (normal(3, 8, 5, 5),) if convolution else (normal(3, 8),)
    made = [capture(Wide(width, convolution).eval(), example, check=False) for width in (mine, theirs)]
    data = [[normal(3, *example[0].shape[1:], seed=at)] for at in range(20)]
    return Taught(Trainable(made[0]), made[1], Loss.parse("features"), in_order=True), data


@pytest.mark.parametrize("convolution", [False, True])
def test_a_map_between_widths_begins_with_least_squares_and_is_trained(convolution):
    taught, data = of_widths(6, 10, convolution)
    maps = taught.projections(data)
    assert [tuple(each.shape) for each in maps.values()] == [(10, 6), (10, 6)]
    seen = [(taught._student(inputs)[1][1], taught._aims(inputs).features[1]) for inputs in data[:16]]
    x, y = (torch.cat([(e.movedim(1, -1) if convolution else e).flatten(0, -2) for e in some]).double() for some in zip(*seen))
    least = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).square().sum()
    assert least <= (x @ maps["projection.1"].T.double() - y).square().sum() < 1.02 * least
    loss = taught.lost(data[17])
    loss.backward()
    assert float(loss.detach()) < 1.2 and all(each.grad.any() for each in maps.values())


def test_a_stream_that_was_turned_is_turned_back():
    program = student("rotate")
    texts = [decoder_inputs(program, torch.arange(24)[None] * (at + 3) % 300) for at in range(16)]
    taught = Taught(Trainable(program), teacher(), Loss.parse("features"))
    with torch.no_grad():
        assert float(taught.lost(texts[0])) > 0.9
        maps = taught.projections(texts)
        assert len(maps) == len(ends(teacher())) and float(taught.lost(texts[0])) < 0.01


def test_of_the_same_width_nothing_is_mapped():
    taught, data = of_widths(6, 6)
    assert taught.projections(data) == {} and float(taught.lost(data[0]).detach()) == 0


def test_what_cannot_be_compared():
    flat, wide = (capture(model.eval(), (normal(3, 8),), check=False) for model in (nn.Linear(8, 4), Wide(6)))
    image = capture(Wide(6, convolution=True).eval(), (normal(3, 8, 5, 5),), check=False)
    with pytest.raises(UsageError, match="cannot be cut"):
        pairs(flat, flat)
    with pytest.raises(UsageError, match="no linear map"):
        Taught(Trainable(wide), image, Loss.parse("features"), in_order=True)
    assert Projection(1, 3, 7)(normal(2, 3, 4, 5)).shape == (2, 7, 4, 5)
