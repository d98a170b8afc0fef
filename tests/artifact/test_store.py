"""Artifacts: what is saved is what is read, and equal inputs give equal bytes."""

import json

import families
import pytest
import torch
from artifacts import INDEX, NET, SHARD, bytes_of, constants, net, refusal
from safetensors.torch import load_file

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import store
from fxc.errors import InputRefused, ResourceError, UsageError, VerificationFailed
from fxc.frontend.capture import capture
from fxc.ir import Program, parse_program, print_program


@pytest.mark.parametrize("family", ["mlp", "cnn", "vit", "gemma"])
def test_a_model_comes_back_as_it_was(family, tmp_path):
    model, example = families.build(family)
    program = capture(model, example, check=False)
    store.save(program, tmp_path / "a", manifest={})
    again = store.read(tmp_path / "a").program
    assert print_program(again) == print_program(program)
    assert again.constants.keys() == program.constants.keys()
    assert (again.signature, again.aliases, again.metadata) == (program.signature, program.aliases, program.metadata)
    inputs = [example_of(node.meta["val"]) for node in program.placeholders]
    for found, expected in zip(again.module()(*inputs), program.module()(*inputs), strict=True):
        assert torch.equal(found, expected)
    store.save(again, tmp_path / "b", manifest={})
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")


def example_of(fake: torch.Tensor) -> torch.Tensor:
    shape = [s if isinstance(s, int) else s.node.hint for s in fake.shape]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(fake.dtype)
    return torch.ones(shape, dtype=fake.dtype)


@pytest.mark.fault(30)
def test_equal_inputs_give_equal_bytes(tmp_path, saved):
    again = tmp_path / "again"
    shuffled = Program(**{**vars(net()), "constants": dict(reversed(constants().items()))})
    report, extra = {"report": {"passes": ["int8"]}}, {"config.json": b'{"a": 1}\n'}
    store.save(shuffled, again, manifest=report, extra_files=extra)
    assert bytes_of(again) == bytes_of(saved)
    assert sorted(bytes_of(saved)) == ["config.json", "fxc.json", SHARD, INDEX, "program.fxc"]
    assert not (tmp_path / "out.lock").exists()


def test_constants_are_sharded_and_mapped(tmp_path):
    program = net()
    store.save(program, tmp_path / "out", manifest={}, max_shard_bytes=100)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert list(load_file(tmp_path / "out" / names[0])) == ["down.weight"]
    assert sorted(k for k, v in weight_map.items() if v == names[1]) == ["mask", "up.qweight", "up.scale"]
    again = store.read(tmp_path / "out").program
    for fqn, tensor in program.constants.items():
        assert torch.equal(again.constants[fqn], tensor)
    before = bytes_of(tmp_path / "out")
    again.constants["down.weight"].zero_()
    assert bytes_of(tmp_path / "out") == before, "writing to a constant must not write to the file"


@pytest.mark.fault(2, 11)
def test_constants_that_are_views_of_one_tensor_or_not_contiguous(tmp_path):
    whole = torch.randn(6, 8)
    given = {**constants(), "down.weight": whole[:, :4].t(), "mask": whole[0, 4:]}
    store.save(parse_program(NET, given), tmp_path / "out", manifest={})
    again = store.read(tmp_path / "out").program.constants
    assert torch.equal(again["down.weight"], given["down.weight"]) and torch.equal(again["mask"], given["mask"])


def test_a_program_without_constants(tmp_path):
    program = capture(torch.nn.ReLU(), (torch.randn(2, 3),))
    store.save(program, tmp_path / "out", manifest={})
    assert sorted(bytes_of(tmp_path / "out")) == ["fxc.json", "program.fxc"]
    assert store.read(tmp_path / "out").program.constants == {}


def test_extra_files_are_copied_into_folders_too(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    extra = {"tokenizer.json": tmp_path / "tokenizer.json", "additional_chat_templates/a.jinja": b"hello"}
    store.save(net(), tmp_path / "out", manifest={}, extra_files=extra)
    assert (tmp_path / "out/additional_chat_templates/a.jinja").read_bytes() == b"hello"
    assert store.read(tmp_path / "out").manifest["files"].keys() >= extra.keys()
    (tmp_path / "out/additional_chat_templates/a.jinja").write_bytes(b"hullo")
    refusal(tmp_path / "out", "a.jinja", "does not match its hash")


def test_a_scale_is_known_by_its_operator_not_by_its_name(tmp_path):
    text = NET.replace("up.scale", "up.other")
    given = {("up.other" if k == "up.scale" else k): v for k, v in constants().items()}
    store.save(parse_program(text, given), tmp_path / "a", manifest={})
    with pytest.raises(VerificationFailed, match=r"up\.other"):
        store.save(parse_program(text, {**given, "up.other": -given["up.other"]}), tmp_path / "b", manifest={})
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    for wrong in ({"x": torch.float32}, {"x": float("nan")}, {"sha256": "x"}, {"files": {}}):
        with pytest.raises(UsageError, match="manifest"):
            store.save(net(), out, manifest=wrong)
    for name in ("fxc.json", "program.fxc", "x.safetensors", INDEX, "a/./b", "a//b"):
        with pytest.raises(UsageError):
            store.save(net(), out, manifest={}, extra_files={name: b""})
    for name in ("../x", "/x", ""):
        with pytest.raises(InputRefused):
            store.save(net(), out, manifest={}, extra_files={name: b""})
    with pytest.raises(ResourceError, match="No such file"):
        store.save(net(), out, manifest={}, extra_files={"x": tmp_path / "nothing"})
    with pytest.raises(UsageError, match="no values"):
        store.save(parse_program(NET), out, manifest={})
    given = constants()
    given["up.scale"][0] = torch.nan
    with pytest.raises(VerificationFailed, match=r"up\.scale"):
        store.save(parse_program(NET, given), out, manifest={})
    orphan = net()
    orphan.constants["orphan"] = torch.zeros(1)
    with pytest.raises(VerificationFailed, match="orphan"):
        store.save(orphan, out, manifest={})
    assert not list(tmp_path.iterdir())
