"""What each layer alone costs, against models that are made by hand with one layer packed."""

import copy
import math

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.schemes import int4


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(torch.tanh(self.layer(x))))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, 64, generator=generator) for _ in range(3)]


def by_hand(model: nn.Module, names: list[str], data: list[torch.Tensor]) -> float:
    """The relative error of `model` whose layers `names` are rounded."""
    other = copy.deepcopy(model)
    for name in names:
        layer = other.get_submodule(name)
        layer.weight.data = int4.SCHEME.fake(layer.weight, bits=4, group=32, symmetric=True, full_range=True)
    with torch.no_grad():
        found, expected = (torch.cat([m(x) for x in data]).double() for m in (other, model))
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("model", [Three(), Twice()], ids=["three", "twice"])
def test_each_layer_alone_and_all_together_cost_what_they_do_by_hand(model, data):
    found = fxc.sensitivity(model, (data[0],), "int4:group=32", calib=data, budget=10, layer_budget=10)
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    assert {each.layer for each in found.layers} == set(names) and found.samples == 3
    for each in found.layers:
        assert each.error == pytest.approx(by_hand(model, [each.layer], data), rel=1e-4)
        assert each.decibels == pytest.approx(-20 * math.log10(each.error)) and each.loss is None
        assert each.bytes_after < each.bytes_before / 3
    assert found.together.error == pytest.approx(by_hand(model, names, data), rel=1e-4)
    errors = [each.error for each in found.layers]
    assert errors == sorted(errors, reverse=True)


def test_a_language_model_is_judged_by_its_loss(pylm_dir, repo):
    text = repo / "examples" / "pylm" / "heldout.txt"
    found = fxc.sensitivity(
        str(pylm_dir), passes="int4:only='re:layers.[04].mlp'", calib=text, calib_length=64, calib_samples=8
    )
    assert len(found.layers) == 6 and found.samples == 8 and 1 < found.before < 4
    losses = [each.loss for each in found.layers]
    assert losses == sorted(losses, reverse=True) and 0 < found.together.loss < 0.1
    assert all(0.001 < each.error < 0.5 for each in found.layers)


def test_what_has_no_such_effect_is_refused(data):
    with pytest.raises(UsageError, match="measured on data"):
        fxc.sensitivity(Three(), (data[0],), "int8")
    with pytest.raises(UsageError, match="others change with it"):
        fxc.sensitivity(Three(), (data[0],), "prune:ffn=0.5", calib=data, budget=10, layer_budget=10)
    with pytest.raises(UsageError, match="rewrite no layer"):
        fxc.sensitivity(Three(), (data[0],), "canonicalize", calib=data)
