"""A model as it is and compressed."""

import pytest
from families import build

import fxc


@pytest.fixture(scope="module")
def pair():
    """A tiny Qwen2 as it is and with int8 layers."""
    model, _ = build("qwen2")
    return fxc.optimize(model, passes=""), fxc.optimize(model, passes="int8", skip=["*.o_proj"])
