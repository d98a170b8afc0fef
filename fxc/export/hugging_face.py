"""A plain Hugging Face folder of a compiled model, for everyone who has transformers and not fxc.

It is written from the model that the new configuration describes, filled with the program's constants, and loaded back: its
outputs have to be the program's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxc.artifact.companions import write
from fxc.data.samples import samples
from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.export.configuration import Fit, changed_fields, describe, weight
from fxc.export.folder import Target, check_has_values
from fxc.export.packed import float_dtype
from fxc.frontend.calls import WithCache, calls_of
from fxc.frontend.check import tolerance
from fxc.ir.cache import SEQ2SEQ, cache_types, is_causal_lm
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.ir.structure import unflatten
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.float64 import SINGLE, computed_in
from fxc.safety import listed
from fxc.schemes.scheme import scheme_of
from fxc.source.load import quiet_transformers
from fxc.verify.compare import relative_error

_WEIGHTS = "model*.safetensors"
_OWN = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json"})


@dataclass(frozen=True)
class Exported:
    """What `export` wrote. config: the new configuration; changes: its fields that differ -> (before, after); zeros: weights
    that the program never reads, or biases that it has not, which are zero in the folder; warnings: what a tool that reads the
    folder may mind."""

    folder: Path
    config: Any
    changes: dict[str, tuple[Any, Any]]
    zeros: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def model_class(self) -> str:
        return self.config.architectures[0]

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return f"{self.model_class} ({self.config.model_type})"


def export(
    program: Program,
    config: Any,
    files: Mapping[str, Path | bytes],
    folder: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Exported:
    """Write `program` as a folder that `AutoModel.from_pretrained` loads without fxc: all of it, its outputs compared with
    the program's, or nothing.

    config: the configuration of the model which the program came from; files: tokenizer and generation files to put beside
    it; overwrite: replace `folder` if it holds nothing but such an export; sources: folders that may not be touched.

    Raises `UsageError` with the reason where no configuration says what the program is or its weights are quantized,
    `VerificationFailed` where the folder does not load or gives other outputs.
    """
    target = hugging_face_target("hf", folder, files, overwrite, sources)
    target.check()
    if quantized := FLOAT_WEIGHTS.check(program) or DENSE_WEIGHTS.check(program):
        formats = sorted({scheme.label for node in program.graph.nodes if (scheme := scheme_of(node.target))})
        plain = f"compile without {' and '.join(formats)} weights and export that"
        raise UsageError(
            "a quantized model has no plain Hugging Face form",
            why=quantized,
            hint=f"--format compressed-tensors, gguf or fxc; or {plain}",
        )
    check_has_values(program, folder)
    fit = describe(program, config)
    dtype = float_dtype(program, {})
    with quiet_transformers(), target.staged(program.nbytes()) as place:
        try:
            _filled(fit, program, dtype).save_pretrained(place)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise VerificationFailed(f"transformers does not save it: {first_line(error)}", where=folder) from error
        write(target.files, place)
        check_written(place, target.folder, fit, program, dtype)
    zeros = sorted(name for name in fit.missing if fit.model.state_dict()[name].is_floating_point())
    return Exported(target.folder, fit.config, changed_fields(config, fit.config), zeros)


def hugging_face_target(
    format: str, folder: str | Path, files: Mapping[str, Path | bytes], overwrite: bool, sources: Sequence[Path]
) -> Target:
    """A folder with config.json and safetensors, and of `files` all but the configuration that the model came with."""
    companions = {name: file for name, file in files.items() if name != "config.json"}
    kind = "Hugging Face folder with safetensors"
    return Target(Path(folder), format, kind, _WEIGHTS, _OWN, "config.json", companions, overwrite, sources)


def _filled(fit: Fit, program: Program, dtype: torch.dtype) -> nn.Module:
    """The model of the new configuration with the program's constants for its weights, which it shares."""
    stored: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, meant in fit.model.state_dict().items():
        fqn = fit.places.get(name)
        if fqn is None:
            state[name] = torch.zeros(meant.shape, dtype=dtype if meant.is_floating_point() else meant.dtype)
        else:
            state[name] = stored.setdefault(fqn, weight(program, fqn).contiguous())
    fit.model.load_state_dict(state, assign=True)
    fit.model.tie_weights()
    fit.model.config.dtype = dtype
    fit.model.config.architectures = [type(fit.model).__name__]
    return fit.model.eval()


def state_of(
    fit: Fit, program: Program, dtype: torch.dtype, packed: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of a folder by name. packed: weight as the model has it -> what is written in its place, by the last part of
    the name; dtype: of the zeros that stand for what the program has not."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, meant in fit.model.state_dict(keep_vars=True).items():
        fqn = fit.places.get(name)
        if id(meant) in seen:
            continue  # tied: the model knows that it is the same tensor
        seen.add(id(meant))
        if fqn in packed:
            layer = name.removesuffix(".weight")
            state |= {f"{layer}.{part}": tensor for part, tensor in packed[fqn].items()}
        elif fqn is None:
            state[name] = torch.zeros(meant.shape, dtype=dtype if meant.is_floating_point() else meant.dtype)
        else:
            # Of one constant under two names that the model does not tie, each is written.
            state[name] = weight(program, fqn).clone(memory_format=torch.contiguous_format)
    return state


def write_weights(place: Path, state: dict[str, Tensor], max_shard_bytes: int) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, place, max_shard_size=max_shard_bytes)


def write_config(place: Path, fit: Fit, quantization: dict[str, Any]) -> None:
    content = json.loads(fit.config.to_json_string()) | {"quantization_config": quantization}
    (place / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- verify


def check_written(
    place: Path, folder: Path, fit: Fit, program: Program, dtype: torch.dtype, allowed: float | None = None,
    prepare: Callable[[nn.Module], object] = nn.Module.eval,
) -> None:
    """Load the folder as anyone would, and run it beside the program. dtype: what is loaded; allowed: the relative error that
    the outputs may have, where it is not that of rounding to what is computed in; prepare: is given what was loaded.
    In bfloat16, which rounds away what a wrong configuration does, the same weights are compared in float32."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    try:
        with redirect_stderr(StringIO()):  # the bars of compressed-tensors, which nothing else switches off
            loaded, report = type(fit.model).from_pretrained(
                str(place), dtype=wide, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever transformers objects to
        raise VerificationFailed(f"the folder does not load: {first_line(error)}", where=folder) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [str(key) for key in report.get(kind) or ()]:
            raise VerificationFailed(f"the folder does not load as written: {kind}: {listed(names)}", where=folder)
    try:
        with redirect_stderr(StringIO()):
            prepare(loaded.eval())
            error = _error(loaded, in_float32(program) if wide != dtype else program, wide)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise VerificationFailed(f"what the folder loads as does not run: {first_line(error)}", where=folder) from error
    allowed = tolerance(wide) if allowed is None else allowed
    if not error <= allowed:
        left = sorted(set(program.constants) - set(fit.places.values()))
        raise VerificationFailed(
            f"the folder gives other outputs than the program: relative error {error:.1e}, and {allowed:.0e} is rounding",
            where=folder,
            why=f"what the model has no place for: {listed(left)}" if left else None,
            hint="nothing was written; fxc.load reads the artifact as it is",
        )


def _error(model: nn.Module, program: Program, dtype: torch.dtype) -> float:
    """The largest relative error of the model's outputs."""
    worst = 0.0
    for inputs in samples(program):
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        with torch.no_grad():
            found = _as_function(model, program, inputs)(*inputs)
        worst = max(worst, relative_error(found, run(program, inputs)))
    return worst


def in_float32(program: Program) -> Program:
    """The program with its types of two bytes made float32, packed weights as they are but for their scales."""
    return computed_in(program, SINGLE)


def _as_function(model: nn.Module, program: Program, inputs: list[Tensor]) -> nn.Module:
    """The model as a function of the program's flat inputs."""
    if is_causal_lm(program):
        return WithCache(model, len(cache_types(program)) // 2)
    if program.metadata.get("kind") in ("encoder", SEQ2SEQ):
        return next(calls_of(model, None)).module
    call = program.signature.call
    args = tuple(unflatten(a, inputs) for a in call["args"])
    return next(calls_of(model, args or {k: unflatten(v, inputs) for k, v in call["kwargs"].items()})).module
