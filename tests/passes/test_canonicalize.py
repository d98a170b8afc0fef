"""Canonical form: what does nothing goes, products become linear layers."""

from __future__ import annotations

import pytest
import torch
from programs import body
from torch import nn

import fxc
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.facts import CANONICAL
from fxc.pipeline import run_passes


def canonical(model: nn.Module, *example):
    program = fxc.capture(model, example)
    return run_passes(program, Context(), Options("canonicalize"))[0]


class Noise(nn.Module):
    """Much that does nothing around a product written in the way of GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(x).float().contiguous().clone()[:, :, :] * 1
        return torch.addmm(self.bias, y.view(-1, 8), self.weight).view(*y.shape[:-1], 4) + 0


def test_noise_goes_and_products_become_linears():
    program = canonical(Noise(), torch.randn(2, 3, 8))
    lines = body(program).splitlines()
    assert lines[-2].startswith("%") and "aten.linear(%0, @weight, @bias)" in lines[-2]
    assert len(lines) == 3, body(program)
    assert list(program.constants["weight"].shape) == [4, 8]


def test_a_second_run_changes_nothing():
    program = canonical(Noise(), torch.randn(2, 3, 8))
    _, steps = run_passes(program, Context(), Options("canonicalize"))
    assert steps[0].changed == 0


def test_what_is_random_or_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight + x @ self.weight.t() + torch.rand(3, 8) + torch.rand(3, 8)

    program = fxc.capture(Twice(), (torch.randn(3, 8),), check=False)
    small, _ = run_passes(program, Context(), Options("canonicalize", verify=False))
    assert body(small).count("aten.rand(") == 2
    assert program.nbytes() == small.nbytes()


def test_a_dropout_that_drops_is_kept():
    class Drops(nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5, training=True)

    program = fxc.capture(Drops(), (torch.randn(3, 8),), check=False)
    assert "dropout" in body(run_passes(program, Context(), Options("canonicalize", verify=False))[0])


class Square(nn.Module):
    """Products with one square weight, written in many ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.w = nn.Parameter(torch.randn(32, 32))
        self.row = nn.Parameter(torch.randn(1, 32))

    def forward(self, x):
        return self.how(x, self.w, self.row)


@pytest.mark.parametrize(
    ("how", "linears", "left"),
    [
        (lambda x, w, b: torch.relu(x @ w) @ w, 2, ()),
        (lambda x, w, b: torch.relu(x @ w.t()) @ w.t(), 2, ()),
        (lambda x, w, b: torch.relu(x @ w.transpose(-1, -2)) @ w.permute(1, 0), 2, ()),
        (lambda x, w, b: torch.addmm(b, x, w), 1, ("aten.add.Tensor",)),
        (lambda x, w, b: torch.addmm(b[0], x, w, alpha=0.5), 1, ("aten.mul.Tensor", "aten.add.Tensor")),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0), 1, ()),
        (lambda x, w, b: torch.addmm(x, x, w, beta=2), 1, ("alpha=2",)),
        (lambda x, w, b: x @ w + w.sum(), 0, ("aten.matmul", "aten.sum")),
        (lambda x, w, b: x @ w.t() + w.sum(), 1, ("aten.sum",)),
        (lambda x, w, b: x @ (w @ w), 0, ("aten.matmul",)),
        (lambda x, w, b: x @ (w @ w.t()), 1, ("aten.matmul",)),
    ],
)
def test_products_become_linears_or_are_left_and_the_fact_holds(how, linears, left):
    torch.manual_seed(0)
    model, x = Square(how), torch.randn(3, 32)
    program = canonical(model, x)
    text = body(program)
    assert text.count("aten.linear(") == linears, text
    assert all(part in text for part in left), text
    assert "aten.t(" not in text or not linears
    assert CANONICAL.check(program) is None
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x)[0], model(x), rtol=1e-4, atol=1e-4)


def test_a_product_with_the_embedding_itself_is_left_alone():
    class TiedProduct(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.e, self.turned = nn.Embedding(32, 32), turned

        def forward(self, ids):
            return self.e(ids) @ (self.e.weight.t() if self.turned else self.e.weight)

    ids = torch.randint(0, 32, (2, 5))
    assert "aten.matmul" in body(canonical(TiedProduct(False), ids))
    turned = fxc.capture(TiedProduct(True), (ids,))
    small, steps = run_passes(turned, Context(), Options("int8", allow_noop=True))
    assert "aten.linear(" in body(small) and "tied" in steps[-1].refusals[0].reason
