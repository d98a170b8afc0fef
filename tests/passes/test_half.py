"""bf16 and fp16: what is still float32 becomes small, norms and softmax stay float32, inputs and outputs keep their types."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from torch import nn

import fxc
from fxc.errors import InputRefused, VerificationFailed
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.order import order
from fxc.pipeline import run_passes

QUICK = {"qwen2", "resnet"}
# The others differ from these in numbers, or in what this pass does not see.
DIFFERENT = [name for name in FAMILIES if name not in ("qwen3", "llama", "mistral", "gemma", "qwen3_moe")]


def ran(model: nn.Module, example, spec: str, **options):
    program = fxc.capture(model, example) if example else fxc.capture(model)
    after, steps = run_passes(program, Context(**options), Options(spec))
    return program, after, steps[-1]


@pytest.mark.parametrize("spec", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in DIFFERENT])
def test_weights_of_every_family_take_half(name, spec):
    model, example = build(name)
    if (name, spec) == ("mobilenetv2", "fp16"):
        # Its activations, with these weights, are smaller than any number of fp16, and batch norms would make them large again.
        with pytest.raises(VerificationFailed, match="did not go through"):
            ran(model, example, spec)
        return
    before, after, _ = ran(model, example, spec)
    assert after.nbytes() < 0.56 * before.nbytes()
    types = [[node.meta["val"].dtype for node in p.results] for p in (before, after)]
    assert types[0] == types[1]


class Attention(nn.Module):
    """With a mask of numbers in which a row is all masked, as padded batches have them."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.o = nn.RMSNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, mask):
        q = self.q(self.norm(x)).unflatten(-1, (4, 8)).transpose(1, 2)
        low = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=low)
        return self.o(y.transpose(1, 2).flatten(2)).softmax(-1)


@pytest.mark.parametrize("spec, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_is_computed_in_which_type(spec, dtype):
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        model.norm.weight.mul_(3)
    x, mask = 200 * torch.randn(2, 5, 32), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[0, :, 1] = False  # a row that may look nowhere: what comes of it means nothing, and has to be a number
    _, after, step = ran(model, (x, mask), spec)
    types = {node.target: node.meta["val"].dtype for node in after.graph.nodes if node.op == "call_function"}
    aten = torch.ops.aten
    assert types[aten.rms_norm.default] == types[aten.softmax.int] == torch.float32
    assert types[aten.linear.default] == types[aten.scaled_dot_product_attention.default] == dtype
    assert {n: t.dtype for n, t in after.constants.items()}["norm.weight"] == torch.float32
    assert step.changed == 4 and "float32" in step.notes[0]
    with torch.no_grad():
        # Squares of 200 and a mask of the lowest float32 are beyond fp16.
        found, expected = after.module()(x, mask)[0], model(x, mask)
    assert found.isfinite().all()
    found[0, 1] = expected[0, 1]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=5e-3)


def test_a_recipe_of_three_formats_is_saved_loaded_and_run(tmp_path):
    model, _ = build("llama")
    compiled = fxc.optimize(model, passes="int4:group=32:only='re:.*mlp.*',int8,bf16")
    compiled.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    tokens = torch.randint(0, 320, (1, 9))
    with torch.no_grad():
        found, expected = loaded(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.3 * expected.norm()
    constants = loaded.program.constants
    assert constants["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert constants["model.norm.weight"].dtype == torch.float32
    assert constants["model.layers.0.mlp.up_proj.qweight"].dtype == torch.uint8
    assert constants["model.layers.0.self_attn.q_proj.qweight"].dtype == torch.int8


def test_a_model_that_is_small_already_stays():
    _, _, step = ran(nn.Linear(8, 8).bfloat16().eval(), (torch.randn(3, 8).bfloat16(),), "bf16")
    assert step.changed == 0


def test_quantizers_come_first():
    ordered = [p.name for p in order(parse_passes("bf16,int8,prune:ffn=0.25")).passes]
    assert ordered.index("prune") < ordered.index("int8") < ordered.index("bf16")


def test_a_weight_above_fp16_is_refused_by_its_name_and_may_be_skipped():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[1].weight[0, 0] = 1e5
    example = (torch.randn(3, 8),)
    with pytest.raises(InputRefused) as caught:
        ran(model, example, "fp16")
    assert caught.value.where == "1" and "1 of its numbers" in caught.value.why
    _, after, step = ran(model, example, "fp16", skip="1")
    assert after.constants["1.weight"].dtype == torch.float32 and after.constants["0.weight"].dtype == torch.float16
    assert [refusal.fqn for refusal in step.refusals] == ["1"]
    ran(model, example, "bf16")
