"""One model, one format: compile, export, load with the other tool, compare. Each export does the last two itself and writes
nothing where they fail, so that what is written agrees (an artifact is compared here). llama.cpp, where it is installed, runs a
GGUF besides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

import fxc
from benchmarks.exports.sources import SOURCES, Source
from benchmarks.output import quiet
from fxc.data.samples import samples
from fxc.errors import FxcError, VerificationFailed, first_line
from fxc.frontend.check import tolerance
from fxc.ir import observe
from fxc.ir.cache import is_causal_lm
from fxc.verify.compare import difference


@dataclass(frozen=True)
class Format:
    """name: of the column; passes: what the model is compiled with; write: the export; needs: packages that it uses besides."""

    name: str
    passes: str
    write: Callable[..., Any]
    needs: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        return ("fxc", "torch", "transformers", *self.needs)


@dataclass(frozen=True)
class _Artifact:
    """What is known of an artifact that fxc has loaded back."""

    error: float
    warnings: tuple[str, ...] = ()


def _artifact(compiled: fxc.CompiledModel, out: Path) -> _Artifact:
    """Save, load, and compare both programs and their numbers to the bit, and what they give."""
    compiled.save(out)
    loaded = fxc.load(out)
    pairs = [(observe.run(loaded.program, inputs), observe.run(compiled.program, inputs)) for inputs in samples(loaded.program)]
    worst = max(difference(*pair).error for pair in pairs)  # of sums over weights that lie at other addresses
    mine, theirs = loaded.program, compiled.program
    same = str(mine) == str(theirs) and all(torch.equal(t, theirs.constants[name]) for name, t in mine.constants.items())
    loaded.run(samples(mine)[0])
    if not same or worst > tolerance(torch.float32):
        raise VerificationFailed(f"what is loaded gives other outputs: relative error {worst:.1e}", where=out)
    return _Artifact(0.0)


_GGUF = ("gguf", "llama-cpp-python")
_ONNX = ("onnx", "onnxscript", "onnxruntime")

FORMATS = (
    Format("artifact, int8", "int8", _artifact),
    Format("artifact, int4", "int4:group=32", _artifact),
    Format("hf", "canonicalize", fxc.CompiledModel.save_pretrained),
    Format("fxc, int8", "int8", fxc.CompiledModel.export_fxc),
    Format("fxc, int4", "int4:group=32", fxc.CompiledModel.export_fxc),
    Format("fxc, int8 static", "int8:mode=static:embeddings=int8", fxc.CompiledModel.export_fxc),
    Format("compressed-tensors, int8", "int8", fxc.CompiledModel.export_compressed_tensors, ("compressed-tensors",)),
    Format("compressed-tensors, int4", "int4:group=32", fxc.CompiledModel.export_compressed_tensors, ("compressed-tensors",)),
    Format("gguf, float", "canonicalize", fxc.CompiledModel.export_gguf, _GGUF),
    Format("gguf, int4", "int4:group=32", fxc.CompiledModel.export_gguf, _GGUF),
    Format("onnx, float", "canonicalize", fxc.CompiledModel.export_onnx, _ONNX),
    Format("onnx, int8", "int8", fxc.CompiledModel.export_onnx, _ONNX),
    Format("onnx, int8 static", "int8:mode=static", fxc.CompiledModel.export_onnx, _ONNX),
    Format("onnx, int4", "int4:group=32", fxc.CompiledModel.export_onnx, _ONNX),
    Format("aoti, float", "canonicalize", fxc.CompiledModel.export_aoti),
    Format("aoti, int8", "int8", fxc.CompiledModel.export_aoti),
    Format("aoti, int4", "int4:group=32", fxc.CompiledModel.export_aoti),
)
PROMPT, NEW = [5, 17, 40, 9, 81, 3, 22], 16


def run(source: str, kind: str, scratch: Path) -> dict[str, Any]:
    """`cell` by the names of row and column, in this process, which one thread serves."""
    quiet()
    torch.set_num_threads(1)
    (row,), (column,) = [each for each in SOURCES if each.name == source], [each for each in FORMATS if each.name == kind]
    return cell(row, column, scratch)


def cell(source: Source, kind: Format, scratch: Path) -> dict[str, Any]:
    """What came of it: {"status": "agrees", "refused", "differs" or "failed"}, with "why", or what is known besides."""
    out = scratch / "export"
    shutil.rmtree(out, ignore_errors=True)
    try:
        model, example = source.make()
        options = {}
        if "static" in kind.passes:
            options["calib"] = source.calib() if source.calib else _token_samples()
        compiled = fxc.optimize(model, example, passes=kind.passes, verify=False, **options)
        made = kind.write(compiled, out)
    except VerificationFailed as error:
        return {"status": "differs", **_said(error)}
    except FxcError as error:
        return {"status": "refused", **_said(error)}
    except Exception as error:  # a bug, of fxc or of a tool: it has to be seen in the table
        return {"status": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}
    found = {"status": "agrees", "warnings": list(made.warnings)}
    if hasattr(made, "error"):
        found["error"] = made.error
    if kind.name.startswith("gguf") and is_causal_lm(compiled.program):
        found |= _by_llama_cpp(made.file, compiled)
    shutil.rmtree(out, ignore_errors=True)
    return found


def _token_samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 300, (1, 24), generator=generator)} for _ in range(4)]


def _said(error: FxcError) -> dict[str, Any]:
    return {"where": error.where, "why": f"{error.what} ({error.why})" if error.why else error.what}


def _by_llama_cpp(file: Path, compiled: fxc.CompiledModel) -> dict[str, Any]:
    """How many of the first greedy tokens are those of the program, in llama.cpp."""
    if util.find_spec("llama_cpp") is None:
        return {"llama.cpp": "not run: llama-cpp-python is not installed"}
    import llama_cpp

    expected = compiled.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    expected = expected[0, len(PROMPT) :].tolist()
    try:
        llama = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, verbose=False, logits_all=False)
        found = []
        for token in llama.generate(PROMPT, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == NEW:
                break
    except Exception as error:  # whatever llama.cpp objects to
        return {"llama.cpp": f"does not load: {first_line(error)}", "status": "differs"}
    same = next((n for n, (a, b) in enumerate(zip(found, expected)) if a != b), NEW)
    return {"llama.cpp": f"{same} of {NEW} greedy tokens"}
