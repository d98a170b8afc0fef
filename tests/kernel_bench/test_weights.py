"""Weights in every scheme and the reference of their products."""

import torch
from toy_bench import TINY

from fxc.kernel_bench import weights
from fxc.kernel_bench.shapes import Shape
from fxc.kernel_bench.weights import make, unfit
from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear


def test_what_does_not_fit_a_shape_says_why():
    assert "K = 100 is not a multiple of 128" in unfit("int4_g128", Shape("x", 8, 100))
    assert "multiple of 8" in unfit("sparse24", Shape("x", 8, 100))
    assert unfit("int8", Shape("x", 8, 100)) is None and unfit("int4_g32", Shape("x", 8, 96)) is None


def test_the_reference_is_that_of_the_operators():
    x = torch.randn(5, TINY.k, generator=torch.Generator().manual_seed(1))
    kinds = ("dense", "int8", "fp8", "int4_g32", "int4_g32_zero", "sparse24", "int8_sparse24")
    made = {kind: make(kind, TINY) for kind in kinds}
    q, scale = made["int8"].parts
    sparse, places = made["sparse24"].parts
    values, meta, row_scale = made["int8_sparse24"].parts
    expected = {
        "dense": x @ made["dense"].parts[0].t(),
        "int8": int8_linear.int8_weight_only_linear_reference(x, q, scale, None),
        "fp8": fp8_linear.fp8_weight_only_linear_reference(x, *made["fp8"].parts, None),
        "int4_g32": int4_linear.int4_weight_only_linear_reference(x, *_float_scale(made["int4_g32"]), None, None, 32),
        "int4_g32_zero": int4_linear.int4_weight_only_linear_reference(x, *_float_scale(made["int4_g32_zero"]), None, 32),
        "sparse24": sparse24_linear.sparse24_linear_reference(x, sparse.float(), places, None),
        "int8_sparse24": x @ (sparse24_linear.unpack(values, meta).float() * row_scale[:, None]).t(),
    }
    for kind, product in expected.items():
        rows, got = made[kind].reference(x)
        assert rows.tolist() == [0, 1, 2, 3, 4]
        torch.testing.assert_close(got, product, rtol=1e-5, atol=1e-5 * product.abs().max().item())


def _float_scale(weight):
    return weight.parts[0], weight.parts[1].float(), *weight.parts[2:]


def test_of_many_rows_some_are_compared_and_the_ends_always(monkeypatch):
    monkeypatch.setattr(weights, "CHECKED_ROWS", 4)
    monkeypatch.setattr(weights, "_CHUNK", 256 * 7)
    weight, x = make("int8", TINY), torch.randn(100, TINY.k)
    rows, got = weight.reference(x)
    assert rows.tolist() == [0, 33, 66, 99]
    torch.testing.assert_close(got, x[rows] @ weight.dense().t(), rtol=1e-4, atol=1e-3)


def test_two_of_four_are_stored_and_places_ascend():
    places = sparse24_linear.unpack_positions(make("sparse24", TINY).parts[1]).reshape(-1, 2)
    assert (places[:, 0] < places[:, 1]).all() and len(places.unique(dim=0)) == 6
