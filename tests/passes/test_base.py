"""How a pass is written, and what is said of one that is written wrong."""

from __future__ import annotations

import pytest

from fxc.errors import UsageError
from fxc.passes.base import parse_passes
from fxc.passes.order import order


@pytest.mark.parametrize("spec", ["int8", "int8:mode=weight_only", "canonicalize"])
def test_a_pass_prints_as_it_is_written(spec):
    assert str(parse_passes(spec)[0]) == spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8:mod=dynamic", "its options: mode"),
        ("int8:mode=fast", "one of dynamic, weight_only"),
        ("int8:mode", "has no option"),
        ("int8,int8:mode=weight_only", "given twice"),
    ],
)
def test_what_is_written_wrong_says_what_there_is(spec, says):
    with pytest.raises(UsageError) as caught:
        order(parse_passes(spec))
    assert says in str(caught.value)
