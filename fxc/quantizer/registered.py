"""What transformers calls to load a folder that `CompiledModel.export_fxc` wrote."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxc.errors import InputRefused
from fxc.export.quantized import BATCH_NORM, layer_kind
from fxc.quantizer.layers import Packed, PackedConv2d, PackedEmbedding, PackedExperts, PackedLinear, PackedRows
from fxc.schemes.ops import GROUPED_LINEAR

_BY_CLASS = "load the folder by the class that its config.json names"
_PACKED = {kind.stands_for: kind for kind in (PackedLinear, PackedEmbedding, PackedConv2d)}


@register_quantization_config("fxc")
class FxcConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json. layers: name of a layer -> what stands in its place, as
    `fxc.export.quantized` writes it; folded: batch norms that went into them, which then do nothing; version: of the fxc that
    wrote it."""

    def __init__(
        self, layers: Mapping[str, Any] | None = None, version: str | None = None, folded: Sequence[str] = (), **others: Any
    ):
        self.quant_method = "fxc"
        known = isinstance(layers, Mapping) and layers and isinstance(folded, Sequence) and not others.keys() - {"quant_method"}
        if not known:
            raise InputRefused(
                "this is not what fxc says of a quantized model",
                where="quantization_config",
                hint="fxc export OUT --format fxc -o FOLDER writes such a folder; upgrade fxc where a newer one wrote it",
            )
        self.layers, self.folded = dict(layers), list(folded)
        self.version = version


@register_quantizer("fxc")
class FxcQuantizer(HfQuantizer):
    """Puts layers with packed weights in the place of float ones, which then run in fxc's kernels."""

    requires_calibration = True
    quantization_config: FxcConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        records = self.quantization_config.layers
        kinds = {name: layer_kind(model, name) for name in records}
        modules = dict(model.named_modules())
        made: dict[str, Packed] = {}
        # Those whose parts are another's last.
        for name, record in sorted(records.items(), key=lambda item: _owner_of(item[1]) is not None):
            if kinds[name] is None:
                there = f"a {type(modules[name]).__name__} is there" if name in modules else f"{type(model).__name__} has none"
                raise InputRefused("it is no layer of the model that can be packed", where=name, why=there, hint=_BY_CLASS)
            owner = _owner_of(record)
            if owner is not None and owner not in made:
                raise InputRefused("its parts are those of a layer that is not there", where=name, why=owner, hint=_BY_CLASS)
            if kinds[name] is GROUPED_LINEAR:
                path, _, weight = name.rpartition(".")
                experts = model.get_submodule(path)
                made[name] = PackedRows(name, record, getattr(experts, weight), made.get(owner))
                if not isinstance(experts, PackedExperts):
                    experts = PackedExperts(experts)
                    model.set_submodule(path, experts)
                experts.pack(weight, made[name])
            else:
                made[name] = _PACKED[kinds[name]](name, record, model.get_submodule(name), made.get(owner))
                model.set_submodule(name, made[name])
        for name in self.quantization_config.folded:
            if not isinstance(modules.get(name), BATCH_NORM):
                raise InputRefused("the model has no batch norm of this name", where=name, hint=_BY_CLASS)
            model.set_submodule(name, nn.Identity())
        _untie(model, made)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _owner_of(record: Any) -> str | None:
    return record.get("parts_of") if isinstance(record, Mapping) else None


def _untie(model: nn.Module, packed: Collection[str]) -> None:
    """Let transformers tie no packed weight: what reads another layer's parts knows that layer."""
    gone = {f"{name}.weight" for name in packed}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names = {name.removeprefix(f"{prefix}.") for name in gone}
        if tied := getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {k: v for k, v in tied.items() if names.isdisjoint((k, v))}
        # What it asks to tie again: names, or regular expressions of them.
        if asked := getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = {
                k: v for k, v in asked.items() if not any(re.match(pattern, name) for pattern in (k, v) for name in names)
            }
