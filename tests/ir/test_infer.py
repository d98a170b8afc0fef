"""Types that were inferred once are known, and only where the next would be the same."""

from __future__ import annotations

import pytest
import torch

from fxc.ir.infer import fake_constant, infer, new_symbols

aten = torch.ops.aten


@pytest.fixture
def types():
    """(a fake mode, a matrix [s0, 4] and an integer vector [s1] in it)"""
    mode, (rows, count) = new_symbols([3, 5])
    with mode:
        return mode, torch.empty(rows, 4), torch.empty(count, dtype=torch.int64)


def test_the_same_operator_of_the_same_types_is_run_once(types, monkeypatch):
    mode, x, _ = types
    weight = fake_constant(mode, torch.ones(6, 4))
    first = infer(mode, aten.linear.default, (x, weight), {})
    with mode:
        alike = torch.empty(x.shape[0], 4)
    others = alike, fake_constant(mode, torch.ones(6, 4))
    monkeypatch.setattr(type(mode), "__torch_dispatch__", lambda *_: pytest.fail("it was run again"))
    assert infer(mode, aten.linear.default, others, {}) is first


def test_what_differs_is_another_type(types):
    mode, x, _ = types
    weight = fake_constant(mode, torch.ones(6, 4))
    assert infer(mode, aten.linear.default, (x, weight), {}).shape[0] == x.shape[0]
    with mode:
        fewer, half, turned = torch.empty(2, 4), torch.empty_like(x, dtype=torch.float16), torch.empty(4, x.shape[0]).t()
    assert infer(mode, aten.linear.default, (fewer, weight), {}).shape == (2, 6)
    assert infer(mode, aten.relu.default, (x,), {}).dtype == torch.float32
    assert infer(mode, aten.relu.default, (half,), {}).dtype == torch.float16
    assert infer(mode, aten.relu.default, (turned,), {}).stride() != infer(mode, aten.relu.default, (x,), {}).stride()
    assert infer(mode, aten.sum.dim_IntList, (x, [0]), {}).shape == (4,)
    assert infer(mode, aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64}).dtype == torch.float64


def test_numbers_that_are_equal_and_of_other_types_are_told_apart(types):
    mode, _, ids = types
    found = [infer(mode, aten.mul.Tensor, (ids, number), {}).dtype for number in (1, 1.0, True)]
    assert found == [torch.int64, torch.float32, torch.int64]


def test_another_default_type_is_another_type(types):
    mode, *_ = types
    assert infer(mode, aten.full.default, ([2], 0.5), {}).dtype == torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        assert infer(mode, aten.full.default, ([2], 0.5), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_size_that_only_data_tells_is_a_new_symbol_each_time(types):
    mode, _, ids = types
    with mode:
        alike = torch.empty(ids.shape[0], dtype=torch.int64)
    first, second = (infer(mode, aten.nonzero.default, (each,), {}) for each in (ids, alike))
    assert str(first.shape[0]) != str(second.shape[0])
