"""What transformers calls to load a folder that `CompiledModel.export_fxc` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxc.errors import InputRefused


@register_quantization_config("fxc")
class FxcConfig(QuantizationConfigMixin):
    """`quantization_config` of a config.json. layers: name of a linear layer -> what stands in its place, as
    `fxc.export.quantized` writes it; version: of the fxc that wrote it."""

    def __init__(self, layers: Mapping[str, Any] | None = None, version: str | None = None, **others: Any):
        self.quant_method = "fxc"
        if others.keys() - {"quant_method"} or not isinstance(layers, Mapping) or not layers:
            raise InputRefused(
                "this is not what fxc says of a quantized model",
                where="quantization_config",
                hint="fxc export OUT --format fxc -o FOLDER writes such a folder; upgrade fxc where a newer one wrote it",
            )
        self.layers = dict(layers)
        self.version = version


@register_quantizer("fxc")
class FxcQuantizer(HfQuantizer):
    """Puts layers with packed weights in the place of linear ones, which then run in fxc's kernels."""

    requires_calibration = True
    quantization_config: FxcConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from fxc.quantizer.layers import PackedLinear

        modules = dict(model.named_modules())
        for name, record in self.quantization_config.layers.items():
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear):
                found = f"a {type(layer).__name__} stands there" if layer is not None else f"{type(model).__name__} has no such"
                raise InputRefused("the model has no linear layer of this name", where=name, why=found,
                                   hint="load the folder by the class that its config.json names")  # fmt: skip
            model.set_submodule(name, PackedLinear(name, record, layer))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
