"""Models that are read piece by piece: the bytes of an ordinary compilation, in less memory, and again after a kill."""

import pytest
import torch
import transformers
from families import _DECODER
from shards import files, in_shards

import fxc
from fxc import mapped, streaming
from fxc.artifact import store
from fxc.artifact.spill import Spill
from fxc.captured import capture_source
from fxc.errors import InputRefused, ResourceError, UsageError, VerificationFailed
from fxc.ir import store as constants
from fxc.options import Options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return in_shards(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("passes", ["int8", "int4:group=32:embeddings=int4", "sparse24", "prune:heads=0.5:ffn=0.25,int8"])
def test_it_makes_the_program_of_an_ordinary_compilation(passes, folder, tmp_path):
    whole = fxc.optimize(folder, passes=passes)
    made = fxc.optimize(folder, passes=passes, stream=True)
    assert str(made.program) == str(whole.program) and made.program.metadata == whole.program.metadata
    made.save(tmp_path / "out")
    read = store.read(tmp_path / "out").program
    assert read.constants.keys() == whole.program.constants.keys()
    assert all(torch.equal(read.constants[name], tensor) for name, tensor in whole.program.constants.items())
    gates = {name: said for step in made.report["passes"] for name, said in step["gates"].items()}
    assert "first layers" in gates["meaning"] or "layer by layer" in gates["meaning"]


def test_parts_become_the_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "PART_BYTES", 20_000)
    made = fxc.optimize(folder, passes="int8", stream=True, resume=tmp_path / "saved")
    parts = [path.stat().st_ino for path in made.program.constants.spill.parts]
    made.save(tmp_path / "out")
    assert len(parts) > 3 and set(parts) < {path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}


def test_a_constant_that_was_replaced_is_in_no_shard_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "PART_BYTES", 1)
    made = fxc.optimize(folder, passes="prune:ffn=0.25,int8", stream=True)
    made.save(tmp_path / "out")
    read = fxc.load(tmp_path / "out").program
    assert all(torch.equal(read.constants[name], tensor) for name, tensor in made.program.constants.items())


@pytest.mark.fault(27)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(count, folder, tmp_path, monkeypatch):
    """Whatever is packed before the kill is not packed again."""
    monkeypatch.setattr(constants, "PART_BYTES", 20_000)
    options = {"passes": "int4:group=32", "stream": True}
    fxc.optimize(folder, **options, resume=tmp_path / "whole").save(tmp_path / "undisturbed")
    write, left, packed = Spill.write, [count], []

    def killed(self, tensors):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(self, tensors)

    monkeypatch.setattr(Spill, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        fxc.optimize(folder, **options, resume=tmp_path / "saved")
    monkeypatch.setattr(Spill, "write", lambda self, tensors: packed.extend(tensors) or write(self, tensors))
    again = fxc.optimize(folder, **options, resume=tmp_path / "saved")
    again.save(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert len([name for name in packed if name.endswith("qweight")]) == 29 - 7 * (count > 0) * count


def test_another_recipe_begins_anew(folder, tmp_path):
    captured = capture_source(folder, options=Options("int8", stream=True))
    keys = [streaming.key_of(captured, Options(**given)) for given in (
        {"passes": "int8"}, {"passes": "int4"}, {"passes": "int8", "skip": "*.0.*"}, {"passes": "int8", "seed": 1},
    )]  # fmt: skip
    assert len({str(key) for key in keys}) == len(keys)
    shard = next(folder.glob("*.safetensors"))
    before = streaming.key_of(captured, Options("int8"))
    shard.touch()
    assert streaming.key_of(captured, Options("int8")) != before


def test_a_layer_beyond_its_budget_is_named_and_nothing_stays(folder, tmp_path):
    with pytest.raises(VerificationFailed, match=r"alone it differs by .* 1e-09") as failed:
        fxc.optimize(folder, passes="int4:group=32", stream=True, layer_budget=1e-9)
    assert failed.value.where == "model.layers.0.self_attn.q_proj"


def test_a_weight_that_is_no_number_is_refused_when_it_is_read(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[1, 2] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(InputRefused, match="NaN") as refused:
        fxc.optimize(tmp_path / "nan", passes="int4:group=32", stream=True)
    assert "layers.3.mlp.up_proj" in refused.value.where


def test_the_plan_says_what_it_takes(folder):
    options = Options("int4:group=32", stream=True)
    captured = capture_source(folder, options=options)
    plan = streaming.plan_of(captured, options)
    made = fxc.optimize(folder, passes="int4:group=32")
    assert plan.is_streamed and plan.weights == captured.program.nbytes() and plan.result == made.program.nbytes()
    assert plan.seconds > 0 and "piece by piece" in str(plan)
    assert streaming.plan_of(captured, Options("int8", stream=True)).memory > plan.memory
    with pytest.raises(ResourceError, match="compiling takes about"):
        streaming.plan_of(captured, Options("int4:group=32", stream=True, max_memory=500_000_000)).check()


def test_of_passes_that_need_values_the_plan_knows_no_result(folder):
    options = Options("prune:ffn=0.25", stream=True)
    captured = capture_source(folder, options=options)
    plan = streaming.plan_of(captured, options)
    # The first layers are pruned in memory before.
    besides = streaming.PROCESS + mapped.in_memory(captured.program.constants.values())
    assert plan.memory == besides + 3 * captured.program.nbytes() + 2 * captured.small.nbytes()
    assert plan.result is None and plan.seconds is None and "depends on the weights" in str(plan)


def test_a_pass_that_the_largest_weight_does_not_go_with_has_no_time(folder):
    options = Options("int4:group=128", stream=True, allow_noop=True)
    plan = streaming.plan_of(capture_source(folder, options=options), options)
    assert plan.seconds is None and plan.result > 0


def test_what_cannot_be_read_piece_by_piece_says_so(folder):
    with pytest.raises(UsageError, match="folder of safetensors"):
        fxc.optimize("nowhere:model", stream=True)
    with pytest.raises(UsageError, match="keeps its dtype"):
        fxc.optimize(folder, stream=True, dtype="float32")
    with pytest.raises(UsageError, match="too few"):
        fxc.optimize(folder, max_memory=1000)


def test_memory_decides_where_nobody_does(folder, monkeypatch):
    from fxc import captured, memory

    assert not captured.is_streamed(str(folder), Options())
    monkeypatch.setattr(memory, "available", lambda: 1 << 29)
    assert captured.is_streamed(str(folder), Options())
    assert not captured.is_streamed(str(folder), Options(stream=False))
    assert captured.is_streamed(str(folder), Options(max_memory=10**9))
    assert not captured.is_streamed(str(folder), Options(max_memory=10**12))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture whose experts are tensors of their own in the files, which transformers stacks."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("mixture") / "model"
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(made)
    return made


def test_experts_that_are_stacked_while_they_are_loaded_are_in_the_plan(mixture, tmp_path):
    options = Options("int8", stream=True)
    captured = capture_source(mixture, options=options)
    stacked = [each for name, each in captured.program.constants.items() if ".experts." in name]
    assert stacked and mapped.in_memory(stacked) == sum(each.nbytes for each in stacked)
    assert mapped.in_memory(captured.program.constants.values()) < 1.1 * mapped.in_memory(stacked)
    made, whole = fxc.optimize(mixture, passes="int8", stream=True), fxc.optimize(mixture, passes="int8")
    made.save(tmp_path / "out")
    read = store.read(tmp_path / "out").program
    assert all(torch.equal(read.constants[name], tensor) for name, tensor in whole.program.constants.items())


def test_experts_that_are_stacked_and_have_no_room_are_refused_before_they_are_loaded(mixture, monkeypatch):
    loaded = lambda *args, **kwargs: pytest.fail("it was loaded")  # noqa: E731
    monkeypatch.setattr(transformers.MixtralForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ResourceError, match="cannot be read piece by piece") as refused:
        fxc.optimize(mixture, passes="int8", stream=True, max_memory=1 << 30)
    assert "experts.gate_up_proj" in refused.value.why
