"""What the gates measure: sizes that a model refuses, integers, masks, dtypes, NaN, single layers; and what they then say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import Mlp
from torch import nn

import fxc
from fxc.data.samples import samples
from fxc.errors import VerificationFailed
from fxc.ir.edit import call, insert, sweep
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context, Pass, Result, parse_passes
from fxc.passes.float64 import in_float64
from fxc.pipeline import run_passes
from fxc.verify.compare import difference, relative_error

aten = torch.ops.aten


@dataclass(frozen=True)
class Edit(Pass):
    """Does what it is given."""

    how: Callable[[Program], None] = lambda program: None

    def run(self, program, context):
        self.how(program)
        sweep(program)
        return Result(1)


class Mechanism(Edit):
    name: ClassVar[str] = ""

    def __str__(self):
        return "mechanism"


class Policy(Mechanism):
    is_policy: ClassVar[bool] = True


def gates(program: Program, step: Pass | str, **options) -> dict[str, str]:
    steps = parse_passes(step) if isinstance(step, str) else [step]
    return run_passes(program, Context(), Options(steps, **options))[1][-1].gates


class By(nn.Module):
    """A linear layer and what comes after it."""

    def __init__(self, after, width=32):
        super().__init__()
        self.l, self.after = nn.Linear(width, width), after

    def forward(self, *args):
        return self.after(self.l(args[0]), *args[1:])


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_sizes_that_the_program_refuses_are_left_out_and_counted():
    program = fxc.capture(By(lambda h: h.view(-1, 4, 32).mean(1)), (torch.randn(8, 32),), check=False)
    for step in ("canonicalize", "int8"):
        meaning = gates(program, step)["meaning"]
        assert meaning.startswith("ok") and "at 1 size; 2 others are refused by the program itself" in meaning, meaning


def test_a_program_that_refuses_the_sizes_of_capture_fails(monkeypatch):
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    monkeypatch.setattr("fxc.pipeline.samples", lambda program: [[torch.randn(2, 41)]])
    for step in (Mechanism(), "int8"):
        with pytest.raises(VerificationFailed, match="does not run at the sizes of capture") as caught:
            gates(program, step)
        assert "[2, 41]" in str(caught.value)


def test_what_only_the_result_refuses_fails():
    program = fxc.capture(By(lambda h: h.reshape(-1, 32)), (torch.randn(3, 32),))

    def fix_the_batch(program):
        node = program.graph.find_nodes(op="call_function", target=aten.reshape.default)[0]
        node.args = (node.args[0], [3, 32])

    with pytest.raises(VerificationFailed, match="does not run where the program before it does"):
        gates(program, Mechanism(fix_the_batch))


# ------------------------------------------------------------------------------------------------------------- integers


def test_integers_are_outside_of_a_policys_budget_and_reported():
    program = fxc.capture(By(lambda h: (h, h.argsort(-1))), (torch.randn(8, 32),))
    meaning = gates(program, "int8")["meaning"]
    assert meaning.startswith("ok") and "% of the integers differ" in meaning
    assert not gates(program, "canonicalize")["meaning"].endswith("differ")


def test_integers_stay_exact_under_a_mechanism():
    program = fxc.capture(By(lambda h: (h, h.argmax(-1))), (torch.randn(8, 32),))

    def argmin(program):
        node = program.graph.find_nodes(op="call_function", target=aten.argmax.default)[0]
        call(program, aten.argmin.default, node.args, replacing=node, by="")

    with pytest.raises(VerificationFailed, match="integers differ"):
        gates(program, Mechanism(argmin))


def test_a_policy_over_integers_alone_says_that_it_was_not_measured():
    program = fxc.capture(By(lambda h: h.argmax(-1)), (torch.randn(8, 32),))
    assert gates(program, "int8")["meaning"].startswith("not measured")


# ---------------------------------------------------------------------------------------------------------------- masks


def test_a_mask_has_a_padded_row_and_dropping_it_is_seen():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(50, 32)

        def forward(self, ids, attention_mask):
            return (self.e(ids) * attention_mask[..., None]).sum(1)

    ids = torch.randint(0, 50, (2, 7))
    program = fxc.capture(Pooled(), (ids, torch.ones_like(ids)))
    masks = [s[1] for s in samples(program)]
    assert [m.all(-1).tolist() for m in masks] == [[False, True], [False, True, True], [True]]

    def drop(program):
        mask = program.placeholders[1]
        ones = insert(program, aten.ones_like.default, (mask,), before=next(iter(mask.users)), by="", fqn="")
        mask.replace_all_uses_with(ones, delete_user_cb=lambda user: user is not ones)

    with pytest.raises(VerificationFailed, match="may not change"):
        gates(program, Mechanism(drop))


def test_a_boolean_mask_leaves_something_to_attend_to_under_either_convention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x, key_padding_mask):
            return self.a(x, x, x, key_padding_mask=key_padding_mask)[0]

    program = fxc.capture(Attends(), (torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)))
    for inputs in samples(program):
        assert inputs[1].any(-1).all() and not inputs[1].all(-1).any()
        assert program.module()(*inputs)[0].isfinite().all()


# --------------------------------------------------------------------------------------------------------------- dtypes


class Rounds(nn.Module):
    """bf16 all through, in float32 at the end."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(64, 64).bfloat16()

    def forward(self, x):
        return self.l(x).to(torch.float32) * 2


def drop_casts(program):
    for node in program.graph.find_nodes(op="call_function", target=aten.to.dtype):
        node.replace_all_uses_with(node.args[0])


def test_results_keep_dtype_and_rank():
    program = fxc.capture(Rounds(), (torch.randn(4, 64).bfloat16(),))
    with pytest.raises(VerificationFailed, match=r"the outputs are of other dtypes: torch.float32 became torch.bfloat16"):
        gates(program, Mechanism(drop_casts))  # which leaves the types in the graph as they were

    def drop_all(program):
        drop_casts(program)
        program.graph.output_node().args = ((program.graph.find_nodes(op="call_function", target=aten.linear.default)[0],),)

    with pytest.raises(VerificationFailed, match=r"'structure': torch.float32 of 2 .* became torch.bfloat16") as caught:
        gates(program, Mechanism(drop_all))
    assert program.signature.outputs[0] in str(caught.value)

    def flatten(program):
        result = program.results[0]
        flat = insert(program, aten.flatten.using_ints, (result,), before=program.graph.output_node(), by="", fqn="")
        program.graph.output_node().args = ((flat,),)

    with pytest.raises(VerificationFailed, match=r"of 2 dimensions became torch.float32 of 1 dimensions"):
        gates(program, Mechanism(flatten))


def test_a_mechanism_runs_in_the_programs_own_dtype_too():
    """In float64 every cast is promoted, so that rounding to bfloat16 in between does not show there."""
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))

    def round_off(program):
        node = program.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]
        rounded = insert(program, aten.to.dtype, (node, torch.bfloat16), before=node.next, by="", fqn="")
        back = insert(program, aten.to.dtype, (rounded, torch.float32), before=rounded.next, by="", fqn="")
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not rounded)

    with pytest.raises(VerificationFailed, match="in its own dtype"):
        gates(program, Mechanism(round_off))
    meaning = gates(program, Mechanism())["meaning"]
    assert "in float64, by 0 in its own dtype, at 3 sizes" in meaning


def test_what_has_no_float64_form_is_compared_in_its_own_dtype():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    small, _ = run_passes(program, Context(), Options("int8"))
    assert "its own dtype (not in float64" in gates(small, Mechanism())["meaning"]


# ------------------------------------------------------------------------------------------------------------------ NaN


def test_nothing_finite_is_nothing_measured():
    program = fxc.capture(By(lambda h: torch.log(-h.abs() - 1)), (torch.randn(3, 32),), check=False)

    def zero(program):
        program.constants = {fqn: torch.zeros_like(t) for fqn, t in program.constants.items()}

    assert gates(program, Mechanism(zero))["meaning"].startswith("not measured")
    found = gates(program, "int8")
    assert found["meaning"].startswith("not measured") and found["layers"].startswith("ok: 1")


def test_differences():
    nan, inf = float("nan"), float("inf")
    one = torch.ones(4)
    assert difference([one * nan], [one * nan]).finite == 0
    assert relative_error([one * nan], [one]) == relative_error([one], [one * inf]) == relative_error([one[:2]], [one]) == inf
    assert relative_error([one * 1.5], [one]) == 0.5
    assert relative_error([one.long()], [one.long() * 2]) == inf
    mixed = difference([one, one > 0, one * nan], [one * 2, torch.tensor([True, False, True, True]), one * nan])
    assert (mixed.error, mixed.finite, mixed.integers, mixed.unequal) == (0.5, 8, 4, 1)
    assert relative_error([torch.complex(one, one)], [torch.complex(one, one) * 2]) == 0.5


# --------------------------------------------------------------------------------------------------------------- layers


class Residual(nn.Module):
    """A layer that hardly counts in the output, and an embedding."""

    def __init__(self):
        super().__init__()
        self.e, self.query, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, ids):
        h = self.e(ids)
        return self.head(h + 1e-3 * self.query(h))


def zero_query(program):
    program.constants["query.weight"] = torch.zeros(64, 64)
    program.constants["query.bias"] = torch.zeros(64)
    # Something has to become smaller.
    program.constants["e.weight"] = program.constants["e.weight"].bfloat16()
    read = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == "e.weight")
    embedding = next(iter(read.users))
    read.meta["val"] = read.meta["val"].bfloat16()
    embedding.meta["val"] = embedding.meta["val"].bfloat16()
    wide = insert(program, aten.to.dtype, (embedding, torch.float32), before=embedding.next, by="", fqn="")
    embedding.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def test_a_policy_may_not_destroy_a_layer_that_the_output_hardly_shows():
    program = fxc.capture(Residual(), (torch.randint(0, 50, (2, 7)),))
    with pytest.raises(VerificationFailed, match=r"alone it differs by 1.000, the budget of a layer is 0.5") as caught:
        gates(program, Policy(zero_query))
    assert str(caught.value).startswith("error[FXC-E5]: query:")
    allowed = run_passes(program, Context(), Options([Policy(zero_query)], layer_budget=1.0))[1][-1]
    assert allowed.layer_errors["query"] == 1.0 and 0 < allowed.layer_errors["e"] < 0.01
    assert "head" not in allowed.layer_errors, "it was not rewritten"


def test_the_budget_of_a_layer_can_be_set():
    program = fxc.capture(Residual(), (torch.randint(0, 50, (2, 7)),))
    with pytest.raises(VerificationFailed, match=r"the budget of a layer is 0.0001"):
        gates(program, "int8", layer_budget=1e-4)
    assert gates(program, "int8")["layers"].startswith("ok: 2, the largest error")


def test_a_layer_edited_in_place_is_measured_as_well():
    program = fxc.capture(Residual(), (torch.randint(0, 50, (2, 7)),))

    def shrink_and_square(program):
        zero_query(program)
        query = program.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        query.args = (query.args[0], query.args[1], None)

    with pytest.raises(VerificationFailed, match="query"):
        gates(program, Policy(shrink_and_square))


def test_complex_numbers_are_promoted_too():
    class Rotation(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("phase", torch.randn(8).to(torch.complex64))
            self.l = nn.Linear(16, 16)

        def forward(self, x):
            pairs = torch.view_as_complex(self.l(x).unflatten(-1, (8, 2))) * self.phase.to(torch.complex64)
            turned = torch.fft.fft(pairs) * torch.polar(x[..., :8].exp(), x[..., 8:])
            return torch.view_as_real(torch.fft.ifft(turned)).flatten(1)

    program = fxc.capture(Rotation().eval(), (torch.randn(3, 16),))
    inputs = [torch.randn(3, 16).double()]
    wide = in_float64(program)
    (found,), (expected,) = run(wide, inputs), run(program, [inputs[0].float()])
    assert found.dtype == torch.float64 and relative_error([found], [expected]) < 1e-5
    assert "in float64" in gates(program, "canonicalize")["meaning"]


def drifting(after: float):
    """A policy that doubles what its layer gives beyond `after`, which made-up inputs never reach."""

    def edit(program: Program) -> None:
        [layer] = [node for node in program.graph.nodes if node.target is aten.linear.default]
        users = list(layer.users)
        over = insert(program, aten.threshold.default, (layer, after, 0.0), before=users[0], by="edit", fqn="0")
        total = insert(program, aten.add.Tensor, (layer, over), before=users[0], by="edit", fqn="0")
        total.meta["replaces"] = layer.name
        for user in users:
            user.replace_input_with(layer, total)

    return edit


def test_policies_are_judged_on_data_that_they_have_not_seen(monkeypatch):
    monkeypatch.setattr(Pass, "registry", dict(Pass.registry))

    @dataclass(frozen=True)
    class Drift(Edit):
        name: ClassVar[str] = "edit"
        is_policy: ClassVar[bool] = True
        shrinks: ClassVar[bool] = False

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    step = Drift(how=drifting(100.0))
    near = [[torch.randn(3, 8)] for _ in range(2)]
    far = [[1e4 * torch.randn(3, 8)]]

    def passed(context):
        program = fxc.capture(model, (torch.randn(3, 8),))
        return run_passes(program, context, Options([step]))[1][-1].gates

    assert "held_out" not in passed(Context(samples=near))
    assert passed(Context(samples=far, held_out=near))["held_out"].startswith("ok: on 2 samples of the calibration data that ")
    with pytest.raises(VerificationFailed, match=r"'held_out': on 3 samples.*differ") as caught:
        passed(Context(samples=near, held_out=near + far))
    assert caught.value.exit_code == 5
