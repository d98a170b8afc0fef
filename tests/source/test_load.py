"""Sources load; each unsafe, damaged or unsupported one is refused with what, where, why and what next."""

import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxc.errors import FxcError, InputRefused, UsageError
from fxc.safety import check_finite, check_relative_name, safetensors_header
from fxc.source.load import kind_of, load_source

INDEX = "model.safetensors.index.json"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A one-file and a sharded checkpoint of one tiny Llama, bfloat16, to be copied before they are damaged."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SMALL)).to(torch.bfloat16)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="4KB")
    return root


@pytest.fixture
def single(saved, tmp_path):
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))
    assert len(shards(folder)) >= 3
    return folder


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(source, *parts, error=InputRefused, **options):
    """The text of the refusal, which has every part and the three lines."""
    with pytest.raises(error) as caught:
        load_source(str(source), **options)
    text = str(caught.value)
    assert text.startswith(f"error[FXC-E{error.exit_code}]: ")
    assert "\ntry: " in text, text
    for part in parts:
        assert str(part) in text, text
    return text


# ---- what loads


def test_minilm_loads(minilm_dir):
    loaded = load_source(str(minilm_dir))
    assert type(loaded.model).__name__ == "BertModel"
    assert loaded.tokenizer_dir == minilm_dir and loaded.example_inputs is None
    assert loaded.source["kind"] == "folder" and loaded.source["dtype"] == "float32"
    assert loaded.source["files"]["model.safetensors"]["size"] == (minilm_dir / "model.safetensors").stat().st_size
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    stored = load_file(minilm_dir / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["encoder.layer.5.output.dense.weight"],
                       stored["encoder.layer.5.output.dense.weight"])  # fmt: skip
    json.dumps(loaded.source)


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_auto_keeps_the_stored_dtype(saved, name):
    loaded = load_source(str(saved / name))
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_auto_believes_the_weights_and_not_the_config(single):
    edit_json(single / "config.json", lambda config: config.update(dtype="float16"))
    assert load_source(str(single)).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.float32])
def test_dtype_can_be_chosen(saved, dtype):
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert load_source(str(saved / "single"), dtype=dtype).model.dtype == expected


def test_unknown_dtype(saved):
    refusal(saved / "single", "unknown dtype 'int8'", "bfloat16", error=UsageError, dtype="int8")


def test_tied_weights_are_not_missing(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_source(str(tmp_path)).model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_without_architectures_the_base_model_is_taken(tmp_path):
    BertModel(BertConfig(vocab_size=32, **SMALL)).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.pop("architectures"))
    assert isinstance(load_source(str(tmp_path)).model, BertModel)


def test_subfolder(single):
    loaded = load_source(str(single.parent), subfolder="single")
    assert loaded.tokenizer_dir == single and loaded.source["subfolder"] == "single"
    refusal(single.parent, "../single", subfolder="../single")


def test_hub_kernels_are_off_while_loading_and_only_then(single, monkeypatch):
    from transformers.integrations import hub_kernels

    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    seen = []
    original = LlamaForCausalLM.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        seen.append(
            (
                os.environ["USE_HUB_KERNELS"],
                hub_kernels._kernels_enabled,
                kwargs["trust_remote_code"],
                kwargs["weights_only"],
            )
        )
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(spy))
    load_source(str(single))
    assert seen == [("0", False, False, True)]
    assert "USE_HUB_KERNELS" not in os.environ and hub_kernels._kernels_enabled


# ---- which kind of source


def test_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "artifact"):
        Path(name).mkdir(parents=True)
    Path("artifact/fxc.json").write_text("{}")
    kinds = {"org/model": "folder", "artifact": "artifact", "org/other": "hub", "gpt2": "hub", "a.b:make": "factory"}
    assert {source: kind_of(source) for source in kinds} == kinds
    refusal("artifact", "artifact", "fxc.load", error=UsageError)
    refusal("./absent", "./absent: no such model", error=UsageError)
    refusal("artifact/fxc.json", "this is a file", error=UsageError)
    refusal("org/model", "--revision", error=UsageError, revision="main")
    refusal("org/model", "org/model", "config.json")


def test_a_hub_id_that_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refusal("acme/tiny", "acme/tiny: not in the local", "HF_HUB_OFFLINE", "hf download acme/tiny")
    refusal("acme/tiny", "at revision v9", revision="v9")


@pytest.fixture
def cached(single, tmp_path, monkeypatch):
    """The hub's cache with the model in it, as huggingface_hub lays it out: links into blobs."""
    repo = tmp_path / "hub" / "models--acme--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    for path in single.iterdir():
        path.rename(repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_cached_hub_id_loads_offline(cached):
    loaded = load_source("acme/tiny")
    assert isinstance(loaded.model, LlamaForCausalLM) and loaded.tokenizer_dir == cached
    described = {key: loaded.source[key] for key in ("kind", "id", "revision", "commit")}
    assert described == {"kind": "hub", "id": "acme/tiny", "revision": "main", "commit": cached.name}
    assert load_source("acme/tiny", revision=cached.name).source["revision"] == cached.name


def test_a_link_out_of_the_cache_is_refused(cached, tmp_path):
    outside = (tmp_path / "outside.json").absolute()
    outside.write_text("{}")
    (cached / "tokenizer.json").symlink_to(outside)
    refusal("acme/tiny", "link", "tokenizer.json", outside)


# ---- package.module:function


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "shop_for_models.py").write_text(
        "import torch\n"
        "def plain(): return torch.nn.Linear(4, 2).train()\n"
        "def pair(): return torch.nn.Linear(4, 2), (torch.ones(1, 4),)\n"
        "def nothing(): return None\n"
        "def sick(): return torch.nn.Linear(4, 2, bias=False).apply(lambda m: m.weight.data.fill_(float('nan')))\n"
        "def broken(): raise KeyError('no \\x1b[31mred\\x1b[0m weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "shop_for_models"
    sys.modules.pop("shop_for_models", None)


def test_factory(module):
    path = list(sys.path)
    loaded = load_source(f"{module}:plain", dtype="bfloat16")
    assert loaded.model.weight.dtype == torch.bfloat16 and not loaded.model.training and loaded.example_inputs is None
    assert loaded.source == {"kind": "factory", "id": f"{module}:plain"} and loaded.tokenizer_dir is None
    inputs = load_source(f"{module}:pair").example_inputs
    assert isinstance(inputs, tuple) and inputs[0].shape == (1, 4)
    assert sys.path == path


def test_factory_faults(module):
    refusal(f"{module}:nothing", "did not return a model", "NoneType", error=UsageError)
    refusal(f"{module}:absent", "no attribute 'absent'", error=UsageError)
    refusal("no_such_package.x:f", "No module named 'no_such_package'", error=UsageError)
    assert "\x1b" not in refusal(f"{module}:broken", "KeyError: 'no", "weights", error=UsageError)
    refusal(f"{module}:sick", "weight (8 NaN, 0 Inf of 8)")


# ---- code and kernels that a folder asks for


def test_auto_map_needs_trust_and_does_not_run(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaForCausalLM as Evil\n")
    edit_json(single / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil"}))
    refusal(single, "config.json", "auto_map", "evil.Evil", "trust_remote_code")
    assert not marker.exists()
    edit_json(single / "config.json", lambda c: c.update(nested={"auto_map": c.pop("auto_map")}))
    refusal(single, "nested.auto_map")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "sdpa"),
        ("_experts_implementation_internal", "eager"),
        ("_attn_implementation", "someone/evil-kernel"),
        ("attn_implementation", "paged|kernels-community/x:fn"),
        ("attn_implementation", {"text_config": "someone/evil"}),
    ],
)
def test_hub_kernels_named_by_a_config(single, key, value):
    edit_json(single / "config.json", lambda config: config.update({key: value}))
    refusal(single, "config.json", f"{key} = {value}", f"remove {key}")
    edit_json(single / "config.json", lambda config: config.update(text_config=[{key: config.pop(key)}]))
    refusal(single, f"text_config.0.{key}")


def test_quantized_already(single):
    edit_json(single / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refusal(single, "already quantized (gptq, 4 bits)", "config.json", "start from the model it was made from")


def test_weights_file_named_by_the_config(single):
    edit_json(single / "config.json", lambda c: c.update(transformers_weights="other.safetensors"))
    refusal(single, "other.safetensors", "redirects")


def test_adapter_folder(single):
    (single / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    refusal(single, "PEFT adapter", "merge")


class Evil:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_never_run(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker), protocol=2))
    refusal(single, "pickle", "pytorch_model.bin", "allow_pickle")
    refusal(single, "could run code", "pytorch_model.bin", allow_pickle=True)
    torch.save({"lm_head.weight": Evil(marker)}, single / "pytorch_model.bin")
    refusal(single, "could run code", "pytorch_model.bin", allow_pickle=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the pickle would have run"


def test_an_honest_pickle_loads_when_it_is_allowed(single):
    weights = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    torch.save(weights, single / "pytorch_model.bin")
    loaded = load_source(str(single), allow_pickle=True)
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], weights["lm_head.weight"])
    assert loaded.model.dtype == torch.bfloat16


def test_safetensors_win_over_a_pickle_beside_them(single, tmp_path):
    marker = tmp_path / "executed"
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    load_source(str(single), allow_pickle=True)
    assert not marker.exists()


# ---- names and links that lead out

LEADING_OUT = [
    "../x.safetensors",
    "a/../../x.safetensors",
    "/etc/x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\server\\x.safetensors",
    "..\\x.safetensors",
    "//server/x.safetensors",
    "x\0.safetensors",
    "..",
    "",
    None,
    7,
]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_index_that_leads_out(sharded, name):
    def redirect(index):
        index["weight_map"]["lm_head.weight"] = name

    edit_json(sharded / INDEX, redirect)
    refusal(sharded, INDEX, "leads out of the model's folder", "do not use")


def test_ordinary_names_pass():
    for name in ("model-00001-of-00002.safetensors", "part/model.safetensors", "..x.safetensors"):
        assert check_relative_name(name, where="here") == name


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_that_lead_out(single, tmp_path, name):
    (single / name).unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (single / name).symlink_to(secret)
    refusal(single, single / name, "a link that leads out", secret)


def test_a_linked_directory_inside_an_index(sharded, tmp_path):
    (tmp_path / "outside").mkdir()
    shards(sharded)[0].rename(tmp_path / "outside" / "a.safetensors")
    (sharded / "inside").symlink_to(tmp_path / "outside")

    def redirect(index):
        gone = "model-00001"
        index["weight_map"] = {k: "inside/a.safetensors" if gone in v else v for k, v in index["weight_map"].items()}

    edit_json(sharded / INDEX, redirect)
    refusal(sharded, "inside/a.safetensors", "a link that leads out")


def test_links_inside_the_folder_and_a_linked_folder_pass(single, tmp_path):
    (single / "model.safetensors").rename(single / "real")
    (single / "model.safetensors").symlink_to("real")
    (tmp_path / "link").symlink_to(single)
    load_source(str(tmp_path / "link"))


def test_a_pickle_in_a_safetensors_index(sharded):
    (sharded / "x.bin").write_bytes(b"")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "x.bin"}))
    refusal(sharded, INDEX, "not .safetensors", "x.bin")


# ---- damage


@pytest.mark.parametrize("cut", [1, 4096, "half"])
def test_truncated_file(single, cut):
    path = single / "model.safetensors"
    data = path.read_bytes()
    lost = len(data) // 2 if cut == "half" else cut
    path.write_bytes(data[: len(data) - lost])
    refusal(single, path, f"truncated: {lost:,} bytes are missing", f"has {len(data) - lost:,}")


def test_file_with_something_at_its_end(single):
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refusal(single, "model.safetensors", "bytes left over at the end")


def raw_safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "truncated: 8 of its first 8 bytes"),
        (b"12345", "truncated: 3 of its first 8 bytes"),
        (raw_safetensors(b"{}", length=0), "not a safetensors file"),
        (raw_safetensors(b"{}", length=10**12), "not a safetensors file"),
        (raw_safetensors(b"{}", length=500), "498 bytes of its header are missing"),
        (raw_safetensors(b"hello"), "not a JSON object"),
        (raw_safetensors(b"[1, 2]"), "it holds a list"),
        (raw_safetensors(b"[" * 200_000), "not a JSON object"),
        (raw_safetensors(b'{"a": 1, "a": 2}'), "given twice: a"),
        (raw_safetensors({"a": 1}), "does not describe a valid file"),
        (raw_safetensors({"a": {"shape": [1]}}), "unknown or missing 'data_offsets'"),
        (raw_safetensors({"a": ENTRY | {"dtype": "F33"}}, bytes(8)), "unknown or missing 'F33'"),
        (raw_safetensors({"a": ENTRY | {"shape": [3]}}, bytes(8)), "a: 8 bytes for [3] of F32"),
        (raw_safetensors({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "whole numbers"),
        (raw_safetensors({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)), "whole numbers"),
        (raw_safetensors({"a": ENTRY, "b": ENTRY}, bytes(8)), "b: starts at byte 0, and the one before it ends at 8"),
        (raw_safetensors({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "a: starts at byte 4"),
        (raw_safetensors({"a\x1b[2J": ENTRY | {"shape": [3]}}, bytes(8)), "a: 8 bytes"),
    ],
)
def test_damaged_header(single, content, text):
    (single / "model.safetensors").write_bytes(content)
    message = refusal(single, single / "model.safetensors", text)
    assert "\x1b" not in message and len(message.splitlines()) == 3


def test_header_reader_agrees_with_the_library(saved):
    path = saved / "single" / "model.safetensors"
    header, raw = safetensors_header(path)
    tensors = load_file(path)
    assert {name: entry["shape"] for name, entry in header.items()} == {k: list(v.shape) for k, v in tensors.items()}
    assert path.read_bytes().startswith(raw)


def test_missing_shard(sharded):
    gone = shards(sharded)[1]
    gone.unlink()
    refusal(sharded, gone, "the file is missing", "finish the copy or download")


def test_stale_index(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"old.weight": shards(sharded)[0].name}))
    refusal(sharded, shards(sharded)[0], "disagree on 1 tensors", "in the index only: old.weight", "get all of them")


def test_shard_with_a_tensor_of_another_shard(sharded):
    first, second = shards(sharded)[:2]
    tensors = load_file(second)
    extra = next(iter(load_file(first)))
    save_file({**tensors, extra: torch.zeros(1)}, second, metadata={"format": "pt"})
    refusal(sharded, second, "in the file only", extra)


def test_one_file_and_an_index_of_others(sharded, single):
    shutil.copy(single / "model.safetensors", sharded)
    refusal(sharded, "two checkpoints in one folder")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": "b"}}'])
def test_not_an_index(sharded, content):
    (sharded / INDEX).write_text(content)
    refusal(sharded, INDEX, "not a checkpoint index")


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json"])
def test_huge_json(sharded, name):
    with (sharded / name).open("wb") as file:
        file.truncate(100_000_001)  # sparse: takes no space
    refusal(sharded, sharded / name, "100,000,001 bytes", "100,000,000")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 100_000])
def test_config_that_is_no_object(single, content):
    (single / "config.json").write_bytes(content)
    refusal(single, single / "config.json", "not a JSON object")


def test_no_weights(single):
    (single / "model.safetensors").rename(single / "consolidated.safetensors")
    refusal(single, "no weights", "there is consolidated.safetensors")


def test_a_pipe_is_not_read(single):
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    refusal(single, "model.safetensors", "not a regular file")


def test_weights_that_are_not_there_are_not_made_up(single):
    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    refusal(single, "lacks 1 of the model's weights", "model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM")


@pytest.mark.parametrize("names", [["NoSuchModel"], ["Trainer"], ["AutoTokenizer"], "LlamaModel", [None]])
def test_class_that_transformers_does_not_have(single, names):
    edit_json(single / "config.json", lambda config: config.update(architectures=names))
    refusal(single, "config.json", "has no such model", f"architectures = {names}")


def test_unknown_model_type(single):
    edit_json(single / "config.json", lambda config: config.update(model_type="nonesuch", architectures=None))
    refusal(single, "cannot load it", "nonesuch", "model_type")


def test_shapes_that_do_not_fit_the_config(single):
    edit_json(single / "config.json", lambda config: config.update(intermediate_size=48))
    refusal(single, "cannot load it")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_of_another_dtype(single, dtype, name):
    tensors = {key: value.to(dtype) for key, value in load_file(single / "model.safetensors").items()}
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    refusal(single, f"stored as {name}", "convert")


def test_weights_that_are_not_finite(single):
    tensors = load_file(single / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, :3] = float("nan")
    tensors["lm_head.weight"][1, 1] = float("-inf")
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    text = refusal(single, "2 tensors hold values that are not finite")
    assert "lm_head.weight (0 NaN, 1 Inf of 512), model.layers.0.mlp.up_proj.weight (3 NaN, 0 Inf of 512)" in text


def test_overflow_of_a_conversion_is_seen(single):
    tensors = load_file(single / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    load_source(str(single))
    refusal(single, "lm_head.weight", "use bfloat16", dtype="float16")


def test_finite_check_knows_masks_and_meta():
    mask = torch.tensor([0.0, float("-inf")])
    check_finite([("mask", mask)], inf_allowed=True)
    passing = {"codes": torch.ones(2, dtype=torch.int8), "meta": torch.empty(2, device="meta"), "empty": mask[:0]}
    check_finite(passing.items())
    with pytest.raises(InputRefused, match=r"mask \(0 NaN, 1 Inf of 2\)"):
        check_finite([("mask", mask)])
    with pytest.raises(InputRefused, match=r"1 NaN, 0 Inf"):
        check_finite([("mask", torch.tensor([float("nan"), float("inf")]))], inf_allowed=True)
    with pytest.raises(InputRefused, match=r"and 4 more"):
        check_finite([(f"w{i}", mask) for i in range(12)])


# ---- the errors themselves


def test_error_text():
    full = InputRefused("bad\x1b[31m red\x1b[0m\r\n thing", where="a\x07b", why="w\x9b2J", hint="h\u202e")
    assert str(full) == "error[FXC-E3]: a b: bad red thing\nwhy: w\ntry: h"
    assert str(UsageError("only this")) == "error[FXC-E2]: only this"
    assert str(FxcError("x\x1b]0;title\x07y", hint="z")) == "error[FXC-E1]: xy\ntry: z"
    again = pickle.loads(pickle.dumps(full))
    assert (type(again), str(again)) == (InputRefused, str(full))
