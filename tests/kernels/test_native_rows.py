"""Layers of an encoder in one call against the same steps one by one, at every level that this CPU has."""

import pytest
import torch

from fxc_kernels.cpu import native, native_attention, native_int8, native_rows
from fxc_kernels.cpu.native_rows import ATTENTION, LINEAR, NORM, Step, encoded, one_by_one

HERE = [name for name, (_, needs) in native.LEVELS.items() if set(needs.split()) <= native._abilities()]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HIDDEN, INNER, HEADS, SHARED, DEPTH = 96, 200, 6, 2, 32


@pytest.fixture(autouse=True, params=HERE or ["none"])
def level(request, monkeypatch):
    monkeypatch.setenv("FXC_CPU_LEVEL", request.param)
    if request.param == "none" or native_rows.why_not():
        pytest.skip("this CPU runs none of them")
    yield request.param
    torch.set_num_threads(1)


def distance(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


class Layers:
    """Steps over one input [B, S, HIDDEN], register 0."""

    def __init__(self, dtype):
        self.dtype, self.constants, self.numbers, self.steps, self.made = dtype, [], [], [], 1

    def add(self, kind, *numbers):
        """The register that the step makes first."""
        self.steps.append(Step(kind, numbers))
        self.made += self.steps[-1].count
        return self.made - self.steps[-1].count

    def linear(self, x, outputs, columns, activation="none", limit=0):
        qweight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
        scale = torch.rand(outputs) / (40 * columns**0.5)
        dense = (qweight * scale[:, None]).to(self.dtype) if limit else None
        self.constants += [*native_int8.pack(qweight, scale, torch.randn(outputs) / 8), dense]
        return self.add(LINEAR, x, native_int8.ACTIVATIONS.index(activation), outputs, limit)

    def norm(self, x, other, is_rms=False, with_sum=False, columns=HIDDEN):
        bias = None if is_rms else torch.randn(columns).to(self.dtype) / 8
        self.constants += [torch.rand(columns).to(self.dtype) + 0.5, bias]
        self.numbers.append(1e-5)
        return self.add(NORM, x, other, int(is_rms), int(with_sum))

    def attention(self, x, mask=-1, is_causal=False, is_rough=False):
        self.numbers.append(DEPTH**-0.5)
        places = (0, HEADS * DEPTH, (HEADS + SHARED) * DEPTH)
        return self.add(ATTENTION, x, HEADS, SHARED, DEPTH, *places, mask, int(is_causal), int(is_rough))

    def layer(self, x, limit=0, **attention):
        """A layer with a norm of each kind; it makes what the next one reads."""
        attended = self.attention(self.linear(x, (HEADS + 2 * SHARED) * DEPTH, HIDDEN), **attention)
        x = self.norm(self.linear(attended, HIDDEN, HEADS * DEPTH, limit=limit), x)
        inner = self.linear(x, INNER, HIDDEN, "gelu")
        return self.norm(self.linear(inner, HIDDEN, INNER), x, is_rms=True, with_sum=True) + 1

    def given(self, x, masks, results):
        return [x], masks, self.constants, self.numbers, encoded(self.steps), results


def layers(dtype, count=3, **options):
    """(layers, the results: what the last one makes, and what stands between)"""
    torch.manual_seed(0)
    made, x = Layers(dtype), 0
    for _ in range(count):
        x = made.layer(x, **options)
    return made, [x - 1, x, 4]


@DTYPES
@pytest.mark.parametrize(
    ("batch", "length", "threads"),
    [(1, 8, 1), (1, 37, 1), (1, 37, 2), (2, 130, 1), (2, 130, 2), (3, 65, 2), (5, 16, 3), (1, 260, 3), (9, 9, 1)],
)
def test_the_same_bits_as_one_by_one(batch, length, threads, dtype):
    made, results = layers(dtype, is_rough=True)
    x = torch.randn(batch, length, HIDDEN).to(dtype)
    torch.set_num_threads(threads)
    for _ in range(3):  # threads meet in another order each time
        given = made.given(x, [], results)
        for y, expected in zip(native_rows.native_rows(*given), one_by_one(*given), strict=True):
            assert y.dtype == dtype and y.isfinite().all() and torch.equal(y, expected)


@pytest.mark.parametrize("seed", range(40))
def test_steps_of_all_widths_in_any_order(seed):
    """Registers get the places of others that nothing reads any more, and parts of these; rows go through 96 at a time."""
    torch.manual_seed(seed)
    made, widths = Layers(torch.float32), [HIDDEN]

    def one_of(some):
        return some[int(torch.randint(len(some), ()))]

    for _ in range(14):
        x = one_of(range(len(widths)))
        alike = [each for each, width in enumerate(widths) if width == widths[x]]
        kind = one_of(["linear", "linear", "norm", "attention"])
        if kind == "linear":
            outputs = one_of([24, 40, HIDDEN, INNER, (HEADS + 2 * SHARED) * DEPTH])
            made.linear(x, outputs, widths[x])
            widths.append(outputs)
        elif kind == "norm":
            with_sum = bool(torch.rand(()) < 0.5)
            made.norm(x, one_of(alike), with_sum=with_sum, columns=widths[x])
            widths += [widths[x]] * (1 + with_sum)
        elif wide := [each for each, width in enumerate(widths) if each and width == (HEADS + 2 * SHARED) * DEPTH]:
            made.attention(one_of(wide), is_rough=True)
            widths.append(HEADS * DEPTH)
    given = made.given(torch.randn(2, 130, HIDDEN), [], sorted({len(widths) - 1, one_of(range(1, len(widths)))}))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for y, expected in zip(native_rows.native_rows(*given), one_by_one(*given), strict=True):
            assert torch.equal(y, expected)


@DTYPES
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "bool of keys", "numbers", "of each head"])
def test_masks(kind, is_causal, dtype):
    made, results = layers(dtype, 2, mask=0, is_causal=is_causal, is_rough=dtype == torch.bfloat16)
    shapes = {
        "bool": (3, 1, 40, 40), "bool of keys": (1, 1, 1, 40), "numbers": (3, 1, 1, 40), "of each head": (1, HEADS, 40, 40),
    }  # fmt: skip
    shape = shapes[kind]
    mask = torch.rand(shape) < 0.7
    if kind in ("numbers", "of each head"):
        mask = torch.zeros(shape).masked_fill(~mask, float("-inf")).to(dtype)
    for each in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3)):  # whose keys are not next to each other
        given = made.given(torch.randn(3, 40, HIDDEN).to(dtype), [each], results)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for y, expected in zip(native_rows.native_rows(*given), one_by_one(*given), strict=True):
                assert y.isfinite().all() and torch.equal(y, expected)


@pytest.mark.skipif(not native_attention._multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("length", [9, 24, 64, 131])
def test_attention_in_bfloat16_is_near(length, level):
    x = torch.randn(2, length, HIDDEN)
    mask = torch.rand(2, 1, length, length) < 0.8
    mask[:, :, 3] = False  # sees nothing
    near, exact = Layers(torch.float32), Layers(torch.float32)
    for made, is_rough in ((near, True), (exact, False)):
        torch.manual_seed(0)
        made.attention(made.linear(0, (HEADS + 2 * SHARED) * DEPTH, HIDDEN), mask=0, is_rough=is_rough)
    (y,), (expected,) = (native_rows.native_rows(*made.given(x, [mask], [2])) for made in (near, exact))
    assert 0 < distance(y, expected) < 4e-3 if level == "avx512_vnni" else torch.equal(y, expected)
    assert not y[:, 3].any()


@pytest.mark.skipif(not native_attention._multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
def test_what_is_not_finite_stays_in_its_sequence():
    made, results = layers(torch.float32, 2, is_rough=True)
    x = torch.randn(3, 16, HIDDEN)
    whole = native_rows.native_rows(*made.given(x, [], results))
    x[1, 5, 7] = float("nan")
    for y, expected in zip(native_rows.native_rows(*made.given(x, [], results)), whole, strict=True):
        assert torch.equal(y[0::2], expected[0::2])
        assert y[1, 5].isnan().all()


def test_few_rows_are_left_to_single_calls(monkeypatch):
    """Those for which a layer is dense, and fewer than threads share; none are refused."""
    called = []
    monkeypatch.setattr(native_rows, "one_by_one", lambda *given: called.append(1) or one_by_one(*given))
    made, results = layers(torch.float32, 2, limit=16)
    for rows, threads, are_single in ((9, 1, 1), (16, 1, 1), (17, 1, 0), (23, 2, 1), (24, 2, 0)):
        torch.set_num_threads(threads)
        called.clear()
        given = made.given(torch.randn(1, rows, HIDDEN), [], results)
        found = native_rows.native_rows(*given)
        assert len(called) == are_single, rows
        assert all(y.shape[:2] == (1, rows) for y in found)
        if rows > 16:
            assert all(torch.equal(y, z) for y, z in zip(found, one_by_one(*given), strict=True))
    with pytest.raises(RuntimeError, match="no rows"):
        native_rows.native_rows(*made.given(torch.randn(1, 0, HIDDEN), [], results))


def test_another_set_of_constants_is_not_taken_for_the_last():
    x = torch.randn(2, 20, HIDDEN)
    for seed in (0, 1, 0):
        made, results = layers(torch.float32, 1)
        torch.manual_seed(seed)
        floats = [each is not None and each.dtype == torch.float32 for each in made.constants]
        made.constants = [torch.rand_like(each) / 99 if new else each for new, each in zip(floats, made.constants, strict=True)]
        given = made.given(x, [], results)
        assert all(torch.equal(y, z) for y, z in zip(native_rows.native_rows(*given), one_by_one(*given), strict=True))
