"""Options: one list, checked before any model is loaded."""

from dataclasses import fields, replace

import pytest
import torch

import fxc
from fxc.errors import UsageError
from fxc.options import Keywords, Options
from fxc.passes.int8 import Int8


def test_the_keywords_that_editors_know_are_the_options():
    assert ["passes", *Keywords.__annotations__] == [field.name for field in fields(Options)]


def test_passes_are_parsed_once_and_options_may_be_varied():
    options = Options("int8:mode=weight_only", budget=0.5)
    assert options.passes == (Int8(mode="weight_only"),)
    assert replace(options, dtype="float32") == Options([Int8(mode="weight_only")], budget=0.5, dtype="float32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "int3"}, "unknown dtype"),
        ({"device": "nowhere"}, "no device"),
        ({"backend": "nothing"}, "no backend"),
        ({"calib": "no/such/file"}, "no such calibration data"),
        ({"calib": ["a text"], "calib_samples": 0}, "0 samples"),
        ({"calib": ["a text"], "calib_length": 1}, "1 tokens"),
        ({"calib_length": 512}, "no calibration data to take"),
        ({"passes": "prune:ffn=0.5:criterion=wanda"}, "calibration data"),
        ({"passes": "int8,fp8"}, "each have to run before the other"),
    ],
)
def test_what_cannot_be_is_refused_before_capture(given, message):
    with pytest.raises(UsageError, match=message):
        Options(**given).check()


def test_a_keyword_that_is_no_option_is_named():
    with pytest.raises(TypeError, match="bugdet"):
        fxc.optimize(torch.nn.Linear(4, 4), (torch.ones(1, 4),), bugdet=1.0)
