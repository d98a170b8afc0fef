"""Layers with packed weights, inside a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

import fxc.schemes  # noqa: F401 - a record names its operators
from fxc.compiled.model import CompiledModel
from fxc.errors import InputRefused, UsageError, first_line
from fxc.ir.edit import constant, insert
from fxc.ir.infer import new_symbols
from fxc.ir.program import Input, Program, Signature
from fxc.ir.targets import resolve
from fxc.ir.text import DTYPES
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import CONV2D, EMBEDDING, LINEAR, product_of

_TWO_BYTES = (torch.bfloat16, torch.float16)
_GIVEN = frozenset({"x", "indices", "offsets", "dtype"})
"""Arguments of products that no record has: they come with the call. A bias is the layer's own, or a part where it has none."""
_PLAIN = (int, float, bool)


class Packed(nn.Module):
    """What stands in the place of a layer: its parts are buffers, in the dtypes that they are stored in. Has no gradient.

    record: operator (as a program names it), parts (argument -> dtype and shape), arguments (others: numbers, lists of them).
    owner: the layer whose parts they are, where several layers read one weight: then it has none of its own. like: the
    weight in whose place they are. Raises `InputRefused` for a record that is not of such a layer.
    """

    stands_for: OpOverload
    """The operator over float weights that it computes instead."""

    def __init__(self, name: str, record: Mapping[str, Any], like: Tensor, owner: Packed | None = None):
        super().__init__()
        self.name = name
        self.operator, self.arguments, parts = _checked(name, record, self.stands_for)
        self.parts = tuple(parts)
        self._owner = (owner,)  # in a tuple, so that it is no submodule
        for part, (dtype, *shape) in parts.items():
            made = torch.empty(shape, dtype=DTYPES[dtype], device=like.device)
            if owner is None:
                self.register_buffer(part, made)
            elif (found := getattr(owner, part, None)) is None or (found.dtype, found.shape) != (made.dtype, made.shape):
                raise _not_known(name, f"{owner.name} has no {part} of {record['parts'][part]}")
        # Models ask a layer's weight for its dtype, and transformers one that has a bias for its rows.
        self.register_buffer("weight", torch.empty(len(like), 0, dtype=like.dtype, device=like.device), persistent=False)

    def part(self, name: str) -> Tensor:
        return getattr(self._owner[0] or self, name)

    def given(self, **others: Any) -> list[Any]:
        """The arguments of a call of the operator, in its order: parts, numbers, and what comes with the call."""
        values = self.arguments | {name: self.part(name) for name in self.parts} | others
        return [values.get(argument.name) for argument in self.operator._schema.arguments]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Buffers move between devices and keep their dtypes: those are the format's."""
        kept = {} if self._owner[0] else {part: self.part(part) for part in self.parts}
        super()._apply(fn, recurse)
        for part, tensor in kept.items():
            if getattr(self, part).dtype != tensor.dtype:
                setattr(self, part, tensor.to(getattr(self, part).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"operator": _text_of(self.operator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"operator": resolve(state["operator"])})

    def extra_repr(self) -> str:
        return _text_of(self.operator)


class _Lowered(Packed):
    """A layer whose product is chosen for device, dtype and machine at the first call, as `fxc.load` chooses. by_definition:
    compute what the operator says, in no kernel."""

    def __init__(self, name: str, record: Mapping[str, Any], layer: nn.Module, owner: Packed | None = None):
        super().__init__(name, record, layer.weight, owner)
        if "bias" not in self.parts:
            self.register_parameter("bias", layer.bias)
        self.by_definition = False
        self._programs: dict[tuple[torch.device, torch.dtype], CompiledModel] = {}

    def sizes(self) -> list[int | None]:
        """The sizes of an input, None for those that vary."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _WithoutGradient.apply(x, self)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.by_definition:
            return self.operator(*self.given(**({"x": x, "bias": self.bias} | self._parts_for(x.dtype))))
        key = x.device, x.dtype
        program = self._programs.get(key)
        if program is None:
            program = self._compiled(*key)
            self._programs = {key: program}  # another thread may ask for another dtype
        return program.run([x])[0]

    def _parts_for(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts, for activations of `dtype`: operators take scales of that or of float32, and a model whose scales are
        stored in two bytes may be loaded in another type."""
        parts = {part: self.part(part) for part in self.parts}
        wide = {part: t.float() for part, t in parts.items() if t.dtype in _TWO_BYTES and t.dtype != dtype}
        return parts | wide

    def _compiled(self, device: torch.device, dtype: torch.dtype) -> CompiledModel:
        """The layer as a program, whose weights are the buffers."""
        sizes = self.sizes()
        mode, symbols = new_symbols([1024 + at for at in range(sizes.count(None))])  # no window is larger than the example
        signature = Signature([Input("x")], ["out"], {"args": [0], "kwargs": {}}, 0)
        program = Program(fx.Graph(), {}, {}, signature, {"class": type(self).__name__, "kind": "module"})
        x = program.graph.placeholder("input_0")
        with mode:
            left = iter(symbols)
            x.meta["val"] = torch.empty([next(left) if size is None else size for size in sizes], dtype=dtype)
        out = program.graph.output((x,))
        tensors = self._parts_for(dtype) | ({} if self.bias is None else {"bias": self.bias.to(dtype)})
        read = {part: constant(program, f"{self.name}.{part}", t.detach(), before=out) for part, t in tensors.items()}
        try:
            y = insert(program, self.operator, tuple(self.given(**read, x=x)), before=out, by="", fqn=self.name)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _not_known(self.name, first_line(error)) from None
        out.args = ((y,),)
        return CompiledModel(program, {}, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        super()._apply(fn, recurse)
        self._programs = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._programs = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without what was made for this machine."""
        return super().__getstate__() | {"_programs": {}}


class PackedLinear(_Lowered):
    """In the place of a `nn.Linear`, or of the like of GPT-2 that stores its weight transposed."""

    stands_for = LINEAR

    def __init__(self, name: str, record: Mapping[str, Any], layer: nn.Module, owner: Packed | None = None):
        super().__init__(name, record, layer, owner)
        rows = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        self.out_features, self.in_features = rows

    def sizes(self) -> list[int | None]:
        return [None, self.in_features]

    def _run(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        return super()._run(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {_text_of(self.operator)}"


class PackedConv2d(_Lowered):
    """In the place of a `nn.Conv2d`."""

    stands_for = CONV2D

    def __init__(self, name: str, record: Mapping[str, Any], layer: nn.Conv2d, owner: Packed | None = None):
        super().__init__(name, record, layer, owner)
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups

    def sizes(self) -> list[int | None]:
        """x [B, C, H, W] -> [B, N, H', W'] in the dtype of x."""
        return [None, self.in_channels, None, None]


class PackedEmbedding(Packed):
    """In the place of a `nn.Embedding`: rows become floats when they are looked up, in the dtype that the model has here. Of
    one of transformers' scaled embeddings, as Gemma has, they are multiplied as there."""

    stands_for = EMBEDDING

    def __init__(self, name: str, record: Mapping[str, Any], layer: nn.Embedding, owner: Packed | None = None):
        super().__init__(name, record, layer.weight, owner)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        # Where the factor is a buffer it has no value before the weights are loaded, and is rounded as they are.
        self.rounded_scale = getattr(layer, "scalar_embed_scale", None)
        self.embed_scale = getattr(layer, "embed_scale", None) if self.rounded_scale is None else None

    def forward(self, indices: Tensor) -> Tensor:
        """indices [...] -> [..., K]"""
        rows = self.operator(*self.given(indices=indices, dtype=self.weight.dtype))
        if self.rounded_scale is not None:
            return rows * torch.tensor(self.rounded_scale, dtype=rows.dtype, device=rows.device)
        return rows if self.embed_scale is None else rows * self.embed_scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_text_of(self.operator)}"


class PackedRows(Packed):
    """In the place of one weight [experts, N, K] of a mixture."""

    stands_for = GROUPED_LINEAR

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [T, K] sorted by expert, ends int32 [experts], where the rows of each end -> [T, N]"""
        return self.operator(*self.given(x=x, offsets=ends))


class PackedExperts(nn.Module):
    """In the place of a module of experts which transformers runs by any of its implementations: all of it but the weights
    that are packed (`pack`) is the module's."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.__dict__.update(experts.__dict__)
        self._gate = type(experts)._apply_gate

    def pack(self, name: str, rows: PackedRows) -> None:
        delattr(self, name)
        self.add_module(name, rows)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], the experts of each token top_k_index int64 [T, k] and what they weigh, [T, k] -> [T, H]"""
        tokens, chosen = top_k_index.shape
        experts, order = top_k_index.flatten().sort()
        ends = torch.bincount(experts, minlength=self.num_experts).cumsum(0).to(torch.int32)
        x = self._product("gate_up_proj" if self.has_gate else "up_proj", hidden_states[order // chosen], experts, ends)
        x = self._gate(self, x) if self.has_gate else self.act_fn(x)
        x = self._product("down_proj", x, experts, ends)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * top_k_weights.flatten()[order, None]
        # In the order of the tokens again, and not added in place, whose order is not the same on every device.
        x = torch.empty_like(x).index_copy_(0, order, x)
        return x.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        weight = getattr(self, name)
        y = weight(x, ends) if isinstance(weight, PackedRows) else GROUPED_LINEAR(x, weight, ends)
        return y + getattr(self, f"{name}_bias")[experts] if self.has_bias else y


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Lowered) -> Tensor:
        ctx.name = layer.name
        return layer._run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UsageError(
            "a layer with a packed weight has no gradient", where=ctx.name, hint="train the original, or use fxc recover"
        )


def _text_of(operator: OpOverload) -> str:
    return str(operator).removesuffix(".default")


def _checked(name: str, record: Any, stands_for: OpOverload) -> tuple[OpOverload, dict[str, Any], dict[str, list]]:
    """The operator, its plain arguments and its parts, of a record that anybody may have written."""
    try:
        operator = resolve(record["operator"])
        parts, arguments = dict(record["parts"]), dict(record["arguments"])
        names = {argument.name for argument in operator._schema.arguments} - _GIVEN
        sound = (
            getattr(product_of(operator), "layer", None) is stands_for
            and parts.keys() <= names and arguments.keys() <= names - parts.keys()
            and all(dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape) for dtype, *shape in parts.values())
            and all(type(each) in _PLAIN or each is None for value in arguments.values()
                    for each in (value if type(value) is list else [value]))
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_known(name, error) from None
    if not sound:
        raise _not_known(name, record)
    return operator, arguments, parts


def _not_known(name: str, why: object) -> InputRefused:
    return InputRefused("this says no layer that fxc knows", where=f"quantization_config, {name}", why=why,
                        hint="the folder was damaged, or a newer fxc or a plugin wrote it")  # fmt: skip
