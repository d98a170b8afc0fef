"""Half-blocks, one after another, each until it gives what the model's gave."""

from __future__ import annotations

import time

from fxc import ranks
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.recover.lesson import Lesson, put, said
from fxc.train.halves import recover_halves
from fxc.train.precision import autocast, chosen

# Blocks are trained on so many samples at most, and judged by an eighth of that, whose hidden states are kept.
SAMPLES, JUDGED = 256, 32
# Of the minutes that are given, where the loss trains too, which needs the rest; and where it trains the same weights again,
# which in little time come further by it than by steps of half-blocks before, once last layers are solved for.
SHARE, SHARE_OF_STEPS = 0.5, 0.1


def train_by_blocks(lesson: Lesson, again: bool) -> float:
    """Train half-blocks, and say so in the lesson's result; nothing is changed where the loss on held-out samples is no lower.
    again: whether the loss trains the same weights after. How many seconds it took."""
    options, student, held_out, context = lesson.options, lesson.student, lesson.held_out, lesson.context
    journal = lesson.journal("half-blocks")
    # The first of several processes has the journal, and the others have to do what it does.
    if saved := ranks.agreed(journal.stage(0) if journal and journal.done else None):
        context.say(f"{options} goes on: half-blocks are done")
        put(student, saved["parameters"])
        lesson.keep(saved["note"], saved["better"])
        return saved["seconds"]
    judge, began = lesson.taught.judged(held_out, held_out.labels), time.monotonic()
    before, kept = judge(), [each.detach().clone() for each in student.parameters()]
    teacher = lesson.original.program.copy()
    Canonicalize().run(teacher, Context())
    # Shares of energy are too small for float16 without scaling.
    limit, share = 60 * options.minutes, 1 if options.method == "blocks" else SHARE
    precision = "float32" if options.precision == "float16" else chosen(options.precision)
    halves = recover_halves(
        student, teacher, lesson.training[:: -(-len(lesson.training) // SAMPLES)], held_out[:JUDGED],
        as_teacher=lesson.original.inputs, steps=options.block_steps, rate=options.block_rate, seed=context.seed,
        seconds=limit * share, training_seconds=limit * SHARE_OF_STEPS if again else 0.0, within=lambda: autocast(precision),
        track=context.track,
    )  # fmt: skip
    if ranks.count() > 1:  # on another kind of machine they come out a little different
        put(student, [ranks.agreed_tensor(each.detach()) for each in student.parameters()])
    after = judge() if ranks.agreed(bool(halves.fits)) else before
    better = after < before
    if not better:
        put(student, kept)
    outcome = said(before, after) if halves.fits else "nothing was changed"
    note = f"{halves}; the loss on {len(held_out)} held-out samples {outcome}"
    seconds = time.monotonic() - began
    if journal:
        own = [each.detach() for each in student.parameters()]
        journal.save_stage({"parameters": own, "note": note, "better": better, "seconds": seconds})
    lesson.keep(note, better)
    return seconds
