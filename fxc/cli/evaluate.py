"""fxc eval."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fxc
from fxc.captured import capture_source
from fxc.cli import watch
from fxc.cli.sources import read_text
from fxc.cli.watch import Watched
from fxc.compiled.model import CompiledModel, compiled_model
from fxc.data.calibration import LIMIT, calibration_samples, check_data
from fxc.data.comparison import inputs_for
from fxc.data.text import encode, tokenizer_of
from fxc.errors import UsageError
from fxc.ir.cache import is_causal_lm
from fxc.measure.agreement import Parting, accuracies, agreement, compare_layers
from fxc.measure.perplexity import Perplexity, perplexity, relative_change
from fxc.options import Options
from fxc.report.compilation import change_text
from fxc.report.console import Output
from fxc.source.load import kind_of, load_source

_LARGEST_LAYERS = 15
_LAYER_INPUTS = 4
_NAMED = 8


@dataclass(frozen=True)
class EvalRequest:
    """The options of `fxc eval`, as given."""

    model: str
    text: Path | None
    against: str | None
    window: int
    windows: int | None
    tolerance: float
    backend: str
    device: str | None
    dtype: str
    revision: str | None
    trust_remote_code: bool
    data: Path | None = None
    history: Path | None = None
    plot: Path | None = None
    fail_over: str | None = None


def evaluate(request: EvalRequest, output: Output) -> None:
    watched = watch.of(request)
    request, text = _read(request)
    result: dict[str, Any] = {"model": request.model}
    if request.against is None:
        result |= _perplexity_of(request, text, output)
    else:
        result |= _agreement_of(request, text, output, watched)
    output.json(result)


def _read(request: EvalRequest) -> tuple[EvalRequest, str | None]:
    """The text that is given, as --text or as --data; the request is left with data of other kinds alone."""
    if request.text is None and request.against is None:
        raise UsageError("there is nothing to measure", hint="--text FILE for perplexity, --against ORIGINAL for agreement")
    if request.data is None:
        return request, read_text(request.text, "--text") if request.text else None
    if request.text is not None:
        raise UsageError("--text and --data are one and the same", where="--data", hint="give one of them")
    check_data(request.data, "evaluation")
    if request.data.is_dir() or request.data.suffix.lower() == ".jsonl":
        return request, None
    return dataclasses.replace(request, data=None), read_text(request.data, "--data")


def _perplexity_of(request: EvalRequest, text: str, output: Output) -> dict[str, Any]:
    with output.doing(f"loading {request.model}"):
        if kind_of(request.model) == "artifact":
            model: Any = fxc.load(request.model, device=request.device, backend=request.backend)
            folder: Path | None = Path(request.model)
        else:
            loaded = load_source(
                request.model,
                revision=request.revision,
                dtype=request.dtype,
                trust_remote_code=request.trust_remote_code,
                device=request.device,
            )
            model, folder = loaded.model, loaded.tokenizer_dir
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            "only causal language models have a perplexity",
            where=request.model,
            hint="--against ORIGINAL measures how near a compiled encoder or vision model is to its original",
        )
    measured = _perplexity(model, folder, request, text, output)
    output.line(f"perplexity {measured.value:.4f} over {measured.tokens:,} tokens in windows of {measured.window}")
    return {"perplexity": measured.value, "tokens": measured.tokens, "window": measured.window}


def _perplexity(model: Any, folder: Path | None, request: EvalRequest, text: str, output: Output) -> Perplexity:
    tokens = encode(tokenizer_of(folder), text)
    return perplexity(
        model, tokens, request.window, limit=request.windows, track=output.track
    )


def _agreement_of(request: EvalRequest, text: str | None, output: Output, watched: Watched | None) -> dict[str, Any]:
    (model, folder), (original, other) = (_as_program(request, source, output) for source in (request.model, request.against))
    causal = is_causal_lm(original.program)
    if request.data is not None:
        inputs = calibration_samples(
            original.program, request.data, folder=other or folder, config=original.config, limit=request.windows or LIMIT,
            window=request.window, track=output.track, what="evaluation",
        )  # fmt: skip
        of = f"{len(inputs)} samples of {request.data.name}"
    else:
        tokenizer = tokenizer_of(other or folder) if text is not None else None
        inputs, of = inputs_for(original.program, tokenizer, text, request.window, request.windows)
    for each in (model, original):
        with output.doing(f"preparing it for {each.device}"):
            each.lower()
    found = agreement(model, original, inputs, track=output.track)
    few = inputs[:_LAYER_INPUTS]
    layers, parting = compare_layers(model.program, original.program, few, request.tolerance, output.track)
    result: dict[str, Any] = {"against": request.against, "inputs": of, "outputs": found}
    result["parting"] = dataclasses.asdict(parting)
    output.table(f"agreement at the output, over {of}", ["measure", ">value"], [(k, f"{v:.6f}") for k, v in found.items()])
    for line in parting_lines(parting, found["relative_error"]):
        output.line(line)
    reshaped = [layer.name for layer in layers if layer.own == float("inf")]
    layers = [layer for layer in layers if layer.name not in reshaped]
    changed = [layer for layer in layers if layer.own > 0]
    rows = [(each.name, f"{each.own:.5f}", f"{each.accumulated:.5f}") for each in changed[:_LARGEST_LAYERS]]
    output.table("relative error by layer", ["layer", ">own", ">accumulated"], rows)
    output.line(f"{len(changed)} of {len(layers)} layers differ by themselves; {len(rows)} are shown")
    if reshaped:
        output.line(f"{len(reshaped)} have outputs of another shape and cannot be compared")
    if causal and text is not None:
        before, after = (_perplexity(m, other or folder, request, text, output) for m in (original, model))
        relative, error = relative_change(before, after)
        output.line(f"perplexity {before.value:.4f} -> {after.value:.4f}: {change_text(relative, error)}")
        result |= {"perplexity": after.value, "perplexity_against": before.value, "tokens": after.tokens}
        result |= {"window": after.window, "perplexity_change": relative, "perplexity_change_standard_error": error}
    elif (labels := getattr(inputs, "labels", None)) and (scored := accuracies(model, original, inputs, labels, output.track)):
        output.line(f"accuracy {scored[1]:.2%} -> {scored[0]:.2%}")
        result |= {"accuracy": scored[0], "accuracy_against": scored[1]}
    result |= {"layers": [dataclasses.asdict(layer) for layer in layers], "reshaped": reshaped}
    return result if watched is None else result | watched.judge(result, model, inputs, output)


def parting_lines(parting: Parting, at_output: float) -> list[str]:
    """Where the two part, for people. at_output: the relative error of the model's output."""
    if parting.bits is not None:
        lines = [f"bit for bit the same up to {parting.bits.name}, which is off by {parting.bits.accumulated:.2e}"]
    elif at_output:
        lines = ["all layers that both have give the same bits; what differs comes after the last of them"]
    else:
        lines = ["all layers that both have give the same bits"]
    if parting.beyond is not None:
        off = parting.beyond.accumulated
        how = "gives another shape" if off == float("inf") else f"is off by {off:.2%}"
        lines.append(f"the first layer beyond {parting.tolerance:.2%} is {parting.beyond.name}, which {how}")
    elif parting.bits is not None:
        lines.append(f"no layer is off by more than {parting.tolerance:.2%}")
    for names, which in ((parting.gone, "the original"), (parting.new, "the model")):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"only {which} has {', '.join(names[:_NAMED])}{more}")
    return lines


def _as_program(request: EvalRequest, source: str, output: Output) -> tuple[CompiledModel, Path | None]:
    """`source` as a compiled model, uncompressed unless it is an artifact, and where its tokenizer is."""
    with output.doing(f"loading {source}"):
        if kind_of(source) == "artifact":
            return fxc.load(source, device=request.device, backend=request.backend), Path(source)
        options = Options(dtype=request.dtype, revision=request.revision, trust_remote_code=request.trust_remote_code)
        captured = capture_source(source, options=options)
    plain = compiled_model(
        captured.program,
        {},
        config=captured.config,
        files=captured.files,
        device=request.device,
        backend=request.backend,
    )
    return plain, captured.folder
