"""An argument that was captured as a constant is what the original takes when it is left out, or the call is refused."""

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x, scale=2.0, flag=False, mode="plus", extra=None, shape=(1, 2), *, last=True):
        y = self.a(x) * scale * shape[1]
        y = -y if flag else y
        y = y - 1 if mode == "minus" else y + 1
        y = y if extra is None else y + extra["by"]
        return y if last else y * 3


CHANGED = {"scale": 3.0, "flag": True, "mode": "minus", "extra": {"by": 1.5}, "shape": (1, 3), "last": False}
DEFAULTS = {"scale": 2.0, "flag": False, "mode": "plus", "extra": None, "shape": (1, 2), "last": True}
X = torch.randn(4, 32)


def compiled(**constants):
    return fxc.optimize(Scaled().eval(), {"x": X, **constants}, passes="")


@pytest.mark.parametrize("name", CHANGED)
def test_a_constant_that_is_not_the_default_cannot_be_left_out(name, tmp_path):
    model = compiled(**{name: CHANGED[name]})
    model.save(tmp_path / "a")
    for each in (model, fxc.load(tmp_path / "a")):
        with pytest.raises(UsageError, match=f"the argument {name} is missing"):
            each(X)
        with pytest.raises(UsageError):
            each(X, **{name: None if name != "extra" else {"by": 2.0}})
        assert each(X, **DEFAULTS | {name: CHANGED[name]}).shape == X.shape


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_argument_that_was_left_out_can_only_be_its_default(name):
    original = Scaled().eval()
    model = fxc.optimize(original, (X,), passes="")
    torch.testing.assert_close(model(X, **{name: DEFAULTS[name]}), original(X))
    with pytest.raises(UsageError, match=f"captured without the argument '{name}'"):
        model(X, **{name: CHANGED[name]})


def test_a_constant_that_is_the_default_can_be_left_out():
    original = Scaled().eval()
    model = fxc.optimize(original, (X, 2.0, False, "plus"), passes="")
    torch.testing.assert_close(model(X), original(X))
    torch.testing.assert_close(model(X, 2.0, mode="plus"), original(X))
    with pytest.raises(UsageError, match="given twice"):
        model(X, x=X)


def test_positional_constants():
    model = fxc.optimize(Scaled().eval(), (X, 3.0, True), passes="")
    with pytest.raises(UsageError, match=r"the original takes 2\.0"):
        model(X)
    with pytest.raises(UsageError, match="the argument flag is missing"):
        model(X, 3.0)
    assert model(X, 3.0, flag=True).shape == X.shape


class Wrapped(nn.Module):
    def forward(self, x, **named):
        return x * named.get("by", 2.0)


def test_the_default_of_a_variadic_argument_is_not_known():
    model = fxc.optimize(Wrapped(), {"x": X, "by": 3.0}, passes="")
    with pytest.raises(UsageError, match="its default is not known"):
        model(X)
    torch.testing.assert_close(model(X, by=3.0), X * 3)


def test_an_option_of_a_hugging_face_model_has_its_configurations_value():
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.arange(10)[None].repeat(2, 1)
    original = transformers.BertModel(config).eval()
    with_states = fxc.optimize(original, {"input_ids": ids, "output_hidden_states": True}, passes="")
    assert len(with_states(ids, output_hidden_states=True).hidden_states) == 2
    with pytest.raises(UsageError, match="the original takes False"):
        with_states(ids)
    plain = fxc.optimize(original, {"input_ids": ids, "output_hidden_states": False}, passes="")
    assert plain(ids).hidden_states is None and plain(ids, use_cache=False).hidden_states is None
