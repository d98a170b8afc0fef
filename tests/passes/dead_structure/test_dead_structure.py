"""What is masked is removed, whoever masked it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from removal import EXACT, Attention, canonical, difference, removed_from, shapes, sliced, with_forward
from torch import nn
from torch.nn.utils import prune as torch_prune
from zeroed import PICTURES, TOKENS, convolutions, mlp


@pytest.mark.parametrize("left_on", [False, True])
def test_columns_that_torch_has_pruned(left_on):
    model = mlp()
    torch_prune.ln_structured(model.down, "weight", amount=5, n=2, dim=1)
    if not left_on:
        torch_prune.remove(model.down, "weight")
    after, result = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["up.weight"] == [7, 6] and shapes(after)["up.bias"] == [7]
    assert [(r.before, r.removed) for r in result.removed] == [(12, 5)]


@pytest.mark.fault(12)
@pytest.mark.parametrize("left_on", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_torch_has_pruned_leave_a_constant_that_is_folded(left_on, bias):
    model = mlp(bias)
    torch_prune.ln_structured(model.up, "weight", amount=5, n=2, dim=0)
    if not left_on:
        torch_prune.remove(model.up, "weight")
    after, result = removed_from(model, torch.randn(3, 6))
    found = shapes(after)
    assert found["down.weight"] == [6, 7] and found["down.bias"] == [6], "a bias is added if there is none"
    assert found["up.bias"] == [7]
    assert sum(r.removed for r in result.removed) == 5


def test_global_unstructured_pruning_removes_what_it_happens_to_kill_and_no_more():
    model = mlp()
    torch_prune.global_unstructured([(model.down, "weight")], torch_prune.L1Unstructured, amount=0.5)
    after, _ = removed_from(model, torch.randn(3, 6))
    dead = int((~(model.down.weight != 0).any(0)).sum())
    assert shapes(after)["up.weight"] == [12 - dead, 6]


@pytest.mark.fault(3)
def test_a_module_that_is_called_twice_is_cut_once():
    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return x

    model = with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6))
    with torch.no_grad():
        model.down.weight[:, [2, 7]] = 0
        model.up.weight[5] = 0
    after, result = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["up.weight"] == [9, 6] and shapes(after)["down.weight"] == [6, 9]
    assert [r.removed for r in result.removed] == [3]


@pytest.mark.fault(1)
def test_tied_weights_stay_tied():
    def forward(self, ids):
        y = self.table(ids)
        y = y + self.down(torch.relu(self.up(y)))
        return torch.nn.functional.linear(y, self.table.weight)

    model = with_forward(forward, table=nn.Embedding(30, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))
    with torch.no_grad():
        model.down.weight[:, 3] = 0
        model.table.weight[:, 6] = 0  # read by the last product as zero, and zero itself
        model.down.weight[6] = 0
        model.down.bias[6] = 0
    after, _ = removed_from(model, torch.randint(0, 30, (2, 5)))
    assert shapes(after) == {
        "table.weight": [30, 7], "up.weight": [11, 7], "up.bias": [11], "down.weight": [7, 11], "down.bias": [7],
    }  # fmt: skip


def test_a_weight_that_another_layer_shares_keeps_what_the_other_reads():
    """Two products with one matrix, between different activations: a unit goes when both do without it."""

    def forward(self, x):
        return self.down(torch.relu(self.up(x))), self.other(torch.tanh(self.up(x)))

    model = with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6), other=nn.Linear(12, 5))
    with torch.no_grad():
        model.down.weight[:, [1, 2, 3]] = 0
        model.other.weight[:, [2, 3, 4]] = 0
    before = canonical(model, (torch.randn(3, 6).double(),))
    after, result = sliced(before)
    assert difference(before, after, result) <= EXACT
    assert shapes(after)["up.weight"] == [10, 6]


@pytest.mark.fault(12)
def test_a_bias_that_two_layers_share_is_not_folded_into():
    def forward(self, x):
        y = torch.relu(self.up(x))
        return torch.nn.functional.linear(y, self.a, self.bias) * torch.nn.functional.linear(x, self.b, self.bias)

    model = with_forward(
        forward, up=nn.Linear(6, 12), a=nn.Parameter(torch.zeros(4, 12)), b=nn.Parameter(torch.zeros(4, 6)),
        bias=nn.Parameter(torch.zeros(4)),
    )  # fmt: skip
    with torch.no_grad():
        model.up.weight[[1, 5]] = 0
        model.up.bias[[1, 5]] = torch.tensor([1.0, 2.0]).double()
    after, _ = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["a"] == [4, 10] and len(shapes(after)) == 6, "the other keeps the bias that it had"


def test_nothing_is_removed_from_a_model_where_all_matters():
    for model, x in (
        (mlp(), torch.randn(3, 6)),
        (Attention(6, 2), torch.randn(TOKENS)),
        (convolutions(1), torch.randn(PICTURES)),
    ):
        before = canonical(model, (x.double(),))
        after, result = sliced(before)
        assert result.changed == 0 and str(after) == str(before) and result.removed == []


def test_single_zeros_are_no_structure():
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, :] = 0  # an output that is its bias
        model.down.weight[1:, 4] = torch.where(torch.arange(5) == 2, 1.0, 0.0)
        model.up.weight[3, :5] = 0
    after, result = sliced(canonical(model, (torch.randn(3, 6).double(),)))
    assert result.changed == 0 and shapes(after)["up.weight"] == [12, 6]
