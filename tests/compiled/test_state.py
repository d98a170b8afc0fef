"""The state of a compiled model: its constants, which nothing changes."""

import copy
import io

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError


@pytest.fixture
def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    return fxc.optimize(model, (torch.randn(4, 64),), "int8")


def test_the_state_is_the_constants_and_is_taken_back(compiled):
    state = compiled.state_dict()
    assert state.keys() == compiled.program.constants.keys()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert str(compiled.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    holder = nn.ModuleDict({"a": compiled, "b": nn.Linear(2, 2)})
    assert {f"a.{name}" for name in state} < holder.state_dict().keys()
    holder.load_state_dict(holder.state_dict())


def test_other_weights_are_refused(compiled):
    state = compiled.state_dict()
    name = next(n for n in state if n.endswith("scale"))
    for other in ({}, {**state, name: state[name] * 2}, {**state, "more": state[name]}):
        with pytest.raises(UsageError, match="load the weights into the original"):
            compiled.load_state_dict(other)
    with pytest.raises(UsageError, match="keeps its weights"):
        nn.ModuleList([compiled]).load_state_dict({f"0.{n}": t * 2 for n, t in state.items()})


@pytest.mark.parametrize("change", ["half", "double", "bfloat16", "train", "requires_grad_"])
def test_what_would_change_the_weights_is_refused(compiled, change):
    with pytest.raises(UsageError):
        getattr(compiled, change)()


def test_what_changes_nothing_is_taken(compiled):
    x = torch.randn(3, 64)
    expected = compiled(x)
    assert compiled.eval().float().to("cpu").to(torch.float32).requires_grad_(False).train(False) is compiled
    assert not list(compiled.parameters())
    copied = copy.deepcopy(compiled)
    assert torch.equal(copied(x), expected) and torch.equal(copy.deepcopy(copied)(x), expected)
    assert copied.state_dict().keys() == compiled.state_dict().keys()
