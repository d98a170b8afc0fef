"""Arguments of an operator's call by name, and the table of what the analyses know of operators."""

import re

import pytest
import torch
from repo import REPO
from torch import fx

from fxc.analysis.operators import operator_of
from fxc.analysis.operators.pointwise import axes_of_pointwise, known_of_pointwise
from fxc.analysis.operators.table import OPERATORS, register
from fxc.ir.call import Call

aten = torch.ops.aten


def call_of(target, *args, **kwargs) -> Call:
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(3)]
    return Call(graph.call_function(target, tuple(inputs[a] if isinstance(a, bool) else a for a in args), kwargs))


def test_arguments_have_their_names_wherever_they_stand():
    by_place = call_of(aten.conv2d.default, True, True, None, [1, 1], [2, 2], [1, 1], 4)
    by_name = call_of(aten.conv2d.default, True, True, groups=4, padding=[2, 2])
    for call in (by_place, by_name):
        assert call["groups"] == call[6] == 4 and call["padding"] == [2, 2] and call["bias"] is None
        assert call["stride"] == call["dilation"] == [1, 1] and call["input"] is call[0]
    assert call_of(aten.scaled_dot_product_attention.default, True, True, True)["enable_gqa"] is False


def test_what_an_operator_does_not_have_is_an_error_or_asked_for():
    call = call_of(aten.rms_norm.default, True, [8])
    with pytest.raises(KeyError):
        call["bias"]
    assert "bias" not in call and call.get("bias") is None and call.get("normalized_shape") == [8]


@pytest.mark.parametrize(
    ("made", "name", "value", "args", "kwargs"),
    [
        (lambda: call_of(aten.conv2d.default, True, True), "bias", 7, (7,), {}),
        (lambda: call_of(aten.conv2d.default, True, True), "groups", 2, (None, [1, 1], [0, 0], [1, 1], 2), {}),
        (lambda: call_of(aten.conv2d.default, True, True, groups=4), "groups", 2, (), {"groups": 2}),
        (lambda: call_of(aten.conv2d.default, True, True, None, 2), "stride", 3, (None, 3), {}),
    ],
)
def test_an_argument_is_set_where_it_stands(made, name, value, args, kwargs):
    call = made()
    call.set(name, value)
    assert call[name] == value and call.node.args[2:] == args and call.node.kwargs == kwargs


def test_an_argument_by_name_only_is_set_by_name():
    call = call_of(aten.scaled_dot_product_attention.default, True, True, True)
    call.set("scale", 0.5)
    assert len(call.node.args) == 3 and call.node.kwargs == {"scale": 0.5} and call["scale"] == 0.5


def test_pointwise_operators_need_no_entry_and_random_ones_are_never_known():
    assert aten.sin.default not in OPERATORS
    assert operator_of(aten.sin.default).axes is axes_of_pointwise
    assert operator_of(aten.sin.default).known is known_of_pointwise
    assert operator_of(aten.clip.default).known is known_of_pointwise
    assert operator_of(aten.bernoulli.p).known is None
    assert operator_of(aten.cdist.default).axes is None


def test_an_operator_is_registered_once():
    with pytest.raises(ValueError, match="twice"):
        register(aten.linear.default)


def test_operators_that_fold_have_a_weight_and_a_bias_and_none_is_without_axes():
    for target, operator in OPERATORS.items():
        assert operator.axes is not None, target
        if operator.fold is not None:
            assert operator.dead is not None and Call(call_of(target, True, True).node)["bias"] is None


def test_analyses_read_arguments_by_name():
    fxc = REPO / "fxc"
    sources = [*(fxc / "analysis" / "operators").glob("*.py"), fxc / "passes" / "dead_structure" / "shrink.py"]
    by_place = re.compile(r"len\([\w.]+\.args\)|\.args\[\d+\]|\.kwargs\.get")
    assert len(sources) > 10
    assert [path.name for path in sources if by_place.search(path.read_text())] == []
