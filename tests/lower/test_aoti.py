"""The backend aoti: code that is compiled once, kept, and found again by models of the same shape."""

import families
import pytest
import torch
from command import fxc as command

import fxc
from fxc.errors import UsageError
from fxc.lower import aoti
from fxc.verify.compare import relative_error
from fxc_kernels.cpu import native_int8


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache folder of its own, and the kernels that this CPU has."""
    made = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FXC_CACHE", str(made))
    monkeypatch.delenv("FXC_CPU_LEVEL")
    return made


def saved(name: str, passes: str, out, factor: float = 1):
    """factor: of all weights."""
    model, *inputs = families.build(name)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(factor)
    fxc.optimize(model, *inputs, passes=passes, verify=False).save(out)
    return out


def no_compiler(monkeypatch):
    def none():
        raise RuntimeError("there is none")

    monkeypatch.setattr(aoti, "compiler", none)


def packages(cache):
    return sorted(cache.glob("program-*.pt2"))


def test_one_package_serves_all_sizes_and_all_models_of_a_shape(cache, tmp_path, monkeypatch):
    model = fxc.load(saved("mlp", "int8", tmp_path / "one"), backend="aoti")
    eager = fxc.load(tmp_path / "one", keep_compressed=True)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 40, generator=torch.Generator().manual_seed(batch))
        assert relative_error([model(x)], [eager(x)]) < (1e-5 if native_int8.why_not() is None else 0.02)
    assert {each.op for each in model.layers} == {"int8" if native_int8.why_not() is None else "dequantized"}
    assert len(packages(cache)) == 1
    # Without a compiler, with other weights.
    no_compiler(monkeypatch)
    other, x = fxc.load(saved("mlp", "int8", tmp_path / "two", factor=-2), backend="aoti"), torch.randn(3, 40)
    assert relative_error([other(x)], [fxc.load(tmp_path / "two", keep_compressed=True)(x)]) < 0.02
    assert relative_error([other(x)], [model(x)]) > 0.1


def test_code_that_is_damaged_is_not_run(cache, tmp_path, monkeypatch):
    out, x = saved("mlp", "fp8", tmp_path / "one"), torch.randn(3, 40)
    model = fxc.load(out, backend="aoti")
    expected = model(x)
    assert {each.op for each in model.layers} == {"dequantized"} and "no kernel in C++" in model.layers[0].reason
    (package,) = packages(cache)
    package.write_bytes(package.read_bytes()[:1000])
    assert torch.equal(fxc.load(out, backend="aoti")(x), expected) and package.stat().st_size > 1000
    package.write_bytes(b"")
    no_compiler(monkeypatch)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler for code that is not in the cache"):
        fxc.load(out, backend="aoti").lower()


@pytest.mark.slow
def test_a_decoder_gives_the_same_tokens_over_either_cache(cache, tmp_path, monkeypatch):
    out = saved("qwen2", "int8", tmp_path / "one")
    made = "-o", tmp_path / "again", "--no-measure", "--allow-noop", "--backend", "aoti"
    command("compile", out, "--passes", "canonicalize", *made)
    assert len(packages(cache)) == 2  # of the whole, and of a prompt's last logits
    no_compiler(monkeypatch)
    model, eager = fxc.load(tmp_path / "again", backend="aoti"), fxc.load(out, keep_compressed=True)
    prompt = torch.arange(5)[None]
    expected = eager.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    assert relative_error([model(prompt.repeat(3, 1)).logits], [eager(prompt.repeat(3, 1)).logits]) < 0.02
    monkeypatch.undo()
    fixed = fxc.load(out, backend="aoti", static_cache=True)
    assert torch.equal(fixed.generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_what_it_cannot_do_is_refused(tmp_path):
    out = saved("mlp", "int8", tmp_path / "one")
    with pytest.raises(UsageError, match="aoti is for a CPU"):
        fxc.load(out, backend="aoti", device="cuda")
    with pytest.raises(UsageError, match="eager, inductor, aoti"):
        fxc.load(out, backend="ahead")
