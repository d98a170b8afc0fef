"""Why an axis may not lose an index."""

from __future__ import annotations

import pytest
import torch
from axes import canonical, family, group_of, members, toy
from torch import nn

from fxc.analysis.axes import analyse
from fxc.analysis.axis import (
    DYNAMIC,
    Atom,
    atoms,
)
from fxc.analysis.groups import groups


def line(size: int = 6):
    return {"up": nn.Linear(6, size), "down": nn.Linear(size, 6)}


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y: torch.softmax(y, dim=-1), "it is normalised over by a softmax"),
        (lambda y: torch.nn.functional.layer_norm(y, y.shape[-1:]), "it is normalised over"),
        (lambda y: y - y.mean(-1, keepdim=True), "it is summed or averaged over"),
        (lambda y: y.cumsum(-1), "the order of its indices matters"),
        (lambda y: y.sort(-1).values, "the order of its indices matters"),
        (lambda y: y.flip(-1), "the order of its indices matters"),
        (lambda y: torch.nn.functional.pad(y, (1, 1))[..., 1:-1], "it is padded"),
        (lambda y: torch.stack([y[..., i] for i in range(12)], -1), "its indices are taken one by one"),
        (lambda y: y[..., torch.arange(11, -1, -1)], "it is looked up by number"),
        (lambda y: torch.cdist(y, y) @ y, "has no rule"),
    ],
)
def test_what_pins_an_axis_says_why(between, reason):
    def forward(self, x):
        return self.down(between(self.up(x)))

    model = toy(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6))
    found = groups(canonical(model, (torch.randn(3, 6),)))
    its = [g for g in found if "up.weight" in {m.fqn for m in g.members if m.dim == 0}]
    assert its and all(reason in (g.pinned or "") for g in its), [g.pinned for g in its]


@pytest.mark.parametrize("op", [torch.nn.functional.gelu, torch.abs, torch.sigmoid, torch.expm1, torch.sinh, torch.sign])
def test_what_is_done_to_each_element_pins_nothing(op):
    model = toy(lambda self, x: self.down(op(self.up(x))), **line(12))
    group = group_of(groups(canonical(model, (torch.randn(3, 6),))), "up.weight", 0)
    assert (group.kind, group.pinned, group.size) == ("ffn", None, 12)


def test_inputs_and_outputs_are_named_in_the_reason():
    found = groups(canonical(toy(lambda self, x: self.up(x), up=nn.Linear(6, 4)), (torch.randn(3, 6),)))
    assert group_of(found, "up.weight", 1).pinned == "it is a dimension of the input x"
    assert "it is a dimension of the output" in group_of(found, "up.weight", 0).pinned


def test_the_cache_of_a_decoder_shrinks_and_its_length_does_not():
    program = family("gpt2")
    axes = analyse(program)
    heads = {g.atom for g in groups(program) if g.kind == "head"}
    assert len(heads) == 2
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        if declared.name.startswith("past."):
            _, head, length, width = axes.of(node)
            assert isinstance(head, Atom) and head.size == 4 and head.pin is None
            assert length is DYNAMIC and not any(a.pin for a in atoms(width))


def test_weights_on_meta_have_the_same_groups():
    def described(program):
        return [(g.name, g.kind, g.size, g.pinned, sorted(members(g))) for g in groups(program)]

    program = family("t5").copy()
    expected = described(program)
    program.constants = {fqn: tensor.to("meta") for fqn, tensor in program.constants.items()}
    assert described(program) == expected
