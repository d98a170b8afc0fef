"""Every architecture that fxc promises: captured, printed and parsed, canonicalised, quantized, compared."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES, build

import fxc
from fxc.data.samples import samples
from fxc.ir import check, parse_program, print_program
from fxc.ir.cache import is_past
from fxc.ir.observe import run
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.verify.compare import relative_error

# Of families that differ from another in numbers, or in what a test of its own has, a plain run has one here.
REPEATED = ("qwen3", "llama", "mistral", "gemma", "qwen3_moe")
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gpt2", "mixtral", "qwen3_moe")


@cache
def captured(name: str):
    model, example = build(name)
    return model, fxc.capture(model, example)  # which compares program and model at three sizes that were not traced


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in FAMILIES])
def test_round_trip_gives_the_same_text_and_numbers(name):
    _, program = captured(name)
    text = print_program(program)
    parsed = parse_program(text, program.constants)
    check(parsed)
    assert print_program(parsed) == text
    for inputs in samples(program):
        assert relative_error(run(parsed, inputs), run(program, inputs)) == 0.0


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in FAMILIES])
def test_int8_stays_close_gets_smaller_and_round_trips(name):
    model, program = captured(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small, steps = run_passes(program, Context(), Options("int8", budget=0.15))
    done = steps[-1]
    assert done.changed > 0 and done.bytes_after < done.bytes_before
    assert not [fqn for fqn in small.constants if fqn.endswith(".qweight") and f"{fqn[:-8]}.weight" in small.constants]
    assert max(done.layer_errors.values()) < 0.06
    text = print_program(small)
    assert print_program(parse_program(text, small.constants)) == text
    assert "fxc.int8_" in text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the model itself was changed"


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in DECODERS])
def test_generates_the_same_tokens_uncompressed(name):
    model, _ = captured(name)
    compiled = fxc.optimize(model, passes="", verify=False)
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # longer than the sliding windows of the families that have one
    sampling = [{"do_sample": True}] if name == "qwen2" else []  # calls a model as greedy search does, with other tokens
    for options in ({"do_sample": False}, *sampling, {"num_beams": 3, "do_sample": False}):
        arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, **options}
        torch.manual_seed(0)
        expected = model.generate(**arguments)
        torch.manual_seed(0)
        assert torch.equal(compiled.generate(**arguments), expected), options


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "resnet", "t5", "clip"])
def test_called_as_the_original_and_returns_its_class(name):
    model, program = captured(name)
    compiled = fxc.optimize(model, passes="", verify=False)
    inputs = dict(zip((i.name for i in program.signature.inputs), samples(program)[1], strict=True))
    inputs = {name: tensor for name, tensor in inputs.items() if not is_past(name)}
    with torch.no_grad():
        expected = model(**inputs)
    found = compiled(**inputs)
    assert type(found) is type(expected)
    for key in found:
        if isinstance(found[key], torch.Tensor):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.fault(4)
def test_moe_experts_are_quantized_not_skipped():
    _, program = captured("mixtral")
    _, steps = run_passes(program, Context(), Options("int8"))
    assert steps[-1].covered_bytes / program.nbytes() > 0.9
