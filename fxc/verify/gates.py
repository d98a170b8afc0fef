"""The gates that every pass has to go through: structure, facts, meaning, finiteness, really lowered, really smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from fxc.errors import VerificationFailed
from fxc.ir.check import check
from fxc.ir.observe import run, stops_at
from fxc.ir.program import Program
from fxc.ir.text import excerpt
from fxc.passes.base import Context, Fact, Pass, Result
from fxc.passes.facts import arguments, packed_weight
from fxc.passes.float64 import LIMIT, LITTLE, in_float64, widened
from fxc.passes.interface import Interface
from fxc.safety import are_finite, as_comparable
from fxc.schemes.scheme import scheme_of
from fxc.verify.compare import Difference, difference, layer_errors, saturation

MECHANISM_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Gates:
    """What the gates measured: gate -> "ok" and what was seen, or why it was not run; layers: FQN -> relative error;
    saturation: FQN -> share of the numbers of a packed weight that are at the ends of the range."""

    outcome: dict[str, str] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    saturation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The largest relative error that a policy pass may cause: in the outputs, and in a single layer that is given the
    inputs that it had before."""

    outputs: float = 0.2
    layer: float = 0.5


def judge(
    step: Pass,
    before: Program,
    after: Program,
    result: Result,
    samples: list[list[Tensor]],
    budget: Budget,
    context: Context | None = None,
) -> Gates:
    """Check what `step` made of `before`. samples: inputs, those of the sizes of capture first; other sizes that `before`
    itself refuses are left out; context: what the pass was given, with samples that it was not.

    Raises `VerificationFailed` naming the pass, the gate and the node or layer.
    """
    gates = Gates()
    check(after)
    _same_results(step, before, after, result.interface)
    gates.outcome["structure"] = "ok"
    is_cut = context is not None and context.rewrites.is_over
    _facts(step, before, after, is_cut)
    gates.outcome["facts"] = "ok but for what it gives: it was cut off" if is_cut else "ok"
    gates.outcome["finite"] = _finite(step, before, after)
    if step.is_policy:
        gates.outcome["lowered"] = _lowered(step, before, after)
        if step.shrinks:
            gates.outcome["smaller"] = _smaller(step, before, after, result)
    if after.is_on_meta:
        gates.outcome["meaning"] = "not run: the weights are on meta"
    elif result.changed == 0:
        gates.outcome["meaning"] = "ok: nothing changed"
    elif step.is_policy and after.is_streamed:
        gates.outcome["meaning"] = "not run: the model is read piece by piece, and judged layer by layer"
    elif step.is_policy:
        _within_budget(step, before, after, samples, budget, gates)
        gates.saturation = saturation(after, step.name)
        if context is not None and context.held_out:
            gates.outcome["held_out"] = _on_held_out(step, before, after, context.held_out, budget)
    else:
        gates.outcome["meaning"] = _unchanged(step, before, after, samples, result.interface, context or Context())
    return gates


def _fail(
    step: Pass,
    gate: str,
    what: str,
    where: str | None = None,
    *,
    program: Program | None = None,
    node: fx.Node | str | None = None,
) -> VerificationFailed:
    """The error of a gate that does not hold. program, node: the place to show, by default that of the constant or layer that
    `where` names."""
    at = node or where
    return VerificationFailed(
        f"the pass {step} did not go through the gate {gate!r}: {what}",
        where=where,
        hint="nothing was written; leave that layer out with --skip, or report it with the model's configuration",
        excerpt=excerpt(program, at) if program and at else (),
    )


def _same_results(step: Pass, before: Program, after: Program, interface: Interface) -> None:
    expected = interface.outputs(before, before.results)
    for name, *nodes in zip(after.signature.outputs, expected, after.results, strict=True):
        old, new = ((n.meta["val"].dtype, n.meta["val"].ndim) for n in nodes)
        if old != new:
            described = (f"{dtype} of {rank} dimensions" for dtype, rank in (old, new))
            raise _fail(step, "structure", " became ".join(described), name, program=after, node=nodes[1])


def _facts(step: Pass, before: Program, after: Program, is_cut: bool) -> None:
    """is_cut: whether a limit of rewrites cut the pass off, so that it does not give what it promises."""
    nodes = {node.name: node for node in after.graph.nodes}

    def broken(fact: Fact, said: str, where: str, why: str) -> VerificationFailed:
        node = None if fact.by_layer else nodes.get(where)
        return _fail(step, "facts", f"{said}, and {why}", where or None, program=after, node=node)

    for fact in [] if is_cut else sorted(step.gives, key=str):
        for where, why in fact.broken(after).items():
            raise broken(fact, f"it promises {fact}", where, why)
    # Of what is broken altogether there is nothing to ask.
    for fact in sorted(step.needs | {each for each in step.breaks if each.by_layer}, key=str):
        was = fact.broken(before) if fact.by_layer else {}
        for where, why in fact.broken(after).items():
            if where in was:
                continue
            if fact not in step.breaks:
                raise broken(fact, f"it says that it keeps {fact}", where, why)
            if fact.by_layer and not step.covers(where):
                raise broken(fact, f"it is for {', '.join(step.limited_to())} alone", where, why)


def _finite(step: Pass, before: Program, after: Program) -> str:
    scales = _scales(after)
    fresh = [fqn for fqn, t in after.constants.items() if t is not before.constants.get(fqn)]
    for fqn in fresh:
        tensor = after.constants[fqn]
        if tensor.is_meta or not tensor.dtype.is_floating_point:
            continue
        if not are_finite(tensor):
            wrong = ~as_comparable(tensor).isfinite()
            raise _fail(step, "finite", f"{int(wrong.sum())} values are NaN or infinite", fqn, program=after)
        if fqn in scales and not ((tensor != 0) if scales[fqn] else (tensor > 0)).all():
            wrong = "zero" if scales[fqn] else "not positive"
            raise _fail(step, "finite", f"a scale is {wrong}", fqn, program=after)
    return f"ok: {len(fresh)} new constants"


def _scales(program: Program) -> dict[str, bool]:
    """The constants that fxc's operators take as scales, and whether they may be negative; a model may have parameters of that
    name besides."""
    found = {}
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "") == "fxc":
            may_be_negative = (scheme := scheme_of(node.target)) is not None and scheme.has_signed_scales
            taken = [a for name, a in arguments(node).items() if name.endswith("scale")]
            found |= {a.target: may_be_negative for a in taken if isinstance(a, fx.Node) and a.op == "get_attr"}
    return found


def _lowered(step: Pass, before: Program, after: Program) -> str:
    """No weight that was packed is still there as floats."""
    old = {node.name: node for node in before.graph.nodes}
    made = [n for n in after.graph.nodes if n.meta.get("by") == step.name]
    for node in made:
        replaced = old.get(node.meta.get("replaces"))
        if replaced is None or packed_weight(node) is None:
            continue
        weight = arguments(replaced).get("weight")
        named = weight.target if isinstance(weight, fx.Node) and weight.op == "get_attr" else packed_weight(replaced)
        if named in after.constants:
            raise _fail(step, "lowered", "the float weight is still there beside the packed one", named, program=after)
    return f"ok: {len(made)} nodes"


def _smaller(step: Pass, before: Program, after: Program, result: Result) -> str:
    if result.changed and after.nbytes() >= before.nbytes():
        raise _fail(step, "smaller", f"{before.nbytes():,} bytes became {after.nbytes():,}")
    return f"ok: {before.nbytes():,} -> {after.nbytes():,} bytes"


def _within_budget(
    step: Pass, before: Program, after: Program, samples: list[list[Tensor]], budget: Budget, gates: Gates
) -> None:
    """Fill in the outcomes "meaning" and "layers", and the layers' errors."""
    seen = _compared(step, before, after, samples)
    try:
        gates.layers = layer_errors(before, after, samples[0], step.name)
    except Exception as error:
        what = f"its layers do not run on what they were given before: {_said(error)}"
        raise _fail(step, "layers", what, program=after, node=_stops_at(after, samples[0])) from error
    layer, most = max(gates.layers.items(), key=lambda item: item[1], default=("", 0.0))
    total = seen.total
    if total.error > budget.outputs:
        raise _fail(
            step,
            "meaning",
            f"the outputs differ by {total.error:.3f}, the budget is {budget.outputs}; most in it: {most:.3f}",
            layer,
            program=after,
        )
    if most > budget.layer:
        what = f"alone it differs by {most:.3f}, the budget of a layer is {budget.layer}"
        raise _fail(step, "layers", what, layer, program=after)
    # Which of two near numbers is the larger is not what a policy promises.
    integers = f"; {total.unequal / total.integers:.2%} of the integers differ" if total.integers else ""
    if total.finite == total.integers:
        gates.outcome["meaning"] = f"not measured: no output has a finite floating-point number{integers}"
    else:
        gates.outcome["meaning"] = (
            f"ok: outputs differ by {total.error:.2e} of their size, {_within(budget.outputs)}, {seen}{integers}"
        )
    gates.outcome["layers"] = (
        f"ok: {len(gates.layers)}, the largest error {most:.2e}, {_within(budget.layer)}"
        if gates.layers
        else "not measured: no layer has a finite value to compare"
    )


def _on_held_out(step: Pass, before: Program, after: Program, samples: list[list[Tensor]], budget: Budget) -> str:
    """The same limits, on real data that the pass has not seen: all samples together, and of each layer the worst of them."""
    total = _compared(step, before, after, samples).total
    layers: dict[str, float] = {}
    for inputs in samples:
        for name, error in layer_errors(before, after, inputs, step.name).items():
            layers[name] = max(error, layers.get(name, 0.0))
    layer, most = max(layers.items(), key=lambda item: item[1], default=("", 0.0))
    where = f"on {len(samples)} sample{'s' * (len(samples) != 1)} of the calibration data that it has not seen"
    if total.error > budget.outputs:
        what = f"{where} the outputs differ by {total.error:.3f}, the budget is {budget.outputs}; most in it: {most:.3f}"
        raise _fail(step, "held_out", what, layer, program=after)
    if most > budget.layer:
        what = f"{where} it alone differs by {most:.3f}, the budget of a layer is {budget.layer}"
        raise _fail(step, "held_out", what, layer, program=after)
    if total.finite == total.integers:
        return f"not measured: no output has a finite floating-point number {where}"
    said = f"the largest error of {len(layers)} layers {most:.2e}, {_within(budget.layer)}" if layers else "no layer to compare"
    return f"ok: {where} outputs differ by {total.error:.2e} of their size, {_within(budget.outputs)}; {said}"


def _unchanged(
    step: Pass, before: Program, after: Program, samples: list[list[Tensor]], interface: Interface, context: Context
) -> str:
    own = rounding_limit(before), "its own dtype"
    if after.is_streamed and not samples:
        return "not run: the model is read piece by piece, and it was tried on its first layers"
    if after.is_streamed:
        seen = _compared(step, before, after, samples[:1], interface, same_dtypes=True)
        _must_agree(step, seen.total, *own, exact=False)
        how = "its own dtype (not in float64: read piece by piece)"
        return f"ok: outputs differ by {_noise(seen.total.error)} in {how}, {seen}"
    most = LITTLE if context.is_short else LIMIT
    wide = in_float64(before, most=most), in_float64(after, most=most)
    why_not = "one of its operators has no such form, or it is too large" if None in wide else None
    doubled = [[widened(t) for t in inputs] for inputs in samples]
    if why_not is None:
        why_not = _outputs(wide[0], doubled[0])[1]
    if why_not is not None:
        seen = _compared(step, before, after, samples, interface, same_dtypes=True)
        _must_agree(step, seen.total, *own, exact=True)
        how = f"its own dtype (not in float64: {why_not})"
    else:
        seen, how = _compared(step, *wide, doubled, interface), "float64"
        if step.rounds and seen.total.error > MECHANISM_LIMIT[torch.float64]:
            # What it computed of constants was rounded to their dtype: in float64 it has to do the same exactly.
            wide = in_float64(before, typed=True), in_float64(before, typed=True)
            exact = step.run(wide[1], replace(context, rewrites=context.rewrites.again()))
            seen, how = _compared(step, *wide, doubled, exact.interface), "float64, run there too"
        _must_agree(step, seen.total, MECHANISM_LIMIT[torch.float64], how, exact=True)
        # Integers were compared in float64: rounding may turn an argmax.
        narrow = _compared(step, before, after, samples[: None if step.rounds else 1], interface, same_dtypes=True)
        _must_agree(step, narrow.total, *own, exact=False)
        how = f"{how}, by {_noise(narrow.total.error)} in its own dtype"
    if seen.total.finite == 0:
        return "not measured: no output has a finite number"
    return f"ok: outputs differ by {_noise(seen.total.error)} in {how}, {seen}"


def _noise(error: float) -> str:
    """What rounding made, as the power of ten that it stays below: its digits are another number of threads' others, and an
    artifact has the same bytes whatever that is."""
    return f"1e{math.ceil(math.log10(error))} at most" if 0 < error < math.inf else f"{error:g}"


def _within(budget: float) -> str:
    return f"budget {budget}" if math.isfinite(budget) else "which no budget limits"


def rounding_limit(program: Program) -> float:
    """What rounding in the coarsest of the program's dtypes may make of its outputs."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, Tensor)}
    return max(MECHANISM_LIMIT.get(dtype, 0.0) for dtype in dtypes | {torch.float64})


def _must_agree(step: Pass, total: Difference, limit: float, how: str, *, exact: bool) -> None:
    if total.error > limit:
        raise _fail(step, "meaning", f"it may not change what the program computes; it does, by {total.error:.1e} in {how}")
    if exact and total.unequal:
        share = f"{total.unequal} of {total.integers} integers differ in {how}"
        raise _fail(step, "meaning", f"it may not change what the program computes; it does: {share}")


@dataclass
class _Seen:
    """The differences over all the sizes that were tried, and how many the program itself refused."""

    total: Difference = field(default_factory=Difference)
    tried: int = 0
    refused: int = 0

    def __str__(self) -> str:
        others = f"; {self.refused} others are refused by the program itself" if self.refused else ""
        return f"at {self.tried} size{'s' * (self.tried != 1)}{others}"


def _compared(
    step: Pass,
    before: Program,
    after: Program,
    samples: list[list[Tensor]],
    interface: Interface | None = None,
    *,
    same_dtypes: bool = False,
) -> _Seen:
    """Run both on all samples. `before` may refuse any but the first; `after` none that `before` takes."""
    interface = interface or Interface()
    seen = _Seen()
    for number, inputs in enumerate(samples):
        expected, refusal = _outputs(before, inputs)
        sizes = ", ".join(str(list(t.shape)) for t in inputs[:4])
        if refusal is not None:
            if number == 0:
                what = f"the program before it does not run at the sizes of capture: {refusal}"
                raise _fail(step, "meaning", what, sizes, program=before, node=_stops_at(before, inputs))
            seen.refused += 1
            continue
        expected = interface.outputs(before, expected)
        taken = interface.inputs(before, inputs)
        found, refusal = _outputs(after, taken)
        if refusal is not None:
            what = f"what it made does not run where the program before it does: {refusal}"
            raise _fail(step, "meaning", what, sizes, program=after, node=_stops_at(after, taken))
        if same_dtypes and [t.dtype for t in found] != [t.dtype for t in expected]:
            dtypes = " became ".join(", ".join(str(t.dtype) for t in ts) for ts in (expected, found))
            raise _fail(step, "meaning", f"the outputs are of other dtypes: {dtypes}")
        seen.total |= difference(found, expected)
        seen.tried += 1
    return seen


def _outputs(program: Program, inputs: list[Tensor]) -> tuple[tuple[Tensor, ...], str | None]:
    """The outputs, or () and why the program did not run: any error of an operator is a refusal of these inputs."""
    try:
        return run(program, inputs), None
    except Exception as error:
        return (), _said(error)


def _stops_at(program: Program, inputs: list[Tensor]) -> fx.Node | None:
    """The node that does not run on these inputs."""
    name = stops_at(program.module(), inputs)
    return next((node for node in program.graph.nodes if node.name == name), None)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'without a message'}"
