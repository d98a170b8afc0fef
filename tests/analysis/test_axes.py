"""Axes: the algebra of dimensions, the groups that networks come down to, and why an axis may not lose an index."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build
from torch import nn

import fxc.passes
from fxc.analysis.axes import analyse
from fxc.analysis.axis import (
    DYNAMIC,
    ONE,
    Atom,
    Axis,
    Mismatch,
    Product,
    Sum,
    atoms,
    cut,
    give_role,
    kept,
    pin,
    product_of,
    resolve,
    split,
    sum_of,
    unify,
    units,
)
from fxc.analysis.groups import NAMES, groups
from fxc.analysis.shapes import regroup
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes

ANOTHER_WAY = "it meets a dimension that is divided in another way"


def canonical(model: nn.Module, *example):
    torch.manual_seed(0)
    program = fxc.capture(model.eval(), example, check=False)
    return run_passes(program, parse_passes("canonicalize"), Context(), verify=False)[0]


def sizes(axis: Axis) -> list[int]:
    return [atom.size for atom in atoms(axis)]


# ------------------------------------------------------------------------------------------------------------- algebra


def positions(axis: Axis) -> list[frozenset]:
    """What each position along `axis` is made of, {(atom, index), ...}: the definition of an axis, written out."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [frozenset({(axis, i)}) for i in range(axis.size)]
    if isinstance(axis, Sum):
        return [p for term in axis.terms for p in positions(term)]
    return [frozenset().union(*each) for each in itertools.product(*(positions(f) for f in axis.factors))]


def made_of(*parts: int) -> tuple[Axis, ...]:
    return tuple(Atom(size) for size in parts)


def some_axes() -> list[Axis]:
    a, b, c, d = made_of(2, 3, 4, 3)
    return [
        ONE,
        a,
        product_of(a, b),
        sum_of([a, b, a]),
        sum_of([product_of(a, c), c]),
        product_of(sum_of([a, c]), b),
        product_of(a, sum_of([b, b])),
        sum_of([product_of(b, sum_of([c, c])), product_of(d, c, a)]),
    ]


@pytest.mark.parametrize("number", range(len(some_axes())))
def test_units_and_kept_say_what_positions_are_made_of(number):
    axis = some_axes()[number]
    written = positions(axis)
    assert len(written) == axis.size
    for atom in set(atoms(axis)):
        expected = [next((i for a, i in p if a is atom), -1) for p in written]
        assert units(axis, atom).tolist() == expected
    assert units(axis, Atom(5)).tolist() == [-1] * axis.size
    alive = {atom: torch.arange(atom.size) % 2 == 0 for atom in set(atoms(axis))}
    assert kept(axis, alive).tolist() == [all(i % 2 == 0 for _, i in p) for p in written]
    assert kept(axis, {}).all()


@pytest.mark.parametrize("number", range(1, len(some_axes())))
@pytest.mark.parametrize("length", range(1, 12))
def test_cut_leaves_every_position_what_it_was(number, length):
    axis = some_axes()[number]
    if length >= axis.size:
        return
    before = positions(axis)
    try:
        head, tail = cut(axis, length)
    except Mismatch:
        return
    assert (head.size, tail.size) == (length, axis.size - length)
    assert positions(head) + positions(tail) == positions(axis)
    if all(atom.definition is None for position in before for atom, _ in position):
        assert positions(axis) == before


@pytest.mark.parametrize("number", range(1, len(some_axes())))
@pytest.mark.parametrize("outer", range(2, 7))
def test_split_gives_the_factors_or_says_that_there_are_none(number, outer):
    axis = some_axes()[number]
    if axis.size % outer:
        with pytest.raises(Mismatch):
            split(axis, outer)
        return
    try:
        high, low = split(axis, outer)
    except Mismatch:
        return
    assert (high.size, low.size) == (outer, axis.size // outer)
    assert positions(product_of(high, low)) == positions(axis)


def test_a_dimension_is_defined_as_the_product_that_it_meets():
    hidden, (heads, width) = Atom(12), made_of(4, 3)
    unify(hidden, product_of(heads, width))
    assert resolve(hidden) == Product((heads, width))
    assert units(hidden, heads).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert units(hidden, width).tolist() == [0, 1, 2] * 4
    assert kept(hidden, {heads: torch.tensor([True, False, True, True])}).tolist() == [True] * 3 + [False] * 3 + [True] * 6


def test_two_divisions_that_nest_are_refined():
    a, b = product_of(*made_of(4, 6)), product_of(*made_of(2, 12))
    unify(a, b)
    assert resolve(a) == resolve(b) and sizes(a) == [2, 2, 6]


@pytest.mark.parametrize(("left", "right"), [((4, 6), (3, 8)), ((2, 3), (3, 2))])
def test_two_divisions_that_do_not_nest_pin_both(left, right):
    a, b = product_of(*made_of(*left)), product_of(*made_of(*right))
    unify(a, b)
    assert {atom.pin for axis in (a, b) for atom in atoms(axis)} == {ANOTHER_WAY}


def test_sizes_that_differ_pin_both_and_so_does_a_dynamic_one():
    a, b, c = made_of(4, 5, 6)
    unify(a, b)
    unify(c, DYNAMIC)
    assert {a.pin, b.pin, c.pin} == {ANOTHER_WAY}
    assert DYNAMIC.pin == "its size is known only when the program runs", "nothing else may be said of what all share"


def test_the_first_reason_is_kept_and_goes_with_the_definition():
    atom, (x, y) = Atom(6), made_of(2, 3)
    pin(atom, "first")
    pin(atom, "second")
    give_role(atom, "channel")
    unify(atom, product_of(x, y))
    pin(atom, "third")
    assert (x.pin, y.pin) == ("first", "first") and x.roles == {"channel"}
    assert Atom(2).pin is None


def test_an_atom_is_not_made_of_itself():
    atom = Atom(4)
    high, _ = split(atom, 2)
    unify(high, Atom(2))
    unify(atom, atom)
    assert atom.pin is None and sizes(atom) == [2, 2]
    # A half that would have to be the whole.
    x = Atom(4)
    unify(product_of(x, Atom(2)), product_of(Atom(2), x))
    assert all(len(p) for p in positions(x)), "it resolves to something finite"


def test_fused_queries_keys_and_values_share_their_heads():
    """A projection to 3 * 4 * 2, cut in three, each of which is four heads."""
    fused, heads = Atom(24), Atom(4)
    rest, widths = fused, []
    for _ in range(3):
        part, rest = cut(rest, 8) if rest.size > 8 else (rest, None)
        high, low = split(part, 4)
        unify(high, heads)
        widths.append(low)
    assert units(fused, resolve(heads)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    assert len({resolve(w) for w in widths}) == 3, "the widths of the three have nothing to do with each other"
    assert resolve(heads).pin is None
    stays = kept(fused, {resolve(heads): torch.tensor([True, True, False, True])})
    assert stays.tolist() == [True, True, True, True, False, False, True, True] * 3


def test_rotation_makes_the_halves_of_a_width_one_axis():
    """x * cos + cat(-x2, x1) * sin: index i and i + half stay and go together."""
    width = Atom(8)
    first, second = cut(width, 4)
    unify(width, sum_of([second, first]))
    half = resolve(first)
    assert resolve(width) == Sum((half, half))
    assert units(width, half).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert kept(width, {half: torch.tensor([True, False, True, True])}).tolist() == [True, False, True, True] * 2
    heads = Atom(2)
    projection = product_of(heads, width)
    assert units(projection, half).tolist() == [0, 1, 2, 3] * 4
    assert units(projection, heads).tolist() == [0] * 8 + [1] * 8


def test_sums_with_other_boundaries_are_cut_at_both():
    (a, b), (x, y) = made_of(3, 5), made_of(6, 2)
    unify(sum_of([a, b]), sum_of([x, y]))
    assert sizes(sum_of([a, b])) == [3, 3, 2] == sizes(sum_of([x, y]))
    assert resolve(sum_of([a, b])) == resolve(sum_of([x, y]))


def test_a_cut_within_a_head_is_none():
    heads, width = made_of(4, 3)
    with pytest.raises(Mismatch):
        cut(product_of(heads, width), 4)
    head, tail = cut(product_of(heads, width), 6)
    assert sizes(head) == [2, 3] and sizes(tail) == [2, 3] and resolve(heads) == Sum(tuple(list(atoms(heads))))


def test_products_are_flat_and_sums_stand_outside():
    a, b, c = made_of(2, 3, 4)
    assert product_of(product_of(a, b), c) == Product((a, b, c))
    assert product_of(a, ONE) is a and product_of() == ONE
    assert sum_of([sum_of([a, b]), c]) == Sum((a, b, c)) and sum_of([a]) is a
    assert product_of(sum_of([a, b]), c) == Sum((Product((a, c)), Product((b, c))))


# ------------------------------------------------------------------------------------------------------------- regroup


def symbol(name: str):
    return SimpleNamespace(node=SimpleNamespace(expr=name))


B, S = symbol("s0"), symbol("s1")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([6], [2, 3], [([0], [0, 1])]),
        ([2, 3, 4], [6, 4], [([0, 1], [0]), ([2], [1])]),
        ([4, 6], [8, 3], [([0, 1], [0, 1])]),
        ([2, 1, 3], [2, 3, 1], [([0], [0]), ([2], [1])]),
        ([1, 1], [1], []),
        ([B, S, 64], [B, S, 4, 16], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ([B, S, 4, 16], [B, S, 64], [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        ([B, S, 64], [symbol("s0*s1"), 64], [([0, 1], [0]), ([2], [1])]),
        ([B, 48, 4, 4], [B, 768], [([0], [0]), ([1, 2, 3], [1])]),
        ([B, 2, 3, 4], [B, 6, 4], [([0], [0]), ([1, 2], [1]), ([3], [2])]),
        ([B, S, 6], [S, B, 2, 3], [([0, 1], [0, 1]), ([2], [2, 3])]),
        ([B, 6, S], [B, 2, symbol("3*s1")], [([0], [0]), ([1, 2], [1, 2])]),
        ([B, 1, S, 8], [B, S, 8], [([0], [0]), ([2], [1]), ([3], [2])]),
        ([12, S], [3, 4, S], [([0], [0, 1]), ([1], [2])]),
    ],
)
def test_regroup(before, after, expected):
    assert regroup(before, after) == expected


# -------------------------------------------------------------------------------------------------------------- groups

# kind, units, members (without the scope that all of them share)
EXPECTED = {
    "qwen2": {
        ("model.layers.0.self_attn", "head", 4, "q_proj.weight:0 q_proj.bias:0 o_proj.weight:1"),
        ("model.layers.0.self_attn", "kv_head", 2, "k_proj.weight:0 k_proj.bias:0 v_proj.weight:0 v_proj.bias:0"),
        ("model.layers.1.mlp", "ffn", 160, "gate_proj.weight:0 up_proj.weight:0 down_proj.weight:1"),
    },
    "gpt2": {
        ("transformer.h.0.attn", "head", 4, "c_attn.weight:0 c_attn.bias:0 c_proj.weight:1"),
        ("transformer.h.1.mlp", "ffn", 256, "c_fc.weight:0 c_fc.bias:0 c_proj.weight:1"),
    },
    "bert": {
        (
            "bert.encoder.layer.0.attention", "head", 4,
            "self.query.weight:0 self.query.bias:0 self.key.weight:0 self.key.bias:0 self.value.weight:0 self.value.bias:0 "
            "output.dense.weight:1",
        ),
        ("bert.encoder.layer.1", "ffn", 128, "intermediate.dense.weight:0 intermediate.dense.bias:0 output.dense.weight:1"),
    },
    "qwen3_moe": {
        ("model.layers.0.self_attn", "head", 4, "q_proj.weight:0 o_proj.weight:1"),
        ("model.layers.0.mlp.experts", "ffn", 96, "gate_up_proj:1 down_proj:2"),
    },
    "t5": {
        (
            "encoder.block", "head", 4,
            " ".join(
                f"{layer}.layer.0.SelfAttention.{part}" for layer in (0, 1) for part in
                ("q.weight:0", "k.weight:0", "v.weight:0", "o.weight:1", "relative_attention_bias.weight:1")
                if layer == 0 or "relative" not in part
            ),
        ),
        ("decoder.block.1.layer.2.DenseReluDense", "ffn", 128, "wi.weight:0 wo.weight:1"),
    },
    "cnn": {
        ("head", "ffn", 64, "1.weight:0 1.bias:0 4.weight:1"),
    },
    "resnet": {
        (
            "resnet.encoder.stages.1.layers.1.layer", "channel", 32,
            "0.convolution.weight:0 0.normalization.weight:0 0.normalization.bias:0 0.normalization.running_mean:0 "
            "0.normalization.running_var:0 1.convolution.weight:1",
        ),
    },
}  # fmt: skip


def members(group) -> set[str]:
    inside = f"{group.scope}." if group.scope else ""
    return {f"{m.fqn.removeprefix(inside)}:{m.dim}" for m in group.members}


@functools.cache
def family(name: str):
    model, example = build(name)
    return run_passes(fxc.capture(model, example, check=False), parse_passes("canonicalize"), Context(), verify=False)[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_a_family(name):
    program = family(name)
    found = groups(program)
    described = {(g.scope, g.kind, g.size, frozenset(members(g))) for g in found}
    for scope, kind, size, names in EXPECTED[name]:
        assert (scope, kind, size, frozenset(names.split())) in described
    for group in found:
        assert group.kind in NAMES and (group.pinned is None or len(group.pinned) > 10)
        for member in group.members:
            along = member.units
            assert len(along) == program.constants[member.fqn].shape[member.dim]
            assert set(along[along >= 0].tolist()) == set(range(group.size)), "each unit is somewhere in each member"
        # Every weight that has the axis is said to, once for each dimension.
        assert len(group.members) == len({(m.fqn, m.dim) for m in group.members})
    names = Counter((g.name, g.kind) for g in found if not g.pinned and g.kind in ("head", "ffn", "channel"))
    assert max(names.values()) == 1, "a group that can be pruned can be named"


def test_query_heads_know_which_keys_and_values_they_read():
    found = groups(family("qwen2"))
    for group in (g for g in found if g.kind == "head"):
        source, index = group.source
        assert (source.kind, source.size, source.scope) == ("kv_head", 2, group.scope)
        assert index.tolist() == [0, 0, 1, 1]
    assert {(s.weight.fqn, s.weight.dim) for g in found if g.kind == "head" for s in g.sites} == {
        (f"model.layers.{i}.self_attn.o_proj.weight", 1) for i in (0, 1)
    }


class Attention(nn.Module):
    """Attention written in one of many ways, 6 query heads of width 4 over 2 KV heads or 6."""

    def __init__(self, how: str, kv: int = 2):
        super().__init__()
        self.how, self.kv = how, kv
        self.heads, self.width = 6, 4
        hidden = self.heads * self.width
        self.qkv = nn.Linear(20, hidden + 2 * kv * self.width)
        self.out = nn.Linear(hidden, 20)
        self.register_buffer("index", torch.arange(kv).repeat_interleave(self.heads // kv))

    def forward(self, x):
        b, s, _ = x.shape
        n = self.kv * self.width
        q, k, v = self.qkv(x).split([self.heads * self.width, n, n], dim=-1)
        q = q.view(b, s, self.heads, self.width).transpose(1, 2)
        k, v = (t.view(b, s, self.kv, self.width).transpose(1, 2) for t in (k, v))
        each = self.heads // self.kv
        if self.how == "expand":
            k, v = (t[:, :, None].expand(b, self.kv, each, s, self.width).reshape(b, -1, s, self.width) for t in (k, v))
        elif self.how == "interleave":
            k, v = (t.repeat_interleave(each, dim=1) for t in (k, v))
        elif self.how == "select":
            k, v = (t.index_select(1, self.index) for t in (k, v))
        if self.how == "matmul":
            weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1)
            y = weights @ v
        else:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "enable_gqa")
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa", "select"])
def test_shared_keys_and_values_are_one_group_however_they_are_written(how):
    found = groups(canonical(Attention(how), torch.randn(2, 5, 20)))
    (head,) = (g for g in found if g.kind == "head")
    its = members(head) - {"index:0"}
    assert head.size == 6 and head.pinned is None and its == {"qkv.weight:0", "qkv.bias:0", "out.weight:1"}
    source, index = head.source
    assert index.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.kind, source.size, source.pinned) == ("kv_head", 2, None)
    fused = next(m for m in source.members if m.fqn == "qkv.weight" and m.dim == 0)
    assert fused.units.tolist() == [-1] * 24 + ([0] * 4 + [1] * 4) * 2
    queries = next(m for m in head.members if m.fqn == "qkv.weight")
    assert queries.units.tolist() == [i // 4 for i in range(24)] + [-1] * 16


@pytest.mark.parametrize("how", ["attention", "matmul"])
def test_fused_queries_keys_and_values_are_cut_into_heads(how):
    found = groups(canonical(Attention(how, kv=6), torch.randn(2, 5, 20)))
    (head,) = (g for g in found if g.kind == "head")
    assert next(m for m in head.members if m.fqn == "qkv.weight").units.tolist() == [i // 4 for i in range(24)] * 3
    assert head.source is None and head.pinned is None and [s.weight.fqn for s in head.sites] == ["out.weight"]


def toy(forward, **modules) -> nn.Module:
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x):
            return forward(self, x)

    return Toy()


def group_of(found, fqn: str, dim: int):
    """The largest group that runs along that dimension."""
    return max((g for g in found if (fqn, dim) in {(m.fqn, m.dim) for m in g.members}), key=lambda g: g.size)


def test_a_gate_and_what_it_gates_are_halves_of_one_projection():
    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)

    model = toy(forward, both=nn.Linear(6, 10, bias=False), down=nn.Linear(5, 6))
    group = group_of(groups(canonical(model, torch.randn(3, 6))), "both.weight", 0)
    assert (group.kind, group.size, group.pinned) == ("ffn", 5, None)
    assert group.members[0].units.tolist() == [0, 1, 2, 3, 4] * 2


def test_channels_of_concatenated_and_flattened_convolutions():
    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], dim=1)
        return self.head(self.pool(self.norm(y)).flatten(1))

    model = toy(
        forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(9), pool=nn.AdaptiveAvgPool2d(2),
        head=nn.Linear(36, 7),
    )  # fmt: skip
    found = groups(canonical(model, torch.randn(2, 3, 8, 8)))
    a, b = group_of(found, "a.weight", 0), group_of(found, "b.weight", 0)
    assert (a.kind, a.size, b.kind, b.size) == ("channel", 4, "channel", 5) and not (a.pinned or b.pinned)
    along = {(m.fqn, m.dim): m.units.tolist() for m in b.members}
    assert along["norm.weight", 0] == [-1] * 4 + [0, 1, 2, 3, 4] == along["norm.running_var", 0]
    assert along["head.weight", 1] == [-1] * 16 + [i // 4 for i in range(20)]


def test_groups_of_a_grouped_convolution():
    model = toy(
        lambda self, x: self.last(torch.relu(self.grouped(torch.relu(self.first(x))))),
        first=nn.Conv2d(3, 6, 1), grouped=nn.Conv2d(6, 12, 3, groups=3), last=nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    found = groups(canonical(model, torch.randn(2, 3, 8, 8)))
    (group,) = (g for g in found if g.kind == "conv_group")
    along = {(m.fqn, m.dim): m.units.tolist() for m in group.members}
    assert along["first.weight", 0] == [0, 0, 1, 1, 2, 2]
    assert along["grouped.weight", 0] == [0] * 4 + [1] * 4 + [2] * 4 == along["last.weight", 1]
    inner = group_of([g for g in found if g.kind == "channel" and g.size == 2 and not g.pinned], "grouped.weight", 1)
    assert {(m.fqn, m.dim): m.units.tolist() for m in inner.members}["first.weight", 0] == [0, 1] * 3


def test_a_depthwise_convolution_goes_with_its_input():
    model = toy(
        lambda self, x: self.last(self.depth(self.first(x))),
        first=nn.Conv2d(3, 6, 1), depth=nn.Conv2d(6, 6, 3, groups=6), last=nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    group = group_of(groups(canonical(model, torch.randn(2, 3, 8, 8))), "first.weight", 0)
    assert (group.kind, group.size, group.pinned) == ("channel", 6, None)
    assert members(group) == {
        "first.weight:0", "first.bias:0", "depth.weight:0", "depth.bias:0", "last.weight:1",
    }  # fmt: skip


def test_tied_weights_and_a_module_that_is_called_twice_are_one_group():
    def forward(self, ids):
        y = self.table(ids)
        for _ in range(2):
            y = y + self.down(torch.relu(self.up(y)))
        return torch.nn.functional.linear(y, self.table.weight)

    model = toy(forward, table=nn.Embedding(30, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))
    found = groups(canonical(model, torch.randint(0, 30, (2, 5))))
    ffn = group_of(found, "up.weight", 0)
    assert (ffn.kind, ffn.size, ffn.pinned) == ("ffn", 12, None)
    assert [s.weight.fqn for s in ffn.sites] == ["down.weight"] * 2, "it is read twice"
    # Nothing normalises over the width, and a table has it as its second dimension: nothing pins it.
    width = group_of(found, "up.weight", 1)
    assert ("table.weight", 1) in {(m.fqn, m.dim) for m in width.members} and width.size == 8


# ---------------------------------------------------------------------------------------------------------------- pins


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
    found = groups(canonical(model, torch.randn(3, 6)))
    its = [g for g in found if "up.weight" in {m.fqn for m in g.members if m.dim == 0}]
    assert its and all(reason in (g.pinned or "") for g in its), [g.pinned for g in its]


@pytest.mark.parametrize("op", [torch.nn.functional.gelu, torch.abs, torch.sigmoid, torch.expm1, torch.sinh, torch.sign])
def test_what_is_done_to_each_element_pins_nothing(op):
    model = toy(lambda self, x: self.down(op(self.up(x))), **line(12))
    group = group_of(groups(canonical(model, torch.randn(3, 6))), "up.weight", 0)
    assert (group.kind, group.pinned, group.size) == ("ffn", None, 12)


def test_inputs_and_outputs_are_named_in_the_reason():
    found = groups(canonical(toy(lambda self, x: self.up(x), up=nn.Linear(6, 4)), torch.randn(3, 6)))
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


# --------------------------------------------------------------------------------------------------------------- names

# As parts of words where no other word has them, else as whole words.
MODELS = (
    "qwen|llama|mistral|mixtral|gemma|gpt|bert|resnet|resnext|mobilenet|whisper|deepseek|falcon|starcoder|convnext|densenet"
    "|minilm|pylm|phi-?[1-4]|olmo|mpnet|electra|longformer|efficientnet|squeezenet|alexnet|vgg|hugging_?face transformers"
    r"|\b(?:vit|deit|swin|beit|dino|clip(?!\.default)|t5|bart|opt|phi|yi|mpt|bloom|neox|xlnet|blip|siglip|sam|detr)\b"
)


@pytest.mark.parametrize("folder", ["analysis", "passes"])
def test_nothing_knows_a_model_by_name(repo, folder):
    files = sorted((repo / "fxc" / folder).glob("*.py"))
    assert len(files) > 5
    found = [
        f"{file.name}:{number}: {text.strip()}"
        for file in files
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(MODELS, text, re.IGNORECASE)
    ]
    assert found == []
    for family in FAMILIES:
        if family not in ("mlp", "cnn"):
            assert re.search(MODELS, family.replace("_", " "), re.IGNORECASE), f"{family} would not be found"
