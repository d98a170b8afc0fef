"""Calibration data: of which kind it may be, and that passes are given what was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import build
from tiny import save
from typer.testing import CliRunner

import fxc
from fxc.cli.app import app
from fxc.data.calibration import check_data, held_out
from fxc.errors import UsageError
from fxc.passes.base import Pass, Result


@pytest.mark.parametrize("name", ["a.json", "a.CSV", "a.parquet", "a.pt", "a.png", "a.zip", "none.txt", "empty"])
def test_data_of_the_wrong_kind_is_refused_without_a_model(tmp_path, name):
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "none.txt":
        (tmp_path / name).write_text("x")
    with pytest.raises(UsageError) as caught:
        check_data(tmp_path / name)
    assert caught.value.hint and name in str(caught.value)
    with pytest.raises(UsageError, match="int"):
        check_data(7)


@pytest.fixture
def learner(monkeypatch):
    """A pass that uses data, and the contexts that it was given."""
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))
    seen = []

    @dataclass(frozen=True)
    class Learner(Pass):
        name: ClassVar[str] = "learner"
        learn: bool = True

        def uses_data(self) -> bool:
            return self.learn

        def run(self, program, context) -> Result:
            seen.append(context)
            return Result()

    return seen


def test_passes_are_given_the_samples(learner, folder):
    model, inputs = build("mlp")
    data = [torch.randn(2, 40) for _ in range(3)]
    fxc.optimize(model, inputs, "learner", calib=data, verify=False)
    assert [s[0].shape for s in learner[0].samples] == [(2, 40)] * 3
    fxc.optimize(model, inputs, "learner", verify=False)
    assert learner[1].samples == []
    with pytest.raises(UsageError, match="no such calibration data"):
        fxc.optimize(model, inputs, "learner", calib="none.txt")


def test_the_command_line_reads_the_data_where_a_pass_uses_it(learner, folder, tmp_path):
    save("bert", tmp_path / "model")

    def compile_with(*options: object, code: int = 0) -> str:
        arguments = ["compile", tmp_path / "model", "--no-verify", "--passes", *options]
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        return done.stderr

    said = compile_with("learner", "-o", tmp_path / "a", "--calib", folder / "text.txt")
    assert "reading calibration samples ..." in said and "no pass of this recipe" not in said
    assert learner[0].samples[0][0].shape == (1, 128)
    said = compile_with("learner:learn=false", "-o", tmp_path / "b", "--calib", folder / "text.txt")
    assert "no pass of this recipe uses calibration data" in said and learner[1].samples == []
    few = ("--calib-samples", 2, "--calib-length", 16)
    compile_with("learner", "-o", tmp_path / "few", "--calib", folder / "text.txt", *few)
    assert [sample[0].shape for sample in learner[2].samples] == [(1, 16)] * 2
    (tmp_path / "r.toml").write_text('passes = ["learner"]\ncalib_samples = 3\ncalib_length = 16')
    recipe = ("--recipe", tmp_path / "r.toml", "--calib", folder / "text.txt", "--calib-length", 8)
    CliRunner().invoke(app, [str(a) for a in ("compile", tmp_path / "model", "--no-verify", "-o", tmp_path / "r", *recipe)])
    assert [sample[0].shape for sample in learner[3].samples] == [(1, 8)] * 3
    for name in ("none.txt", "model"):
        said = compile_with("learner", "-o", tmp_path / "c", "--calib", tmp_path / name, code=2)
        assert said.startswith("error[FXC-E2]") and not (tmp_path / "c").exists()


def test_every_eighth_sample_is_kept_from_passes_and_few_of_many():
    assert held_out([[n] for n in range(7)]) == ([[n] for n in range(7)], [])
    seen, kept = held_out([[n] for n in range(20)])
    assert kept == [[7], [15]] and sorted(seen + kept) == [[n] for n in range(20)]
    seen, kept = held_out([[n] for n in range(512)])
    assert len(kept) == 16 and len(seen) == 496


def test_the_report_says_what_was_learned_from(learner):
    model, inputs = build("mlp")
    data = [torch.randn(2, 40) for _ in range(3)]

    def told(given):
        return fxc.optimize(model, inputs, "learner", calib=given, calib_samples=2, verify=False).report["calibration"]

    assert told(data) | {"sha256": None} == {"samples": 2, "held_out": 0, "most": 2, "length": 128, "sha256": None}
    assert told(data)["sha256"] == told(data)["sha256"] != told(data[1:])["sha256"]
    assert "calibration" not in fxc.optimize(model, inputs, "learner", verify=False).report
