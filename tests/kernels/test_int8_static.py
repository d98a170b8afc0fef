"""The layers with one scale for all activations compute what their formula says, in float64 and number by number."""

import pytest
import torch

from fxc.schemes import int8

SCALE, ZERO = 0.05, 100


def levels(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(x.double() / SCALE) + ZERO, 0, 255) - ZERO


def weights(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return q, torch.rand(shape[0], generator=generator) + 0.01, torch.randn(shape[0], generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer(dtype):
    q, scale, bias = weights(5, 24)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1)).mul(6).to(dtype)
    out = int8.STATIC(x, q, scale, bias, SCALE, ZERO)
    expected = torch.stack([(levels(x) * row.double()).sum(-1) for row in q], -1) * SCALE * scale + bias
    torch.testing.assert_close(out, expected.to(dtype))
    assert (levels(x) == -ZERO).any() and (levels(x) == 255 - ZERO).any(), "both ends are cut off"
    assert torch.equal(int8.STATIC(x, q, scale, None, SCALE, ZERO), int8.STATIC(x, q, scale, bias * 0, SCALE, ZERO))
    assert int8.STATIC(x[:, :0], q, scale, bias, SCALE, ZERO).shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [([1, 1], [0, 0], [1, 1], 1), ([2, 1], [1, 2], [1, 1], 1), ([1, 1], [2, 2], [2, 1], 2), ([1, 2], [1, 1], [1, 1], 4)],
)
def test_a_convolution(stride, padding, dilation, groups):
    q, scale, bias = weights(8, 4 // groups, 3, 2)
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1)) * 3
    out = int8.STATIC_CONV2D(x, q, scale, bias, stride, padding, dilation, groups, SCALE, ZERO)
    read = torch.nn.functional.pad(levels(x), (padding[1], padding[1], padding[0], padding[0]))
    for n in range(8):
        first = n // (8 // groups) * (4 // groups)
        for i, j in ((0, 0), (1, 2), (out.shape[2] - 1, out.shape[3] - 1)):
            total = sum(
                read[:, first + c, i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]] * int(q[n, c, a, b])
                for c in range(4 // groups) for a in range(3) for b in range(2)
            )  # fmt: skip
            assert torch.allclose(out[:, n, i, j].double(), total * SCALE * scale[n] + bias[n], rtol=1e-5, atol=1e-5)
    meta = int8.STATIC_CONV2D(*(t.to("meta") for t in (x, q, scale, bias)), stride, padding, dilation, groups, SCALE, ZERO)
    assert meta.shape == out.shape


def test_wrong_arguments_are_refused():
    q, scale, bias = weights(8, 4, 3, 3)
    x, how = torch.randn(1, 4, 5, 5), ([1, 1], [0, 0], [1, 1], 1)
    for x_scale, zero in ((0.0, 0), (float("inf"), 0), (float("nan"), 0), (-1.0, 0), (1.0, 256), (1.0, -1)):
        with pytest.raises(ValueError, match="x_scale"):
            int8.STATIC_CONV2D(x, q, scale, bias, *how, x_scale, zero)
        with pytest.raises(ValueError, match="x_scale"):
            int8.STATIC(torch.randn(2, 36), q.flatten(1), scale, bias, x_scale, zero)
    with pytest.raises(TypeError, match="int8"):
        int8.STATIC_CONV2D(x, q.float(), scale, bias, *how, 1.0, 0)
    with pytest.raises(ValueError, match="four dimensions"):
        int8.STATIC_CONV2D(x[0], q, scale, bias, *how, 1.0, 0)
    with pytest.raises(ValueError, match="scale and bias"):
        int8.STATIC_CONV2D(x, q, scale[:3], bias, *how, 1.0, 0)
