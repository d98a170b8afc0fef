"""int8 whose numbers are learned from calibration data, experts of a mixture included."""

from __future__ import annotations

import pytest
import torch
from families import build
from formats import DTYPES, captured, compiled, directed, error, learned
from layers import layer, output_loss

from fxc.calibrate.hessian import Hessian
from fxc.calibrate.quantize import STATISTICS
from fxc.data.calibration import calibration_samples
from fxc.errors import UsageError
from fxc.frontend.capture import capture
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.int8 import Int8
from fxc.passes.learned_linears import learned_experts
from fxc.pipeline import run_passes
from fxc.schemes import int8, int8_sparse24, sparse24


@pytest.mark.parametrize("dtype", [DTYPES[0]], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_each_algorithm_is_better_than_rounding_to_nearest(mode, dtype):
    rtn, grid, gptq, qronos, trained = (
        error(learned(f"int8:mode={mode}:algorithm={each}", dtype)[0], dtype) for each in ("rtn", *STATISTICS)
    )
    # Activations are rounded too in dynamic layers, and no weight makes up for that.
    least = 0.75 if mode == "weight_only" else 1.0
    assert grid < 1.02 * rtn and gptq < least * rtn and qronos < least * rtn
    assert trained < 1.01 * qronos


@pytest.mark.parametrize("algorithm", STATISTICS)
def test_scales_are_positive_and_levels_those_of_the_scheme(algorithm):
    program, steps = learned(f"int8:algorithm={algorithm}")
    scales = {name: t for name, t in program.constants.items() if name.endswith("scale")}
    weights = {name: t for name, t in program.constants.items() if t.dtype == torch.int8}
    plain = captured()
    assert len(scales) == len(weights) == 6 and all((t > 0).all() and t.dim() == 1 for t in scales.values())
    assert all(t.min() >= -127 for t in weights.values())
    for name, q in weights.items():
        weight = plain.constants[name.replace("qweight", "weight")]
        dense = int8.dequantize(q, scales[name.replace("qweight", "scale")])
        assert (dense - weight).norm() < 0.05 * weight.norm()
    assert any("largest errors of outputs" in note for note in steps[-1].notes)


def test_the_default_needs_no_data_and_data_changes_nothing():
    program, _ = learned("int8")
    plain, _ = compiled("int8")
    assert program.constants.keys() == plain.constants.keys()
    assert all(torch.equal(tensor, plain.constants[name]) for name, tensor in program.constants.items())
    with pytest.raises(UsageError, match="algorithm=gptq is measured on calibration data"):
        run_passes(captured(), Context(), Options("int8:algorithm=gptq"))


def test_what_has_no_such_form_is_refused():
    with pytest.raises(UsageError, match="rounded to nearest, not by gptq"):
        parse_passes("int8:mode=static:algorithm=gptq")


@pytest.mark.parametrize("algorithm", STATISTICS)
def test_zeros_of_sparse_weights_stay_and_the_others_make_up(algorithm):
    sparse, _ = learned("sparse24")
    plain, packed = (learned(f"sparse24,int8:algorithm={each}")[0] for each in ("rtn", algorithm))
    for program in (plain, packed):
        for name in ("up", "down"):
            whole = sparse24.unpack(sparse.constants[f"{name}.values"], sparse.constants[f"{name}.meta"])
            parts = {part: program.constants[f"{name}.{part}"] for part in ("qweight", "meta", "scale")}
            dense = int8_sparse24.SCHEME.dense(parts)
            assert not dense[whole == 0].any() and (dense - whole).norm() < 0.1 * whole.norm()
    # What 2:4 leaves is far from the float network; nearer to the sparse one is what rounding can be.
    x = directed(1, seed=50)[0]
    gaps = [(each.module()(*x)[0] - sparse.module()(*x)[0]).norm() for each in (packed, plain)]
    assert gaps[0] < 1.5 * gaps[1]


def tokens(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (1, length), generator=made) for _ in range(count)]


def mixture(spec: str, ids: list[torch.Tensor]):
    """(program as captured, packed, its notes) of a mixture of experts, learned from `ids`."""
    torch.manual_seed(0)
    model, example = build("mixtral")
    program = capture(model, example, check=False)
    samples = calibration_samples(program, [{"input_ids": each} for each in ids])
    after, steps = run_passes(program, Context(samples=samples), Options(spec, verify=False))
    return program, after, steps[-1].notes


def test_experts_learn_each_from_its_own_tokens():
    given = [layer(rows=32, seed=seed, samples=count) for seed, count in enumerate((300, 200, 20, 0))]
    statistics = []
    for _, inputs in given:
        statistics.append(Hessian(64))
        statistics[-1].add(inputs)
    few = []
    weight = torch.stack([each for each, _ in given])
    parts, _ = learned_experts(Int8(algorithm="gptq"), "moe", weight, statistics, few)
    dense = int8.SCHEME.dense(parts)
    nearest = int8.SCHEME.dense(int8.SCHEME.pack(weight))
    for at, (one, inputs) in enumerate(given[:2]):
        assert output_loss(one, dense[at], inputs) < 0.7 * output_loss(one, nearest[at], inputs)
        alone, _ = Int8(algorithm="gptq").learned(one, statistics[at])
        assert torch.equal(parts["qweight"][at], alone["qweight"])
    grid, _ = Int8(algorithm="grid").learned(given[2][0], statistics[2].squares())
    assert torch.equal(parts["qweight"][2], grid["qweight"]) and torch.equal(dense[3], nearest[3])
    assert few == ["moe[2] (20)", "moe[3] (none: as without data)"]


def test_experts_that_few_or_no_tokens_reach_are_named():
    _, after, notes = mixture("int8:algorithm=gptq", tokens(1, 1))
    [note] = [each for each in notes if "fewer tokens" in each]
    assert "(none: as without data)" in note and "(1)" in note
    plain = mixture("int8", tokens(1, 1))[1]
    for node in (n for n in after.graph.nodes if n.target is int8.GROUPED):
        name = node.args[1].target
        same = [torch.equal(a, b) for a, b in zip(after.constants[name], plain.constants[name], strict=True)]
        # A token is for two of four.
        assert sum(same) >= 2
        assert all(t.isfinite().all() and (t > 0).all() for t in (after.constants[node.args[2].target],))
