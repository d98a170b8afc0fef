"""Options of `prune`: how they are written, and what they refuse."""

from __future__ import annotations

import pytest
from pruned import masked, three_layers

from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.prune.prune import Prune
from fxc.pipeline import run_passes


@pytest.mark.parametrize(
    "spec",
    [
        "prune:heads=0.25:ffn=0.3",
        "prune:layers=0.5:criterion=taylor",
        "prune:channels=0.125:criterion=bn_scale:scope=global:round_to=16",
        "prune:heads=0.5:uniform=true",
        "prune:drop=model.layers.3.self_attn/heads/0+5;model.layers.4",
        "prune:ffn=0.1:plan=plans/a.json",
    ],
)
def test_a_pass_prints_as_it_is_written(spec):
    (step,) = parse_passes(spec)
    assert str(step) == spec and parse_passes(str(step)) == [step]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("prune:heads=1.5", "is not a share"),
        ("prune:ffn=1", "is not a share"),
        ("prune:ffn=-0.1", "is not a share"),
        ("prune:ffn=nan", "is not a share"),
        ("prune:channels=many", "is not a float"),
        ("prune:ffn=0.5:round_to=0", "is not a positive number"),
        ("prune:ffn=0.5:round_to=1.5", "is not a int"),
        ("prune:ffn=0.5:uniform=true:scope=global", "uniform=true keeps the layers alike"),
        ("prune:ffn=0.5:uniform=yes", "is not a bool"),
        ("prune:ffn=0.5:criterion=best", "one of auto, l2, l1, bn_scale, taylor, wanda, mask_gradient"),
        ("prune:ffn=0.5:scope=world", "one of layer, global"),
        ("prune:toes=0.5", "its options: amount, budget, heads, ffn"),
        ("prune:drop=a/toes/1", "one of heads"),
    ],
)
def test_options_that_make_no_sense(spec, says):
    with pytest.raises(UsageError) as caught:
        parse_passes(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["ffn=0.5:criterion=taylor", "ffn=0.5:criterion=wanda", "ffn=0.5:criterion=mask_gradient", "layers=0.5"]
)
def test_missing_data_is_asked_for(spec):
    (step,) = parse_passes(f"prune:{spec}")
    assert step.uses_data()
    with pytest.raises(UsageError, match="measured on calibration data, and there is none") as caught:
        step.run(three_layers().copy(), Context())
    assert "--calib" in str(caught.value)


@pytest.mark.parametrize("spec", ["ffn=0.5", "ffn=0.5:criterion=bn_scale", "drop=a.1:criterion=taylor"])
def test_what_needs_no_data_does_not_ask(spec):
    assert not parse_passes(f"prune:{spec}")[0].uses_data()


def test_weights_on_meta_cannot_be_ranked():
    program = three_layers().copy()
    program.constants = {fqn: t.to("meta") for fqn, t in program.constants.items()}
    with pytest.raises(UsageError, match="meta"):
        Prune(ffn=0.5).run(program, Context())


def test_a_kind_that_is_not_there_is_said_to_be():
    _, result = masked(three_layers(), "prune:heads=0.5:ffn=0.5")
    assert [r.reason for r in result.refusals] == ["the model has no heads that can be pruned by l2"]
    with pytest.raises(UsageError, match="the model has no channels"):
        run_passes(three_layers(), Context(), Options("prune:channels=0.5"))
    _, result = masked(three_layers(), "prune:ffn=0.5:criterion=bn_scale")
    assert {r.reason for r in result.refusals} >= {"bn_scale says nothing about it"}
