"""The groups that networks come down to."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from axes import canonical, family, group_of, members, toy
from torch import nn

from fxc.analysis.groups import NAMES, groups

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
    found = groups(canonical(Attention(how), (torch.randn(2, 5, 20),)))
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
    found = groups(canonical(Attention(how, kv=6), (torch.randn(2, 5, 20),)))
    (head,) = (g for g in found if g.kind == "head")
    assert next(m for m in head.members if m.fqn == "qkv.weight").units.tolist() == [i // 4 for i in range(24)] * 3
    assert head.source is None and head.pinned is None and [s.weight.fqn for s in head.sites] == ["out.weight"]


def test_a_gate_and_what_it_gates_are_halves_of_one_projection():
    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)

    model = toy(forward, both=nn.Linear(6, 10, bias=False), down=nn.Linear(5, 6))
    group = group_of(groups(canonical(model, (torch.randn(3, 6),))), "both.weight", 0)
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
    found = groups(canonical(model, (torch.randn(2, 3, 8, 8),)))
    a, b = group_of(found, "a.weight", 0), group_of(found, "b.weight", 0)
    assert (a.kind, a.size, b.kind, b.size) == ("channel", 4, "channel", 5) and not (a.pinned or b.pinned)
    along = {(m.fqn, m.dim): m.units.tolist() for m in b.members}
    assert along["norm.weight", 0] == [-1] * 4 + [0, 1, 2, 3, 4] == along["norm.running_var", 0]
    assert along["head.weight", 1] == [-1] * 16 + [i // 4 for i in range(20)]


@pytest.mark.fault(15)
def test_groups_of_a_grouped_convolution():
    model = toy(
        lambda self, x: self.last(torch.relu(self.grouped(torch.relu(self.first(x))))),
        first=nn.Conv2d(3, 6, 1), grouped=nn.Conv2d(6, 12, 3, groups=3), last=nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    found = groups(canonical(model, (torch.randn(2, 3, 8, 8),)))
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
    group = group_of(groups(canonical(model, (torch.randn(2, 3, 8, 8),))), "first.weight", 0)
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
    found = groups(canonical(model, (torch.randint(0, 30, (2, 5)),)))
    ffn = group_of(found, "up.weight", 0)
    assert (ffn.kind, ffn.size, ffn.pinned) == ("ffn", 12, None)
    assert [s.weight.fqn for s in ffn.sites] == ["down.weight"] * 2, "it is read twice"
    # Nothing normalises over the width, and a table has it as its second dimension: nothing pins it.
    width = group_of(found, "up.weight", 1)
    assert ("table.weight", 1) in {(m.fqn, m.dim) for m in width.members} and width.size == 8
