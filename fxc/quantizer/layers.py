"""A linear layer with a packed weight, inside a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import fxc.schemes  # noqa: F401 - a record names its operators
from fxc.compiled.model import CompiledModel
from fxc.errors import InputRefused, UsageError
from fxc.ir.parse import parse_program
from fxc.ir.targets import resolve
from fxc.ir.text import DTYPE_NAMES, DTYPES, tensor_type
from fxc.schemes.scheme import LINEAR, product_of

_TWO_BYTES = (torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """What stands in the place of a `nn.Linear`: its parts are buffers, in the dtypes that they are stored in, and its product
    is chosen for device, dtype and machine at the first call, as `fxc.load` chooses. Has no gradient. by_definition: compute
    what the operator says, in no kernel.

    record: operator (as a program names it), parts (argument -> dtype and shape), arguments (others, plain values). layer: the
    float layer, on any device. Raises `InputRefused` for a record that is not of such a layer.
    """

    def __init__(self, name: str, record: Mapping[str, Any], layer: nn.Linear):
        super().__init__()
        self.name, self.in_features, self.out_features = name, layer.in_features, layer.out_features
        self.operator, self.arguments, parts = _checked(name, record)
        with torch.device(layer.weight.device):
            for part, (dtype, *shape) in parts.items():
                self.register_buffer(part, torch.empty(shape, dtype=DTYPES[dtype]))
        self.register_parameter("bias", layer.bias)
        self.register_parameter("weight", None)  # T5 asks for its dtype where it is a tensor
        self.parts, self.by_definition = tuple(parts), False
        self._programs: dict[tuple[torch.device, torch.dtype], CompiledModel] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithoutGradient.apply(x, self)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.by_definition:
            names = [argument.name for argument in self.operator._schema.arguments]
            values = self.arguments | self._parts_for(x.dtype) | {"x": x, "bias": self.bias}
            return self.operator(*map(values.get, names))
        key = x.device, x.dtype
        program = self._programs.get(key)
        if program is None:
            program = self._compiled(*key)
            self._programs = {key: program}  # another thread may ask for another dtype
        (y,) = program.run([x.reshape(-1, self.in_features)])
        return y.view(*x.shape[:-1], self.out_features)

    def _parts_for(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts, for activations of `dtype`: operators take scales of that or of float32, and a model whose scales are
        stored in two bytes may be loaded in another type."""
        parts = {part: getattr(self, part) for part in self.parts}
        wide = {part: t.float() for part, t in parts.items() if t.dtype in _TWO_BYTES and t.dtype != dtype}
        return parts | wide

    def _compiled(self, device: torch.device, dtype: torch.dtype) -> CompiledModel:
        """The layer as a program, whose weights are the buffers."""
        names = [argument.name for argument in self.operator._schema.arguments]
        constants = {f"{self.name}.{part}": tensor.detach() for part, tensor in self._parts_for(dtype).items()}
        if self.bias is not None:
            constants[f"{self.name}.bias"] = self.bias.detach().to(dtype)
        written = {name: f"@{self.name}.{name}" if f"{self.name}.{name}" in constants else None for name in names}
        written = {name: str(self.arguments.get(name)) if at is None else at for name, at in written.items()} | {"x": "%0"}
        kind = DTYPE_NAMES[dtype]
        lines = [
            "fxc program 1", 'metadata {"class": "PackedLinear", "kind": "module"}', 'call {"args": [0], "kwargs": {}}',
            "result 0", "symbol s0 = 2",
            *(f"constant @{fqn}: {tensor_type(t.dtype, t.shape)}" for fqn, t in sorted(constants.items())),
            f'%0: {kind}[s0, {self.in_features}] = input "x"',
            f"%1: {kind}[s0, {self.out_features}] = {_text_of(self.operator)}({', '.join(written[n] for n in names)})"
            f"  # {self.name}",
            'return "out" %1',
        ]  # fmt: skip
        return CompiledModel(parse_program("\n".join(lines) + "\n", constants), {}, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Buffers move between devices and keep their dtypes: those are the format's."""
        kept = {part: getattr(self, part) for part in self.parts}
        super()._apply(fn, recurse)
        for part, tensor in kept.items():
            if getattr(self, part).dtype != tensor.dtype:
                setattr(self, part, tensor.to(getattr(self, part).device))
        self._programs = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._programs = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without what was made for this machine."""
        return self.__dict__ | {"_programs": {}, "operator": _text_of(self.operator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"operator": resolve(state["operator"])})

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {_text_of(self.operator)}"


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.name = layer.name
        return layer._run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UsageError(
            "a layer with a packed weight has no gradient", where=ctx.name, hint="train the original, or use fxc recover"
        )


def _text_of(operator: OpOverload) -> str:
    return str(operator).removesuffix(".default")


def _checked(name: str, record: Any) -> tuple[OpOverload, dict[str, Any], dict[str, list]]:
    """The operator, its plain arguments and its parts, of a record that anybody may have written."""
    try:
        operator = resolve(record["operator"])
        parts, arguments = dict(record["parts"]), dict(record["arguments"])
        names = {argument.name for argument in operator._schema.arguments} - {"x", "bias"}
        sound = (
            getattr(product_of(operator), "layer", None) is LINEAR
            and parts.keys() <= names and arguments.keys() <= names - parts.keys()
            and all(dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape) for dtype, *shape in parts.values())
            and all(type(value) in (int, float, bool) or value is None for value in arguments.values())
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused("this says no layer that fxc knows", where=f"quantization_config, {name}", why=error,
                           hint="the folder was damaged, or a newer fxc or a plugin wrote it") from None  # fmt: skip
    if not sound:
        raise InputRefused("this says no layer that fxc knows", where=f"quantization_config, {name}", why=record,
                           hint="the folder was damaged, or a newer fxc or a plugin wrote it")  # fmt: skip
    return operator, arguments, parts
