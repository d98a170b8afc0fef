"""A packed layer within a model of transformers: what is asked of modules, and records that say something else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fxc  # noqa: F401 - registers the operators
from fxc.errors import InputRefused, UsageError
from fxc.quantizer.layers import PackedEmbedding, PackedLinear
from fxc.quantizer.registered import FxcConfig
from fxc.schemes.scheme import SCHEMES

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))


def record(**changes) -> dict:
    parts = {"qweight": ["i8", 32, 64], "scale": ["f32", 32]}
    return {"operator": "fxc.int8_linear", "parts": parts, "arguments": {}} | changes


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    made = PackedLinear("up", record(), linear)
    packed = SCHEMES["int8"].pack(linear.weight.detach())
    made.load_state_dict({**packed, "bias": linear.bias.detach()})
    made.expected = linear(X).detach()
    return made


def near(found, expected):
    return (found - expected).norm() < 0.02 * expected.norm()


def test_it_is_called_in_several_dtypes_and_shapes(layer):
    assert near(layer(X), layer.expected) and near(layer(X[0, :1]), layer.expected[0, :1])
    found = layer(X.bfloat16())
    assert found.dtype == torch.bfloat16 and near(found.float(), layer.expected)
    assert layer(X[:0]).shape == (0, 5, 32)


def test_a_cast_leaves_its_numbers(layer):
    scale = layer.scale.clone()
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.scale, scale) and layer.qweight.dtype == torch.int8
    assert near(layer(X.bfloat16()).float(), layer.expected)


def test_other_numbers_are_taken_after_a_call(layer):
    layer(X)
    layer.load_state_dict(layer.state_dict() | {"scale": layer.scale * 2, "bias": layer.bias.detach() * 2})
    assert near(layer(X), layer.expected * 2)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"])
def test_it_is_copied_and_pickled_after_a_call(layer, way):
    expected = layer(X)
    assert torch.equal(way(layer)(X), expected) and "int8_linear" in repr(way(layer))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"])
def test_a_head_that_is_copied_with_its_table_reads_the_copys(way):
    table = PackedEmbedding("table", record(operator="fxc.int8_embedding"), nn.Embedding(32, 64))
    table.load_state_dict(SCHEMES["int8"].pack(torch.randn(32, 64)))
    head = PackedLinear("head", record(), nn.Linear(64, 32, bias=False), table)
    made = way(nn.ModuleDict({"table": table, "head": head}))
    assert made["head"].part("scale") is made["table"].scale and made["table"].scale is not table.scale
    assert torch.equal(made["head"](X), head(X)) and list(made.state_dict()) == ["table.qweight", "table.scale"]
    assert torch.equal(made["table"](torch.tensor([3])), table(torch.tensor([3])))


def test_a_gradient_is_refused_where_it_is_asked_for(layer):
    found = layer(X.clone().requires_grad_())
    assert near(found.detach(), layer.expected)
    with pytest.raises(UsageError, match="has no gradient"):
        found.sum().backward()


@pytest.mark.parametrize("wrong", [
    None, [], {}, record(operator="aten.relu"), record(operator="os.system"), record(operator="fxc.no_such"),
    record(operator=3), record(parts={"qweight": ["i8", 32, 64], "other": ["f32", 3]}), record(parts={"qweight": ["i8", -1]}),
    record(parts={"qweight": ["float", 32, 64]}), record(arguments={"x": 1}), record(arguments={"group": "1"}), record(parts=3),
    record(operator="fxc.int8_embedding"),
])  # fmt: skip
def test_records_that_say_something_else_are_refused(wrong):
    with pytest.raises(InputRefused, match="no layer that fxc knows"):
        PackedLinear("up", wrong, nn.Linear(64, 32))


def test_a_layer_has_no_parts_of_one_that_has_others(layer):
    for other in (record(), record(parts={"qweight": ["i8", 32, 64], "scale": ["f32", 31]}), record(parts={"zero": ["u8", 3]})):
        if other == record():
            assert PackedLinear("head", other, nn.Linear(64, 32), layer).part("scale") is layer.scale
        else:
            with pytest.raises(InputRefused, match="no layer that fxc knows"):
                PackedLinear("head", other, nn.Linear(64, 32), layer)


def test_parts_of_another_size_are_refused_when_it_is_called():
    made = PackedLinear("up", record(parts={"qweight": ["i8", 32, 60], "scale": ["f32", 32]}), nn.Linear(64, 32))
    with pytest.raises(InputRefused):
        made(X)


@pytest.mark.parametrize("says", [{}, {"layers": []}, {"layers": {}}, {"layers": {"a": record()}, "bits": 4}])
def test_a_configuration_that_fxc_did_not_write_is_refused(says):
    with pytest.raises(InputRefused, match="not what fxc says"):
        FxcConfig(**says)
