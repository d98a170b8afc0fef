"""Dead heads, and heads that share keys and values."""

from __future__ import annotations

import pytest
import torch
from removal import Attention, removed_from, shapes
from torch import nn
from zeroed import TOKENS, rows, zero_heads


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["o columns", "v rows", "q, k and v rows"])
def test_heads_that_were_zeroed_by_hand(where, masked):
    model = Attention(masked=masked)
    zero_heads(model, where, 0, 2)
    after, result = removed_from(model, torch.randn(TOKENS))
    found = shapes(after)
    assert found["q.weight"] == found["k.weight"] == found["v.weight"] == [8, 10] and found["o.weight"] == [10, 8]
    assert [(r.kind, r.before, r.removed) for r in result.removed] == [("head", 4, 2)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_with_constant_values_is_folded(bias):
    """The weights of attention sum to one, so that a value that is the same everywhere comes out as it is."""
    model = Attention(bias=bias)
    with torch.no_grad():
        model.v.weight[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == [12, 10] and shapes(after)["o.bias"] == [10]


@pytest.mark.parametrize("part", ["q", "k"])
def test_heads_without_queries_or_keys_are_not_dead(part):
    """Their weights are even, and they average the values."""
    model = Attention()
    with torch.no_grad():
        getattr(model, part).weight[rows(1)] = 0
        getattr(model, part).bias[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [16, 10]


@pytest.mark.fault(14)
@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8])
def test_every_ratio_of_query_to_kv_heads(ratio, how):
    model = Attention(2 * ratio, 2, how)
    # The first query head of the first KV head, and all but one of the second.
    zero_heads(model, "o columns", 0, *range(ratio + 1, 2 * ratio))
    after, _ = removed_from(model, torch.randn(TOKENS))
    queries = 2 * ratio - 1 - (ratio - 1)
    heads = shapes(after)["q.weight"][0] // 4
    assert heads == queries
    assert shapes(after)["k.weight"] == shapes(after)["v.weight"] == [4 if ratio == 1 else 8, 10]
    uneven = queries - 1 != 1 and ratio > 1
    copies = [n for n in after.graph.nodes if n.target is torch.ops.aten.index_select.default]
    assert bool(copies) == uneven, "no copy that is not needed"


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ((0, 1, 2), (3, 1)),  # a whole KV head with its queries
        ((0, 3), (4, 2)),  # one of each: still even
        ((1, 2), (4, 2)),  # uneven
        ((0, 1, 2, 4, 5), (1, 1)),  # one head left
        ((2, 4, 5), (3, 2)),
    ],
)
def test_shared_keys_and_values_stay_as_long_as_a_query_reads_them(how, gone, left):
    model = Attention(6, 2, how)
    zero_heads(model, "o columns", *gone)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert (shapes(after)["q.weight"][0] // 4, shapes(after)["k.weight"][0] // 4) == left


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_one_kv_head_for_all_stays(how):
    model = Attention(4, 1, how)
    zero_heads(model, "o columns", 0, 1, 3)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == shapes(after)["k.weight"] == [4, 10] and shapes(after)["o.weight"] == [10, 4]


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_a_kv_head_that_is_read_elsewhere_stays_without_queries(how):
    class ReadTwice(Attention):
        def __init__(self):
            super().__init__(6, 2, how)
            self.side = nn.Linear(8, 10).double()

        def forward(self, x):
            b, s, _ = x.shape
            values = self.v(x).view(b, s, 2, 4)
            return super().forward(x) + self.side(values.transpose(1, 2).transpose(1, 2).reshape(b, s, 8))

    model = ReadTwice()
    zero_heads(model, "o columns", 0, 1, 2)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [8, 10]
    with torch.no_grad():
        model.side.weight[:, :4] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [4, 10] and shapes(after)["side.weight"] == [10, 4]


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_values_of_a_kv_head_that_are_zero_take_all_its_queries(how):
    model = Attention(6, 2, how)
    with torch.no_grad():
        model.v.weight[rows(1)] = 0
        model.v.bias[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == [12, 10] and shapes(after)["v.weight"] == [4, 10]


def test_the_width_of_values_and_of_scores_may_shrink_and_the_scale_stays():
    model = Attention()
    with torch.no_grad():
        model.o.weight.view(10, 4, 4)[:, :, 1] = 0
        for part in (model.q, model.k):
            part.weight.view(4, 4, 10)[:, 2] = 0
            part.bias.view(4, 4)[:, 2] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [12, 10] and shapes(after)["q.weight"] == shapes(after)["k.weight"] == [12, 10]
