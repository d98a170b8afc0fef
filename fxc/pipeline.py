"""Run passes over a program, one at a time, each through the gates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fxc import ranks
from fxc.compilation import Step
from fxc.data.labels import Samples
from fxc.data.samples import samples
from fxc.errors import FxcError, UsageError, VerificationFailed
from fxc.ir.program import Program
from fxc.ir.thinned import remember_thinned
from fxc.options import Options
from fxc.passes.base import Context, Original, Pass
from fxc.passes.instead import instead
from fxc.passes.order import order
from fxc.passes.patterns import check_patterns
from fxc.plugins import origin_of
from fxc.schemes.parameters import parameters
from fxc.verify.gates import Budget, judge
from fxc.verify.layer_gate import LayerGate

# What a context holds of inputs.
DATA = ("samples", "held_out", "training", "judging")
# So many samples judge a pass that fits them.
JUDGED = 4


def run_passes(
    program: Program,
    context: Context,
    options: Options,
    on_step: Callable[[Step, Program], None] | None = None,
    *,
    is_small: bool = False,
) -> tuple[Program, list[Step]]:
    """Run the passes of `options` in the order that their facts demand; `program` itself is not changed.

    options: of these passes, verify, budget, layer_budget, allow_noop and dump_dir are read; the text of the program goes to
    00-capture.fxc, 01-NAME.fxc, ... in dump_dir. on_step: called after each pass. is_small: whether a program whose
    constants are in files can be run all the same.
    Raises `VerificationFailed` at the first gate that does not hold, `UsageError` for an impossible order or a policy pass
    that changed nothing. After `context.rewrites.limit` rewrites it ends.
    """
    ordered = order(options.passes, program).passes
    dump_dir = Path(options.dump_dir) if options.dump_dir else None
    for each in ordered:
        check_patterns(each.limited_to(), program, f"{each.name}:only")
    if dump_dir is not None:
        dump_dir.mkdir(parents=True, exist_ok=True)
        _dump(program, dump_dir / "00-capture.fxc")
    # What is larger than memory is not run as a whole: see `rehearse`.
    runs = options.verify and not program.is_on_meta and not (program.is_streamed and not is_small)
    tried = samples(program) if runs else []
    original = Original(program, context.samples)
    steps = []
    for number, step in enumerate(ordered, 1):
        if context.rewrites.is_over:
            break
        context.rewrites.begin(str(step))
        after = program.copy()
        context = replace(context, later=tuple(ordered[number:]))
        began = time.perf_counter()
        budget, layer_budget = options.budget, options.layer_budget
        own = step.limits
        limits = Budget(own[0] if budget is None else budget, own[1] if layer_budget is None else layer_budget)
        alone = LayerGate(step, limits.layer) if program.is_streamed and options.verify and step.is_policy else None
        try:
            limit = options.budget if options.verify else None
            result = step.run(after, replace(context, limit=limit, tried=tried, original=original, on_layer=alone))
            if after.is_streamed:
                after.constants.settle()
        except FxcError:
            raise
        except Exception as error:
            raise VerificationFailed(
                f"the pass {step} broke off: {type(error).__name__}: {error}",
                hint="this is a fault of fxc; report it with the model's configuration",
            ) from error
        seconds = time.perf_counter() - began
        context.rewrites.end(result.changed)
        if context.rewrites.is_over:
            result.notes.append(f"it ends here: the limit is {context.rewrites.limit} rewrites")
        may_do_nothing = options.allow_noop or context.rewrites.is_over or step.may_change_nothing()
        if step.is_policy and result.changed == 0 and not may_do_nothing:
            others = instead(program, [each.name for each in ordered])
            found = f"what would find something: {'; '.join(others)}" if others else "leave it out"
            raise UsageError(
                f"the pass {step} changed nothing",
                why="; ".join(f"{r.fqn}: {r.reason}" for r in result.refusals[:5]) or "there is no layer for it",
                hint=f"{found}; --allow-noop accepts a pass that does nothing",
            )
        done = Step(
            str(step), result.changed, round(seconds, 4), program.nbytes(), after.nbytes(), parameters(program),
            parameters(after), result.covered_bytes, result.refusals, result.removed, notes=result.notes,
            repeat=str(result.repeat) if result.repeat else None, cut_off=result.cut_off, training=result.training,
            plugin=origin_of(type(step)),
        )  # fmt: skip
        if options.verify and (ranks.number() == 0 or not after.is_streamed):  # of what is packed others have shapes alone
            judged = context.samples[:JUDGED] if step.fits_data() and context.samples else tried
            gates = judge(step, program, after, result, judged, limits, context)
            done.gates, done.layer_errors, done.saturation = gates.outcome, gates.layers, gates.saturation
            if alone:
                gates.outcome["layers"], done.layer_errors, done.judged_on = alone.outcome(), alone.errors, "drawn rows"
            elif gates.layers:
                done.judged_on = "made-up inputs" if judged is tried else "calibration data"
        if dump_dir is not None:
            _dump(after, dump_dir / f"{number:02}-{step.name}.fxc")
        tried = [result.interface.inputs(program, inputs) for inputs in tried]
        # A copy: a caller's context is not changed.
        taken = partial(result.interface.inputs, program)
        given = {name: Samples.of(getattr(context, name)).map(taken) for name in DATA}
        gone = {name: each for name, each in program.constants.items() if name not in after.constants}
        floats = {name: each for name, each in gone.items() if each.is_floating_point() and each.ndim > 1}
        remember_thinned(after, floats)
        # They would be in memory for nothing where nobody trains.
        kept = floats if any(each.uses_training() for each in ordered[number:]) else {}
        context = replace(context, floats=context.floats | kept, **given)
        original = replace(original, interface=original.interface.then(result.interface))
        program = after
        steps.append(done)
        if on_step is not None:
            on_step(done, program)
    return program, steps


def rehearse(small: Program, options: Options) -> None:
    """Run the passes up to the last mechanism over the first layers of a model that is larger than memory, so that their gates
    hold there. Raises what `run_passes` does."""
    chosen = replace(options, passes=rehearsed(small, options), dump_dir=None, allow_noop=True)
    run_passes(small, Context(skip=options.skip, seed=options.seed, is_short=True), chosen, is_small=True)


def rehearsed(small: Program, options: Options) -> list[Pass]:
    """The passes of `options`, in their order, up to the last mechanism."""
    ordered = order(options.passes, small).passes
    return ordered[: max((at for at, step in enumerate(ordered, 1) if not step.is_policy), default=0)]


def _dump(program: Program, path: Path) -> None:
    path.write_text(str(program), encoding="utf-8")
