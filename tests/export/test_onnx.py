"""ONNX files: ONNX Runtime runs them at any size and computes what fxc does, with its own levels and scales."""

import importlib.util

import families
import numpy as np
import pytest
import torch
from command import fxc as command
from command import fxc_json

import fxc
from examples import digits
from fxc.errors import UsageError, VerificationFailed
from fxc.export import onnx as onnx_export
from fxc.export import onnx_products
from fxc.export.folder import MARK
from fxc.export.packed import packed_weights
from fxc.ir.cache import empty_cache
from fxc.ir.observe import run
from fxc.schemes.int4 import unpack
from fxc.verify.compare import relative_error

onnx = pytest.importorskip("onnx", reason="not installed: pip install 'fxc[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="not installed: pip install 'fxc[onnx]'")
pytest.importorskip("onnxscript", reason="not installed: pip install 'fxc[onnx]'")


def compiled(name: str, passes: str, **options) -> fxc.CompiledModel:
    return fxc.optimize(*families.build(name), passes=passes, verify=False, **options)


def session(folder):
    path = folder / "model.onnx"
    return onnx_export._session(path, "MatMulInteger" in onnx_export._operators(path))


def run_onnx(ready, inputs):
    """Outputs for flat inputs, in the order of the program."""
    names = [each.name for each in ready.get_inputs()]
    return [torch.from_numpy(t) for t in ready.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})]


def greedy(step, program, ids, count):
    """`count` tokens after `ids`, one call for the prompt and one for each token, by the cache that each call returns."""
    past, mask, made = [t.float() for t in empty_cache(program, len(ids))], torch.ones_like(ids), []
    new = ids
    for _ in range(count):
        positions = torch.arange(mask.shape[1] - new.shape[1], mask.shape[1]).expand(len(ids), -1)
        logits, *past = step([new, mask, positions.contiguous(), *past])
        new = logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        made.append(new)
    return torch.cat(made, dim=1)


@pytest.fixture(scope="module")
def pylm(pylm_dir, tmp_path_factory):
    """The example in int8, and its export."""
    model = fxc.optimize(pylm_dir, passes="int8", verify=False, dtype="float32")
    folder = tmp_path_factory.mktemp("pylm") / "out"
    return model, model.export_onnx(folder), session(folder)


def initializers(folder):
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(folder / "model.onnx").graph.initializer}


def attributes(folder, kind):
    nodes = [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == kind]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes], nodes


def test_a_decoder_generates_through_its_cache(pylm):
    model, made, ready = pylm
    assert made.operators["MatMulInteger"] == 35 and made.error < 0.02
    inputs, outputs = ([each.name for each in some] for some in (ready.get_inputs(), ready.get_outputs()))
    assert inputs[:5] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"
    ]  # fmt: skip
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    ids = torch.randint(3, 4000, (2, 9), generator=torch.Generator().manual_seed(1))
    found = greedy(lambda tensors: run_onnx(ready, tensors), model.program, ids, 10)
    assert torch.equal(found, greedy(lambda tensors: run(model.program, tensors), model.program, ids, 10))


def test_sizes_have_names_and_files_lie_beside(pylm):
    _, made, ready = pylm
    shapes = {each.name: each.shape for each in ready.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.4.value"] == ["batch", 4, "past", 32]
    assert {"config.json", "model.onnx", "tokenizer.json"} <= {path.name for path in made.folder.iterdir()}


def test_levels_and_scales_of_int8_are_those_of_the_program(pylm):
    model, made, _ = pylm
    stored = list(initializers(made.folder).values())
    for each in packed_weights(model.program).values():
        numbers, scale = (each.parts[part].numpy() for part in ("qweight", "scale"))
        assert any(t.dtype == np.int8 and np.array_equal(t, numbers.T) for t in stored), each.layer
        assert any(t.dtype == np.float32 and np.array_equal(t, scale) for t in stored), each.layer


@pytest.mark.parametrize("passes", ["int4:group=32:embeddings=int4", "int4:group=32:bits=3:symmetric=false"])
def test_levels_in_groups_are_those_of_the_program(tmp_path, passes):
    model = compiled("qwen2", passes)
    made = model.export_onnx(tmp_path / "out")
    said, nodes = attributes(tmp_path / "out", "MatMulNBits")
    assert all((each["accuracy_level"], each["bits"], each["block_size"]) == (4, 4, 32) for each in said)
    stored = initializers(tmp_path / "out")
    packed = list(packed_weights(model.program).values())
    assert len(nodes) == sum("linear" in str(node.target) for each in packed for node in each.readers) >= 14
    bits = 3 if "bits=3" in passes else 4
    shift = 8 - (1 << bits - 1)
    levels = [unpack(each.parts["qweight"], bits).numpy() + shift for each in packed]
    for node in nodes:
        blocks = stored[node.input[1]]
        found = np.stack([blocks & 15, blocks >> 4], -1).reshape(len(blocks), -1)
        assert any(found.shape == each.shape and np.array_equal(found, each) for each in levels)
        assert (len(node.input) == 4) == ("symmetric=false" in passes)
    # A table that the tied head reads too is there once.
    assert made.error < 0.1 and sum(t.nbytes for t in stored.values()) < 1.3 * model.program.nbytes()


def test_an_encoder_takes_any_batch_and_length_and_its_weights_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_BESIDE", 0)  # as of a model that one file of protobuf does not hold
    model = compiled("bert", "int8:mode=weight_only")
    model.export_onnx(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.onnx", "model.onnx.data", MARK}
    ready = session(tmp_path / "out")
    assert ready.get_inputs()[0].shape == ["batch", "sequence"]
    said, _ = attributes(tmp_path / "out", "MatMulNBits")
    assert said and all((each["bits"], each["accuracy_level"]) == (8, 4) for each in said)
    for batch, length in ((1, 5), (4, 33)):
        inputs = [torch.randint(3, 300, (batch, length)), torch.ones(batch, length, dtype=torch.long)]
        inputs += [torch.zeros(batch, length, dtype=torch.long)] * (len(ready.get_inputs()) - 2)
        assert relative_error(run_onnx(ready, inputs), run(model.program, inputs)) < 0.05


@pytest.mark.parametrize("passes", ["canonicalize", "int8:mode=static"])
def test_convolutions(tmp_path, passes):
    model = fxc.optimize(*digits.resnet(), passes=passes, calib=digits.calibration(), verify=False)
    made = model.export_onnx(tmp_path / "out")
    *_, held_out, _ = digits.images()
    ready = session(tmp_path / "out")
    found, expected = run_onnx(ready, [held_out])[0], run(model.program, [held_out])[0]
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.995 and made.operators["Conv"] == 10
    if passes == "canonicalize":
        assert relative_error([found], [expected]) < 1e-5
    else:
        assert made.operators["QuantizeLinear"] >= 9 and any(t.dtype == np.int8 for t in initializers(made.folder).values())


REFUSED = {
    ("mixtral", "int8:only=re:experts"): r"experts\S*: ONNX cannot hold it as int8\n.*sorted by expert.*\n.*--skip",
    ("mixtral", "canonicalize"): r"no operator for fxc\.grouped.*\n.*experts of a mixture",
    ("qwen2", "fp8"): r"q_proj: ONNX cannot hold it as fp8\n.*\n.*int8 or int4",
    ("qwen2", "sparse24,int8"): r"q_proj: .*\n.*no 2:4 sparsity",
}


@pytest.mark.parametrize(("name", "passes"), REFUSED)
def test_what_onnx_has_not_is_refused(tmp_path, name, passes):
    model = compiled(name, passes)
    with pytest.raises(UsageError, match=REFUSED[name, passes]):
        model.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_wrong_numbers_do_not_get_out(tmp_path, monkeypatch):
    model = compiled("bert", "int4:group=32")
    blocks = onnx_products._int4_blocks

    def of_other_rows(*args, **parts):
        made = blocks(*args, **parts)
        return made | {"scales": made["scales"].flip(0)}

    monkeypatch.setattr(onnx_products, "_int4_blocks", of_other_rows)
    with pytest.raises(VerificationFailed, match="gives other outputs"):
        model.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_command_replaces_only_its_like(tmp_path):
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    compiled("mlp", "int8").save(artifact)
    done = fxc_json("export", artifact, "-o", out, "--format", "onnx")
    assert done["format"] == "onnx" and {path.name for path in out.iterdir()} == {"model.onnx", MARK}
    assert "exists" in command("export", artifact, "-o", out, "--format", "onnx", code=2).stderr
    (out / "mine.txt").write_text("mine")
    assert "mine.txt" in command("export", artifact, "-o", out, "--format", "onnx", "--overwrite", code=2).stderr


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    model = compiled("mlp", "canonicalize")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else found(name, *more)
    )
    with pytest.raises(UsageError, match=r"onnxscript not installed\n(.|\n)*fxc\[onnx\]"):
        model.export_onnx(tmp_path / "out")
    assert not any(tmp_path.iterdir())
