"""compressed-tensors folders: transformers and compressed-tensors load them and compute what fxc does, with its own numbers."""

import json

import families
import pytest
import torch
from command import fxc as command
from command import fxc_json
from safetensors.torch import load_file

import fxc
from fxc.errors import InputRefused, UsageError, VerificationFailed
from fxc.export import compressed_tensors
from fxc.export.packed import packed_weights
from fxc.export.runs import rounded_apart
from fxc.schemes.int4 import unpack
from fxc.verify.compare import relative_error

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'fxc[compressed-tensors]'")


def compiled(source, passes: str, **options) -> fxc.CompiledModel:
    return fxc.optimize(source, passes=passes, verify=False, **options)


def plain(folder, auto: str = "AutoModelForCausalLM"):
    import transformers

    model, report = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def quantization_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# Passes -> formats of the groups, and how far logits may be: by rounding, and where activations round to other integers.
CASES = {
    "int8": (["int-quantized"], 2e-2),
    "int8:mode=weight_only": (["pack-quantized"], 1e-5),
    "int4:group=32": (["pack-quantized"], 1e-5),
    "int4:group=128:bits=3": (["pack-quantized"], 1e-5),
    "fp8": (["float-quantized"], 2e-2),
    "fp8:mode=weight_only": (["float-quantized"], 1e-5),
    "int4:group=64:only=re:mlp,int8": (["int-quantized", "pack-quantized"], 2e-2),
}


@pytest.mark.parametrize("passes", CASES)
def test_transformers_computes_the_same(pylm_dir, tmp_path, passes):
    formats, allowed = CASES[passes]
    model = compiled(pylm_dir, passes, dtype="float32")
    made = model.export_compressed_tensors(tmp_path / "out")
    assert made.zeros == [] and made.model_class == "Qwen2ForCausalLM"
    said = quantization_of(tmp_path / "out")
    assert sorted(group["format"] for group in said["config_groups"].values()) == formats and said["ignore"] == ["lm_head"]
    loaded = plain(tmp_path / "out")
    ids = torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # The program's own meaning: how layers run on this machine is not what is exported.
        expected = model.program.module()(*_inputs(model, ids))[0]
        assert relative_error([loaded(ids).logits], [expected]) < allowed
    if allowed == 1e-5 and "bits=3" not in passes:  # whose kernel on this machine may round activations
        steps = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **steps), model.generate(ids, **steps))


def _inputs(model: fxc.CompiledModel, ids: torch.Tensor) -> list[torch.Tensor]:
    past = [
        torch.zeros(len(ids), n.meta["val"].shape[1], 0, n.meta["val"].shape[3]) for n in model.program.placeholders[3:]
    ]
    return [ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids), *past]


@pytest.mark.parametrize("passes", ["int8", "int8:mode=weight_only", "int4:group=32", "int4:group=32:bits=3", "fp8"])
def test_numbers_and_scales_are_those_of_the_program(pylm_dir, tmp_path, passes):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model = compiled(pylm_dir, passes)
    model.export_compressed_tensors(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layers = packed_weights(model.program).values()
    assert len(layers) == 35
    for each in layers:
        numbers, scale = each.parts["qweight"], each.parts["scale"]
        assert torch.equal(stored[f"{each.layer}.weight_scale"].flatten(), scale.flatten())
        assert stored[f"{each.layer}.weight_scale"].dtype == scale.dtype
        if f"{each.layer}.weight" in stored:
            assert torch.equal(stored[f"{each.layer}.weight"].view(torch.uint8), numbers.view(torch.uint8))
            continue
        bits = 8 if each.scheme.name == "int8" else int(each.scheme.name[-1])
        found = unpack_from_int32(stored[f"{each.layer}.weight_packed"], bits, each.shape)
        assert torch.equal(found, numbers if bits == 8 else (unpack(numbers, bits).int() - (1 << bits - 1)).to(torch.int8))
        assert stored[f"{each.layer}.weight_shape"].tolist() == list(each.shape)


def test_weights_are_split_and_the_index_names_them(pylm_dir, tmp_path):
    model = compiled(pylm_dir, "int4:group=32", dtype="float32")
    model.export_compressed_tensors(tmp_path / "out", max_shard_bytes=2_000_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and files == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert plain(tmp_path / "out").config.num_hidden_layers == 5
    # An export is replaced when told, also by one of fewer files; what lies there otherwise stays.
    with pytest.raises(UsageError, match="not empty"):
        model.export_compressed_tensors(tmp_path / "out")
    model.export_compressed_tensors(tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        model.export_compressed_tensors(tmp_path / "out", overwrite=True)
    model.files["../x"] = b""
    with pytest.raises(InputRefused, match="leads out"):
        model.export_compressed_tensors(tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("name", "auto"), [("bert", "AutoModelForSequenceClassification"), ("vit", "AutoModelForImageClassification")]
)
def test_encoders(tmp_path, name, auto):
    source, _ = families.build(name)
    model = compiled(source, "int8:mode=weight_only")
    model.export_compressed_tensors(tmp_path / "out")
    loaded = plain(tmp_path / "out", auto)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": torch.randint(3, 300, (2, 9))}
    with torch.no_grad():
        assert relative_error([loaded(**inputs).logits], [model(**inputs).logits]) < 1e-3


def test_a_model_that_rounding_of_activations_moves_by_more_than_2_percent(minilm_dir, tmp_path):
    model = compiled(str(minilm_dir), "int8")
    assert rounded_apart(model.program) > 0.05
    assert model.export_compressed_tensors(tmp_path / "out").model_class == "BertModel"


def test_a_pruned_model_and_the_command(pylm_dir, tmp_path):
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    command("compile", pylm_dir, "-o", artifact, "--passes", "prune:heads=0.5:ffn=0.5:uniform=true,int4:group=32",
            "--no-measure", "--no-verify")  # fmt: skip
    made = fxc_json("export", artifact, "-o", out, "--format", "compressed-tensors")
    assert made["class"] == "Qwen2ForCausalLM" and made["warnings"] == [] and made["format"] == "compressed-tensors"
    loaded = plain(out)
    assert loaded.config.intermediate_size == 384 and loaded.config.num_attention_heads == 4
    assert (out / "tokenizer.json").exists()
    assert "one of hf, compressed-tensors" in command("export", artifact, "-o", out, "--format", "exe", code=2).stderr
    assert "--format compressed-tensors" in command("export", artifact, "-o", tmp_path / "plain", code=2).stderr


REFUSED = {
    ("qwen2", "int4:group=32:symmetric=false"): r"q_proj: .* cannot hold it as int4\n.*zero points.*\n.*symmetric=true",
    ("qwen2", "int8:embeddings=int8"): r"embed_tokens: .*\n.*embeddings in float.*\n.*without embeddings=",
    ("qwen2", "sparse24"): r"q_proj: .*\n.*dropped 2:4 sparsity.*\n",
    ("qwen2", "canonicalize"): r"nothing in it is quantized\n.*--format hf",
    ("mixtral", "int8:only=re:experts"): r"experts\S*: .*\n.*experts of a mixture.*\n.*--skip",
    ("gpt2", "int8"): r"c_attn: .*\n.*has a Conv1D there.*nn\.Linear",
}


@pytest.mark.parametrize(("name", "passes"), REFUSED)
def test_what_the_format_cannot_hold_is_refused(tmp_path, name, passes):
    model = compiled(families.build(name)[0], passes)
    with pytest.raises(UsageError, match=REFUSED[name, passes]):
        model.export_compressed_tensors(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_static_activations_are_refused(tmp_path):
    ids = [{"input_ids": torch.randint(3, 300, (1, 12))} for _ in range(4)]
    model = compiled(families.build("qwen2")[0], "int8:mode=static:smooth=false", calib=ids)
    with pytest.raises(UsageError, match=r"static ranges.*\n.*without mode=static"):
        model.export_compressed_tensors(tmp_path / "out")


@pytest.mark.fault(16)
def test_layers_that_differ_are_refused(tmp_path):
    model = compiled(families.build("llama")[0], "prune:ffn=0.3:scope=global,int8")
    with pytest.raises(UsageError, match=r"layers differ.*\n.*one number for all layers"):
        model.export_compressed_tensors(tmp_path / "out")


def test_what_vllm_computes_as_one_is_warned_of(tmp_path):
    model = compiled(families.build("llama")[0], "int4:group=32:only=re:q_proj|gate_proj:bits=3,int8")
    warnings = model.export_compressed_tensors(tmp_path / "out").warnings
    fused = [w for w in warnings if "as one, in one format" in w]
    assert len(fused) == 1 and "layers.0.self_attn.q_proj is int3 in groups of 32" in fused[0] and "3 more" in fused[0]
    assert any("no kernels for 3 bits" in w for w in warnings)


def test_wrong_numbers_do_not_get_out(tmp_path, monkeypatch):
    model = compiled(families.build("llama")[0], "int4:group=32")
    stored = compressed_tensors._stored

    def of_other_rows(*args):
        return stored(*args) | {"weight_scale": stored(*args)["weight_scale"].flip(0)}

    monkeypatch.setattr(compressed_tensors, "_stored", of_other_rows)
    with pytest.raises(VerificationFailed):
        model.export_compressed_tensors(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    model = compiled(families.build("llama")[0], "int8")
    monkeypatch.setattr(compressed_tensors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed\n.*fxc\[compressed-tensors\]"):
        model.export_compressed_tensors(tmp_path / "out")
