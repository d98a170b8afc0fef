"""Predicted losses against those that are computed by hand."""

import copy

import pytest
import torch
from torch import nn

from fxc.captured import capture_source
from fxc.options import Options
from fxc.schemes import int4, int8
from fxc.selection import influence as influence_module
from fxc.selection.errors import errors_of, group_errors, noise
from fxc.selection.formats import parse_formats
from fxc.selection.groups import space_of
from fxc.selection.influence import SIZE, influence


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        # So that layers matter differently.
        with torch.no_grad():
            self.second.weight.mul_(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(x + torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture(scope="module")
def known():
    generator = torch.Generator().manual_seed(2)
    model, data = Chain().eval(), [torch.randn(40, 64, generator=generator) for _ in range(4)]
    captured = capture_source(model, (data[0],), Options(""))
    space = space_of(captured.program, parse_formats("int4:group=32;int4:bits=3:group=32:algorithm=gptq"))
    samples = [[x] for x in data]
    errors = errors_of(space, samples, SIZE, seed=0)
    return model, data, space, errors, influence(space.base, errors, samples, seed=0)


def relative(model: nn.Module, other: nn.Module, data: list[torch.Tensor]) -> float:
    with torch.no_grad():
        found, expected = (torch.cat([m(x) for x in data]).double() for m in (other, model))
    return ((found - expected).square().sum() / expected.square().sum()).item()


def with_rounded(model: nn.Module, names: list[str], bits: int = 4) -> nn.Module:
    other = copy.deepcopy(model)
    for name in names:
        layer = other.get_submodule(name)
        layer.weight.data = int4.SCHEMES[bits].fake(layer.weight, group=32, symmetric=True, full_range=True)
    return other


def test_errors_are_those_of_what_a_layer_gives(known):
    model, data, _, errors, _ = known
    read = torch.cat(data)
    whole = read @ model.first.weight.T
    off = read @ (with_rounded(model, ["first"]).first.weight - model.first.weight).T
    assert errors.by_weight["first.weight"][1] == pytest.approx((off.square().sum() / whole.square().sum()).item(), rel=1e-3)
    off = read @ noise("first.weight", model.first.weight, SIZE, 0).T
    assert errors.of_noise["first.weight"] == pytest.approx((off.square().sum() / whole.square().sum()).item(), rel=1e-3)
    assert not errors.unreached


def test_what_learns_is_predicted_to_lose_less_than_it_would_without(known):
    model, _, _, errors, _ = known
    learned = errors.by_weight["third.weight"][2]
    other = with_rounded(model, ["third"], bits=3)
    change = (other.third.weight - model.third.weight).square().sum() / model.third.weight.square().sum()
    assert 0 < learned < change.item()


def test_predicted_losses_are_near_those_of_one_layer_and_of_all(known):
    model, data, space, errors, weights = known
    predicted = [group_errors(group, errors, weights)[1] for group in space.groups]
    for group, loss in zip(space.groups, predicted, strict=True):
        assert loss == pytest.approx(relative(model, with_rounded(model, list(group.layers)), data), rel=0.35)
    assert sum(predicted) == pytest.approx(relative(model, with_rounded(model, ["first", "second", "third"]), data), rel=0.35)
    # A layer whose output hardly counts is seen to hardly count.
    assert weights["second.weight"] < weights["third.weight"] / 2


def test_the_same_seed_gives_the_same_and_weights_are_put_back(known):
    _, data, space, errors, weights = known
    before = {name: tensor.clone() for name, tensor in space.base.constants.items()}
    assert influence(space.base, errors, [[x] for x in data], seed=0) == weights
    assert all(torch.equal(before[name], tensor) for name, tensor in space.base.constants.items())


def test_rounding_activations_counts_where_a_format_does_it(known):
    model, data, *_ = known
    # One channel is much larger than the others.
    data = [torch.cat([x[:, 1:], torch.full((len(x), 1), 40.0)], 1) for x in data]
    captured = capture_source(model, (data[0],), Options(""))
    space = space_of(captured.program, parse_formats("int8:mode=weight_only;int8"))
    errors = errors_of(space, [[x] for x in data], SIZE, seed=0).by_weight["first.weight"]
    read, parts = torch.cat(data), int8.SCHEME.pack(model.first.weight.detach())
    with torch.no_grad():
        whole, found = read @ model.first.weight.T, torch.ops.fxc.int8_linear(read, *parts.values(), None)
        off = (found - read @ int8.SCHEME.dense(parts).T).square().sum() / whole.square().sum()
    assert errors[2] - errors[1] == pytest.approx(off.item(), rel=0.05) and errors[2] > 2 * errors[1]


def test_of_groups_of_other_sizes_the_gain_of_learning_is_taken_over(known):
    model, data, *_ = known
    captured = capture_source(model, (data[0],), Options(""))
    both = "int4:group=32:algorithm=gptq;int4:group=64:algorithm=gptq"
    samples = [[x] for x in data]
    together = errors_of(space_of(captured.program, parse_formats(both)), samples, SIZE, seed=0)
    alone = errors_of(space_of(captured.program, parse_formats(both.partition(";")[2])), samples, SIZE, seed=0)
    for name, found in together.by_weight.items():
        assert found[2] == pytest.approx(alone.by_weight[name][1], rel=0.25) and found[2] > found[1]


def test_runs_are_shared_out_so_that_time_grows_with_the_model_alone(known, monkeypatch):
    _, data, space, errors, weights = known
    runs = []
    loss = influence_module._Clean.loss
    monkeypatch.setattr(influence_module._Clean, "loss", lambda self, outputs: runs.append(self) or loss(self, outputs))
    monkeypatch.setattr(influence_module, "RUNS", 12)
    found = influence(space.base, errors, [[x] for x in data], seed=0)
    assert len(runs) == 12 and len(set(map(id, runs))) == 4  # of three weights each has two of the four samples
    assert all(found[name] == pytest.approx(weights[name], rel=0.5) for name in weights)
