"""Compiled models are called as their originals, with clear errors where they cannot be."""

from __future__ import annotations

import pytest
import torch
from families import Mlp, build
from torch import nn

import fxc
from fxc.errors import CaptureFailed, UsageError


class Nested(nn.Module):
    """Takes and returns nested structures."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, x, pair, scale=None, options=None):
        y = self.linear(x) + pair[0]
        if options is not None:
            y = y * options["gain"]
        return {"y": y, "both": (y.sum(-1), [pair[1] * 2]), "none": None, "flag": True}


def nested_inputs(batch: int) -> dict:
    return {
        "x": torch.randn(batch, 16),
        "pair": (torch.randn(batch, 32), torch.randn(batch, 3)),
        "options": {"gain": torch.randn(batch, 1)},
    }


def test_nested_structures_go_in_and_come_out():
    model = Nested().eval()
    compiled = fxc.optimize(model, nested_inputs(4), passes="")
    inputs = nested_inputs(5)
    found, expected = compiled(**inputs), model(**inputs)
    assert found.keys() == expected.keys() - {"none"}
    torch.testing.assert_close(found["y"], expected["y"])
    torch.testing.assert_close(found["both"], expected["both"])
    assert found["flag"] is True
    torch.testing.assert_close(compiled(inputs["x"], **{k: inputs[k] for k in ("pair", "options")})["y"], expected["y"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": None}, "the input x is missing"),
        ({"x": [1.0]}, "x is a list and must be a tensor"),
        ({"x": torch.zeros(2, 17)}, "size 17 in dimension 1"),
        ({"x": torch.zeros(2, 2, 16)}, "has 3 dimensions"),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "is torch.int64"),
        ({"pair": (torch.zeros(2, 32),)}, "a list or tuple of 2"),
        ({"options": {"loss": torch.zeros(2, 1)}}, "a dict with the keys gain"),
        ({"scale": 2.0}, "captured without the argument 'scale'"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, says):
    compiled = fxc.optimize(Nested(), nested_inputs(4), passes="")
    with pytest.raises(UsageError) as caught:
        compiled(**{**nested_inputs(2), **change})
    assert says in str(caught.value)


def test_the_model_is_not_changed():
    model = Mlp().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = fxc.optimize(model, (torch.randn(2, 40),), dtype="bfloat16")
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert compiled(torch.randn(7, 40)).dtype == torch.bfloat16


def test_inputs_are_needed_where_they_cannot_be_known():
    with pytest.raises(UsageError, match="give example_inputs"):
        fxc.optimize(Mlp())


def test_example_inputs_that_the_model_does_not_take():
    with pytest.raises(CaptureFailed, match="the model itself fails on the example inputs"):
        fxc.optimize(Mlp(), (torch.randn(2, 41),))


def test_control_flow_on_data_is_refused_in_one_message():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureFailed, match="compile the part that does not"):
        fxc.optimize(Branches(), (torch.randn(2, 3),))


def test_writing_to_a_buffer_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(CaptureFailed, match="writes to its buffer count"):
        fxc.optimize(Counts(), (torch.randn(2, 3),))


def test_in_place_operations_become_functional_ones():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            y.add_(1)
            z = y.view(-1)
            return torch.relu_(y - 3), z

    model = InPlace()
    compiled = fxc.optimize(model, (torch.randn(2, 3),), passes="")
    x = torch.randn(4, 3)
    for a, b in zip(compiled(x), model(x), strict=True):
        assert torch.equal(a, b)


def test_a_view_sees_a_later_write():
    class Aliased(nn.Module):
        def forward(self, x):
            y = x * 2
            z = y.view(-1)
            y.add_(1)
            return z + 1

    x = torch.randn(4, 3)
    assert torch.equal(fxc.optimize(Aliased(), (torch.randn(2, 3),), passes="")(x), Aliased()(x))


def test_a_language_model_is_called_as_the_original():
    model, _ = build("qwen2")
    compiled = fxc.optimize(model, passes="")
    ids = torch.randint(3, 300, (2, 8))
    expected = model(input_ids=ids, labels=ids)
    found = compiled(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    step = compiled(ids[:, :1], past_key_values=found.past_key_values)
    assert step.past_key_values.get_seq_length() == 9 and found.past_key_values is step.past_key_values
    with pytest.raises(UsageError, match="must be \\[2, 8\\]"):
        compiled(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(UsageError, match="inputs_embeds"):
        compiled(ids, inputs_embeds=torch.ones(2, 7, 64))
    from transformers import StaticCache

    with pytest.raises(UsageError, match="a StaticCache cannot be"):
        compiled(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_unknown_backends_and_devices_are_refused():
    with pytest.raises(UsageError, match="no backend 'fast'"):
        fxc.optimize(Mlp(), (torch.randn(2, 40),), backend="fast")(torch.randn(2, 40))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            fxc.optimize(Mlp(), (torch.randn(2, 40),), device="cuda")(torch.randn(2, 40))
