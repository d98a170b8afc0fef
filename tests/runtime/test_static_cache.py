"""Decoding over buffers of a fixed size gives what the growing cache gives, and reads nothing but its own tensors."""

from __future__ import annotations

import copy
import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from families import Mlp, _causal, build
from lowered import for_cuda
from torch.utils._python_dispatch import TorchDispatchMode

import fxc
from fxc.errors import ResourceError, UsageError
from fxc.lower.inductor import CompiledGraph
from fxc.runtime import static_cache
from fxc.runtime.decode_graph import decode_graph
from fxc.runtime.static_cache import CudaGraphs, SlotCache, static_decoder

DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gpt2", "mixtral", "qwen3_moe")


def _others(name: str):
    """Families whose positions or masks are made differently."""
    import transformers

    small = {"vocab_size": 320, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(3)
    if name == "llama4":  # attention in chunks
        options = {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 128}
        return _causal("Llama4TextConfig", **options).eval()
    if name == "gpt_oss":  # sinks: a column more than keys, which is sliced off again
        options = {"head_dim": 16, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}
        return _causal("GptOssConfig", **options).eval()
    config = {
        "bloom": lambda: transformers.BloomConfig(**small, n_layer=2, n_head=4),  # ALiBi, from the mask
        "opt": lambda: transformers.OPTConfig(  # learned positions, from the mask
            **small, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64
        ),
        "gptj": lambda: transformers.GPTJConfig(
            vocab_size=320, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=1, eos_token_id=2
        ),
        "mpt": lambda: transformers.MptConfig(vocab_size=320, d_model=64, n_layers=1, n_heads=4, max_seq_len=128),
    }[name]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@cache
def compiled(name: str):
    model = build(name)[0] if name in DECODERS else _others(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that attention is not nearly uniform
    return fxc.optimize(model, passes="", verify=False)


def arguments(length: int, new: int, **options):
    ids = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new, **options}


def generate(model, static: bool, given, record=None, capacity: int = 8):
    """(tokens, logits of each step) of `model`, over the static cache or not."""
    model._decoder = None
    if static:
        model._decoder = static_decoder(model.lower(), model.program, model.device, capacity, record)
    torch.manual_seed(0)
    found = model.generate(**given, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


OPTIONS = ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False})


# Sampling calls the model as greedy search does, with other tokens: one family is enough in a plain run.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{how}", marks=[pytest.mark.slow] * (how == "sampling" and name != "qwen2"))
        for name in (*DECODERS, "bloom", "opt", "gptj", "llama4", "gpt_oss")
        for how, options in zip(("greedy", "sampling", "beams"), OPTIONS)
    ],
)
def test_gives_what_the_growing_cache_gives(name, options):
    """A padded prompt longer than the first buffers and than the sliding windows, and two moves to larger buffers."""
    model, given = compiled(name), arguments(11, 24, **options)
    expected, logits = generate(model, False, given)
    found, static_logits = generate(model, True, given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(static_logits, logits, rtol=1e-4, atol=2e-5 * logits.abs().max().item())
    assert {step.size[1] for step in model._decoder.steps} == {16, 32, 64}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("passes", ["int8", "int4:group=32", "prune:heads=0.5", "prune:drop=model.layers.1"])
def test_of_compressed_models(passes, device):
    """As they are lowered for the CPU, and for CUDA with the kernels' definitions on the CPU."""
    torch.manual_seed(4)
    model = fxc.optimize(_causal("Qwen2Config", num_hidden_layers=4).eval(), passes=passes, verify=False)
    if device == "cuda":
        pytest.importorskip("triton")
        object.__setattr__(model, "_lowered", for_cuda(model.program, capability=90)[0])
    given = arguments(5, 12)
    expected = generate(model, False, given)[1]
    torch.testing.assert_close(generate(model, True, given)[1], expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


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


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "gpt2", "mixtral", "bloom"])
def test_a_recorded_step_serves_every_token(name):
    """A number or a tensor of the first call that stuck in the recording would give other logits in the later ones."""
    model, tapes = compiled(name), Tapes()
    for given, recorded in ((arguments(11, 24), 3), (arguments(5, 20, num_beams=3, do_sample=False), 6)):
        expected = generate(model, False, given)
        found = generate(model, True, given, tapes)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5 * expected[1].abs().max().item())
        assert tapes.recorded == recorded, "once for each size of buffers"
    assert tapes.replayed == 23 + 19


def test_the_tape_sees_what_a_recording_would_miss():
    model = compiled("qwen2")
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


def test_tensors_of_a_step_are_never_replaced():
    model, seen = compiled("qwen2"), {}

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
    model._decoder = None
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
    model._decoder = None
    torch.testing.assert_close(found[:, -1], model(torch.cat([ids, ids[:, :1] + 2], dim=1)).logits[:, -1])


def test_a_copied_model_decodes_too():
    model = compiled("qwen2").use_static_cache(8)
    given = arguments(5, 12, do_sample=False, pad_token_id=0)
    expected = model.generate(**given)
    assert torch.equal(copy.deepcopy(model).generate(**given), expected)
    model._decoder = None


def test_several_threads_may_generate_at_once():
    model = compiled("qwen2")
    given = [arguments(length, 12, do_sample=False, pad_token_id=0) for length in (5, 9, 5, 9)]
    model._decoder = None
    expected = [model.generate(**each) for each in given]
    model._decoder = static_decoder(model.lower(), model.program, model.device, 16, Tapes())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: model.generate(**each), given))
    assert all(map(torch.equal, found, expected))
    model._decoder = None


def test_idle_steps_are_few():
    model = compiled("llama")
    model.use_static_cache(capacity=4)
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
    model._decoder = None


def test_load_with_a_static_cache(tmp_path):
    model = compiled("mistral")
    model._decoder = None
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
    model._decoder = other._decoder = None


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2"])
def test_keys_are_not_repeated_and_masks_are_made_once(name):
    model = compiled(name)
    step = decode_graph(model.lower(), model.program.signature)
    aten = torch.ops.aten
    attentions = step.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert len(attentions) == 2
    for node in attentions:
        assert [each.target for each in node.args[1:3]] == [aten.index_copy_.default] * 2
    assert len({node.args[3] for node in attentions}) == 1 and attentions[0].args[3].target is aten.to.dtype
    made = {n.target for n in model.lower().graph.nodes if n.op == "get_attr"}
    assert {n.target for n in step.graph.nodes if n.op == "get_attr"} == made
    weights = dict(model.lower().named_buffers()) | dict(model.lower().named_parameters())
    own = dict(step.named_buffers()) | dict(step.named_parameters())
    assert own and all(t.data_ptr() == weights[n].data_ptr() for n, t in own.items()), "weights are shared"


# What is not understood is refused.


def test_a_model_that_measures_distance_from_the_end_is_refused():
    with pytest.raises(UsageError, match="uses the number of cached tokens in a way that is not known"):
        compiled("mpt").use_static_cache()


def test_experts_cannot_be_captured():
    model = compiled("mixtral")
    with pytest.raises(UsageError, match="the host counts the rows of its experts"):
        static_decoder(model.lower(), model.program, torch.device("cuda"))


def _changed(name, edit):
    """decode_graph of the family's program after `edit` of its graph."""
    program = compiled(name).program.copy()
    edit(program.graph)
    return decode_graph(program.module(), program.signature)


def _first(graph, target):
    return graph.find_nodes(op="call_function", target=target)[0]


def _window_of_the_last(graph):
    append = next(n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default) if n.args[1] == -2)
    with graph.inserting_after(append):
        last = graph.call_function(torch.ops.aten.slice.Tensor, (append, 2, -4, 2**63 - 1))
    last.meta = dict(append.meta)
    append.replace_all_uses_with(last, delete_user_cb=lambda user: user not in (last, graph.output_node()))


def _reads_the_cache(graph):
    past = graph.find_nodes(op="placeholder")[3]
    with graph.inserting_before(graph.output_node()):
        total = graph.call_function(torch.ops.aten.neg.default, (past,))
    (logits, *present) = graph.output_node().args[0]
    graph.output_node().args = ((logits, total, *present[1:]),)


def _returns_something_else(graph):
    (logits, first, second, *rest) = graph.output_node().args[0]
    graph.output_node().args = ((logits, second, first, *rest),)


def _counts_cached_tokens(graph):
    size = next(n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int) if n.args[1] == 2)
    hidden = graph.output_node().args[0][0]
    with graph.inserting_before(graph.output_node()):
        scaled = graph.call_function(torch.ops.aten.div.Tensor, (hidden, size))
    graph.output_node().args = ((scaled, *graph.output_node().args[0][1:]),)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_window_of_the_last, "takes a part of what it has cached"),
        (_reads_the_cache, "does more with its cache than append"),
        (_returns_something_else, "present.0.key is not its cache"),
        (_counts_cached_tokens, "in a way that is not known"),
    ],
)
def test_other_uses_of_the_cache_are_refused(edit, says):
    with pytest.raises(UsageError, match=says):
        _changed("qwen2", edit)


def test_the_check_sees_a_step_that_ignores_the_mask():
    model = compiled("gpt2")
    step = decode_graph(model.lower(), model.program.signature)
    for node in step.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        node.args = node.args[:3]
    step.recompile()
    with pytest.raises(UsageError, match="logits differ by"):
        static_cache.check_step(model.lower(), step, model.program, model.device)


# CudaGraphs, as far as it can be known without a GPU.


class _Context:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, other):
        pass


def _cuda(monkeypatch, capture=_Context):
    """torch.cuda with a capture that replays a tape."""
    log, streams = [], set()

    class Graph:
        def replay(self):
            log.append("replay")

    def graph(graph, pool, stream, capture_error_mode):
        log.append(("capture", pool))
        streams.add(stream)
        assert capture_error_mode == "thread_local", "other threads allocate meanwhile"
        return capture()

    for name, value in {
        "device": lambda device: _Context(),
        "graph_pool_handle": lambda: "pool",
        "Stream": _Context,
        "current_stream": _Context,
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log, streams


def test_a_step_is_warmed_up_captured_and_replayed(monkeypatch):
    log, streams = _cuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda"))
    result = torch.zeros(1)
    replay = graphs(lambda: (log.append("run"), result)[1])
    assert log == ["run", "run", "run", ("capture", "pool"), "run"]
    assert replay() is result and replay() is result and log[-2:] == ["replay", "replay"]
    graphs(lambda: result)
    assert log[-1] == ("capture", "pool") and len(streams) == 1, "graphs share one pool, which needs one stream"
    assert streams == {graphs.stream}, "torch's own stream for captures is on the device of the first capture"


def test_a_capture_that_fails_is_an_error_in_plain_words(monkeypatch):
    class Fails(_Context):
        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    _cuda(monkeypatch, Fails)
    with pytest.raises(UsageError) as caught:
        CudaGraphs(torch.device("cuda"))(lambda: torch.zeros(1))
    assert "cannot be captured in a CUDA graph" in str(caught.value) and "more" not in str(caught.value)
    assert "operation not permitted" in caught.value.why and "without static_cache" in caught.value.hint


def test_short_memory_is_a_resource_error(monkeypatch):
    model = compiled("qwen2")

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ResourceError, match="no memory for the decode step of 2 rows and 8 slots"):
        generate(model, True, arguments(5, 3), lambda function: no_memory)
    monkeypatch.setattr(static_cache, "torch", SimpleNamespace(**{**vars(torch), "zeros": no_memory}))
    with pytest.raises(ResourceError, match=r"no memory for a cache of 2 rows and 8 slots"):
        generate(model, True, arguments(5, 3))
    model._decoder = None
