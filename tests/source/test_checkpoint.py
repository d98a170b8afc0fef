"""Checkpoints that are damaged or do not fit their config: each is refused with what, where, why and what next."""

import json
import os
import shutil
import struct

import pytest
import torch
from checkpoints import INDEX, edit_json, refusal, shards
from safetensors.torch import load_file, save_file

from fxc.safety import safetensors_header
from fxc.source.load import load_source


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
def test_missing_shard(sharded):
    gone = shards(sharded)[1]
    gone.unlink()
    refusal(sharded, gone, "the file is missing", "finish the copy or download")


@pytest.mark.fault(22)
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


@pytest.mark.fault(33)
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


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_of_another_dtype(single, dtype, name):
    tensors = {key: value.to(dtype) for key, value in load_file(single / "model.safetensors").items()}
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    refusal(single, f"stored as {name}", "convert")


@pytest.mark.fault(8)
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
