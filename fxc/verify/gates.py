"""The gates that every pass has to go through: structure, facts, meaning, finiteness, really lowered, really smaller."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxc.errors import VerificationFailed
from fxc.ir.check import check
from fxc.ir.program import Program
from fxc.passes.base import Pass, Result
from fxc.verify.compare import in_float64, layer_errors, relative_error, run

MECHANISM_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Gates:
    """What the gates measured: gate -> "ok" and what was seen, or why it was not run; layers: FQN -> relative error."""

    outcome: dict[str, str] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)


def judge(step: Pass, before: Program, after: Program, result: Result, samples: list[list[Tensor]], budget: float) -> Gates:
    """Check what `step` made of `before`. budget: the largest relative error of the outputs that a policy pass may cause.

    Raises `VerificationFailed` naming the pass, the gate and the node or layer.
    """
    gates = Gates()
    check(after)
    gates.outcome["structure"] = "ok"
    _facts(step, before, after)
    gates.outcome["facts"] = "ok"
    gates.outcome["finite"] = _finite(step, before, after)
    if step.is_policy:
        gates.outcome["lowered"] = _lowered(step, before, after)
        gates.outcome["smaller"] = _smaller(step, before, after, result)
    if after.is_on_meta:
        gates.outcome["meaning"] = "not run: the weights are on meta"
    elif result.changed == 0:
        gates.outcome["meaning"] = "ok: nothing changed"
    elif step.is_policy:
        gates.outcome["meaning"] = _within_budget(step, before, after, samples, budget, gates)
    else:
        gates.outcome["meaning"] = _unchanged(step, before, after, samples)
    return gates


def _fail(step: Pass, gate: str, what: str, where: str | None = None) -> VerificationFailed:
    return VerificationFailed(
        f"the pass {step} did not go through the gate {gate!r}: {what}",
        where=where,
        hint="nothing was written; leave that layer out with --skip, or report it with the model's configuration",
    )


def _facts(step: Pass, before: Program, after: Program) -> None:
    for fact in sorted(step.gives, key=str):
        if why := fact.check(after):
            raise _fail(step, "facts", f"it promises {fact}, and {why}")
    for fact in sorted(step.needs - step.breaks, key=str):
        if why := fact.check(after):
            raise _fail(step, "facts", f"it says that it keeps {fact}, and {why}")


def _finite(step: Pass, before: Program, after: Program) -> str:
    fresh = [fqn for fqn, t in after.constants.items() if t is not before.constants.get(fqn)]
    for fqn in fresh:
        tensor = after.constants[fqn]
        if tensor.is_meta or not tensor.dtype.is_floating_point:
            continue
        if not tensor.isfinite().all():
            raise _fail(step, "finite", f"{int((~tensor.isfinite()).sum())} values are NaN or infinite", fqn)
        if fqn.endswith(".scale") and not (tensor > 0).all():
            raise _fail(step, "finite", "a scale is not positive", fqn)
    return f"ok: {len(fresh)} new constants"


def _lowered(step: Pass, before: Program, after: Program) -> str:
    """No weight that was packed is still there as floats."""
    for fqn in after.constants:
        base = fqn.removesuffix(".qweight")
        if base != fqn and (f"{base}.weight" in after.constants or base in after.constants):
            raise _fail(step, "lowered", "the float weight is still there beside the packed one", base)
    made = sum(1 for n in after.graph.nodes if n.meta.get("by") == step.name)
    return f"ok: {made} nodes"


def _smaller(step: Pass, before: Program, after: Program, result: Result) -> str:
    if result.changed and after.nbytes() >= before.nbytes():
        raise _fail(step, "smaller", f"{before.nbytes():,} bytes became {after.nbytes():,}")
    return f"ok: {before.nbytes():,} -> {after.nbytes():,} bytes"


def _within_budget(
    step: Pass, before: Program, after: Program, samples: list[list[Tensor]], budget: float, gates: Gates
) -> str:
    gates.layers = layer_errors(before, after, samples[0], step.name)
    worst = 0.0
    for inputs in samples:
        worst = max(worst, relative_error(run(after, inputs), run(before, inputs)))
    if worst > budget:
        layer, error = max(gates.layers.items(), key=lambda item: item[1], default=("", 0.0))
        raise _fail(
            step,
            "meaning",
            f"the outputs differ by {worst:.3f}, the budget is {budget}; most in it: {error:.3f}",
            layer,
        )
    return f"ok: outputs differ by {worst:.2e} of their size, budget {budget}"


def _unchanged(step: Pass, before: Program, after: Program, samples: list[list[Tensor]]) -> str:
    worst, how = 0.0, "float64"
    promoted = in_float64(before), in_float64(after)
    if None in promoted:
        promoted, how = (before, after), "its own dtype"
    dtypes = {t.dtype for t in promoted[0].constants.values() if t.dtype.is_floating_point} or {torch.float64}
    limit = max(MECHANISM_LIMIT.get(d, 0.0) for d in dtypes)
    for inputs in samples:
        if how == "float64":
            inputs = [t.double() if t.dtype.is_floating_point else t for t in inputs]
        worst = max(worst, relative_error(run(promoted[1], inputs), run(promoted[0], inputs)))
        if worst > limit:
            raise _fail(step, "meaning", f"it may not change what the program computes; it does, by {worst:.1e}")
    return f"ok: outputs differ by {worst:.1e} in {how} at {len(samples)} sizes"
