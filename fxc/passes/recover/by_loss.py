"""The whole student by its loss: what is trained, with what schedules, from where an earlier process was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxc.passes.recover.lesson import Lesson, said
from fxc.train.batches import Batches
from fxc.train.loop import train
from fxc.train.lora import adapt, merge
from fxc.train.muon import matrices
from fxc.train.needs import needs_of
from fxc.train.schedules import RAMP, Sparser, l1, norm_scales
from fxc.train.shards import gather, parts_of, shard
from fxc.train.trainable import Trainable

EVERYTHING = ("weight", "vector", "scale")


def train_by_loss(lesson: Lesson, spent: float) -> None:
    """Train by the loss, and say so in the lesson's result. spent: seconds so far, which count."""
    options, student, context = lesson.options, lesson.student, lesson.context
    training, held_out = lesson.training, lesson.held_out
    plan = options.plan(context.seed)
    if plan.minutes:
        if plan.minutes * 60 <= spent:
            lesson.result.notes.append(f"nothing is left of {plan.minutes:g} minutes to train by the loss")
            return
        plan = replace(plan, minutes=plan.minutes - spent / 60)
    adapted = adapt(student, options.lora, context.seed) if options.lora else []
    if adapted:
        student.train_only(EVERYTHING)
    count = sum(each.numel() for each in student.named().values())
    sharded = shard(student) if options.shard else {}
    lesson.taught.gathers = bool(sharded)
    parameters = student.named()
    parameters |= lesson.taught.projections(training)
    together = -(-plan.batch // plan.accumulate)
    own = sum(each.numel() for each in parameters.values())
    needs = needs_of(student.program, own, training, together, in_blocks=options.checkpointing)
    context.say(f"{options} trains {count:,} numbers on {len(training)} samples, judged on {len(held_out)}, with {needs}")
    needs.check(str(options))
    sparser = Sparser(student, options.sparsity) if options.sparsity else None

    def before_step(done: float) -> None:
        student.rounds(done >= options.quantize_after)
        if sparser is not None:
            sparser(done)

    prepares = bool(options.l1 or options.layer_drop)
    # The parts of the first process, which has the journal, are not all.
    journal = lesson.journal("by the loss") if not sharded else None
    if journal and journal.began:
        looks = plan.looks if plan.minutes else min(plan.looks, plan.steps)
        context.say(f"{options} goes on: {journal.began} of {looks} parts are done")
    pieces = lesson.taught.pieces(
        Batches(training, options.batch, context.seed), held_out, training.labels, held_out.labels,
        accumulate=options.accumulate,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        fit = train(
            parameters, pieces, plan, kinds=student.kinds, before_step=before_step, state=student.state, buffers=student,
            apart=parts_of(student, sharded), matrices=matrices(student), first_counts=not (prepares or sparser),
            settled=1.0 if prepares else max(RAMP if sparser else 0.0, options.quantize_after),
            journal=journal, track=context.track, what="recovering",
        )  # fmt: skip
    merge(student, adapted)
    gather(student, sharded)
    better = fit.after < fit.before or prepares or sparser is not None
    lesson.result.training = fit
    outcome = said(fit.before, fit.after, better)
    lesson.keep(f"{fit.steps} steps in {fit.precision}; the loss on {len(held_out)} held-out samples {outcome}", better)
    if fit.stopped:
        lesson.result.notes.append(f"it ended early: {fit.stopped}")


def penalty(student: Trainable, weight: float) -> Callable[[], Tensor] | None:
    """What is added to the loss of each step: so much times the scales of batch norms."""
    if not weight:
        return None
    scales = norm_scales(student)
    return lambda: weight * l1(scales)
