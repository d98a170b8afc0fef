"""Zeros anywhere in the weights, which stay dense floats."""

from __future__ import annotations

import pytest
import torch
from formats import captured, error, learned, normal
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.order import order
from fxc.pipeline import run_passes

WEIGHTS = [f"{name}.weight" for name in ("q", "k", "v", "up", "down", "odd", "head")]


def zeros(program, fqn) -> float:
    return (program.constants[fqn] == 0).double().mean().item()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "gradual", "taylor"])
def test_half_of_each_layer_is_zero_and_nothing_is_smaller(criterion):
    spec = f"sparsify:sparsity=0.5:criterion={criterion}"
    (program, steps), (again, _) = learned(spec), learned(spec)
    assert all(torch.equal(tensor, again.constants[name]) for name, tensor in program.constants.items())
    fits = criterion in ("sparsegpt", "gradual")
    for fqn in WEIGHTS:
        assert zeros(program, fqn) == 0.5, fqn
        before, after = captured().constants[fqn], program.constants[fqn]
        assert ((after == before) | (after == 0)).all() == (not fits), "what stays is as it was, or fitted"
    assert steps[-1].bytes_after == steps[-1].bytes_before and steps[-1].covered_bytes == 0
    assert any("saves neither bytes nor time" in note for note in steps[-1].notes)
    assert set(steps[-1].layer_errors) == {name.removesuffix(".weight") for name in WEIGHTS}


def test_each_criterion_is_better_than_the_one_before():
    magnitude, wanda, sparsegpt = (
        error(learned(f"sparsify:criterion={each}")[0]) for each in ("magnitude", "wanda", "sparsegpt")
    )
    assert sparsegpt < 0.7 * wanda and wanda < magnitude
    gradual, at_once = (error(learned(f"sparsify:sparsity=0.7:criterion={each}")[0]) for each in ("gradual", "sparsegpt"))
    assert gradual < at_once


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "taylor"])
def test_globally_layers_lose_as_much_as_they_can_bear(criterion):
    spec = f"sparsify:sparsity=0.5:scope=global:criterion={criterion}"
    program, _ = learned(spec)
    sizes = {fqn: captured().constants[fqn].numel() for fqn in WEIGHTS}
    gone = {fqn: zeros(program, fqn) for fqn in WEIGHTS}
    assert sum(gone[fqn] * sizes[fqn] for fqn in WEIGHTS) / sum(sizes.values()) == pytest.approx(0.5, abs=0.02)
    assert max(gone.values()) - min(gone.values()) > 0.05 and max(gone.values()) < 1


def test_magnitude_ranks_a_layer_as_a_whole_and_globally_as_lamp_does():
    weights = {"0": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "1": torch.tensor([[10.0, 10.0], [10.0, 70.0]])}
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    program = fxc.capture(net, (normal(3, 2),), check=False)
    by_layer, _ = run_passes(program, Context(), Options("sparsify"))
    assert by_layer.constants["0.weight"].tolist() == [[0, 0], [3, 4]]
    assert by_layer.constants["1.weight"].tolist() == [[10, 0], [0, 70]], "of equals the first stays"
    # LAMP: 1/30, 4/29, 9/25, 1 beside 100/5200, 100/5100, 100/5000, 1
    together, _ = run_passes(program, Context(), Options("sparsify:scope=global"))
    assert together.constants["0.weight"].tolist() == [[0, 2], [3, 4]]
    assert together.constants["1.weight"].tolist() == [[0, 0], [0, 70]]


def test_convolutions_lose_numbers_by_magnitude_and_by_taylor_and_not_by_what_is_of_linear_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 49, 5))
    samples = [[normal(2, 3, 8, 8, seed=seed)] for seed in range(4)]
    program = fxc.capture(net.eval(), tuple(samples[0]), check=False)
    for criterion in ("magnitude", "taylor"):
        sparse, _ = run_passes(program, Context(samples=samples), Options(f"sparsify:sparsity=0.75:criterion={criterion}"))
        assert [zeros(sparse, f"{at}.weight") for at in (0, 2, 4)] == [0.75] * 3
    sparse, [*_, step] = run_passes(program, Context(samples=samples), Options("sparsify:criterion=wanda"))
    assert [zeros(sparse, f"{at}.weight") for at in (0, 2, 4)] == [0.0, 0.0, 0.5]
    assert {r.fqn for r in step.refusals} == {"0", "2"} and "use magnitude or taylor" in step.refusals[0].reason


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.twice, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.twice(torch.relu(self.twice(x))))


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt", "taylor"])
def test_a_layer_that_runs_twice_is_pruned_once_and_a_tied_table_is_left(criterion):
    samples = [[torch.arange(20).view(2, 10)]]
    program = fxc.capture(Shared().eval(), tuple(samples[0]), check=False)
    sparse, [*_, step] = run_passes(program, Context(samples=samples), Options(f"sparsify:criterion={criterion}"))
    assert zeros(sparse, "twice.weight") == 0.5
    assert [(r.fqn, "tied to another use" in r.reason) for r in step.refusals] == [("table", True)]


def test_only_and_skip_and_what_no_sample_reaches():
    program, [*_, step] = learned("sparsify:only=up;down:criterion=sparsegpt", calibration=[[torch.zeros(0, 5, 64)]])
    assert [fqn for fqn in WEIGHTS if zeros(program, fqn)] == ["up.weight", "down.weight"]
    assert any("no sample reached up, down: the smallest numbers went" in note for note in step.notes)
    plain, _ = run_passes(captured(), Context(skip=("up",)), Options("sparsify"))
    assert zeros(plain, "up.weight") == 0
    assert torch.equal(plain.constants["down.weight"], program.constants["down.weight"])


def test_it_goes_before_what_packs_and_what_it_cannot_do_is_refused():
    names = [p.name for p in order(parse_passes("int8,sparse24,sparsify")).passes]
    assert names[-3:] == ["sparsify", "sparse24", "int8"]
    for spec, said in (("sparsify:sparsity=1", "not between 0 and 1"), ("sparsify:criterion=taylor", "calibration data")):
        with pytest.raises(UsageError, match=said):
            run_passes(captured(), Context(), Options(spec))


def test_taylor_of_2_of_4_keeps_what_the_loss_depends_on():
    program, _ = learned("sparse24:criterion=taylor")
    assert error(program) < error(learned("sparse24")[0])
    with pytest.raises(UsageError, match="criterion=taylor is measured on calibration data"):
        run_passes(captured(), Context(), Options("sparse24:criterion=taylor"))
