"""Compiled models cross processes and torch's own tools: pickled, saved, copied, compiled, exported and traced."""

import copy
import io
import multiprocessing
import pickle
from functools import cache

import pytest
import torch
from families import build
from torch import nn

import fxc
from fxc.compiled.model import AS_IT_IS
from fxc.errors import FxcError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def first(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@cache
def compiled(kind, passes):
    """A compiled model and what to call it with."""
    if kind == "module":
        return fxc.optimize(mlp(), (X,), passes), {"input": X}
    return fxc.optimize(build(kind)[0], passes=passes, budget=1, layer_budget=1), {"input_ids": IDS}


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_old_pickle(model):
    return pickle.loads(pickle.dumps(model, protocol=2))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def within_a_module(model):
    return by_torch(nn.ModuleList([model]))[0]


def within_a_dict(model):
    return by_pickle({"model": model, "epoch": 1})["model"]


WAYS = [by_pickle, by_old_pickle, by_torch, copy.deepcopy, copy.copy, within_a_module, within_a_dict]


# Every way with a module and with a decoder; how it was compressed and what it is crosses each way alike.
@pytest.mark.parametrize(("kind", "passes", "way"), [
    pytest.param(kind, passes, way, id=f"{kind}-{passes}-{way.__name__}", marks=[pytest.mark.slow] * (kind == "bert"))
    for kind, passes, ways in (
        ("module", "int8", WAYS), ("module", "int4", [by_torch]), ("module", "prune:ffn=0.25,int8", [by_pickle]),
        ("bert", "int8", [by_torch, copy.deepcopy]), ("llama", "int8", WAYS), ("llama", "int4:group=32", [by_pickle]),
    )
    for way in ways
])  # fmt: skip
def test_it_is_the_same_model(kind, passes, way):
    model, inputs = compiled(kind, passes)
    again = way(model)
    assert type(again) is type(model) and again is not model
    assert (again.backend, again.device, again.keep_compressed) == (model.backend, model.device, model.keep_compressed)
    assert str(again.program) == str(model.program) and not again.training
    assert again.report == model.report and again.files.keys() == model.files.keys()
    assert torch.equal(first(again(**inputs)), first(model(**inputs)))
    assert again.state_dict().keys() == model.state_dict().keys()
    if kind == "llama":
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))
        assert again.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("way", [by_torch, copy.deepcopy], ids=lambda way: way.__name__)
def test_options_and_files_stay(way, tmp_path):
    compiled("bert", "int8")[0].save(tmp_path / "a")
    again = way(fxc.load(tmp_path / "a", backend="inductor", keep_compressed=True))
    assert again.backend == "inductor" and again.keep_compressed
    again.save(tmp_path / "b")
    for name in ("fxc.json", "config.json", "program.fxc"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_after_the_first_call_it_still_pickles():
    model = fxc.optimize(mlp(), (X,), "int8")
    expected = model(X)
    model(X[:1])
    assert torch.equal(by_pickle(by_pickle(model))(X), expected)


def test_a_pickled_model_has_weights_of_its_own():
    model = fxc.optimize(mlp(), (X,), "")
    again, expected = by_pickle(model), model(X)
    for tensor in model.program.constants.values():
        tensor.zero_()
    assert torch.equal(again(X), expected)


def test_static_cache_is_kept_or_left():
    model = fxc.optimize(build("llama")[0], passes="int8").use_static_cache()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    for way in (by_pickle, copy.deepcopy):
        assert torch.equal(way(model).generate(IDS, max_new_tokens=4, do_sample=False), expected)


def test_weights_only_is_refused_by_torch():
    file = io.BytesIO()
    torch.save(compiled("module", "int8")[0], file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def run(model, x, results):
    results.put(model(x).numpy())


def test_a_spawned_process_gets_a_model():
    context = multiprocessing.get_context("spawn")
    results, model = context.Queue(), compiled("module", "int8")[0]
    process = context.Process(target=run, args=(model, X, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=120))
    process.join()
    assert (found - model(X)).norm() < 1e-2 * found.norm()


# ------------------------------------------------------------------------------------------------------- torch's own tools


@pytest.mark.parametrize(
    "kind, passes", [("module", "int8"), ("module", "int4"), ("module", ""), ("bert", "int8"), ("llama", "int8")]
)
def test_torch_compile_leaves_it_as_it_is(kind, passes):
    model, inputs = compiled(kind, passes)
    expected = first(model(**inputs))
    torch._dynamo.reset()
    assert torch.equal(first(torch.compile(model, backend="eager")(**inputs)), expected)


def test_torch_compile_of_a_function_and_of_a_module_that_call_it():
    model = compiled("module", "int8")[0]
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def function(x):
        return model(x * 2).relu() + 1

    assert torch.allclose(function(X), model(X * 2).relu() + 1)
    assert torch.allclose(function(X[:2]), model(X[:2] * 2).relu() + 1)
    assert torch.equal(torch.compile(model)(X), model(X))
    whole = nn.Sequential(nn.Linear(64, 64), model, nn.Linear(64, 8))
    assert torch.allclose(torch.compile(whole, backend="eager")(X), whole(X), atol=1e-6)


TOOLS = {
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "export, strict": lambda model: torch.export.export(model, (X,), strict=True).module(),
    "export within another": lambda model: torch.export.export(nn.Sequential(model), (X,)).module(),
    "jit.trace": lambda model: torch.jit.trace(model, X),
    "jit.script": torch.jit.script,
    "compile, fullgraph": lambda model: torch.compile(model, fullgraph=True, backend="eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("passes", ["int8", ""])
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after one"])
def test_other_tools_work_or_say_what_to_do(tool, passes, called):
    model = fxc.optimize(mlp(), (X,), passes)
    if called:
        model(X)
    torch._dynamo.reset()
    try:
        found = TOOLS[tool](model)(X)
    except FxcError as error:
        assert error.hint
    except torch._dynamo.exc.Unsupported as error:
        assert AS_IT_IS in str(error)
    else:
        # A kernel of this machine may round activations otherwise than the definition, which is what is exported.
        assert (found - model(X)).abs().max() <= (0.02 if passes else 1e-5) * model(X).abs().max()
    assert torch.isfinite(model(X)).all()  # and it is none the worse
