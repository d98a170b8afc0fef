"""fxc export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fxc
from fxc.analysis.sizes import on_disk
from fxc.errors import UsageError
from fxc.report.console import Output, size
from fxc.safety import listed

# Format -> (what writes it, what to say of the folder).
FORMATS: dict[str, tuple[Callable[..., Any], str]] = {
    "hf": (fxc.CompiledModel.export_hugging_face, "AutoModel.from_pretrained loads it without fxc"),
    "compressed-tensors": (
        fxc.CompiledModel.export_compressed_tensors,
        "vLLM loads it, and AutoModel.from_pretrained where compressed-tensors is installed",
    ),
    "gguf": (fxc.CompiledModel.export_gguf, "llama.cpp loads the file, and what is built on it"),
    "onnx": (fxc.CompiledModel.export_onnx, "ONNX Runtime runs model.onnx"),
    "aoti": (fxc.CompiledModel.export_aoti, "torch._inductor.aoti_load_package runs model.pt2, without fxc and compilers"),
    "fxc": (fxc.CompiledModel.export_fxc, "AutoModel.from_pretrained loads it after 'import fxc'"),
}


def export_model(output: Output, artifact: Path, out: Path, kind: str, overwrite: bool) -> None:
    if kind not in FORMATS:
        raise UsageError(f"there is no export {kind!r}", where="--format", hint=f"one of {', '.join(FORMATS)}")
    with output.doing(f"loading {artifact}"):
        model = fxc.load(artifact)
    made = exported(output, model, out, kind, overwrite)
    nbytes = on_disk(out)
    output.line(f"{made.kind}, {size(nbytes)}")
    output.line(f"written to {out}: {FORMATS[kind][1]}")
    output.json(
        {"out": str(out), "format": kind, "class": made.model_class, "bytes": nbytes, "zeros": made.zeros,
         "warnings": made.warnings}
    )  # fmt: skip


def exported(output: Output, model: fxc.CompiledModel, out: Path, kind: str, overwrite: bool = False) -> Any:
    """Write `model` in a format of FORMATS, and warn of what is to be minded."""
    with output.doing(f"writing {out}, loading it back and comparing"):
        made = FORMATS[kind][0](model, out, overwrite=overwrite)
    if made.zeros:
        output.warn(f"{len(made.zeros)} weights that the program does not have are zero: {listed(made.zeros)}")
    for warning in made.warnings:
        output.warn(warning)
    return made
