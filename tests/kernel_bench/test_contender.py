"""When a product is wrong."""

import torch

from fxc.kernel_bench.contender import HALF, errors


def test_rounding_is_not_called_wrong():
    got = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    rms, largest = errors(got.bfloat16(), torch.arange(1000), got)
    assert rms < HALF / 2 and 4 * rms < largest < 8 * HALF
