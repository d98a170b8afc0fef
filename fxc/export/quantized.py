"""A Hugging Face folder of a model with packed weights, which transformers loads where fxc is imported.

    import fxc
    model = AutoModelForCausalLM.from_pretrained(folder)

`quantization_config` of its config.json names the layers: {"quant_method": "fxc", "version": ..., "layers": {layer: record}}. A
record is {"operator": as a program names it, "parts": {argument: [dtype, size, ...]}, "arguments": {argument: number}}, and
each part is a tensor LAYER.PART of the safetensors files: numbers and scales are the program's, bit for bit. A head that is
tied to a packed table has "parts_of", the name of the layer whose tensors its parts are. What is float is stored as in any
folder; "folded" are the batch norms that went into convolutions. It is loaded back, and its outputs compared with the
program's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxc.artifact.companions import write
from fxc.errors import UsageError
from fxc.export.configuration import Fit, changed_fields, describe
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
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import CONV2D, EMBEDDING, LINEAR, product_of
from fxc.source.load import quiet_transformers

TOOL = "transformers with fxc"
_SCALED = "ScaledWordEmbedding"  # Gemma's, Bart's and others': rows times embed_scale
BATCH_NORM = nn.modules.batchnorm._BatchNorm
_EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


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

    Raises `UsageError` where nothing is packed, with the layer and the reason where no packed layer takes the place of what the
    model has there, and where no configuration says what the model is; `VerificationFailed` where the folder does not load or
    gives other outputs.
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
    fit = describe(_as_float(program, packed), config)
    layers, parts = {}, {}
    for name, each in packed.items():
        records = _records(fit, name, each, tensors[name])
        layers |= records
        parts |= {f"{next(iter(records))}.{part}": tensor for part, tensor in tensors[name].items()}
    missing = set(fit.missing) - parts.keys()
    folded = _folded(fit.model, missing)
    gone = {name for names in folded.values() for name in names}
    dtype = float_dtype(program, packed)
    fit.config.dtype = dtype
    says = {"quant_method": "fxc", "version": metadata.version("fxc"), "layers": layers, "folded": sorted(folded)}
    with quiet_transformers(), target.staged(program.nbytes()) as place:
        state = state_of(fit, program, dtype, {name: {} for name in packed})
        write_weights(place, {name: state[name] for name in state.keys() - gone} | parts, max_shard_bytes)
        write(target.files, place)
        write_config(place, fit, says)
        rounds = any(product_of(node.target).activations for each in packed.values() for node in each.readers)
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        allowed = rounded_apart(in_float32(program)) if rounds else tolerance(wide)
        check_written(place, target.folder, fit, program, dtype, allowed, _by_definition)
    zeros = sorted(name for name in missing - gone if fit.model.state_dict()[name].is_floating_point())
    return Exported(target.folder, fit.config, changed_fields(config, fit.config), zeros)


def _folded(model: nn.Module, missing: set[str]) -> dict[str, set[str]]:
    """Batch norm -> the names of its numbers, of those that the program has nothing of: convolutions have them."""
    norms = {name: module.state_dict() for name, module in model.named_modules() if isinstance(module, BATCH_NORM)}
    names = {name: {f"{name}.{part}" for part in state} for name, state in norms.items() if state}
    return {name: theirs for name, theirs in names.items() if theirs <= missing}


def _by_definition(model: nn.Module) -> None:
    """Let packed layers run as a program says, and not in kernels, which may round once more: that is what is compared."""
    for module in model.modules():
        if hasattr(module, "by_definition"):
            module.by_definition = True


def layer_kind(model: nn.Module, name: str) -> OpOverload | None:
    """The operator that a program has for the layer `name` of a model of transformers, or for the weight of this name in a
    module of experts; None for what fxc puts no packed layer in the place of."""
    from transformers.pytorch_utils import Conv1D

    module, (path, _, last) = _submodule(model, name), name.rpartition(".")
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return LINEAR
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and type(module).__name__.endswith(_SCALED)):
        return EMBEDDING
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        return CONV2D
    experts = _submodule(model, path)
    if last in _EXPERTS and hasattr(experts, "_apply_gate") and not getattr(experts, "is_transposed", True):
        return GROUPED_LINEAR
    return None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _records(fit: Fit, name: str, each: Packed, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Layer -> record, of all that read the weight `name`, the layer that has its tensors first."""
    records: dict[str, Any] = {}
    if name not in fit.places.values():
        raise refused(each, TOOL, f"{type(fit.model).__name__} has no place for it", "fxc.load reads the artifact as it is")
    for place in sorted((place for place, fqn in fit.places.items() if fqn == name), key=list(fit.model.state_dict()).index):
        layer = place.removesuffix(".weight")
        kind = layer_kind(fit.model, layer)
        reader = next((node for node in each.readers if product_of(node.target).layer is kind), None)
        if reader is None:
            module = type(fit.model.get_submodule(place.rpartition(".")[0])).__name__
            raise refused(each, TOOL, f"{type(fit.model).__name__} has a {module} there, whose place no packed layer takes",
                          "leave it out with --skip; fxc.load reads the artifact as it is")  # fmt: skip
        records[layer] = _record(reader, tensors) | ({"parts_of": next(iter(records))} if records else {})
    return records


def _tensors(program: Program, each: Packed) -> dict[str, Tensor]:
    """Argument -> the constant that it is, of all that comes not with the call. Raises `UsageError` for what layers do not
    have."""
    ways: dict[OpOverload, dict[str, Any]] = {}
    for node in each.readers:
        way = {name: value.target if isinstance(value, fx.Node) else value for name, value in _arguments(node).items()}
        way[""] = node.target
        if ways.setdefault(product_of(node.target).layer, way) != way:
            raise refused(each, TOOL, "several layers read it in different ways", "leave it out with --skip")
    constants = {name: value for name, value in _arguments(each.readers[0]).items() if isinstance(value, fx.Node)}
    if computed := [name for name, value in constants.items() if value.op != "get_attr"]:
        raise refused(each, TOOL, f"its {computed[0]} is computed as the model runs", "leave it out with --skip")
    return {name: program.constants[value.target].contiguous() for name, value in constants.items()}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """What a record has of a product's arguments. The bias of a convolution is part of it, for that is often of a batch norm,
    where the model has none."""
    product = product_of(node.target)
    others = {"x", "indices", "offsets", "dtype"} | ({"bias"} if product.layer is not CONV2D else set())
    return {name: value for name, value in product.arguments(node.args).items() if name not in others}


def _as_float(program: Program, packed: Mapping[str, Packed]) -> Program:
    """As `as_float`, without what is part of a packed layer besides its weight."""
    made = as_float(program, packed)
    given = [value for each in packed.values() for value in _arguments(each.readers[0]).values()]
    parts = {value.target for value in given if isinstance(value, fx.Node)}
    made.constants = {name: tensor for name, tensor in made.constants.items() if name not in parts}
    return made


def _record(node: fx.Node, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    plain = {name: value for name, value in _arguments(node).items() if not isinstance(value, fx.Node) and value is not None}
    return {
        "operator": name_of(node.target),
        "parts": {name: [DTYPE_NAMES[tensor.dtype], *tensor.shape] for name, tensor in tensors.items()},
        "arguments": {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in plain.items()},
    }
