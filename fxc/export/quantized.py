"""A Hugging Face folder of a model with packed weights, which transformers loads where fxc is imported.

    import fxc
    model = AutoModelForCausalLM.from_pretrained(folder)

`quantization_config` of its config.json names the layers: {"quant_method": "fxc", "version": ..., "layers": {layer: record}}. A
record is {"operator": as a program names it, "parts": {argument: [dtype, size, ...]}, "arguments": {argument: number}}, and
each part is a tensor LAYER.PART of the safetensors files: numbers and scales are the program's, bit for bit. What is float is
stored as in any folder. It is loaded back, and its outputs compared with the program's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxc.artifact.companions import write
from fxc.errors import UsageError
from fxc.export.configuration import changed_fields, describe
from fxc.export.folder import check_has_values
from fxc.export.hugging_face import (
    Exported,
    check_written,
    hugging_face_target,
    in_float32,
    state_of,
    write_config,
    write_weights,
)
from fxc.export.packed import Packed, as_float, float_dtype, packed_weights, refused
from fxc.export.runs import rounded_apart
from fxc.frontend.check import tolerance
from fxc.ir.program import Program
from fxc.ir.targets import name_of
from fxc.ir.text import DTYPE_NAMES
from fxc.schemes.scheme import LINEAR, product_of
from fxc.source.load import quiet_transformers

TOOL = "transformers with fxc"


def export(
    program: Program,
    config: Any,
    files: Mapping[str, Path | bytes],
    folder: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Exported:
    """Write `program` as such a folder: all of it, loaded back and compared, or nothing. Arguments as of
    `compressed_tensors.export`.

    Raises `UsageError` where nothing is packed, with the layer and the reason where a packed weight is no linear layer's, and
    where no configuration says what the model is; `VerificationFailed` where the folder does not load or gives other outputs.
    """
    target = hugging_face_target("fxc", folder, files, overwrite, sources)
    target.check()
    check_has_values(program, folder)
    packed = packed_weights(program)
    if not packed:
        raise UsageError(
            "nothing in it is quantized", where=folder, hint="--format hf writes a model of float weights as a plain folder"
        )
    tensors = {name: _tensors(program, weight) for name, weight in packed.items()}
    fit = describe(as_float(program, packed), config)
    linear = {f"{name}.weight" for name, module in fit.model.named_modules(remove_duplicate=False) if type(module) is nn.Linear}
    layers = {}
    for name, each in packed.items():
        places = [place for place, fqn in fit.places.items() if fqn == name]
        if not places or not linear.issuperset(places):
            why = f"{type(fit.model).__name__} has other layers there than nn.Linear"
            raise refused(each, TOOL, why, "leave it out with --skip; fxc.load reads the artifact as it is")
        layers |= {place.removesuffix(".weight"): _record(each, tensors[name]) for place in places}
    dtype = float_dtype(program, packed)
    fit.config.dtype = dtype
    says = {"quant_method": "fxc", "version": metadata.version("fxc"), "layers": dict(sorted(layers.items()))}
    with quiet_transformers(), target.staged(program.nbytes()) as place:
        write_weights(place, state_of(fit, program, dtype, tensors), max_shard_bytes)
        write(target.files, place)
        write_config(place, fit, says)
        rounds = any(each.product.activations for each in packed.values())
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        allowed = rounded_apart(in_float32(program)) if rounds else tolerance(wide)
        check_written(place, target.folder, fit, program, dtype, allowed, _by_definition)
    zeros = sorted(name for name in fit.missing if fit.model.state_dict()[name].is_floating_point())
    return Exported(target.folder, fit.config, changed_fields(config, fit.config), zeros)


def _by_definition(model: nn.Module) -> None:
    """Let packed layers run as a program says, and not in kernels, which may round once more: that is what is compared."""
    for module in model.modules():
        if hasattr(module, "by_definition"):
            module.by_definition = True


def _tensors(program: Program, each: Packed) -> dict[str, Tensor]:
    """Argument -> the constant that it is, of all but the bias. Raises `UsageError` where it is no linear layer."""
    if any(product_of(node.target).layer is not LINEAR for node in each.readers):
        what = {3: "the experts of a mixture", 4: "a convolution"}.get(each.parts[each.scheme.numbers].ndim, "a packed table")
        why = f"it is {what}, read by other layers than linear ones, and those alone are put into a model of transformers"
        raise refused(each, TOOL, why, "leave it out with --skip, or compile without embeddings=; fxc.load reads it as it is")
    if len({(node.target, *node.args[1:]) for node in each.readers}) > 1:
        raise refused(each, TOOL, "several layers read it in different ways", "leave it out with --skip")
    constants = {name: value for name, value in _arguments(each).items() if isinstance(value, fx.Node)}
    if computed := [name for name, value in constants.items() if value.op != "get_attr"]:
        raise refused(each, TOOL, f"its {computed[0]} is computed as the model runs", "leave it out with --skip")
    return {name: program.constants[value.target].contiguous() for name, value in constants.items()}


def _arguments(each: Packed) -> dict[str, Any]:
    return {k: v for k, v in each.product.arguments(each.readers[0].args).items() if k not in ("x", "bias")}


def _record(each: Packed, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "operator": name_of(each.readers[0].target),
        "parts": {name: [DTYPE_NAMES[tensor.dtype], *tensor.shape] for name, tensor in tensors.items()},
        "arguments": {k: v for k, v in _arguments(each).items() if not isinstance(v, fx.Node) and v is not None},
    }
