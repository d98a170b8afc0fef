"""rotate: what writes the residual stream turns with what reads it, in every family where nothing else touches it."""

import families
import pytest
import torch
from rotated import differs, family, family_of, rotated
from torch import nn

import fxc
from fxc.data.samples import samples
from fxc.ir.observe import run
from fxc.passes.base import Context
from fxc.passes.float64 import widened
from fxc.passes.rotate.hadamard import rotation
from fxc.passes.rotate.rotate import Rotate
from fxc.verify.compare import relative_error

ROTATED = {"qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "vit", "mixtral", "qwen3_moe"}
WHY = {
    "gemma2": "post_attention_layernorm, which a rotation does not pass",
    "bert": "LayerNorm, which a rotation does not pass",
    "distilbert": "LayerNorm, which a rotation does not pass",
    "clip": "pre_layrnorm, which a rotation does not pass",
    "t5": "the model returns it",
    "whisper_encoder": "is no linear map of it",
}
WITHOUT_HEADS = {"resnet", "mobilenetv2", "mlp", "cnn"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_nothing_changes_where_it_applies_and_elsewhere_it_says_why_not(name):
    program = family(name)
    after, result = rotated(program, of="stream")
    assert bool(result.changed) == (name in ROTATED) and not result.interface.turned
    assert all(why in " ".join(r.reason for r in result.refusals) for why in [WHY.get(name)] if why)
    assert differs(program, after, result) < 1e-13
    if name in ROTATED:
        before = program.constants
        changed = [n for n, t in after.constants.items() if n not in before or not torch.equal(t, before[n])]
        assert len(changed) >= 8
        other, _ = rotated(program, of="stream", seed=1)
        assert any(not torch.equal(other.constants[n], after.constants[n]) for n in changed)
    after, result = rotated(program)
    assert bool(result.changed) == (name not in WITHOUT_HEADS) and differs(program, after, result) < 1e-13
    cached = {declared.name for declared in program.signature.inputs if declared.name.endswith(".value")}
    assert result.interface.turned.keys() == cached and bool(cached) == any("the cache" in note for note in result.notes)
    if cached:
        inputs = [widened(each) for each in samples(program)[0]]
        assert relative_error(run(after, inputs), run(program, inputs)) > 0.1, "the cache is another one"


def by_name(weights: dict[str, torch.Tensor], layers: int, width: int) -> dict[str, torch.Tensor]:
    """QuaRot as its paper has it, by the names of a Llama's weights."""
    made, r, h = dict(weights), rotation(64), rotation(width)
    made["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ r
    made["lm_head.weight"] = weights["lm_head.weight"] * weights["model.norm.weight"] @ r
    for at in (f"model.layers.{n}" for n in range(layers)):
        read = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}  # fmt: skip
        for norm, its in read.items():
            for each in its:
                made[f"{at}.{each}.weight"] = weights[f"{at}.{each}.weight"] * weights[f"{at}.{norm}.weight"] @ r
        made[f"{at}.mlp.down_proj.weight"] = r.t() @ weights[f"{at}.mlp.down_proj.weight"]
        values, out = made[f"{at}.self_attn.v_proj.weight"], weights[f"{at}.self_attn.o_proj.weight"]
        made[f"{at}.self_attn.v_proj.weight"] = torch.cat([h.t() @ head for head in values.split(width)])
        made[f"{at}.self_attn.o_proj.weight"] = r.t() @ torch.cat([head @ h for head in out.split(width, 1)], 1)
    return {name: tensor for name, tensor in made.items() if "norm" not in name}


def test_it_is_quarot_by_the_names_of_a_llama():
    program = family("llama")
    after, _ = rotated(program)
    expected = by_name(program.constants, layers=2, width=16)
    assert after.constants.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(after.constants[name], tensor, atol=1e-12, rtol=0)


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
    after, result = rotated(program, of="stream")
    assert not result.changed and f"of {name} are zeros" in result.refusals[0].reason
    assert torch.equal(after.constants[name], kept)


def test_a_tied_head_is_untied_and_the_cost_is_said():
    program = family("gpt2")
    after, result = rotated(program)
    assert "transformer.wte.weight: read in ways that now differ" in result.notes[0]
    assert after.nbytes() > program.nbytes()


class Twice(nn.Module):
    """A layer that two calls read, behind one norm or two."""

    def __init__(self, norms: int):
        super().__init__()
        self.embed, self.norms = nn.Embedding(16, 32), nn.ModuleList(nn.LayerNorm(32) for _ in range(norms))
        self.ffn, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for norm in (self.norms[0], self.norms[-1]):
            x = x + self.ffn(norm(x))
        return self.head(self.norms[0](x))


@pytest.mark.parametrize("norms", [1, 2])
def test_what_two_calls_read_has_a_copy_only_where_they_read_it_differently(norms):
    program = family_of(Twice(norms), torch.tensor([[1, 2, 3]]))
    after, result = rotated(program)
    weights = [name for name, tensor in after.constants.items() if name.startswith("ffn") and tensor.ndim == 2]
    assert len(weights) == norms and differs(program, after, result) < 1e-13
    if norms == 1:
        assert not result.notes
    else:
        assert "ffn.bias, ffn.weight: read in ways that now differ" in result.notes[0] and "embed" not in result.notes[0]


def test_it_runs_before_int4_and_the_result_is_near(pylm_dir):
    made = fxc.optimize(str(pylm_dir), passes="rotate,int4:group=128")
    assert {step["name"].partition(":")[0]: step["changed"] for step in made.report["passes"]}["rotate"] > 30
    ids = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(0))
    plain = fxc.optimize(str(pylm_dir), passes="int4:group=128")
    assert relative_error([made(input_ids=ids).logits], [plain(input_ids=ids).logits]) < 0.2


def test_a_head_is_untied_under_its_own_name(pylm_dir):
    made = fxc.optimize(str(pylm_dir), passes="rotate,int4:group=128", skip=("lm_head",), verify=False)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= made.program.constants.keys()
    assert "lm_head.weight" not in made.program.aliases
