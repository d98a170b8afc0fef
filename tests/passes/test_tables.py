"""Tables of embeddings that int8 and int4 pack, and the heads that are tied to them."""

from __future__ import annotations

import pytest
import torch
from families import build
from formats import normal
from lowered import for_cuda
from pass_text import program_of
from torch import nn

import fxc
from fxc.analysis.sizes import bytes_by_kind
from fxc.captured import capture_source
from fxc.data.tables import bound_of, table_size
from fxc.errors import UsageError
from fxc.ir import parse_program, print_program
from fxc.ir.names import layer_of, parts_of
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes
from fxc.schemes import int4, int8

SPECS = ["int8:embeddings=int8", "int8:embeddings=int4", "int4:group=32:embeddings=int8", "int4:group=32:embeddings=int4"]


class Tied(nn.Module):
    """Tokens and positions, a layer, and a head that is tied to the tokens or has a weight of its own."""

    def __init__(self, tied: bool = True, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(96, width), nn.Embedding(12, width)
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, 96)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(torch.relu(self.layer(x)))


IDS = torch.arange(20).reshape(2, 10) * 4


def made(spec: str, model: nn.Module | None = None, **options):
    return fxc.optimize(model or Tied(), (IDS,), passes=spec, **options)


def operators(program) -> dict[str, str]:
    """Operator of each of fxc's calls, by its layer."""
    nodes = [n for n in program.graph.nodes if getattr(n.target, "namespace", "") == "fxc"]
    return {f"{layer_of(n, n.args[1].target)} {n.meta['fqn']}": n.target._opname for n in nodes}


@pytest.mark.fault(1)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tied", [True, False])
def test_lookup_and_tied_head_read_one_table(spec, tied, tmp_path):
    model = made(spec, Tied(tied))
    form = spec.rpartition("=")[2]
    own = "int8_linear" if spec.startswith("int8") else "int4_weight_only_linear"
    head = {"int8": "int8_linear" if spec.startswith("int8") else "int8_weight_only_linear", "int4": "int4_weight_only_linear"}
    expected = {"tokens tokens": f"{form}_embedding", "layer layer": own}
    expected |= {"tokens head": head[form]} if tied else {"head head": own}
    assert operators(model.program) == expected
    assert "tokens.weight" not in model.program.constants and "positions.weight" in model.program.constants
    assert len([name for name in model.program.constants if name.endswith("qweight")]) == (2 if tied else 3)
    scheme = {"int8": int8.SCHEME, "int4": int4.SCHEME}[form]
    parts = {part: model.program.constants[f"tokens.{part}"] for part in ("qweight", "scale")}
    dense, weight = scheme.dense(parts), Tied(tied).tokens.weight
    assert 0 < (dense - weight).norm() < (0.01 if form == "int8" else 0.1) * weight.norm()
    lookup = next(n for n in model.program.graph.nodes if n.meta.get("fqn") == "tokens" and n.op == "call_function")
    arguments = (*(model.program.constants[a.target] if getattr(a, "op", "") == "get_attr" else a for a in lookup.args[1:]),)
    assert torch.equal(lookup.target(IDS, *arguments), dense[IDS])
    [refusal] = model.report["passes"][-1]["refusals"]
    assert refusal["fqn"] == "positions" and refusal["reason"] == "a table of 12 rows beside one of 96: nothing to gain"
    text = print_program(model.program)
    assert print_program(parse_program(text, model.program.constants)) == text
    model.save(tmp_path / "a")
    again = fxc.load(tmp_path / "a")
    assert torch.equal(again.program.module()(IDS)[0], model.program.module()(IDS)[0])
    again.lower()
    expected = model.program.module()(IDS)[0]
    assert (again(IDS) - expected).norm() < 0.03 * expected.norm()
    kind = f"{form} embedding, tied to a linear" if tied else f"{form} embedding"
    assert bytes_by_kind(model.program)[kind] == 96 * 64 // (1 if form == "int8" else 2)


def test_without_the_option_tables_stay():
    model = made("int8", Tied())
    reasons = {r["fqn"]: r["reason"] for r in model.report["passes"][-1]["refusals"]}
    assert reasons.keys() == {"tokens", "positions"} and "tied to another use" in reasons["tokens"]
    assert str(parse_passes("int8:embeddings=float")[0]) == "int8"
    with pytest.raises(UsageError, match="one of float, int8, int4"):
        parse_passes("int4:embeddings=int2")


@pytest.mark.parametrize("family", ["gpt2", "t5", "gemma", "bert"])
def test_families(family):
    model, example = build(family)
    source = capture_source(model, example, options=Options(verify=False))
    compiled = run_passes(source.program, Context(), Options("int8:embeddings=int8"))[0]
    lookups = [n for n in compiled.graph.nodes if n.target is int8.LOOKUP]
    # These models have nearly as many positions as tokens.
    assert len({n.args[1].target for n in lookups}) == {"gpt2": 2, "bert": 2}.get(family, 1)
    heads = [n for n in compiled.graph.nodes if n.target is int8.LINEAR and n.args[1].target == lookups[0].args[1].target]
    assert len(heads) == (0 if family == "bert" else 1)
    for node, name in zip(compiled.placeholders, compiled.signature.inputs):
        if name == "input_ids":
            assert table_size(node) == bound_of(node) == 320


def test_what_is_skipped_left_out_or_used_otherwise_stays_with_a_reason():
    def reason(spec, model=None, **options):
        found = made(spec, model, **options).report["passes"][-1]["refusals"]
        return next(r["reason"] for r in found if r["fqn"] == "tokens")

    assert reason("int8:embeddings=int8", skip=["tokens"]) == "skipped by the pattern tokens"
    assert reason("int8:embeddings=int8:only=layer") == "outside of only=layer"
    assert reason("int8:embeddings=int4", Tied(width=48)) == "no size of groups divides its rows of 48: use embeddings=int8"

    class Other(Tied):
        def forward(self, ids):
            return super().forward(ids) + self.tokens.weight.sum()

    assert reason("int8:embeddings=int8", Other()) == "it is tied to something else than a linear layer"


def test_tables_alone_are_packed_where_only_says_so():
    program = made("int4:group=auto:embeddings=int8:only=tokens").program
    assert set(operators(program).values()) == {"int8_embedding", "int8_weight_only_linear"}


def test_groups_of_tables_are_those_of_int4_and_the_largest_beside_int8():
    for spec, groups in (("int8:embeddings=int4", 1), ("int4:group=auto:embeddings=int4", 1), (SPECS[3], 2)):
        assert made(spec).program.constants["tokens.scale"].shape == (96, groups)
    program = made("int4:group=32:symmetric=false:embeddings=int4").program
    assert program.constants["tokens.zero"].shape == (96, 2)


def test_shapes_are_planned_without_weights_and_what_learns_takes_packed_tables():
    program = fxc.capture(Tied(), (IDS,), check=False)
    meta = program.copy()
    meta.constants = {name: t.to("meta") for name, t in meta.constants.items()}
    spec = "int4:group=32:algorithm=gptq:embeddings=int8"
    real = run_passes(program, Context(samples=[[IDS], [IDS + 1]]), Options(spec))[0]
    planned = run_passes(meta, Context(), Options(spec))[0]
    shapes = [{n: (t.shape, t.dtype) for n, t in each.constants.items()} for each in (real, planned)]
    assert shapes[0] == shapes[1]
    plain = run_passes(program, Context(), Options("int4:group=32:embeddings=int8"))[0]
    assert torch.equal(real.constants["tokens.qweight"], plain.constants["tokens.qweight"])
    assert not torch.equal(real.constants["layer.qweight"], plain.constants["layer.qweight"])


def test_a_tied_head_learns_as_other_layers_do_and_the_table_has_its_numbers():
    program = fxc.capture(Tied(), (IDS,), check=False)
    samples = [[(IDS * step + step) % 96] for step in range(1, 12)]
    spec = "int4:group=32:embeddings=int4"
    rtn, gptq = (
        run_passes(program, Context(samples=samples), Options(f"{spec}:algorithm={each}"))[0] for each in ("rtn", "gptq")
    )
    assert operators(gptq) == operators(rtn) and "tokens.weight" not in gptq.constants
    lookup, head = (n for n in gptq.graph.nodes if parts_of(n).get("qweight") == "tokens.qweight")
    assert (lookup.target, head.target) == (int4.LOOKUP, int4.LINEAR) and parts_of(lookup) == parts_of(head)

    def gap(made):
        # Of the head alone: what it reads is the same.
        weight, scheme = Tied().tokens.weight, int4.SCHEME
        hidden = torch.cat([hidden_of(ids) for [ids] in samples])
        made = scheme.dense({part: made.constants[f"tokens.{part}"] for part in ("qweight", "scale")})
        return (hidden @ (made - weight).T).norm().item()

    def hidden_of(ids):
        model = Tied()
        x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        return torch.relu(model.layer(x)).flatten(0, 1)

    with torch.no_grad():
        assert gap(gptq) < 0.8 * gap(rtn)
    meta = program.copy()
    meta.constants = {name: t.to("meta") for name, t in meta.constants.items()}
    planned = run_passes(meta, Context(), Options(f"{spec}:algorithm=gptq"))[0]
    assert {n: t.shape for n, t in planned.constants.items()} == {n: t.shape for n, t in gptq.constants.items()}


def test_rows_that_are_not_there_and_wrong_operands_are_refused():
    q, scale = int8.quantize_weight(normal(10, 64))
    with pytest.raises(IndexError):
        int8.LOOKUP(torch.tensor([10]), q, scale, torch.float32)
    assert int8.LOOKUP(torch.tensor(3), q, scale, torch.bfloat16).dtype == torch.bfloat16
    assert int8.LOOKUP(torch.zeros(2, 0, dtype=torch.int64), q, scale, torch.float32).shape == (2, 0, 64)
    with pytest.raises(TypeError):
        int8.LOOKUP(torch.tensor([1.0]), q, scale, torch.float32)
    with pytest.raises(ValueError, match="scale must be"):
        int8.LOOKUP(torch.tensor([1]), q, scale[:5], torch.float32)
    q, scale, _ = int4.quantize_weight(normal(10, 64), 32, True)
    with pytest.raises(ValueError, match="group must be"):
        int4.LOOKUP(torch.tensor([1]), q, scale, None, 48, torch.float32)
    with pytest.raises(ValueError, match="scale and zero"):
        int4.LOOKUP(torch.tensor([1]), q, scale, None, 64, torch.float32)


def test_a_packed_table_is_not_packed_again():
    text = '''constant @embed.weight: f32[96, 64]
%0: i64[s0] = input "ids"
%1: f32[s0, 64] = aten.embedding(@embed.weight, %0)  # embed
%2: f32[s0, 96] = aten.linear(%1, @embed.weight)  # head
return "out" %2'''
    program = program_of(text)
    first, second = parse_passes("int4:embeddings=int8:group=32,int8:embeddings=int8")
    assert first.run(program, Context()).changed == 2
    result = second.run(program, Context())
    assert result.changed == 0 and {r.reason for r in result.refusals} == {"already int4"}


@pytest.mark.parametrize("spec", SPECS)
def test_lowered_for_cuda_the_lookup_stays_and_needs_no_kernel(spec):
    program = made(spec).program
    lowered, report = for_cuda(program)
    assert {choice.fqn for choice in report} == {"tokens", "layer"} and all(choice.op != "unchanged" for choice in report)
    expected = program.module()(IDS)[0]
    assert (lowered(IDS)[0] - expected).norm() < 1e-5 * expected.norm()
