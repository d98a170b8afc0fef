"""GGUF files: read by the package gguf, their tensors are the program's numbers, and their heads say what llama.cpp needs."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import fxc as command
from command import fxc_json

import fxc
from fxc.errors import UsageError
from fxc.export import ggml
from fxc.export.folder import MARK
from fxc.export.packed import packed_weights
from fxc.schemes.int4 import SCHEMES, unpack

gguf = pytest.importorskip("gguf", reason="not installed: pip install 'fxc[gguf]'")


def read(folder):
    return gguf.GGUFReader(folder / "model.gguf")


def tensors(reader):
    return {each.name: each for each in reader.tensors}


def numbers(each):
    return torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())


def value(reader, key):
    field = reader.fields[key]
    found = [field.parts[at][0] for at in field.data]
    return [int(each) for each in found] if len(found) > 1 else int(found[0])


@pytest.fixture(scope="module")
def int4(pylm_dir):
    return fxc.optimize(pylm_dir, passes="int4:group=32", verify=False)


def test_levels_of_int4_are_those_of_q4_0_bit_for_bit(int4, tmp_path):
    made = int4.export_gguf(tmp_path / "out")
    assert made.architecture == "qwen2" and made.types["Q4_0"] == 35 and made.zeros == []
    stored = tensors(read(tmp_path / "out"))["blk.2.ffn_up.weight"]
    packed = next(each for each in packed_weights(int4.program).values() if each.layer.endswith("layers.2.mlp.up_proj"))
    blocks = torch.from_numpy(np.array(stored.data)).view(packed.shape[0], -1, 18)
    levels = unpack(packed.parts["qweight"], 4).unflatten(1, (-1, 32))
    assert torch.equal(blocks[..., 2:] & 15, levels[..., :16]) and torch.equal(blocks[..., 2:] >> 4, levels[..., 16:])
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0].float(), packed.parts["scale"].float())


def test_it_holds_every_weight_under_the_names_of_llama_cpp(int4, tmp_path, pylm_dir):
    int4.export_gguf(tmp_path / "out")
    found = tensors(read(tmp_path / "out"))
    assert {name.partition(".")[0] for name in found} == {"token_embd", "output_norm", "blk"}
    embedding = int4.program.constants["model.embed_tokens.weight"]
    assert torch.equal(numbers(found["token_embd.weight"]), embedding.float())
    reader = read(tmp_path / "out")
    assert value(reader, "qwen2.block_count") == 5 and value(reader, "qwen2.vocab_size") == len(embedding)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == len(embedding) and "tokenizer.ggml.merges" in reader.fields


@pytest.mark.parametrize(("passes", "kind"), [("int8", "Q8_0"), ("int4:group=64:symmetric=false", "Q4_1"), ("fp8", "F16")])
def test_other_formats_become_what_ggml_has_for_them(passes, kind, pylm_dir, tmp_path):
    model = fxc.optimize(pylm_dir, passes=passes, verify=False)
    assert model.export_gguf(tmp_path / "out").types[kind] == 35
    found = tensors(read(tmp_path / "out"))
    for packed in list(packed_weights(model.program).values())[:3]:
        name = packed.layer.replace("model.layers.", "blk.").replace("self_attn.", "attn_").replace("_proj", "")
        dense = packed.dense()
        assert float((numbers(found[f"{name}.weight"]) - dense).norm() / dense.norm()) <= ggml.LIMIT


def test_layers_of_unlike_sizes_are_arrays(pylm_dir, tmp_path):
    model = fxc.optimize(pylm_dir, passes="prune:ffn=0.3:scope=global,int8", verify=False)
    made = model.export_gguf(tmp_path / "out")
    reader = read(tmp_path / "out")
    widths = value(reader, f"{made.architecture}.feed_forward_length")
    assert made.architecture == "deci" and len(set(widths)) > 1
    found = tensors(reader)
    assert widths == [found[f"blk.{at}.ffn_up.weight"].shape[1] for at in range(5)]
    assert len(value(reader, "deci.attention.head_count_kv")) == 5


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_fewer_bits_have_the_same_middle(bits):
    torch.manual_seed(0)
    scheme = SCHEMES[bits]
    weight = torch.randn(8, 64).bfloat16()
    parts = scheme.pack(weight, group=32, symmetric=True, full_range=True)
    dense = scheme.dense(parts)
    kind, data = ggml.blocks(SimpleNamespace(scheme=scheme, parts=parts, shape=(8, 64), argument={"group": 32}.get))
    assert kind == "Q4_0"
    back = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(back), dense)


def test_the_command_writes_one_and_replaces_only_its_like(int4, tmp_path):
    int4.save(tmp_path / "artifact")
    done = fxc_json("export", tmp_path / "artifact", "-o", tmp_path / "out", "--format", "gguf")
    assert done["format"] == "gguf" and {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", MARK}
    assert "exists" in command("export", tmp_path / "artifact", "-o", tmp_path / "out", "--format", "gguf", code=2).stderr
    command("export", tmp_path / "artifact", "-o", tmp_path / "out", "--format", "gguf", "--overwrite")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = command("export", tmp_path / "artifact", "-o", tmp_path / "out", "--format", "gguf", "--overwrite", code=2)
    assert "mine.txt" in done.stderr and (tmp_path / "out" / "mine.txt").exists()


def test_what_has_no_graph_and_what_is_not_installed_say_so(int4, tmp_path, minilm_dir, monkeypatch):
    encoder = fxc.optimize(minilm_dir, passes="int8", verify=False)
    with pytest.raises(UsageError, match="no GGUF of bert"):
        encoder.export_gguf(tmp_path / "out")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else found(name, *more))
    with pytest.raises(UsageError, match="not installed"):
        int4.export_gguf(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
