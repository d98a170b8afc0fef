"""Whole layers: what they change, and which go."""

from __future__ import annotations

import gc

import pytest
import torch
from families import build
from pruned import Residual, masked, stack, three_layers
from removal import sliced
from torch import Tensor

import fxc.passes
from fxc.analysis.groups import groups
from fxc.compiled.model import compiled_model
from fxc.data.samples import samples
from fxc.passes.float64 import in_float64
from fxc.passes.prune import blocks as prune_blocks
from fxc.passes.prune import scores
from fxc.passes.prune.blocks import blocks, influence


@pytest.mark.parametrize("criterion", ["", ":criterion=taylor", ":criterion=wanda"])
def test_the_layer_that_changes_least_is_dropped(criterion):
    """By what it does to its stream, whatever units would be judged by."""
    torch.manual_seed(4)
    program = stack(Residual(), Residual(), Residual(scale=1e-3), Residual())
    found, why = blocks(program)
    assert [b.scope for b in found] == [f"layers.{i}" for i in range(4)] and not why
    after, result = masked(program, f"prune:layers=0.25{criterion}", samples(program))
    assert [(r.scope, r.kind) for r in result.removed] == [("layers.2", "layer")]
    small, _ = sliced(after)
    assert not [fqn for fqn in small.constants if "layers.2." in fqn] and len(small.constants) == 12


def test_influence_is_one_less_the_cosine_of_input_and_output():
    torch.manual_seed(4)
    layers = [Residual(), Residual(scale=0.1)]
    program = stack(*layers)
    inputs = samples(program)
    found = influence(program, blocks(program)[0], inputs)
    cosines: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for (x,) in inputs:
            for layer, its in zip(layers, cosines):
                y = layer(x)
                its.append(torch.nn.functional.cosine_similarity(x, y, dim=-1).flatten())
                x = y
    for value, its in zip(found.values(), cosines, strict=True):
        assert value == pytest.approx(1 - torch.cat(its).mean().item(), abs=1e-6)


def test_one_layer_always_stays():
    program = three_layers()
    _, result = masked(program, "prune:layers=0.99", samples(program))
    assert len(result.removed) == 2


def test_dropping_a_layer_of_a_decoder_is_leaving_it_out():
    model, _ = build("qwen2")
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight *= 1e-4
        layer.mlp.down_proj.weight *= 1e-4
    compiled = fxc.optimize(model, passes="prune:layers=0.5", calib=[{"input_ids": torch.randint(3, 300, (2, 8))}])
    names = [step["name"].partition(":")[0] for step in compiled.report["passes"]]
    assert names == ["canonicalize", "prune", "dead_structure"]
    assert not [fqn for fqn in compiled.program.constants if "layers.0." in fqn]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wide = compiled_model(in_float64(compiled.program, typed=True), {}, config=compiled.config)
    assert torch.equal(wide.generate(ids, **options), model.double().generate(ids, **options))


@pytest.mark.parametrize("what", ["influence", "wanda"])
def test_what_runs_forward_only_keeps_no_more_of_a_deep_model(what, monkeypatch):
    module = scores if what == "wanda" else prune_blocks
    true = module.observe

    def most(depth: int) -> int:
        program = stack(*(Residual() for _ in range(depth)))
        seen = []

        def counting(observed, inputs, watches):
            def counted(watch):
                def both(value):
                    result = watch(value)
                    seen.append(sum(type(each) is Tensor and each.shape[:1] == (23,) for each in gc.get_objects()))
                    return result

                return both

            return true(observed, inputs, {name: counted(watch) for name, watch in watches.items()})

        monkeypatch.setattr(module, "observe", counting)
        inputs = [[torch.randn(23, 5, 10)]]
        if what == "wanda":
            assert scores.scores(program, groups(program), "wanda", inputs)
        else:
            assert len(influence(program, blocks(program)[0], inputs)) == depth
        assert len(seen) >= depth
        return max(seen)

    assert most(3) == most(9)
