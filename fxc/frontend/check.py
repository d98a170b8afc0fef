"""Whether a captured program is the model: both are run at sizes that were not traced."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxc.errors import CaptureFailed, first_line
from fxc.frontend.calls import Call
from fxc.ir.cache import empty_cache, positions_of
from fxc.ir.program import Program


def compare(program: Program, call: Call) -> list[list[Tensor]]:
    """Run program and model at `call.other_sizes`; raise `CaptureFailed` where they differ by more than rounding. Returns the
    examples and at most two other sets of inputs that both take."""
    module, taken = program.module(), []
    for inputs in call.other_sizes:
        if call.may_fix and not _fits(program, inputs):
            continue
        sizes = ", ".join(str(list(t.shape)) for t in inputs[:3])
        try:
            expected = call.module(*inputs)
        except Exception:
            continue
        try:
            found = module(*inputs)
        except Exception as error:
            raise CaptureFailed(
                f"the captured program fails at the sizes {sizes}, which the model takes: {first_line(error)}",
                where=program.metadata["class"],
                hint="give example_inputs of other sizes, so that no size is taken for a constant",
            ) from error
        for name, a, b in zip(program.signature.outputs, found, expected, strict=True):
            worst = relative_difference(a, b)
            if worst > tolerance(b.dtype):
                _refuse_random(program, call, inputs)
                raise CaptureFailed(
                    f"the captured program differs from the model by {worst:.1e} in {name} at the sizes {sizes}",
                    where=program.metadata["class"],
                    why=f"the tolerance for {b.dtype} is {tolerance(b.dtype):.0e}",
                    hint="the model's control flow may depend on sizes or values",
                )
        taken.append(inputs)
    return taken[:3]


def _fits(program: Program, inputs: list[Tensor]) -> bool:
    """Whether the sizes of `inputs` are those that the program demands."""
    shapes = [node.meta["val"].shape for node in program.placeholders]
    return all(
        not isinstance(wanted, int) or wanted == size
        for tensor, shape in zip(inputs, shapes, strict=True)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def _refuse_random(program: Program, call: Call, inputs: list[Tensor]) -> None:
    """Raise `CaptureFailed` if the model itself gives something else at every run."""
    once, again = call.module(*inputs), call.module(*inputs)
    if all(relative_difference(a, b) <= tolerance(b.dtype) for a, b in zip(once, again, strict=True)):
        return
    node = next((n for n in program.graph.nodes if _is_random(n)), None)
    raise CaptureFailed(
        "the model is random: two runs on the same inputs differ",
        where=program.metadata["class"] if node is None else node.meta.get("fqn") or program.metadata["class"],
        why=node and f"it calls {node.target}, also in evaluation mode",
        hint="give F.dropout the module's own training flag; let a model that samples take its noise as an input",
    )


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), node.args)) | node.kwargs
    return given.get("train", given.get("training")) is not False and given.get("p", given.get("dropout_p")) not in (0, 0.0)


def counts_positions(model: nn.Module, program: Program, call: Call) -> str:
    """What the model takes for the positions when it is not told: "arange" counts every column, "mask" those before padding."""
    ids = call.other_sizes[0][0]
    past = empty_cache(program, len(ids), ids.device)
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    errors = {}
    for name, positions in (
        ("arange", torch.arange(ids.shape[1]).expand(len(ids), -1)),
        ("mask", positions_of(mask, ids.shape[1])),
    ):
        found = program.module()(ids, mask, positions, *past)[0]
        errors[name] = relative_difference(found[mask.bool()], expected[mask.bool()])
    return "mask" if errors["mask"] < errors["arange"] else "arange"


def tolerance(dtype: torch.dtype) -> float:
    """How far two correct evaluations of one model may differ, relative to the largest value: some roundings of `dtype`."""
    return 64 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite when shapes differ or only one of the two is finite."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).amax().item()
    return float("inf") if difference != difference else difference / max(scale, 1e-30)
