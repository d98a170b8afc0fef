"""`fxc.recover` and `fxc.distill`: what is left of a model, or another one, taught by the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build

import fxc
from fxc.errors import UsageError
from fxc.ir.thinned import thinned
from fxc.train.trainable import Trainable


@pytest.fixture(scope="module")
def teacher():
    return build("qwen2")[0]


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 300, (1, 12), generator=draw)} for _ in range(16)]


def losses(model: fxc.CompiledModel) -> tuple[float, float]:
    """Before and after, as the pass said."""
    notes = [each for each in model.report["passes"][-1]["notes"] if "the loss on" in each and " -> " in each[-40:]]
    first, last = (each.rpartition(" samples ")[2].partition(" -> ") for each in (notes[0], notes[-1]))
    return float(first[0]), float(last[2])


@pytest.mark.slow
def test_what_was_pruned_and_packed_comes_nearer_to_its_teacher_and_stays_packed(teacher, data, tmp_path):
    small = fxc.optimize(teacher, passes="prune:heads=0.25:ffn=0.3,int8")
    small.save(tmp_path / "small")
    made = fxc.recover(tmp_path / "small", data, teacher, steps=20)
    before, after = losses(made)
    assert after < 0.9 * before
    names = [each["name"] for each in made.report["passes"]]
    assert names == [
        "canonicalize", "prune:heads=0.25:ffn=0.3", "dead_structure", "int8", "canonicalize", "recover:steps=20"
    ]  # fmt: skip
    assert made.report["teacher"]["class"] == type(teacher).__name__
    old, new = small.program.constants, made.program.constants
    assert {name: (t.dtype, t.shape) for name, t in old.items()} == {name: (t.dtype, t.shape) for name, t in new.items()}
    ids = data[0]["input_ids"]
    with torch.no_grad():
        aim = teacher(ids).logits.log_softmax(-1)
        gaps = [float((aim.exp() * (aim - m(ids).logits.log_softmax(-1))).sum(-1).mean()) for m in (small, made)]
    assert gaps[1] < gaps[0]
    made.save(tmp_path / "made")
    assert fxc.load(tmp_path / "made").generate(ids, max_new_tokens=3).shape == (1, 15)


def test_a_model_that_was_just_compiled_is_taken_as_its_artifact_is(teacher, data):
    small = fxc.optimize(teacher, passes="sparsify:sparsity=0.6,int4:group=32")
    kept = {name: each.clone() for name, each in small.program.constants.items()}
    made = fxc.recover(small, data, small, steps=2, loss="kl")
    assert all(torch.equal(each, small.program.constants[name]) for name, each in kept.items())
    assert "recover:loss=kl:steps=2" in [each["name"] for each in made.report["passes"]]


@pytest.mark.parametrize("format", ["int4:group=32", "fp8"])
def test_packed_zeros_of_an_artifact_stay_and_those_of_dense_weights_need_not(format, teacher, tmp_path):
    layer = "model.layers.0.mlp.up_proj"
    for spec, stays in ((f"sparsify:sparsity=0.6,{format}", True), (format, False)):
        fxc.optimize(teacher, passes=spec, verify=False).save(tmp_path / str(stays))
        program = fxc.load(tmp_path / str(stays)).program
        assert (layer in thinned(program)) == stays
        student = Trainable(program)
        latent = next(each for name, each in student.latents.items() if name.startswith(layer))
        before = latent().detach()
        with torch.no_grad():
            for each in latent.parameters():
                each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(0)))
        student.write()
        now = next(each for name, each in Trainable(program).latents.items() if name.startswith(layer))().detach()
        zeros = before == 0
        assert not torch.equal(before, now) and (bool(zeros.any()) or not stays)
        assert bool((now[zeros] == 0).all()) == (stays or not bool(zeros.any()))


def test_a_smaller_configuration_learns_what_its_teacher_does(teacher, data):
    config = copy.deepcopy(teacher.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 48, 1
    config.layer_types = config.layer_types[:1]
    made, again = (fxc.distill(teacher, config, data, steps=25, rate=0.004, seed=3) for _ in range(2))
    before, after = losses(made)
    assert after < 0.9 * before
    assert made.config.hidden_size == 32 and made.report["source"]["kind"] == "configuration"
    assert all(torch.equal(each, again.program.constants[name]) for name, each in made.program.constants.items())
    assert made.generate(data[0]["input_ids"], max_new_tokens=2).shape == (1, 14)


def test_layers_of_the_teacher_are_a_student_with_their_weights(teacher, data):
    made = fxc.distill(teacher, data=data, student_layers=[1], steps=10)
    before, after = losses(made)
    assert after < before
    assert [each["name"] for each in made.report["passes"]][1] == "prune:keep=1"
    assert {name.split(".")[2] for name in made.program.constants if name.startswith("model.layers.")} == {"1"}
    assert made.config.num_hidden_layers == 1


def test_an_encoder_is_distilled_by_what_it_gives():
    draw = torch.Generator().manual_seed(1)
    some = [{"input_ids": torch.randint(3, 300, (1, 9), generator=draw)} for _ in range(16)]
    bert = build("bert")[0]
    config = copy.deepcopy(bert.config)
    config.intermediate_size = 64
    made = fxc.distill(bert, config, some, steps=25, rate=0.003)
    before, after = losses(made)
    assert after < 0.9 * before


def test_a_model_trains_on_its_task_without_a_teacher(teacher, data):
    some = [{"input_ids": torch.arange(at, at + 12)[None] + 3} for at in range(24)]
    made = fxc.recover(teacher, some, loss="task", steps=10)
    before, after = losses(made)
    assert after < before


def other(teacher, **changes):
    config = copy.deepcopy(teacher.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t, d: fxc.recover(t, d), "there is no teacher"),
        (lambda t, d: fxc.recover(t, None, t), "data"),
        (lambda t, d: fxc.distill(t, other(t, vocab_size=300), d), "tells 320 tokens or labels apart, and the student 300"),
        (lambda t, d: fxc.distill(t, None, d), "there is no student"),
        (lambda t, d: fxc.distill(t, t, d, student_layers=[0]), "two students"),
        (lambda t, d: fxc.distill(t, t), "no data"),
        (lambda t, d: fxc.distill(t, data=d, student_layers=[0, 5]), "there is no layer 5"),
        (lambda t, d: fxc.distill(t, data=d, student_layers=[0, 1]), "all of its 2 layers"),
        (lambda t, d: fxc.distill(t, data=d, student_layers=[-1]), "no list of layers"),
        (lambda t, d: fxc.distill(t, other(t, hidden_act="none"), d), "makes no model of this configuration"),
        (lambda t, d: fxc.distill(build("bert")[0], t, d), "tells 2 tokens or labels apart, and the student 320"),
        (lambda t, d: fxc.distill(build("vit")[0], t, d), "the teacher takes pixel_values, and the student does not"),
        (lambda t, d: fxc.optimize(t, passes="int8", teacher=t), "no pass is taught"),
        (lambda t, d: fxc.recover(t, d, t, lorra=3), "lorra"),
    ],
)
def test_what_cannot_be_taught_is_refused(call, said, teacher, data):
    with pytest.raises((UsageError, TypeError), match=said):
        call(teacher, data)
