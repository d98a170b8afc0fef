"""What to trace: for every kind of model, a module over flat tensors, examples of them, and which of their sizes vary."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxc.data.decoder import random_inputs
from fxc.errors import CaptureFailed, UsageError, first_line
from fxc.frontend.dimensions import Axis, FreeSize, asked_of, batch_of, checked_free, found_free, owned, resized, runs
from fxc.frontend.hf_cache import cache_of, cross_cache_of, tensors_of
from fxc.frontend.images import image_size
from fxc.ir.cache import KIND, SEQ2SEQ, input_names, output_names, past_names, present_names
from fxc.ir.structure import flatten, unflatten

_SAMPLES = 4000  # a quarter of a second: more than a first convolution spans
AUTO = torch.export.Dim.AUTO
_SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")


@dataclass
class Call:
    """What to trace: a module whose forward takes the flat tensors in `inputs` and returns a flat list of tensors.

    inputs: name -> example tensor; dynamic: name -> {dimension: AUTO}; defaults: name -> Input.default;
    other_sizes: further sets of inputs, of sizes that are not traced, for the check; stacks: of a decoder, which of the
    cache's tensors are alike; asked: axes that the caller wants to vary; may_fix: whether torch.export may take others for
    constants, which the program then demands; loses_cache: of a model that generates, why this call is one without its cache.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, Any]]
    defaults: dict[str, str]
    other_sizes: list[list[Tensor]]
    call: Any
    kind: str
    stacks: list[list[int]] = field(default_factory=list)
    asked: frozenset[Axis] = frozenset()
    may_fix: bool = False
    loses_cache: str = ""


def shapes_alone(reads: bool) -> AbstractContextManager:
    """What a model computes in it are shapes and no numbers, unless it `reads` its weights."""
    return nullcontext() if reads else FakeTensorMode(allow_non_fake_inputs=True)


def calls_of(model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None, reads: bool = True) -> Iterator[Call]:
    """The ways to trace `model`, that with the most sizes free first. reads: whether a decoder may be run to find out."""
    if example_inputs is not None:
        yield from _calls_by_example(model, example_inputs, dynamic_shapes)
    elif not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise UsageError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs are not known",
            hint="give example_inputs=(tensor, ...) or example_inputs={'name': tensor}",
        )
    elif _generates_without_cache(model):
        raise CaptureFailed(
            "it writes text, and fxc cannot run it with a cache, so that generate() would be lost",
            where=type(model).__name__,
            why="its forward takes no past_key_values",
            hint="to compile it for one forward pass, without generate(), give example_inputs={'input_ids': ids}",
        )
    elif _takes_cross_cache(model):
        why = "fxc cannot run it with a cache"
        try:
            yield from _calls_with_cross_cache(model, dynamic_shapes, reads)
        except CaptureFailed as error:
            why = error.what
        for call in _calls_without_cache(model, dynamic_shapes):
            yield replace(call, loses_cache=why)
    elif not takes_cache(model):
        yield from _calls_without_cache(model, dynamic_shapes)
    elif dynamic_shapes is not None:
        raise UsageError(
            "all sizes of a decoder vary already: batch, new tokens and those in its cache",
            hint="leave dynamic_shapes out, or give example_inputs to capture it without its cache",
        )
    else:
        yield _call_with_cache(model, reads)


def takes_cache(model: nn.Module) -> bool:
    """Whether it is captured as a decoder with a cache, whose inputs are tokens of any number alone."""
    return (
        hasattr(model, "generate")
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.main_input_name == "input_ids"
        and "past_key_values" in inspect.signature(model.forward).parameters
    )


def _takes_cross_cache(model: nn.Module) -> bool:
    return (
        hasattr(model, "generate")
        and model.can_generate()
        and model.config.is_encoder_decoder
        and {"past_key_values", "decoder_input_ids"} <= inspect.signature(model.forward).parameters.keys()
    )


def _generates_without_cache(model: nn.Module) -> bool:
    writes = hasattr(model, "generate") and model.can_generate() and not model.config.is_encoder_decoder
    return writes and model.main_input_name == "input_ids" and not takes_cache(model)


class _Flat(nn.Module):
    """The model as a function of flat tensors, returning the flat tensors of its output."""

    def __init__(self, model: nn.Module, structure: Any, options: dict[str, Any]):
        super().__init__()
        self.m = model
        self.structure = structure
        self.options = options
        self.result: Any = None
        self.names: list[str] = []

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args = [unflatten(a, tensors) for a in self.structure["args"]]
        kwargs = {k: unflatten(a, tensors) for k, a in self.structure["kwargs"].items()}
        flat: list[Tensor] = []
        self.names = []
        self.result = flatten(self.m(*args, **kwargs, **self.options), flat, self.names)
        return flat


class WithCache(nn.Module):
    """A decoder as a function of (tokens, mask, positions, the cache's tensors), returning logits and the new cache."""

    def __init__(self, model: nn.Module, layers: int):
        super().__init__()
        self.m = model
        self.layers = layers
        self.names = output_names(layers)
        self.result = {"dict": {name: i for i, name in enumerate(self.names)}}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> list[Tensor]:
        output = self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache_of(past),
            use_cache=True,
        )
        return [output.logits, *tensors_of(output.past_key_values)]

    def over(self, stacks: list[list[int]]) -> WithStackedCache:
        return WithStackedCache(self.m, stacks)


class WithStackedCache(WithCache):
    """The same function of the cache's tensors stacked, one stack for each shape that they have. It is what is traced: every
    tensor brings symbols of its own, and with two for each of 80 layers tracing takes twice as long."""

    def __init__(self, model: nn.Module, stacks: list[list[int]]):
        super().__init__(model, sum(map(len, stacks)) // 2)
        self.stacks = stacks

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *stacked: Tensor) -> list[Tensor]:
        return super().forward(input_ids, attention_mask, position_ids, *_unstacked(stacked, self.stacks))


def _unstacked(stacked: Sequence[Tensor], stacks: list[list[int]]) -> list[Tensor]:
    members = {i: t for stack, many in zip(stacks, stacked, strict=True) for i, t in zip(stack, many.unbind(0))}
    return [members[i] for i in sorted(members)]


class WithCrossCache(nn.Module):
    """An encoder with its decoder as a function of (the inputs called `rows`, the tensors of the cache of self-attention),
    returning the flat tensors of its output and the new cache. stacks: as in `WithStackedCache`, where they are given so."""

    def __init__(self, model: nn.Module, rows: list[str], options: dict[str, Any], stacks: list[list[int]] | None = None):
        super().__init__()
        self.m = model
        self.rows = rows
        self.options = options
        self.stacks = stacks
        self.result: Any = None
        self.names: list[str] = []

    def over(self, stacks: list[list[int]]) -> WithCrossCache:
        return WithCrossCache(self.m, self.rows, self.options, stacks)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        rows, past = tensors[: len(self.rows)], tensors[len(self.rows) :]
        cache = cross_cache_of(past if self.stacks is None else _unstacked(past, self.stacks))
        output = self.m(**dict(zip(self.rows, rows, strict=True)), past_key_values=cache, **self.options)
        present = tensors_of(cache.self_attention_cache)
        items = {name: value for name, value in output.items() if name != "past_key_values"}
        flat: list[Tensor] = []
        names: list[str] = []
        self.result = flatten(type(output)(**items), flat, names)
        self.names = [*names, *present_names(len(present) // 2)]
        return [*flat, *present]


def _call_with_cache(model: nn.Module, reads: bool) -> Call:
    config = model.config.get_text_config(decoder=True)
    device = next(model.parameters()).device
    past_shapes = _cache_shapes(model, reads)
    cache = [(heads, width, model.dtype) for heads, width in past_shapes]

    def example(batch: int, new: int, past: int) -> list[Tensor]:
        return [t.to(device) for t in random_inputs(config.vocab_size, cache, batch, new, past)]

    layers = len(past_shapes) // 2
    names = input_names(layers)
    inputs = owned(dict(zip(names, example(2, 7, 9), strict=True)))
    sizes = ((2, 7, 9), (1, 1, 12), (3, 6, 5), (1, 11, 0), (2, 35, 3))
    others = [] if device.type == "meta" else [example(*each) for each in sizes]
    structure = {"args": [], "kwargs": {n: i for i, n in enumerate(names)}}
    return Call(WithCache(model, layers), inputs, {}, {}, others, structure, KIND, _alike(past_shapes))


def _alike(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """`Call.stacks`: which of the shapes are the same."""
    return [[i for i, s in enumerate(shapes) if s == shape] for shape in dict.fromkeys(shapes)]


def _cache_shapes(model: nn.Module, reads: bool) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each key and value, as the model itself writes them into its cache."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    cache = cache_of(())
    return _shapes_written(model, {"input_ids": ids}, reads, cache, cache)


def _shapes_written(
    model: nn.Module, inputs: dict[str, Tensor], reads: bool, cache: Any, written: Any
) -> list[tuple[int, int]]:
    """The shapes that `model` writes into the Hugging Face cache `written`, which is `cache` or a part of it."""
    try:
        with shapes_alone(reads):
            model(**inputs, past_key_values=cache, use_cache=True)
    except Exception as error:  # the model's own code
        raise CaptureFailed(
            f"the model does not run with a plain cache: {first_line(error)}",
            where=type(model).__name__,
            hint="capture it without generation: give example_inputs={'input_ids': ...}",
        ) from error
    shapes = [(t.shape[1], t.shape[3]) for t in tensors_of(written)]
    if not shapes:
        raise CaptureFailed(
            "the model writes nothing into a Hugging Face cache",
            where=type(model).__name__,
            hint="capture it without generation: give example_inputs={'input_ids': ...}",
        )
    return shapes


def _calls_with_cross_cache(model: nn.Module, dynamic_shapes: Any, reads: bool) -> Iterator[Call]:
    """Those of `_calls_without_cache` with the cache of the decoder's self-attention behind their inputs."""
    inputs = _example_tensors(model, inspect.signature(model.forward).parameters, 1, 5)
    cache = cross_cache_of(())
    yield from _calls_without_cache(
        model, dynamic_shapes, _shapes_written(model, inputs, reads, cache, cache.self_attention_cache)
    )


def _calls_without_cache(
    model: nn.Module, dynamic_shapes: Any, cache: Sequence[tuple[int, int]] = ()
) -> Iterator[Call]:
    config, name = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"return_dict": True} if _takes(parameters, "return_dict") else {}
    if cache:
        options["use_cache"] = True
    elif "use_cache" in parameters or (getattr(config, "use_cache", None) is not None and "input_ids" in parameters):
        options["use_cache"] = False
    past_of = dict(zip(past_names(len(cache) // 2), cache, strict=True))

    def example(batch: int, length: int, past: int) -> dict[str, Tensor]:
        rows = _example_tensors(model, parameters, batch, length)
        generator = torch.Generator().manual_seed(batch * 10_007 + past)
        like = next(model.parameters())
        for name, (heads, width) in past_of.items():
            rows[name] = torch.randn(batch, heads, past, width, generator=generator).to(like.device, like.dtype)
        return rows

    first = owned(example(2, 9, 5))
    if name not in first:
        raise CaptureFailed(
            f"fxc does not know how to make an example of the input {name}",
            where=type(model).__name__,
            hint="give example_inputs={'name': tensor, ...}",
        )
    dynamic: dict[str, dict[int, Any]] = {}
    for n, tensor in first.items():
        dynamic[n] = {0: AUTO, 1: AUTO} if n in _SEQUENCES else {0: AUTO, 2: AUTO} if n in past_of else {0: AUTO}
        if tensor.ndim < 2:
            raise CaptureFailed(f"the input {n} has no batch dimension", where=type(model).__name__)
    on_meta = next(iter(first.values())).is_meta
    sizes = ((2, 9, 5), (1, 5, 3), (3, 14, 0), (1, 1, 6), (2, 37, 2))
    others = [] if on_meta else [list(example(*each).values()) for each in sizes]
    defaults = {n: "empty:decoder_input_ids" for n in past_of}
    for n in first:
        if n in ("attention_mask", "token_type_ids") and "input_ids" in first:
            defaults[n] = f"{'ones' if n == 'attention_mask' else 'zeros'}:input_ids"
        elif n == "decoder_attention_mask":
            defaults[n] = "ones:decoder_input_ids"
    structure = {"args": [], "kwargs": {n: i for i, n in enumerate(first)}}
    rows = [n for n in first if n not in past_of]
    module = WithCrossCache(model, rows, options) if cache else _Flat(model, structure, options)
    asked = asked_of(dynamic_shapes, structure, list(first), [])
    known = {(n, d) for n, dims in dynamic.items() for d in dims} | {(n, d) for n in past_of for d in range(4)}
    kind, stacks = (SEQ2SEQ, _alike(cache)) if cache else ("encoder", [])
    for n, dims in asked.items():
        dynamic[n] = dict.fromkeys(dims, AUTO)
    wanted = frozenset((n, d) for n, dims in asked.items() for d in dims)
    groups = checked_free(module, first, set(wanted) - known)
    others = [*others, *(_grown(first, [each], 0) for each in groups)]
    free = found_free(module, first, set(), known | {(n, d) for n in asked for d in range(first[n].ndim)})
    if free:
        freest = {n: dims | {d: AUTO for g in free for m, d in g.axes if m == n} for n, dims in dynamic.items()}
        tried = [*others, *(_grown(first, [each], step) for each in free for step in (0, 1))]
        yield Call(module, first, freest, defaults, tried, structure, kind, stacks, asked=wanted)
    yield Call(module, first, dynamic, defaults, others, structure, kind, stacks, asked=wanted)


def _grown(inputs: dict[str, Tensor], groups: list[FreeSize], step: int, batch: int = 0) -> list[Tensor]:
    """`inputs` with the axes of `groups` grown by their first or second step and the batch by `batch`."""
    by = {axis: group.steps[step] for group in groups for axis in group.axes}
    size = batch_of(inputs)
    by |= {(n, 0): batch for n, t in inputs.items() if t.ndim and t.shape[0] == size and batch}
    return list(resized(inputs, by).values())


def _takes(parameters: Any, name: str) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _example_tensors(model: nn.Module, parameters: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Plausible inputs for a Hugging Face model without a cache, from its configuration."""
    config = model.config
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(batch * 10_007 + length)
    tensors: dict[str, Tensor] = {}

    def tokens(width: int, vocabulary: int) -> Tensor:
        return torch.randint(3, vocabulary, (batch, width), generator=generator)

    text = _part(config, "vocab_size", ("text_config", "decoder"))
    if "input_ids" in parameters and getattr(text, "vocab_size", None):
        tensors["input_ids"] = tokens(length, text.vocab_size)
        if isinstance(getattr(text, "eos_token_id", None), int) and length > 1:
            tensors["input_ids"][:, -1] = text.eos_token_id  # some models pool there
        if "attention_mask" in parameters:
            mask = torch.ones(batch, length, dtype=torch.int64)
            if batch > 1 and length > 3:
                mask[-1, length // 2 + 1 :] = 0
            tensors["attention_mask"] = mask
        if "token_type_ids" in parameters and getattr(text, "type_vocab_size", 0) > 0:
            tensors["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
    # Heads for classification make the decoder's input themselves.
    is_head = type(model).__name__.endswith(("Classification", "Answering"))
    if config.is_encoder_decoder and "decoder_input_ids" in parameters and not is_head:
        tensors["decoder_input_ids"] = tokens(max(2, length - 2) if length > 1 else 1, text.vocab_size)
    if "pixel_values" in parameters:
        vision = getattr(config, "vision_config", config)
        height, width = image_size(config)
        shape = (batch, getattr(vision, "num_channels", 3), height, width)
        tensors["pixel_values"] = torch.randn(shape, generator=generator).to(first.dtype)
    for name in ("input_features", "input_values"):
        if name in parameters and (shape := _sound_shape(config, name)):
            tensors[name] = torch.randn((batch, *shape), generator=generator).to(first.dtype)
    return {n: t.to(first.device) for n, t in tensors.items()}


def _sound_shape(config: Any, name: str) -> tuple[int, ...] | None:
    """The shape of one sound, without its batch dimension: a spectrogram as the model lays it out, or samples of a wave."""

    def known(*names: str) -> int | None:
        return next((value for n in names if isinstance(value := getattr(config, n, None), int)), None)

    bins = known("num_mel_bins")
    if name == "input_features":
        if bins and known("max_source_positions") and not known("input_feat_per_channel"):
            return bins, 2 * known("max_source_positions")
        width = known("input_feat_per_channel", "feature_projection_input_dim", "input_size")
        return (96, width) if width else None
    if bins and known("max_length"):
        return known("max_length"), bins
    channels = known("audio_channels")
    return (channels, _SAMPLES) if channels else (_SAMPLES,)


def _part(config: Any, attribute: str, names: tuple[str, ...]) -> Any:
    """The part of a configuration that has `attribute`, or all of it."""
    parts = [config, *(getattr(config, name, None) for name in names)]
    return next((part for part in parts if getattr(part, attribute, None)), config)


def _calls_by_example(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Iterator[Call]:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list, dict)):
        raise UsageError(
            f"example_inputs is a {type(example_inputs).__name__}",
            hint="give a tuple of positional arguments or a dict of keyword arguments",
        )
    flat: list[Tensor] = []
    names: list[str] = []
    parameters = list(inspect.signature(model.forward).parameters)
    if isinstance(example_inputs, dict):
        kwargs = {k: flatten(v, flat, names, k) for k, v in example_inputs.items()}
        structure = {"args": [], "kwargs": kwargs}
    else:
        args = [
            flatten(v, flat, names, parameters[i] if i < len(parameters) else f"input{i}") for i, v in enumerate(example_inputs)
        ]
        structure = {"args": args, "kwargs": {}}
    if not flat:
        raise UsageError("example_inputs holds no tensor")
    options: dict[str, Any] = {}
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        options = {"return_dict": True} if _takes(inspect.signature(model.forward).parameters, "return_dict") else {}
        if "past_key_values" in parameters or "use_cache" in parameters:
            options["use_cache"] = False
        options = {k: v for k, v in options.items() if k not in structure["kwargs"]}
    module, given = _Flat(model, structure, options), owned(dict(zip(names, flat, strict=True)))
    asked = asked_of(dynamic_shapes, structure, names, parameters)
    _check_asked(asked, given)
    # A size of 1 would be taken for a constant, so a batch of one is traced as a batch of two, if the model takes that.
    sized = [t for t in flat if t.ndim]
    is_one = bool(sized) and all(t.shape[0] == 1 for t in sized)
    ones = {(n, 0) for n, t in given.items() if t.ndim and is_one and (n not in asked or 0 in asked[n])}
    doubled = resized(given, dict.fromkeys(ones | {(n, d) for n, s in asked.items() for d in s if given[n].shape[d] == 1}, 1))
    wants_batch = any(0 in dimensions for dimensions in asked.values())
    if not is_one or wants_batch or runs(module, doubled):
        yield from _by_freedom(module, doubled, structure, asked, has_batch=True)
    if is_one and not wants_batch:
        yield from _by_freedom(module, given, structure, asked, has_batch=False)


def _check_asked(asked: dict[str, set[int]], given: dict[str, Tensor]) -> None:
    for name, dimensions in asked.items():
        if wrong := [d for d in dimensions if not 0 <= d < given[name].ndim]:
            raise UsageError(f"{name} has no dimension {wrong[0]}: it is {list(given[name].shape)}", hint="count from 0")


def _by_freedom(
    module: _Flat, inputs: dict[str, Tensor], structure: Any, asked: dict[str, set[int]], has_batch: bool
) -> Iterator[Call]:
    """Calls with every dimension free that the model takes at other sizes, then with the batch and tokens alone."""
    wanted = {(n, d) for n, dimensions in asked.items() for d in dimensions}
    decided = {(n, d) for n in asked for d in range(inputs[n].ndim)}
    first = {(n, 0) for n, t in inputs.items() if has_batch and t.ndim and t.shape[0] > 1 and n not in asked}
    tokens = {
        (n, 1) for n, t in inputs.items() if t.ndim > 1 and not t.is_floating_point() and t.shape[1] > 1 and n not in asked
    }
    said = checked_free(module, inputs, {(n, d) for n, d in wanted if d > 0 or inputs[n].shape[0] != batch_of(inputs)})
    free = found_free(module, inputs, tokens, decided | (set() if has_batch else {(n, 0) for n in inputs}))
    few = [FreeSize(group.axes & tokens, group.steps) for group in free if group.axes & tokens]
    many = 2 * batch_of(inputs) if has_batch else 0
    for groups in [free, few] if free != few else [free]:
        all_of = [*said, *groups]
        axes = first | wanted | {axis for group in all_of for axis in group.axes}
        dynamic = {n: {d: AUTO for d in range(t.ndim) if (n, d) in axes} for n, t in inputs.items()}
        others = [
            list(inputs.values()), _grown(inputs, [], 0, many), _grown(inputs, [], 0, min(0, 1 - many // 2)),
            *(_grown(inputs, [group], 0) for group in all_of), _grown(inputs, all_of, 1, many // 2),
        ]  # fmt: skip
        yield Call(module, inputs, dynamic, {}, others, structure, "module", asked=frozenset(wanted), may_fix=True)
