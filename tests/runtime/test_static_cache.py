"""Decoding over buffers of a fixed size gives what the growing cache gives, and reads nothing but its own tensors."""

from __future__ import annotations

import copy
import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from decoders import DECODERS, compiled
from families import Mlp, _causal, build
from torch.utils._python_dispatch import TorchDispatchMode

import fxc
from fxc.compiled.model import compiled_model
from fxc.errors import ResourceError, UsageError
from fxc.lower.inductor import CompiledGraph
from fxc.lower.runnable import runnable
from fxc.runtime import static_cache
from fxc.runtime.decode_graph import decode_program
from fxc.runtime.static_cache import SlotCache, static_decoder


def arguments(length: int, new: int, **options):
    ids = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new, **options}


def generate(model, static: bool, given, record=None, capacity: int = 8):
    """(tokens, logits of each step) of `model`, over the static cache or not."""
    model.use_growing_cache()
    if static:
        model.static_cache = True
        model._decoder = static_decoder(model.lowered, model.device, model.backend, capacity, record)
    torch.manual_seed(0)
    found = model.generate(**given, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


OPTIONS = ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False})


# What makes masks, positions and buffers in ways of its own. Sampling calls a model as greedy search does, in every family.
WAYS = ("qwen2", "gemma2", "gpt2", "mixtral", "bloom", "llama4", "gpt_oss")


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name, options, id=f"{name}-{how}",
            marks=[pytest.mark.slow] * (name != "qwen2" and (how != "greedy" or name not in WAYS)),
        )
        for name in (*DECODERS, "bloom", "opt", "gptj", "llama4", "gpt_oss")
        for how, options in zip(("greedy", "sampling", "beams"), OPTIONS)
        if name == "qwen2" or how == "greedy" or (how == "beams" and name in WAYS)
    ],
)  # fmt: skip
def test_gives_what_the_growing_cache_gives(name, options):
    """A padded prompt longer than the first buffers and than the sliding windows, and two moves to larger buffers."""
    model, given = compiled(name), arguments(11, 24, **options)
    expected, logits = generate(model, False, given)
    found, static_logits = generate(model, True, given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(static_logits, logits, rtol=1e-4, atol=2e-5 * logits.abs().max().item())
    assert {step.size[1] for step in model._decoder.steps} == {32, 64}, "of buffers that are free one is kept"


QUICK = [("int8", "cpu"), ("int4:group=32", "cuda"), ("prune:heads=0.5", "cuda"), ("prune:drop=model.layers.1", "cpu")]


@pytest.mark.parametrize(
    ("passes", "device"),
    [
        pytest.param(passes, device, marks=[pytest.mark.slow] * ((passes, device) not in QUICK))
        for passes in ("int8", "int4:group=32", "prune:heads=0.5", "prune:drop=model.layers.1")
        for device in ("cpu", "cuda")
    ],
)
def test_of_compressed_models(passes, device):
    """As they are lowered for the CPU, and for CUDA with the kernels' definitions on the CPU."""
    torch.manual_seed(4)
    model = fxc.optimize(_causal("Qwen2Config", num_hidden_layers=4).eval(), passes=passes, verify=False)
    if device == "cuda":
        pytest.importorskip("triton")
        from fxc.lower.cuda import lower_cuda

        model._lowered_program, _ = lower_cuda(model.program, "cpu", capability=90)
        object.__setattr__(model, "_lowered", runnable(model._lowered_program, "cpu", "eager"))
    given = arguments(5, 12)
    expected = generate(model, False, given)[1]
    torch.testing.assert_close(generate(model, True, given)[1], expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_with_inductor_longer_buffers_compile_nothing_anew():
    model = fxc.optimize(build("qwen2")[0], passes="", verify=False, backend="inductor")
    given = arguments(11, 14)
    expected = generate(fxc.optimize(build("qwen2")[0], passes="", verify=False), False, given)
    found = generate(model, True, given)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    module = model._decoder.module
    assert isinstance(module, CompiledGraph) and sum(map(len, module._known.values())) == 1
    assert len(model._decoder.steps) == 2


class Tape(TorchDispatchMode):
    """A recording as CUDA makes it: which operators ran on which memory. Replayed, each writes to where it wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for a number"
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view, nor written in place
                    old.copy_(new)


def _tensors(value) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


class Tapes:
    """Stands for `CudaGraphs` where there is no GPU, and counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        with Tape() as tape:
            result = function()

        def replay():
            self.replayed += 1
            tape.replay()
            return result

        return replay


@pytest.fixture
def taped(monkeypatch):
    """Models that are lowered to what torch dispatches, for a tape sees no kernel in C++."""
    monkeypatch.setenv("FXC_CPU_LEVEL", "none")

    def model(name):
        made = compiled(name)
        return compiled_model(made.program, made.record, config=made.config, files=made.files)

    return model


@pytest.mark.parametrize(
    "name", ["qwen2", "gemma2", "bloom", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "gpt2", "mixtral"))]
)
def test_a_recorded_step_serves_every_token(name, taped):
    """A number or a tensor of the first call that stuck in the recording would give other logits in the later ones."""
    model, tapes = taped(name), Tapes()
    for given, recorded in ((arguments(11, 24), 3), (arguments(5, 20, num_beams=3, do_sample=False), 6)):
        expected = generate(model, False, given)
        found = generate(model, True, given, tapes)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5 * expected[1].abs().max().item())
        assert tapes.recorded == recorded, "once for each size of buffers"
    assert tapes.replayed == 23 + 19


def test_the_tape_sees_what_a_recording_would_miss(taped):
    model = taped("qwen2")
    given = arguments(5, 8)
    expected = generate(model, False, given)[1]
    original = SlotCache.decode

    def rebinds(self, ids, mask, positions):
        """The fault: new tensors in place of the step's own."""
        self.step.tensors = (ids.clone(), *self.step.tensors[1:])
        return original(self, ids, mask, positions)

    SlotCache.decode = rebinds
    try:
        found = generate(model, True, given, Tapes())[1]
    finally:
        SlotCache.decode = original
    assert not torch.allclose(found, expected, rtol=1e-2)


def test_tensors_of_a_step_are_never_replaced(taped):
    model, seen = taped("qwen2"), {}

    class Watched(Tapes):
        def __call__(self, function):
            replay = super().__call__(function)

            def checked():
                for step in model._decoder.steps:
                    addresses = [t.data_ptr() for t in step.tensors]
                    assert seen.setdefault(id(step), addresses) == addresses
                return replay()

            return checked

    for options in OPTIONS:
        generate(model, True, arguments(11, 24, **options), Watched())
    assert len(seen) >= 3


def test_steps_are_used_again_and_a_cache_that_lives_keeps_its_own():
    model = compiled("qwen2")
    given = arguments(5, 6, do_sample=False)
    expected = generate(model, False, given)[0]
    assert torch.equal(generate(model, True, given, capacity=16)[0], expected)
    gc.collect()
    decoder = model._decoder
    (step,) = decoder.steps
    for buffer in step.buffers:
        buffer.fill_(float("nan"))  # what an overflow leaves behind
    first = model.generate(**given, return_dict_in_generate=True, pad_token_id=0)
    assert torch.equal(first.sequences, expected) and decoder.steps == [step]
    # The first call's cache lives on, so that another call needs tensors of its own.
    assert torch.equal(model.generate(**given, pad_token_id=0), expected) and len(decoder.steps) == 2
    longer = torch.cat([given["attention_mask"], torch.ones(2, 7, dtype=torch.int64)], dim=1)
    more = model.generate(first.sequences, attention_mask=longer[:, :11], past_key_values=first.past_key_values,
                          max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)  # fmt: skip
    model.use_growing_cache()
    whole = model.generate(first.sequences, attention_mask=longer[:, :11], max_new_tokens=3, min_new_tokens=3, do_sample=False,
                           pad_token_id=0)  # fmt: skip
    assert torch.equal(more, whole)


def test_a_copied_cache_goes_its_own_way():
    model = compiled("qwen2").use_static_cache()
    ids = torch.full((2, 3), 7)
    one = SlotCache(model._decoder)
    model(ids, past_key_values=one)
    other = copy.deepcopy(one)
    model(ids[:, :1] + 1, past_key_values=one)
    assert (one.get_seq_length(), other.get_seq_length()) == (4, 3) and other.decoder is one.decoder
    found = model(ids[:, :1] + 2, past_key_values=other).logits
    model.use_growing_cache()
    torch.testing.assert_close(found[:, -1], model(torch.cat([ids, ids[:, :1] + 2], dim=1)).logits[:, -1])


def test_a_copied_model_decodes_too():
    model = compiled("qwen2").use_static_cache(8)
    given = arguments(5, 12, do_sample=False, pad_token_id=0)
    expected = model.generate(**given)
    assert torch.equal(copy.deepcopy(model).generate(**given), expected)
    model.use_growing_cache()


def test_several_threads_may_generate_at_once(taped):
    model = taped("qwen2")
    given = [arguments(length, 12, do_sample=False, pad_token_id=0) for length in (5, 9, 5, 9)]
    model.use_growing_cache()
    expected = [model.generate(**each) for each in given]
    model.static_cache, model._decoder = True, static_decoder(model.lowered, model.device, capacity=16, record=Tapes())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: model.generate(**each), given))
    assert all(map(torch.equal, found, expected))
    model.use_growing_cache()


@pytest.mark.slow
def test_idle_steps_are_few(taped):
    model = taped("llama")
    model.use_static_cache(capacity=4)
    for batch in range(1, static_cache.IDLE_STEPS + 3):
        model.generate(torch.full((batch, 3), 7), max_new_tokens=2, do_sample=False, pad_token_id=0)
        gc.collect()
    assert [step.size for step in model._decoder.steps] == [(batch, 4)], "buffers, which hold memory, are not kept"
    generate(model, True, arguments(3, 2), Tapes(), capacity=4)
    for batch in range(1, static_cache.IDLE_STEPS + 3):
        model.generate(torch.full((batch, 3), 7), max_new_tokens=2, do_sample=False, pad_token_id=0)
        gc.collect()
    assert len(model._decoder.steps) == static_cache.IDLE_STEPS
    assert model._decoder.steps[-1].size == (batch, 4)


def test_generation_in_inference_mode_and_outside():
    model = compiled("qwen2").use_static_cache()
    given = arguments(5, 6, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        first = model.generate(**given)
    assert torch.equal(model.generate(**given), first)
    model.use_growing_cache()


def test_load_with_a_static_cache(tmp_path):
    model = compiled("mistral")
    model.use_growing_cache()
    model.save(tmp_path / "lm")
    loaded = fxc.load(tmp_path / "lm", static_cache=True)
    given = arguments(11, 6, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(**given), model.generate(**given))
    assert [step.size for step in loaded._decoder.steps] == [(2, static_cache.CAPACITY)]
    fxc.optimize(Mlp(), (torch.randn(2, 40),), passes="").save(tmp_path / "mlp")
    with pytest.raises(UsageError, match="only a causal language model has a cache"):
        fxc.load(tmp_path / "mlp", static_cache=True)


def test_a_cache_that_is_not_its_own_is_refused():
    model = compiled("qwen2").use_static_cache()
    ids = torch.full((2, 3), 7)
    mine = SlotCache(model._decoder)
    model(ids, past_key_values=mine)
    with pytest.raises(UsageError, match="of 2 rows, or of another model"):
        model(ids[:1, :1], past_key_values=mine)
    other = compiled("llama").use_static_cache()
    with pytest.raises(UsageError, match="another model"):
        other(ids[:, :1], past_key_values=mine)
    for method in (mine.crop, mine.batch_repeat_interleave, mine.batch_select_indices):
        with pytest.raises(UsageError, match="assisted or contrastive"):
            method(1)
    with pytest.raises(UsageError, match="1 slots holds nothing"):
        model.use_static_cache(capacity=1)
    model.use_growing_cache()
    other.use_growing_cache()


def test_experts_cannot_be_captured():
    model = compiled("mixtral")
    with pytest.raises(UsageError, match="the host counts the rows of its experts"):
        static_decoder(model.lowered, torch.device("cuda"))


def test_the_check_sees_a_step_that_ignores_the_mask(taped):
    model = taped("gpt2")
    step = runnable(decode_program(model.lowered), "cpu", "eager")
    for node in step.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        node.args = node.args[:3]
    step.recompile()
    with pytest.raises(UsageError, match="logits differ by"):
        static_cache.check_step(model.lower(), step, model.program, model.device)


def test_short_memory_is_a_resource_error(monkeypatch):
    model = compiled("qwen2")

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ResourceError, match="no memory for the decode step of 2 rows and 8 slots"):
        generate(model, True, arguments(5, 3), lambda function: no_memory)
    monkeypatch.setattr(static_cache, "torch", SimpleNamespace(**{**vars(torch), "zeros": no_memory}))
    with pytest.raises(ResourceError, match=r"no memory for a cache of 2 rows and 8 slots"):
        generate(model, True, arguments(5, 3))
    model.use_growing_cache()
