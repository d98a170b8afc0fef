"""Constants that artifacts hold coded: smaller on disk, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from artifacts import SHARD, rehash
from formats import captured, compiled, normal
from safetensors.torch import load_file, save_file
from torch import nn

import fxc
from fxc.artifact import store
from fxc.errors import InputRefused, UsageError
from fxc.ir import print_program
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.passes.order import order
from fxc.pipeline import run_passes


def save(program, folder):
    store.save(program, folder, manifest={})
    return (folder / SHARD).stat().st_size


@pytest.mark.parametrize(
    "spec", ["", "int8", "int4:group=32", "fp8", "sparse24", "sparse24,int8", "sparsify:sparsity=0.9", "sparsify,int4:group=32"]
)
def test_whatever_is_packed_is_smaller_on_disk_and_the_same_once_loaded(spec, tmp_path):
    plain = captured() if not spec else compiled(spec)[0]
    coded, [*_, step] = run_passes(plain, Context(), Options("pack"))
    assert save(coded, tmp_path / "coded") < 0.99 * save(plain, tmp_path / "plain")
    found = store.read(tmp_path / "coded").program
    assert print_program(found) == print_program(coded) and '"storage": "coded"' in print_program(coded)
    assert all(torch.equal(found.constants[fqn].float(), tensor.float()) for fqn, tensor in plain.constants.items())
    assert step.bytes_after == step.bytes_before and any("on disk alone" in note for note in step.notes)
    save(found, tmp_path / "again")
    assert (tmp_path / "again" / SHARD).read_bytes() == (tmp_path / "coded" / SHARD).read_bytes(), "stored so again"


def test_a_codebook_of_what_is_left_makes_pruned_layers_small(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 64, 3, bias=False), nn.Flatten(), nn.Linear(64 * 36, 64, bias=False)).eval()
    model = fxc.optimize(net, (normal(2, 8, 8, 8),), "sparsify:sparsity=0.9,pack:codebook=32")
    for name in ("0.weight", "2.weight"):
        weight = model.program.constants[name]
        assert len(weight.unique()) <= 33 and (weight == 0).double().mean() > 0.89
    model.save(tmp_path / "out")
    whole = sum(p.numel() * 4 for p in net.parameters())
    assert (tmp_path / "out" / SHARD).stat().st_size < whole / 30
    x = normal(3, 8, 8, 8, seed=1)
    assert torch.equal(fxc.load(tmp_path / "out")(x), model(x))


def test_only_limits_the_codebook_and_what_is_no_float_has_none():
    program, _ = run_passes(captured(), Context(), Options("pack:codebook=16:only=up"))
    distinct = {fqn: len(tensor.unique()) for fqn, tensor in program.constants.items() if fqn.endswith("weight")}
    assert [fqn for fqn, count in distinct.items() if count <= 16] == ["up.weight"]
    quantized, [*_, step] = run_passes(compiled("int8")[0], Context(), Options("pack:codebook=16"))
    same = {fqn: torch.equal(tensor, compiled("int8")[0].constants[fqn]) for fqn, tensor in quantized.constants.items()}
    assert [fqn for fqn, equal in same.items() if not equal] == ["head.weight"], "the one that int8 left in floats"
    assert list(step.layer_errors) == ["head"]


def test_long_biases_share_values_too_and_short_ones_stay():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 20)).eval()
    program, _ = run_passes(fxc.capture(net, (normal(2, 16),), check=False), Context(), Options("pack:codebook=16"))
    assert len(program.constants["0.bias"].unique()) <= 16
    assert torch.equal(program.constants["2.bias"], net[2].bias)


def test_it_runs_after_what_prunes_and_quantizes_and_twice_is_nothing():
    names = [each.name for each in order(parse_passes("pack:codebook=32,int8,sparsify")).passes]
    assert names[-3:] == ["sparsify", "int8", "pack"]
    packed, _ = run_passes(captured(), Context(), Options("pack"))
    with pytest.raises(UsageError, match="changed nothing"):
        run_passes(packed, Context(), Options("pack"))
    for spec, said in (("pack:codebook=8", "from 16 to 256"), ("pack:only=up", "give codebook=32")):
        with pytest.raises(UsageError) as caught:
            parse_passes(spec)
        assert said in str(caught.value)


@pytest.fixture
def coded(tmp_path):
    save(run_passes(captured(), Context(), Options("pack"))[0], tmp_path / "out")
    return tmp_path / "out"


def change(folder, edit):
    manifest = json.loads((folder / "fxc.json").read_bytes())
    tensors = load_file(folder / SHARD)
    edit(manifest, tensors)
    save_file(tensors, folder / SHARD)
    (folder / "fxc.json").write_text(json.dumps(manifest))
    rehash(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m, t: m["coded"].update({"up.weight": ["f32", 1 << 20, 1 << 11]}), "cannot be so large"),
        (lambda m, t: m["coded"].update({"up.weight": ["f32", 64, 48]}), "program.fxc"),
        (lambda m, t: m["coded"].update({"up.weight": ["f64", 96, 32]}), "damaged"),
        (lambda m, t: m["coded"].update({"up.weight": ["f32", -96, -32]}), "no dtype and shape"),
        (lambda m, t: m["coded"].update({"up.weight": "f32"}), "no dtype and shape"),
        (lambda m, t: m["coded"].update({"other": ["f32", 3]}), "not there"),
        (lambda m, t: m.update(coded=[]), "not there"),
        (lambda m, t: m.pop("coded"), "program.fxc"),
        (lambda m, t: t.update({"up.weight": t["up.weight"][:100]}), "damaged"),
        (lambda m, t: t["up.weight"].__setitem__(0, 15), "damaged"),
        (lambda m, t: t.update({"up.weight": t["up.weight"].float()}), "cannot be so large"),
    ],
)
def test_what_is_changed_on_purpose_is_refused_in_words(edit, said, coded):
    change(coded, edit)
    with pytest.raises(InputRefused) as caught:
        store.read(coded)
    assert said in str(caught.value)


@pytest.mark.fault(32)
def test_fxc_that_knows_no_coded_constants_is_told_to_be_upgraded(coded, tmp_path):
    assert json.loads((coded / "fxc.json").read_bytes())["format_version"] == 2
    save(captured(), tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "fxc.json").read_bytes())["format_version"] == 1
