"""A language model as weights by name, layer by layer, each with the sizes that it has: what needs no configuration.

    model.layers.0.self_attn.q_proj.weight   [heads * width, hidden]
    model.layers.1.mlp.up_proj.weight        [channels, hidden]

Layers that are gone are counted anew. A layer that has lost its attention, or its feed-forward part, is given one of zeros,
which adds nothing: other tools expect both. Whether these weights are all that the program does is tried: transformers
computes with them, each layer by its own sizes, and has to give what the program gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.export.configuration import class_of, weight
from fxc.export.hugging_face import in_float32
from fxc.export.packed import Packed, packed_weights, without_rounding
from fxc.frontend.check import tolerance
from fxc.ir.cache import empty_cache, is_causal_lm
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.source.load import quiet_transformers
from fxc.verify.compare import relative_error

_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")
_ATTENTION, _FFN = "self_attn", "mlp"
ZEROS = 32
"""Channels of a feed-forward part of zeros: a block of the formats that have blocks."""


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Layers:
    """weights: name in the model -> float tensor or packed weight; sizes: of each layer; width: of a head; kept: the number
    that each layer had; added: names of the weights of zeros that were put in; repeated: layers whose keys and values are
    stored once for each query head, because their heads share them unevenly."""

    weights: Mapping[str, Tensor | Packed]
    sizes: tuple[Sizes, ...]
    width: int
    kept: tuple[int, ...]
    added: frozenset[str]
    repeated: tuple[str, ...] = ()

    @property
    def is_uniform(self) -> bool:
        return len(set(self.sizes)) == 1


def layers_of(program: Program, config: Any) -> Layers:
    """The layers of a causal language model whose modules are called as in Llama's line of models (layers.N.self_attn.q_proj,
    mlp.gate_proj). config: of the model that the program came from. Raises `UsageError` with the reason where it is none, or
    where the sizes of a layer are not those of whole heads."""
    if not is_causal_lm(program):
        raise UsageError("it is no causal language model", where=program.metadata.get("class"))
    packed = packed_weights(program)
    parts = {id(part) for each in packed.values() for part in each.parts.values()}
    found: dict[str, Tensor | Packed] = dict(packed)
    found |= {fqn: weight(program, fqn) for fqn, tensor in program.constants.items() if id(tensor) not in parts}
    found |= {name: found[fqn] for name, fqn in program.aliases.items() if fqn in found}
    numbers = sorted({int(match[2]) for name in found if (match := _LAYER.fullmatch(name))})
    anew = {old: new for new, old in enumerate(numbers)}
    named = {_renumbered(name, anew): tensor for name, tensor in found.items()}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prefix = next((match[1] for name in found if (match := _LAYER.fullmatch(name))), None)
    if prefix is None:
        raise UsageError("it has no list of layers", where=program.metadata.get("class"))
    sizes, added, repeated = [], {}, []
    for number in range(len(numbers)):
        place = f"{prefix}.{number}"
        if index := [name for name in named if name.startswith(f"{place}.{_ATTENTION}.kv_index")]:
            named |= _repeated(named, place, index, width)
            repeated.append(place)
        made = _zeros(named, place, width, config)
        added |= made
        named |= made
        sizes.append(_sizes(named, place, width))
    return Layers(named, tuple(sizes), width, tuple(numbers), frozenset(added), tuple(repeated))


def check_computes(program: Program, config: Any, layers: Layers) -> None:
    """Raises `VerificationFailed` where transformers, computing with these weights in float32, gives other logits than the
    program. Activations are rounded in neither: each tool rounds them in its own way."""
    model = _model(program, config, layers)
    wide = in_float32(without_rounding(program))
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (2, 12), generator=torch.Generator().manual_seed(0))
    past = [each.float() for each in empty_cache(wide, len(ids))]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).logits
    error = relative_error([found], [run(wide, [ids, torch.ones_like(ids), positions, *past])[0]])
    if not error <= tolerance(torch.float32):
        raise VerificationFailed(
            f"the weights by their names compute something else than the program: relative error {error:.1e}",
            where=program.metadata.get("class"),
            why="a pass has put something between the layers that has no name in the model, as smooth does",
            hint="compile without that pass; fxc.load reads the artifact as it is",
        )


# ------------------------------------------------------------------------------------------------------------------- layers


def _renumbered(name: str, anew: Mapping[int, int]) -> str:
    match = _LAYER.fullmatch(name)
    return name if match is None else f"{match[1]}.{anew[int(match[2])]}.{match[3]}"


def _repeated(
    named: Mapping[str, Tensor | Packed], place: str, index: Sequence[str], width: int
) -> dict[str, Tensor | Packed]:
    """Keys and values of a layer with a copy for each query head, where `index` says which of them each head reads."""
    heads = named[index[0]]
    if any(not torch.equal(named[each], heads) for each in index):
        raise UsageError("its queries read other keys than values", where=f"{place}.{_ATTENTION}")
    rows = (heads[:, None] * width + torch.arange(width)).flatten()
    names = [f"{place}.{_ATTENTION}.{part}_proj.{suffix}" for part in "kv" for suffix in ("weight", "bias")]
    return {name: permuted(named[name], rows) for name in names if name in named}


def _zeros(named: Mapping[str, Tensor | Packed], place: str, width: int, config: Any) -> dict[str, Tensor]:
    """An attention of one head, a feed-forward part, or none of both, for what the layer has lost."""
    hidden, made = config.hidden_size, {}
    like = {"dtype": torch.float16}
    if not any(name.startswith(f"{place}.{_ATTENTION}.") and name.endswith("o_proj.weight") for name in named):
        made |= {f"{place}.{_ATTENTION}.{part}_proj.weight": torch.zeros(width, hidden, **like) for part in "qkv"}
        made[f"{place}.{_ATTENTION}.o_proj.weight"] = torch.zeros(hidden, width, **like)
        made[f"{place}.input_layernorm.weight"] = torch.ones(hidden)
        for part in "qk":
            if any(name.endswith(f"{_ATTENTION}.{part}_norm.weight") for name in named):
                made[f"{place}.{_ATTENTION}.{part}_norm.weight"] = torch.ones(width)
    if not any(name.startswith(f"{place}.{_FFN}.") and name.endswith("down_proj.weight") for name in named):
        made |= {f"{place}.{_FFN}.{part}_proj.weight": torch.zeros(ZEROS, hidden, **like) for part in ("gate", "up")}
        made[f"{place}.{_FFN}.down_proj.weight"] = torch.zeros(hidden, ZEROS, **like)
        norm = "pre_feedforward_layernorm" if any("pre_feedforward" in name for name in named) else "post_attention_layernorm"
        made[f"{place}.{norm}.weight"] = torch.ones(hidden)
    return made


def _sizes(named: Mapping[str, Tensor | Packed], place: str, width: int) -> Sizes:
    def shape(layer: str) -> tuple[int, ...]:
        if (found := named.get(f"{place}.{layer}.weight")) is None:
            raise UsageError("it has no such layer", where=f"{place}.{layer}", why="models of Llama's line have one there")
        return tuple(found.shape)

    q, k, v, o = (shape(f"{_ATTENTION}.{part}_proj") for part in "qkvo")
    heads, kv_heads = q[0] // width, k[0] // width
    whole = q[0] == heads * width == o[1] and k[0] == v[0] == kv_heads * width
    if not whole or kv_heads == 0 or heads % kv_heads:
        raise UsageError(
            f"its heads are not {width} wide each: queries {list(q)}, keys {list(k)}, values {list(v)}",
            where=f"{place}.{_ATTENTION}",
            why="a head that is thinner than the others, or turns by other angles, has no place in other tools",
            hint="prune whole heads; fxc.load reads the artifact as it is",
        )
    return Sizes(heads, kv_heads, shape(f"{_FFN}.down_proj")[1])


# -------------------------------------------------------------------------------------------------------------------- check


def trimmed(config: Any, layers: Layers) -> Any:
    """The configuration with as many layers as there are, and of what it says of each layer what those that are left have."""
    values, count = config.to_dict(), len(layers.sizes)
    if config.num_hidden_layers != count:
        lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == config.num_hidden_layers}
        values |= {name: [each[i] for i in layers.kept] for name, each in lists.items()} | {"num_hidden_layers": count}
    made = type(config).from_dict(values)
    made.use_cache = True
    return made


def _model(program: Program, config: Any, layers: Layers) -> nn.Module:
    """transformers' model whose layers have the sizes that they have: it takes these from the weights, but for the number of
    query heads that share keys."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(trimmed(config, layers))
    config.dtype = torch.float32
    with quiet_transformers(), no_init_weights():
        try:
            model = class_of(program, config)(config).float().eval()
        except Exception as error:  # transformers and the model's code raise what they like
            raise UsageError(f"transformers does not build it: {first_line(error)}", where=type(config).__name__) from error
    for module_name, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            found = layers.weights.get(f"{module_name}.{name}")
            if found is None and isinstance(module, nn.Linear) and name == "bias":
                found = torch.zeros(layers.weights[f"{module_name}.weight"].shape[0])
            if found is not None:
                tensor = found.dense() if isinstance(found, Packed) else found.float()
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            elif not getattr(model.config, "tie_word_embeddings", False):
                place, why = f"{module_name}.{name}", f"it is {list(old.shape)}"
                raise UsageError("the program has no such weight", where=place, why=why)
    model.tie_weights()
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if hasattr(module, "num_key_value_groups") and isinstance(index, int):
            module.num_key_value_groups = layers.sizes[index].heads // layers.sizes[index].kv_heads
    return model


def permuted(found: Tensor | Packed, order: Tensor) -> Tensor | Packed:
    """A weight, or a bias, with its rows in another order, some of them perhaps more than once."""
    if isinstance(found, Tensor):
        return found[order]
    shape = (len(order), *found.shape[1:])
    return replace(found, shape=shape, parts={part: tensor[order] for part, tensor in found.parts.items()})
