"""How a pass is written, and what is said of one that is written wrong."""

from __future__ import annotations

import pytest

from fxc.errors import UsageError
from fxc.passes.base import parse_passes
from fxc.passes.order import order

SPECS = [
    "int8", "int8:mode=weight_only", "canonicalize", "int4:only=lm_head;*.mlp", "int8:mode=weight_only:only=re:.*mlp.*",
    "int4:group=32:only=re:(?:q|k)_proj", "int4:only='re:(l{1,2}),b;c'", "int8:only='re:a:b=c'", "int8:only='it''s'",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_pass_prints_as_it_is_written(spec):
    assert str(parse_passes(spec)[0]) == spec
    every = ",".join(SPECS)
    assert ",".join(map(str, parse_passes(every))) == every


@pytest.mark.parametrize("mark", ["", "'", '"'])
def test_a_value_may_stand_in_quotes(mark):
    first, second = parse_passes(f"int4:only={mark}re:.*mlp.*:x{mark}:group=64,int8")
    assert (first.only, first.group, str(second)) == ("re:.*mlp.*:x", 64, "int8")
    if mark:
        assert parse_passes(f"int8:only={mark}a,re:b{mark}")[0].only == "a,re:b"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8:mod=dynamic", "its options: mode, observer"),
        ("int8:only", "its options: mode, observer, algorithm, steps, smooth, only"),
        ("int8:mode=fast", "one of dynamic, weight_only"),
        ("int8:mode", "has no option"),
        ("int8,int8:mode=weight_only", "given twice"),
    ],
)
def test_what_is_written_wrong_says_what_there_is(spec, says):
    with pytest.raises(UsageError) as caught:
        order(parse_passes(spec))
    assert says in str(caught.value)


OTHER_NAMES = [("qat:format=int4", "recover"), ("distill", "fxc distill"), ("lora", "recover:lora")]


@pytest.mark.parametrize(("name", "said"), OTHER_NAMES)
def test_what_has_another_name_here_is_said(name, said):
    with pytest.raises(UsageError, match="there is no pass") as refused:
        parse_passes(name)
    assert said in refused.value.hint
