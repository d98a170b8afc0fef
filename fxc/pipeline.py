"""Run passes over a program, one at a time, each through the gates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fxc.compilation import Step
from fxc.data.labels import Samples
from fxc.data.samples import samples
from fxc.errors import FxcError, UsageError, VerificationFailed
from fxc.ir.program import Program
from fxc.ir.thinned import remember_thinned
from fxc.options import Options
from fxc.passes.base import Context, Original
from fxc.passes.instead import instead
from fxc.passes.order import order
from fxc.passes.patterns import check_patterns
from fxc.schemes.parameters import parameters
from fxc.verify.gates import Budget, judge

# What a context holds of inputs.
DATA = ("samples", "held_out", "training", "judging")
# So many samples judge a pass that fits them.
JUDGED = 4


def run_passes(
    program: Program,
    context: Context,
    options: Options,
    on_step: Callable[[Step, Program], None] | None = None,
) -> tuple[Program, list[Step]]:
    """Run the passes of `options` in the order that their facts demand; `program` itself is not changed.

    options: of these passes, verify, budget, layer_budget, allow_noop and dump_dir are read; the text of the program goes to
    00-capture.fxc, 01-NAME.fxc, ... in dump_dir. on_step: called after each pass.
    Raises `VerificationFailed` at the first gate that does not hold, `UsageError` for an impossible order or a policy pass
    that changed nothing.
    """
    ordered = order(options.passes, program).passes
    dump_dir = Path(options.dump_dir) if options.dump_dir else None
    for each in ordered:
        check_patterns(each.limited_to(), program, f"{each.name}:only")
    if dump_dir is not None:
        dump_dir.mkdir(parents=True, exist_ok=True)
        _dump(program, dump_dir / "00-capture.fxc")
    tried = samples(program) if options.verify and not program.is_on_meta else []
    original = Original(program, context.samples)
    steps = []
    for number, step in enumerate(ordered, 1):
        after = program.copy()
        context = replace(context, later=tuple(ordered[number:]))
        began = time.perf_counter()
        try:
            limit = options.budget if options.verify else None
            result = step.run(after, replace(context, limit=limit, tried=tried, original=original))
        except FxcError:
            raise
        except Exception as error:
            raise VerificationFailed(
                f"the pass {step} broke off: {type(error).__name__}: {error}",
                hint="this is a fault of fxc; report it with the model's configuration",
            ) from error
        seconds = time.perf_counter() - began
        if step.is_policy and result.changed == 0 and not options.allow_noop and not step.may_change_nothing():
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
        )  # fmt: skip
        if options.verify:
            budget, layer_budget = options.budget, options.layer_budget
            own = step.limits
            limits = Budget(own[0] if budget is None else budget, own[1] if layer_budget is None else layer_budget)
            judged = context.samples[:JUDGED] if step.fits_data() and context.samples else tried
            gates = judge(step, program, after, result, judged, limits, context)
            done.gates, done.layer_errors, done.saturation = gates.outcome, gates.layers, gates.saturation
            if gates.layers:
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


def _dump(program: Program, path: Path) -> None:
    path.write_text(str(program), encoding="utf-8")
