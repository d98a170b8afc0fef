"""The record of a compilation: what its JSON holds, and what of that an artifact keeps."""

import pytest

from fxc.compilation import Compilation, Configuration, PerplexityChange, Stage, Step, lasting
from fxc.passes.base import Refusal


def record(**more) -> Compilation:
    step = Step("int8", 1, 0.25, 400, 100, 100, 100, 400, [Refusal("head", "it is tied", 40)])
    earlier = [{"name": "prune", "said by": "a newer version"}]
    return Compilation({"kind": "module"}, "auto", ["*.x"], {"*.x": []}, 440, 140, 110, 110, 0.9, earlier, [step], **more)


def test_the_report_says_what_an_artifact_went_through_before_and_leaves_out_what_was_not_measured():
    report = record().as_json()
    assert list(report) == [
        "source", "dtype", "skip", "skipped", "bytes_before", "bytes_after", "parameters_before", "parameters_after",
        "coverage", "passes",
    ]  # fmt: skip
    assert report["passes"][0] == {"name": "prune", "said by": "a newer version"}
    assert report["passes"][1]["refusals"] == [{"fqn": "head", "reason": "it is tied", "bytes": 40}]


def test_what_was_measured_is_in_the_report_but_for_the_stages():
    change = PerplexityChange(10.0, 11.0, 0.1, None, 640, 64)
    made = record(perplexity=change, configuration=Configuration({}, "layers differ"), stages=[Stage("int8", 140, 110)])
    report = made.as_json()
    assert report["perplexity"]["standard_error"] is None and report["perplexity"]["change"] == 0.1
    assert report["configuration"] == {"changes": {}, "not_exportable": "layers differ"} and "stages" not in report


def test_an_artifact_keeps_no_times():
    assert [step.keys() & {"seconds", "name"} for step in lasting(record().as_json())["passes"]] == [{"name"}, {"name"}]
    assert lasting({}) == {}


def test_a_stage_says_nothing_of_what_was_not_measured():
    assert Stage("int8", 1, 2).as_json() == {"name": "int8", "bytes": 1, "parameters": 2}
    timed = Stage("int8", 1, 2, milliseconds={"forward": 0.5}, perplexity=3.0).as_json()
    assert list(timed) == ["name", "bytes", "parameters", "milliseconds", "tokens", "perplexity"] and timed["tokens"] is None


def test_layers_are_told_in_decibels_and_the_worst_by_name():
    made = record()
    unmeasured = made.as_json()
    measured = {"saturation", "cut_off", "judged_on", "signal_to_noise"}
    assert "worst" not in unmeasured and not measured & unmeasured["passes"][1].keys()
    step = made.passes[0]
    step.layer_errors, step.saturation, step.judged_on = {"a": 0.01, "b": 0.1, "c": 0.0}, {"a": 0.25}, "made-up inputs"
    step.cut_off = {"a": 0.001}
    report = made.as_json()
    told = report["passes"][1]
    assert told["signal_to_noise"] == {"a": pytest.approx(40), "b": pytest.approx(20), "c": None}
    assert told["saturation"] == {"a": 0.25} and told["judged_on"] == "made-up inputs"
    assert [each["layer"] for each in report["worst"]] == ["b", "a", "c"]
    assert report["worst"][1] == {"layer": "a", "by": "int8", "error": 0.01, "saturation": 0.25, "cut_off": 0.001}
