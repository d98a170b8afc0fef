"""fxc run."""

from __future__ import annotations

from pathlib import Path

import fxc
from fxc import ranks
from fxc.ir.cache import is_seq2seq
from fxc.report import outputs
from fxc.report.console import Output
from fxc.report.lowering import describe, describe_held, forms, held_as_json


def run_model(
    output: Output,
    out: Path,
    prompt: str | None,
    new: int,
    text: str | None,
    image: Path | None,
    backend: str,
    device: str | None,
    keep_float: float | None = None,
    tensor_parallel: bool = False,
) -> None:
    """Under torchrun with `tensor_parallel` every process runs, and the first one alone prints."""
    if tensor_parallel and not ranks.is_first():
        output.silence()
    with output.doing(f"loading {out}"):
        model = fxc.load(out, device=device, backend=backend, keep_float=keep_float, tensor_parallel=tensor_parallel)
    if model.division is not None:
        output.note(model.division)
    with output.doing(f"preparing it for {model.device}"):
        model.lower()
    for line in describe(model.layers):
        output.note(line)
    output.note(describe_held(model.lowered))
    if prompt is not None:
        with output.doing("generating"):
            made = outputs.generate(model, out, prompt, new)
        output.block(made["text"] if is_seq2seq(model.program) else made["prompt"] + made["text"])
        output.note(f"{made['tokens']} tokens in {made['seconds']:.2f} s on {model.device}, backend {backend}")
    else:
        with output.doing("running"):
            made = outputs.read(model, out, text, image)
        if made["kind"] == "labels":
            rows = [(row["label"], f"{row['probability']:.4f}") for row in made["top"]]
            output.table("labels", ["label", ">probability"], rows)
        else:
            first = ", ".join(f"{value:.4f}" for value in made["first"])
            output.line(f"{made['of']}: {made['size']} numbers, norm {made['norm']:.4f}, the first: {first}")
    output.json(made | {"lowering": forms(model.layers)} | held_as_json(model.lowered))
