"""Training data apart from calibration data: read, split, carried through what changes inputs, and told in the report."""

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
from fxc.data.decoder import decoder_inputs
from fxc.data.labels import Samples
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context, Pass, Result
from fxc.pipeline import run_passes


@pytest.fixture
def learner(monkeypatch):
    """A pass that trains, or does so in name, and the contexts that it was given."""
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))
    seen = []

    @dataclass(frozen=True)
    class Learner(Pass):
        name: ClassVar[str] = "learner"

        def uses_training(self) -> bool:
            return True

        def needs_data(self) -> str | None:
            return "what it is trained on is"

        def run(self, program, context) -> Result:
            seen.append(context)
            return Result()

    return seen


def test_passes_are_given_what_to_train_on_and_what_to_judge_by(learner):
    model, inputs = build("mlp")
    x = torch.randn(20, 40)
    data = [(row, at % 10) for at, row in enumerate(x)]
    made = fxc.optimize(model, inputs, "learner", train=data, train_samples=18, calib=[x[:2]], verify=False)
    context, report = learner[0], made.report
    assert [len(some) for some in (context.samples, context.training, context.judging)] == [1, 16, 2]
    assert context.judging.labels[1].tolist() == [5] and torch.equal(context.judging[1][0], x[15:16])
    assert {k: v for k, v in report["training"].items() if k != "sha256"} == {
        "samples": 16, "held_out": 2, "most": 18, "length": 128,
    }  # fmt: skip
    other = fxc.optimize(model, inputs, "learner", train=[(row, 0) for row, _ in data], train_samples=18, verify=False)
    assert learner[1].samples == [] and other.report["training"]["sha256"] != report["training"]["sha256"]
    assert "calibration" not in other.report


def test_the_samples_are_what_the_program_takes_after_each_pass(learner):
    program = capture(*build("qwen2"), check=False)
    texts = [torch.full((1, 4), at) for at in range(3)]
    data = Samples([decoder_inputs(program, ids) for ids in texts], texts)
    options = Options("prune:drop=model.layers.0,learner", verify=False)
    after, _ = run_passes(program, Context(training=data, judging=data.take([1])), options)
    context = learner[0]
    assert [len(each) for each in (data[2], context.training[2])] == [7, 5]
    for sample in (*context.training, *context.judging):
        after.module()(*sample)
    assert context.training.labels is data.labels and context.judging.labels[0].tolist() == [[1] * 4]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"passes": "learner"}, "or --train FILE, train=..."),
        ({"passes": "int8", "train": ["a"]}, "none of the passes trains"), ({"train_length": 7}, "no training data to take"),
        ({"passes": "learner", "train": "none.txt"}, "no such training data"),
        ({"passes": "learner", "train": ["a"], "train_samples": 0}, "0 samples"),
        ({"passes": "learner,int8:mode=static", "train": ["a"]}, "calibration data"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_capture(learner, given, said):
    with pytest.raises(UsageError) as caught:
        Options(**given).check()
    assert said in str(caught.value)
    Options("learner", train=["a"]).check()


def test_the_command_trains_a_classifier_on_a_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    save("vit", tmp_path / "model", tokenizer=False)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    for label, name in enumerate(("black", "white")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for at in range(5):
            image.new("RGB", (32, 32), (200 * label + at,) * 3).save(tmp_path / "images" / name / f"{at}.png")

    def run(*more):
        spec = ("--passes", "recover:loss=task:steps=4:rate=0.003", "--no-verify", "--no-measure")
        given = ("compile", tmp_path / "model", "-o", tmp_path / "out", *spec, "--train", tmp_path / "images", *more)
        return CliRunner().invoke(app, [str(each) for each in given])

    done = run()
    assert done.exit_code == 0, done.output
    assert "reading training samples" in done.stderr and "on 9 samples, judged on 1" in done.stderr
    assert fxc.load(tmp_path / "out").report["training"]["held_out"] == 1
    (tmp_path / "images" / "loose.png").write_bytes((tmp_path / "images" / "white" / "0.png").read_bytes())
    done = run("--overwrite")
    assert done.exit_code == 2 and "loss=task needs labels" in done.stderr and "one folder a class" in done.stderr
