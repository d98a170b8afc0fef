"""Checks of what comes from outside."""

import pytest
import torch

from fxc.errors import InputRefused
from fxc.safety import check_finite, check_relative_name


def test_ordinary_names_pass():
    for name in ("model-00001-of-00002.safetensors", "part/model.safetensors", "..x.safetensors"):
        assert check_relative_name(name, where="here") == name


def test_finite_check_knows_masks_and_meta():
    mask = torch.tensor([0.0, float("-inf")])
    check_finite([("mask", mask)], inf_allowed=True)
    passing = {"codes": torch.ones(2, dtype=torch.int8), "meta": torch.empty(2, device="meta"), "empty": mask[:0]}
    check_finite(passing.items())
    with pytest.raises(InputRefused, match=r"mask \(0 NaN, 1 Inf of 2\)"):
        check_finite([("mask", mask)])
    with pytest.raises(InputRefused, match=r"1 NaN, 0 Inf"):
        check_finite([("mask", torch.tensor([float("nan"), float("inf")]))], inf_allowed=True)
    with pytest.raises(InputRefused, match=r"and 4 more"):
        check_finite([(f"w{i}", mask) for i in range(12)])
