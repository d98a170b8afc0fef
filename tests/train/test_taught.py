"""A student beside its teacher: labels go with their samples, and a teacher that is known does not run again."""

from __future__ import annotations

import pytest
import torch
from families import build
from formats import captured, directed, normal

from fxc.data.labels import Samples
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.train.batches import Batches
from fxc.train.kept import Kept
from fxc.train.losses import Loss, default_loss
from fxc.train.taught import Taught
from fxc.train.trainable import Trainable


def taught(loss: str, **options) -> Taught:
    """int4 of 2 bits of `Net`, whose 8 outputs are taken as logits, [3, 5, 8]."""
    program = run_passes(captured(), Context(), Options("int4:bits=2:group=32", verify=False))[0]
    return Taught(Trainable(program), captured(), Loss.parse(loss, **options))


def counted(made: Taught) -> list[int]:
    """Grows with each run of the teacher."""
    ran, teacher = [], made.teacher
    made.teacher = lambda *inputs: ran.append(1) or teacher(*inputs)
    return ran


@pytest.mark.parametrize("loss", ["topk", "topk+0.1*task"])
def test_a_teacher_that_is_known_does_not_run_again(loss):
    data, labels = directed(6), [torch.arange(15).view(3, 5) % 8] * 6
    made, fresh = (taught(loss, k=3, temperature=2.0) for _ in range(2))
    fresh.kept = None
    ran, batches = counted(made), Batches(data, 4)
    steps, expected = made.steps(batches, labels), fresh.steps(batches, labels)
    judge = made.judged(data[:2], labels[:2])
    for step in range(8):
        for mine, other in zip(steps(step), expected(step), strict=True):
            torch.testing.assert_close(mine, other)
        assert judge() == judge()
    assert len(ran) <= 6 + 2
    assert made.kept.bytes == 8 * (3 * 5 * (3 * 8 + 4)), "of six samples and of two that are judged"


@pytest.mark.parametrize("loss", ["kl+topk", "outputs+features", "features_cosine", "topk"])
def test_all_that_the_loss_reads_is_kept_where_there_is_room(loss):
    data = directed(6)
    made, fresh = (taught(loss, k=64) for _ in range(2))
    fresh.kept = None
    ran, batches = counted(made), Batches(data, 4)
    steps, expected = made.steps(batches), fresh.steps(batches)
    for step in range(8):
        for mine, other in zip(steps(step), expected(step), strict=True):
            torch.testing.assert_close(mine, other)
    assert len(ran) <= 6 and made.kept.bytes
    small = taught(loss, k=64)
    small.kept = Kept(most=made.kept.bytes - 1)
    steps = small.steps(batches)
    assert all(len(list(steps(step))) == 1 for step in range(4)) and small.kept.bytes == 0, "a part of them is of no use"


def test_nothing_is_kept_without_a_teacher():
    assert taught("task").kept is None


def mlp():
    return capture(*build("mlp"), check=False)


def labelled(count: int = 40, wrong: bool = False) -> Samples:
    """Rows of an MLP's inputs, of which one number says the class by its sign."""
    x = normal(count, 40)
    x[:, 0] *= 4
    labels = (x[:, 0] > 0).long() + (10 if wrong else 3)
    return Samples([[row[None]] for row in x], [label[None] for label in labels])


def test_a_classifier_learns_labels():
    samples = labelled(200)
    train, judge = samples.take(range(150)), samples.take(range(150, 200))
    assert default_loss(mlp()) == "outputs"
    spec = "int8,recover:method=all:loss=task:steps=30:rate=0.01:batch=16"
    program, steps = run_passes(mlp(), Context(training=train, judging=judge), Options(spec, verify=False))
    given = program.module()(torch.cat([each[0] for each in judge]))[0].argmax(-1)
    assert (given == torch.cat(judge.labels)).float().mean() > 0.85, steps[-1].notes


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (Samples(labelled(16)), "needs labels"), (labelled(16, wrong=True), "is no class: the model knows 0 to 9"),
        (Samples(labelled(16), None, UsageError("row 7 is odd")), "row 7 is odd"),
        (Samples(labelled(16), [torch.zeros(1, 3, dtype=torch.int64)] * 16), "give one for each sample"),
    ],
)  # fmt: skip
def test_labels_that_are_missing_or_wrong_are_found_before_training(samples, said):
    with pytest.raises(UsageError) as caught:
        run_passes(mlp(), Context(samples=samples), Options("recover:loss=task", verify=False))
    assert said in str(caught.value) and caught.value.hint


def test_what_a_model_does_not_give_is_found_before_training():
    loss = Loss.parse("pooled")
    with pytest.raises(UsageError, match=r"\[B, N, D\]"):
        loss.check(mlp(), mlp())
    bert = capture(*build("distilbert"), check=False)
    loss.check(bert, bert)
    for text in ("kl", "topk", "task"):
        with pytest.raises(UsageError, match="last_hidden_state"):
            Loss.parse(text).check(bert, bert)
    narrow = capture(torch.nn.Linear(40, 7).eval(), (normal(2, 40),), check=False)
    with pytest.raises(UsageError, match="7 wide where the teacher's is 10"):
        Loss.parse("outputs").check(narrow, mlp())
    Loss.parse("features").check(narrow, mlp())
