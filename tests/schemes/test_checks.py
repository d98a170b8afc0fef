"""Weights that no format can hold."""

from __future__ import annotations

import pytest
import torch

from fxc.errors import InputRefused
from fxc.schemes import fp8, int4, sparse24


@pytest.mark.parametrize(
    "quantize",
    [lambda w: int4.quantize_weight(w, 32, True), fp8.quantize_weight, sparse24.mask_by_magnitude],
    ids=["int4", "fp8", "sparse24"],
)
def test_what_no_format_can_hold_is_refused(quantize):
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(3, 32)
        weight[1, 2] = bad
        with pytest.raises(InputRefused, match="1 of its 3 output channels"):
            quantize(weight)
    for wrong in (torch.ones(3, 32, dtype=torch.int32), torch.ones(32), torch.ones(2, 2, 32)):
        with pytest.raises(InputRefused, match="floating-point matrix"):
            quantize(wrong)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(InputRefused, match="more than two of four"):
        sparse24.pack(torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0]]))
    with pytest.raises(InputRefused, match="multiple of 8"):
        sparse24.pack(torch.zeros(2, 12))
    with pytest.raises(InputRefused, match="0 to 15"):
        int4.pack(torch.tensor([[1, 16]], dtype=torch.uint8))
    with pytest.raises(InputRefused, match="even number"):
        int4.pack(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(InputRefused, match="group=64 does not divide"):
        int4.quantize_weight(torch.zeros(2, 96), 64, True)
