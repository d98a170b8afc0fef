"""rotate: what writes the residual stream turns with what reads it, in every family where nothing else touches it."""

import families
import pytest
import torch

import fxc
from fxc.data.samples import samples
from fxc.ir.program import Program
from fxc.passes.base import Context, Result
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.float64 import in_float64, widened
from fxc.passes.rotate import Rotate, rotation
from fxc.verify.compare import relative_error, run

ROTATED = {"qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "vit", "mixtral", "qwen3_moe"}
WHY = {
    "gemma2": "post_attention_layernorm, which a rotation does not pass",
    "bert": "LayerNorm, which a rotation does not pass",
    "distilbert": "LayerNorm, which a rotation does not pass",
    "clip": "pre_layrnorm, which a rotation does not pass",
    "t5": "the model returns it",
    "whisper_encoder": "is no linear map of it",
}


def family(name: str) -> Program:
    """Canonical, in float64, with norms whose gains and biases are not all alike."""
    model, example = families.build(name)
    program = fxc.capture(model, example, check=False)
    Canonicalize().run(program, Context())
    torch.manual_seed(0)
    for fqn, tensor in program.constants.items():
        if tensor.ndim == 1 and tensor.is_floating_point() and ("norm" in fqn.lower() or "ln_" in fqn):
            program.constants[fqn] = torch.rand_like(tensor) + 0.5
    return in_float64(program)


def rotated(program: Program, seed: int = 0) -> tuple[Program, Result]:
    after = program.copy()
    return after, Rotate(seed).run(after, Context())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_nothing_changes_where_it_applies_and_elsewhere_it_says_why_not(name):
    program = family(name)
    after, result = rotated(program)
    assert bool(result.changed) == (name in ROTATED)
    assert all(why in " ".join(r.reason for r in result.refusals) for why in [WHY.get(name)] if why)
    for inputs in samples(program):
        inputs = [widened(each) for each in inputs]
        assert relative_error(run(after, inputs), run(program, inputs)) < 1e-13
    if name in ROTATED:
        before = program.constants
        changed = [n for n, t in after.constants.items() if n not in before or not torch.equal(t, before[n])]
        assert len(changed) >= 8
        other, _ = rotated(program, seed=1)
        assert any(not torch.equal(other.constants[n], after.constants[n]) for n in changed)


@pytest.mark.parametrize("size", [1, 2, 32, 6, 40, 7])
def test_a_rotation_is_orthogonal_and_spreads(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(matrix, rotation(size)) and (size == 1 or not torch.equal(matrix, rotation(size, seed=3)))
    if size in (2, 32):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_the_seed_of_the_compilation_counts_and_on_meta_it_is_planned():
    program = family("llama")
    after, _ = rotated(program)
    other = program.copy()
    Rotate().run(other, Context(seed=1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(other.constants[name], after.constants[name])
    planned = program.copy()
    planned.constants.update({fqn: tensor.to("meta") for fqn, tensor in planned.constants.items()})
    Rotate().run(planned, Context())
    assert {fqn: t.shape for fqn, t in planned.constants.items()} == {fqn: t.shape for fqn, t in after.constants.items()}


def test_zeros_that_were_made_are_not_filled():
    program = family("llama")
    name = next(fqn for fqn in program.constants if fqn.endswith("down_proj.weight"))
    kept = program.constants[name].clone()
    kept[:, ::2] = 0
    program.constants[name] = kept
    assert rotated(program)[1].changed, "whole columns stay what they are"
    kept[::2, 1::2] = 0
    after, result = rotated(program)
    assert not result.changed and f"of {name} are zeros" in result.refusals[0].reason
    assert torch.equal(after.constants[name], kept)


def test_a_tied_head_is_untied_and_the_cost_is_said():
    program = family("gpt2")
    after, result = rotated(program)
    assert "stored twice" in result.notes[0]
    assert after.nbytes() > program.nbytes()


def test_it_runs_before_int4_and_the_result_is_near(pylm_dir):
    made = fxc.optimize(str(pylm_dir), passes="rotate,int4:group=128")
    assert {step["name"].partition(":")[0]: step["changed"] for step in made.report["passes"]}["rotate"] > 30
    ids = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(0))
    plain = fxc.optimize(str(pylm_dir), passes="int4:group=128")
    assert relative_error([made(input_ids=ids).logits], [plain(input_ids=ids).logits]) < 0.2
