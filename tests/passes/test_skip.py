"""Patterns of layers to leave alone."""

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x):
        return self.lm_head(self.body(x))


def report_of(skip):
    return fxc.optimize(Net().eval(), (torch.randn(2, 64),), passes="int8", skip=skip).report


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("lm_head", ["lm_head"]), ("*.lm_head", ["lm_head"]), (["*head"], ["lm_head"]), ("re:head$", ["lm_head"]),
        ("body", ["body.0", "body.2"]), ("body.*", ["body.0", "body.2"]), (("body.2",), ["body.2"]),
    ],
)  # fmt: skip
def test_what_a_pattern_leaves_alone_is_said(skip, left):
    report = report_of(skip)
    pattern = skip if isinstance(skip, str) else skip[0]
    assert report["passes"][-1]["changed"] == 3 - len(left)
    assert report["skipped"] == {pattern: left}
    assert [r["fqn"] for r in report["passes"][-1]["refusals"] if pattern in r["reason"]] == left


@pytest.mark.parametrize("skip", [["model.layer.0.*"], "lm_haed", ["lm_head", "re:attention"]])
def test_a_pattern_that_matches_nothing(skip):
    with pytest.raises(UsageError, match="matches no layer") as caught:
        report_of(skip)
    if skip == "lm_haed":
        assert "lm_head" in caught.value.hint


def test_what_is_no_pattern():
    with pytest.raises(UsageError, match="is not a pattern"):
        report_of([3])
