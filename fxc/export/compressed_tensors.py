"""A Hugging Face folder of a quantized model in the compressed-tensors format, which vLLM and transformers load.

Numbers and scales are the program's, bit for bit, in other words at most:

    fxc                                       folder, for each layer
    int8    qweight i8[N, K], scale [N]       int-quantized    weight i8[N, K], weight_scale [N, 1]
    int8 weight-only                          pack-quantized   weight_packed i32[N, K/4] (q + 128), weight_scale [N, 1]
    int4    qweight u8[N, K/2], scale         pack-quantized   weight_packed i32[N, K/8], weight_scale [N, K/group]
            [N, K/group], no zero points      (and int3, int2: both are one stream of bits, the lowest first)
    fp8     qweight f8[N, K], scale [N]       float-quantized  weight f8[N, K], weight_scale [N, 1]

The format is that of the package compressed-tensors (https://github.com/vllm-project/compressed-tensors). The folder is loaded
back by it and transformers, and its outputs compared with the program's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.safety import listed
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import EMBEDDING, LINEAR, product_of
from fxc.source.load import quiet_transformers

TOOL = "compressed-tensors"


@dataclass(frozen=True)
class _Form:
    """How layers are held: the name of the format, and what it says of weights and of activations. Two layers of one form are
    in one group."""

    format: str
    bits: int
    type: str
    group: int | None = None
    activations: str | None = None

    def as_group(self, targets: Sequence[str]) -> dict[str, Any]:
        weights = {"num_bits": self.bits, "type": self.type, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        inputs = None
        if self.activations:
            # fxc rounds each token to int8 with a zero point, and to fp8 without.
            inputs = {"num_bits": 8, "type": self.type, "symmetric": self.activations == "symmetric", "dynamic": True}
            inputs |= {"strategy": "token"}
        return {
            "targets": list(targets), "format": self.format, "weights": weights, "input_activations": inputs,
            "output_activations": None,
        }  # fmt: skip

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.group else ""
        return f"{self.type}{self.bits}{group}{' with rounded activations' if self.activations else ''}"


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
    """Write `program` as a compressed-tensors folder: all of it, loaded back and compared, or nothing. Arguments as of
    `hugging_face.export`; max_shard_bytes: where the weights are split into files.

    Raises `UsageError` where compressed-tensors is not installed, where nothing is quantized, with the layer and the reason
    where the format has no place for it, and where no configuration says what the model is; `VerificationFailed` where the
    folder does not load or gives other outputs.
    """
    target = hugging_face_target("compressed-tensors", folder, files, overwrite, sources)
    target.check()
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UsageError(
            "compressed-tensors reads back what is exported, and is not installed",
            where="--format compressed-tensors",
            hint="pip install 'fxc[compressed-tensors]'",
        )
    check_has_values(program, folder)
    packed = packed_weights(program)
    if not packed:
        raise UsageError(
            "nothing in it is quantized", where=folder, hint="--format hf writes a model of float weights as a plain folder"
        )
    forms = {name: _form(weight) for name, weight in packed.items()}
    fit = describe(as_float(program, packed), config)
    linear = _linear_layers(fit)
    for name, each in packed.items():
        if not any(fit.places[place] == name for place in linear):
            kind = type(fit.model.get_submodule(each.layer)).__name__
            raise refused(each, TOOL, f"{type(fit.model).__name__} has a {kind} there, and the format is for nn.Linear",
                          "leave it out with --skip")  # fmt: skip
    dtype = float_dtype(program, packed)
    fit.config.dtype = dtype
    with quiet_transformers(), target.staged(program.nbytes()) as place:
        stored = {name: _stored(each, forms[name]) for name, each in packed.items()}
        write_weights(place, state_of(fit, program, dtype, stored), max_shard_bytes)
        write(target.files, place)
        write_config(place, fit, _quantization(fit, linear, forms))
        rounds = any(form.activations for form in forms.values())
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        allowed = rounded_apart(in_float32(program)) if rounds else tolerance(wide)
        check_written(place, target.folder, fit, program, dtype, allowed)
    zeros = sorted(name for name in fit.missing if fit.model.state_dict()[name].is_floating_point())
    made = Exported(target.folder, fit.config, changed_fields(config, fit.config), zeros)
    return replace(made, warnings=_what_vllm_minds(program, packed, forms))


def _form(each: Packed) -> _Form:
    """How compressed-tensors holds this weight. Raises `UsageError` where it does not."""
    product = each.product
    if product.layer is EMBEDDING or any(product_of(node.target).layer is EMBEDDING for node in each.readers):
        why = "its readers take tables of embeddings in float only"
        raise refused(each, TOOL, why, "compile without embeddings=; --format gguf and --format fxc hold packed tables")
    if product.layer is GROUPED_LINEAR:
        why = "transformers keeps the experts of a mixture as one weight, which the package does not pack"
        raise refused(each, TOOL, why, "leave the experts out with --skip; --format fxc holds them")
    if product.layer is not LINEAR:
        raise refused(each, TOOL, f"it stands for {product.layer}", "leave it out with --skip")
    if product.learned:
        hint = "compile without mode=static: activations are then rounded by each token's own range"
        raise refused(each, TOOL, "this export writes no static ranges of activations", hint)
    activations = product.activations is not None
    match each.scheme.name:
        case "int8" if activations:
            return _Form("int-quantized", 8, "int", activations="asymmetric")
        case "int8":
            return _Form("pack-quantized", 8, "int")
        case "int4" | "int3" | "int2" if "zero" in each.parts:
            why = "it has zero points, and transformers reads asymmetric packed weights wrongly"
            raise refused(each, TOOL, why, "compile with symmetric=true, which is the default of int4")
        case "int4" | "int3" | "int2":
            return _Form("pack-quantized", int(each.scheme.name[-1]), "int", each.argument("group"))
        case "fp8":
            return _Form("float-quantized", 8, "float", activations="symmetric" if activations else None)
    why = "the format has dropped 2:4 sparsity" if each.scheme.is_sparse else "it has no such numbers"
    raise refused(each, TOOL, why, "compile with int8, int4 or fp8 instead")


# ------------------------------------------------------------------------------------------------------------------- write


def _linear_layers(fit: Fit) -> dict[str, str]:
    """Name of the weight -> its module, of all linear layers of the model."""
    modules = fit.model.named_modules(remove_duplicate=False)
    linear = {f"{name}.weight": name for name, module in modules if isinstance(module, nn.Linear)}
    return {weight: name for weight, name in linear.items() if weight in fit.places}


def _stored(each: Packed, form: _Form) -> dict[str, Tensor]:
    numbers, scale = each.parts["qweight"], each.parts["scale"]
    scale = scale[:, None] if form.group is None else scale
    if form.format != "pack-quantized":
        return {"weight": numbers.contiguous(), "weight_scale": scale.contiguous()}
    if form.bits == 8:
        numbers = numbers.view(torch.uint8) ^ 0x80  # q + 128
        numbers = nn.functional.pad(numbers, (0, -numbers.shape[1] % 4))
    # A row fills whole words: groups are multiples of 32 numbers.
    packed = numbers.contiguous().view(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale.contiguous(), "weight_shape": torch.tensor(each.shape)}


def _quantization(fit: Fit, linear: Mapping[str, str], forms: Mapping[str, _Form]) -> dict[str, Any]:
    import compressed_tensors

    layers: dict[_Form, list[str]] = {}
    for name, module in linear.items():
        if fit.places[name] in forms:
            layers.setdefault(forms[fit.places[name]], []).append(module)
    # One form: all that is linear but what is named. Several: each layer by its name, for a class of modules would match all.
    single = len(layers) == 1
    groups = {f"group_{n}": form.as_group(["Linear"] if single else names) for n, (form, names) in enumerate(layers.items())}
    formats = {form.format for form in layers}
    return {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [module for name, module in linear.items() if fit.places[name] not in forms],
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
    }


# -------------------------------------------------------------------------------------------------------------------- vLLM


def _what_vllm_minds(program: Program, packed: Mapping[str, Packed], forms: Mapping[str, _Form]) -> list[str]:
    """What transformers loads and vLLM may refuse, by layer."""
    found, unlike = [], []
    for layers in _fused(program):
        kinds = {layer: str(forms[name]) if (name := f"{layer}.weight") in forms else "float" for layer in layers}
        if len(set(kinds.values())) > 1:
            unlike.append(", ".join(f"{layer} is {kind}" for layer, kind in kinds.items()))
    if unlike:
        more = f"; and {len(unlike) - 1} more like it" if len(unlike) > 1 else ""
        found.append(f"vLLM computes layers that read the same as one, in one format, and refuses this: {unlike[0]}{more}")
    odd = {forms[name].bits: each.layer for name, each in packed.items() if forms[name].bits < 4}
    found += [f"vLLM has no kernels for {bits} bits, as of {layer}; transformers loads it" for bits, layer in odd.items()]
    heads = [each.layer for each in packed.values() if each.shape[0] > 8 * each.shape[1] and "." not in each.layer]
    if heads:
        found.append(f"some versions of vLLM want the head of a language model in float: {listed(heads)}")
    return found


def _fused(program: Program) -> list[list[str]]:
    """Layers of one module that read the same value, which vLLM makes one layer of."""
    layers: dict[tuple[str, str], list[str]] = {}
    for node in program.graph.nodes:
        product = product_of(node.target)
        if node.target is LINEAR or (product and product.layer is LINEAR):
            layer = layer_at(program, node)
            layers.setdefault((node.args[0].name, layer.rpartition(".")[0]), []).append(layer)
    return [names for names in layers.values() if len(names) > 1]
