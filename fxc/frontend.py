"""nn.Module -> Program.

A model is captured with `torch.export` at the ATen level, without decomposition, with every batch, sequence and cache
length dynamic. A causal language model becomes one graph that serves prefill and decode: the cache is among its inputs and
outputs as plain tensors. The captured program is then run at sizes that were not traced and compared with the model.
"""

from __future__ import annotations

import inspect
import operator
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxc.schemes  # noqa: F401 - what is captured may become its operators
from fxc.cache import cache_of, tensors_of
from fxc.errors import CaptureFailed, FxcError, UsageError
from fxc.ir.edit import sweep
from fxc.ir.infer import fake_constant, fake_mode_of
from fxc.ir.program import Input, Program, Signature, is_name
from fxc.ir.structure import flatten, unflatten
from fxc.legalize import legalize

AUTO = torch.export.Dim.AUTO
_SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")


@dataclass
class Call:
    """What to trace: a module whose forward takes the flat tensors in `inputs` and returns a flat list of tensors.

    inputs: name -> example tensor; dynamic: name -> {dimension: AUTO}; defaults: name -> Input.default;
    other_sizes: further sets of inputs, of sizes that are not traced, for the check; stacks: of a decoder, which of the
    cache's tensors are alike.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, Any]]
    defaults: dict[str, str]
    other_sizes: list[list[Tensor]]
    call: Any
    kind: str
    stacks: list[list[int]] = field(default_factory=list)


def capture(model: nn.Module, example_inputs: Any = None, *, check: bool = True) -> Program:
    """Capture `model` as a Program. The model is not changed; the program's constants share its memory.

    example_inputs: a tuple of positional arguments or a dict of keyword arguments (nested lists, tuples and dicts of
    tensors are allowed). May be None for a Hugging Face model, whose inputs follow from its configuration. The first
    dimension of every example tensor is taken as dynamic where the model permits, and the sequence dimensions of token
    inputs. check: run the program at other sizes and compare it with the model.

    Raises `CaptureFailed` when the model's control flow depends on its data or it calls an operator that no program may
    call, `UsageError` when example inputs are needed.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with _deterministic_graphs(), torch.no_grad():
            call = _call_of(model, example_inputs)
            program = _export(model, call)
            if check and not program.is_on_meta:
                compare(program, call)
    finally:
        for module in training:
            module.training = True
    return program


@contextmanager
def _deterministic_graphs():
    previous = os.environ.get("USE_HUB_KERNELS")
    os.environ["USE_HUB_KERNELS"] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["USE_HUB_KERNELS"]
        else:
            os.environ["USE_HUB_KERNELS"] = previous


# ------------------------------------------------------------------------------------------------------- what to trace


def _call_of(model: nn.Module, example_inputs: Any) -> Call:
    if example_inputs is not None:
        return _call_by_example(model, example_inputs)
    if not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise UsageError(
            f"{type(model).__name__} is not a Hugging Face model, so its inputs are not known",
            hint="give example_inputs=(tensor, ...) or example_inputs={'name': tensor}",
        )
    if _is_causal_lm(model):
        return _call_with_cache(model)
    return _call_without_cache(model)


def _is_causal_lm(model: nn.Module) -> bool:
    return (
        hasattr(model, "generate")
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.main_input_name == "input_ids"
        and "past_key_values" in inspect.signature(model.forward).parameters
    )


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


class _WithCache(nn.Module):
    """A decoder as a function of (tokens, mask, positions, the cache's tensors), returning logits and the new cache."""

    def __init__(self, model: nn.Module, layers: int):
        super().__init__()
        self.m = model
        self.layers = layers
        self.result: Any = None
        self.names = ["logits", *(f"present.{i}.{part}" for i in range(layers) for part in ("key", "value"))]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> list[Tensor]:
        output = self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache_of(past),
            use_cache=True,
        )
        return [output.logits, *tensors_of(output.past_key_values)]


class _WithStackedCache(_WithCache):
    """The same function of the cache's tensors stacked, one stack for each shape that they have. It is what is traced: every
    tensor brings symbols of its own, and with two for each of 80 layers tracing takes twice as long."""

    def __init__(self, model: nn.Module, stacks: list[list[int]]):
        super().__init__(model, sum(map(len, stacks)) // 2)
        self.stacks = stacks

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *stacked: Tensor) -> list[Tensor]:
        members = {i: t for stack, many in zip(self.stacks, stacked, strict=True) for i, t in zip(stack, many.unbind(0))}
        return super().forward(input_ids, attention_mask, position_ids, *(members[i] for i in sorted(members)))


def _call_with_cache(model: nn.Module) -> Call:
    config = model.config.get_text_config(decoder=True)
    device = next(model.parameters()).device
    past_shapes = _cache_shapes(model)

    def example(batch: int, new: int, past: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(batch * 10_007 + new * 101 + past)
        ids = torch.randint(0, config.vocab_size, (batch, new), generator=generator)
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        if batch > 1 and past + new > 2:
            mask[0, : (past + new) // 3] = 0  # a left-padded row
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        dtype = model.dtype
        cache = [torch.randn(batch, heads, past, width, generator=generator).to(dtype) for heads, width in past_shapes]
        return [t.to(device) for t in (ids, mask, positions, *cache)]

    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past.{i}.{part}" for i in range(len(past_shapes) // 2) for part in ("key", "value")]
    inputs = dict(zip(names, example(2, 7, 9), strict=True))
    others = [] if device.type == "meta" else [example(*sizes) for sizes in ((1, 1, 12), (3, 6, 5), (1, 11, 0))]
    structure = {"args": [], "kwargs": {n: i for i, n in enumerate(names)}}
    stacks = [[i for i, s in enumerate(past_shapes) if s == shape] for shape in dict.fromkeys(past_shapes)]
    module = _WithCache(model, len(past_shapes) // 2)
    return Call(module, inputs, {}, {}, others, structure, "causal_lm", stacks)


def _cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each key and value, as the model itself writes them into its cache."""
    from transformers import DynamicCache

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    shapes = [(t.shape[1], t.shape[3]) for t in tensors_of(cache)]
    if not shapes:
        raise CaptureFailed(
            "the model writes nothing into a Hugging Face cache",
            where=type(model).__name__,
            hint="capture it without generation: give example_inputs={'input_ids': ...}",
        )
    return shapes


def _call_without_cache(model: nn.Module) -> Call:
    config, name = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"return_dict": True} if _takes(parameters, "return_dict") else {}
    if "use_cache" in parameters or (getattr(config, "use_cache", None) is not None and "input_ids" in parameters):
        options["use_cache"] = False

    def example(batch: int, length: int, extra: int) -> dict[str, Tensor]:
        return _example_tensors(model, parameters, batch, length, extra)

    first = example(2, 9, 0)
    dynamic: dict[str, dict[int, Any]] = {}
    for n, tensor in first.items():
        dynamic[n] = {0: AUTO, 1: AUTO} if n in _SEQUENCES else {0: AUTO}
        if n == "pixel_values":
            dynamic[n] |= {2: AUTO, 3: AUTO}
        if tensor.ndim < 2:
            raise CaptureFailed(f"the input {n} has no batch dimension", where=type(model).__name__)
    on_meta = next(iter(first.values())).is_meta
    others = [] if on_meta else [list(example(b, s, i).values()) for i, (b, s) in enumerate([(1, 5), (3, 14), (1, 1)])]
    defaults = {}
    for n in first:
        if n in ("attention_mask", "token_type_ids") and "input_ids" in first:
            defaults[n] = f"{'ones' if n == 'attention_mask' else 'zeros'}:input_ids"
        elif n == "decoder_attention_mask":
            defaults[n] = "ones:decoder_input_ids"
    structure = {"args": [], "kwargs": {n: i for i, n in enumerate(first)}}
    if name not in first:
        raise CaptureFailed(
            f"fxc does not know how to make an example of the input {name}",
            where=type(model).__name__,
            hint="give example_inputs={'name': tensor, ...}",
        )
    return Call(_Flat(model, structure, options), first, dynamic, defaults, others, structure, "encoder")


def _takes(parameters: Any, name: str) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _example_tensors(model: nn.Module, parameters: Any, batch: int, length: int, variant: int) -> dict[str, Tensor]:
    """Plausible inputs for a Hugging Face model without a cache, from its configuration."""
    config = model.config
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(batch * 10_007 + length)
    tensors: dict[str, Tensor] = {}

    def tokens(width: int, vocabulary: int) -> Tensor:
        return torch.randint(3, vocabulary, (batch, width), generator=generator)

    text = getattr(config, "text_config", config)
    if "input_ids" in parameters and getattr(text, "vocab_size", None):
        tensors["input_ids"] = tokens(length, text.vocab_size)
        if "attention_mask" in parameters:
            mask = torch.ones(batch, length, dtype=torch.int64)
            if batch > 1 and length > 3:
                mask[-1, length // 2 + 1 :] = 0
            tensors["attention_mask"] = mask
        if "token_type_ids" in parameters and getattr(text, "type_vocab_size", 0) > 0:
            tensors["token_type_ids"] = torch.zeros(batch, length, dtype=torch.int64)
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        tensors["decoder_input_ids"] = tokens(max(2, length - 2) if length > 1 else 1, text.vocab_size)
    if "pixel_values" in parameters:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, getattr(vision, "num_channels", 3), height, width)
        tensors["pixel_values"] = torch.randn(shape, generator=generator).to(first.dtype)
    if "input_features" in parameters:
        frames = 2 * config.max_source_positions
        shape = (batch, config.num_mel_bins, frames)
        tensors["input_features"] = torch.randn(shape, generator=generator).to(first.dtype)
    return {n: t.to(first.device) for n, t in tensors.items()}


def _call_by_example(model: nn.Module, example_inputs: Any) -> Call:
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
    # A dimension of size 1 would be specialised, so it is traced at 2 where repeating it makes sense: the batch.
    traced = [torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t for t in flat]
    inputs = dict(zip(names, traced, strict=True))
    dynamic: dict[str, dict[int, Any]] = {n: {0: AUTO} if t.ndim else {} for n, t in inputs.items()}
    for n, t in inputs.items():
        if t.ndim > 1 and not t.is_floating_point():
            dynamic[n][1] = AUTO
    options = {"return_dict": True} if hasattr(model, "config") and hasattr(model.config, "return_dict") else {}
    others = [[torch.cat([t] * 3) if t.ndim else t for t in traced], [t[:1] if t.ndim else t for t in traced]]
    return Call(_Flat(model, structure, options), inputs, dynamic, {}, others, structure, "module")


# --------------------------------------------------------------------------------------------------------------- export


def _export(model: nn.Module, call: Call) -> Program:
    names = list(call.inputs)
    first_names = _first_names(model)
    try:
        call.module(*call.inputs.values())  # tells the output's structure, which tracing does not let a module keep
    except FxcError:
        raise
    except Exception as error:  # it is the model's own code that runs here
        raise CaptureFailed(
            f"the model itself fails on the example inputs: {_first_line(error)}",
            where=type(model).__name__,
            hint="give example_inputs that the model takes",
        ) from error
    try:
        exported = _trace(call)
    except Exception as error:  # torch.export raises many kinds; each means that this model cannot be captured as it is
        raise CaptureFailed(
            _first_line(error),
            where=type(model).__name__,
            why="torch.export could not trace it",
            hint="if its control flow depends on tensor values, compile the part that does not; "
            "set TORCH_LOGS=+dynamic for torch's own account",
        ) from error
    graph, constants = _flatten_graph(exported.module(check_guards=False))
    if call.stacks:
        _unstack(graph, call.stacks)
    legalize(graph)
    canonical, aliases = _canonical_names(first_names, constants)
    for node in graph.find_nodes(op="get_attr"):
        node.target = canonical[node.target]
    store = {canonical[name]: tensor.detach() for name, tensor in constants.items()}
    signature = Signature(
        [Input(n, call.defaults.get(n)) for n in names], list(call.module.names), call.call, call.module.result
    )
    if call.kind == "causal_lm":
        signature.result = {"dict": {n: i for i, n in enumerate(call.module.names)}}
    metadata = {"class": type(model).__name__, "kind": call.kind, "parameters": _parameter_names(model)}
    program = Program(graph, store, aliases, signature, metadata)
    _retype_constants(program)
    sweep(program)
    return program


def _parameter_names(model: nn.Module) -> list[str]:
    """The names of the arguments of the model's forward, in order, for callers who give them by position."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def _trace(call: Call) -> torch.export.ExportedProgram:
    args = list(call.inputs.values())
    if call.stacks:
        rows, past = args[:3], args[3:]
        stacked = tuple(torch.stack([past[i] for i in stack]) for stack in call.stacks)
        dynamic = ({0: AUTO, 1: AUTO},) * 3 + (({1: AUTO, 3: AUTO},) * len(stacked),)
        module = _WithStackedCache(call.module.m, call.stacks)
        return torch.export.export(module, (*rows, *stacked), dynamic_shapes=dynamic, strict=False)
    dynamic = (tuple(call.dynamic[n] for n in call.inputs),)  # one entry for all of a variadic forward's arguments
    return torch.export.export(call.module, tuple(args), dynamic_shapes=dynamic, strict=False)


def _unstack(graph: fx.Graph, stacks: list[list[int]]) -> None:
    """Give the graph a placeholder for each tensor of the cache in place of the stacked ones."""
    stacked = graph.find_nodes(op="placeholder")[3:]
    placeholders: dict[int, fx.Node] = {}
    mode = fake_mode_of(graph)
    for stack, whole in zip(stacks, stacked, strict=True):
        (unbound,) = (user for user in whole.users if user.target is torch.ops.aten.unbind.int)
        for item in list(unbound.users):
            value = item.meta["val"]
            with graph.inserting_before(whole):
                index = stack[item.args[1]]
                node = placeholders[index] = graph.placeholder(f"past_{index}")
            with mode:
                node.meta = {"val": torch.empty(value.shape, dtype=value.dtype, device="cpu"), "fqn": "", "by": ""}
            item.replace_all_uses_with(node)
            graph.erase_node(item)
        graph.erase_node(unbound)
        for user in list(whole.users):  # what is left asks for the sizes of the stack
            user.args = (placeholders[stack[0]], user.args[1] - 1)
        graph.erase_node(whole)
    for before, index in zip(sorted(placeholders), sorted(placeholders)[1:]):
        placeholders[before].append(placeholders[index])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _flatten_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The exported module's graph with one placeholder an input and a flat tuple returned, regions inlined; and the
    tensors that it reads, by FQN."""
    graph, constants = fx.Graph(), {}
    mapping: dict[fx.Node, Any] = {}

    def copy(source: fx.GraphModule, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = _attribute(source, node.target)
            if isinstance(value, fx.GraphModule):
                return
            name = node.target.removeprefix("m.") if source is module else f"{node.target}"
            constants[name] = value
            mapping[node] = graph.create_node("get_attr", name)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            mapping[node] = _inline(source, node, mapping, copy)
        else:
            args, kwargs = _substitute(node.args, mapping), _substitute(node.kwargs, mapping)
            if node.target is operator.getitem and isinstance(args[0], (list, tuple)):
                mapping[node] = args[0][args[1]]  # a result of an inlined region
                return
            mapping[node] = graph.call_function(node.target, args, kwargs)
        if isinstance(mapping[node], fx.Node):
            mapping[node].meta = {"val": node.meta.get("val"), "fqn": _module_of(node), "by": ""}

    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, node in enumerate(placeholders):
        mapping[node] = graph.placeholder(f"input_{index}")
        mapping[node].meta = {"val": node.meta["val"], "fqn": "", "by": ""}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copy(module, node)
    results, _ = torch.utils._pytree.tree_flatten(_substitute(module.graph.output_node().args[0], mapping))
    graph.output(tuple(results))
    return graph, constants


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _substitute(argument: Any, mapping: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return mapping[argument]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_substitute(a, mapping) for a in argument)
    if isinstance(argument, dict):
        return {k: _substitute(v, mapping) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_substitute(a, mapping) for a in (argument.start, argument.stop, argument.step)))
    # A program is neutral to the device: lowering puts the target's in.
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _inline(source: fx.GraphModule, node: fx.Node, mapping: dict, copy: Any) -> Any:
    """The results of a region that only sets a mode (no gradients, autocast off), its nodes copied in place."""
    name = str(node.target)
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        raise CaptureFailed(f"the model uses the control-flow operator {name}", hint="rewrite that part without it")
    if name == "wrap_with_autocast" and node.args[2] is not False and node.args[2] is not None and node.args[2]:
        raise CaptureFailed("the model runs a part under autocast", hint="capture it in the wanted dtype: dtype=...")
    region_node = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    region = _attribute(source, region_node.target)
    operands = node.args[node.args.index(region_node) + 1 :]
    inner = [n for n in region.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(inner, operands, strict=True):
        mapping[placeholder] = mapping[operand]
    for inside in region.graph.nodes:
        if inside.op not in ("placeholder", "output"):
            copy(region, inside)
    return _substitute(region.graph.output_node().args[0], mapping)


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("m").removeprefix(".") if path == "m" or path.startswith("m.") else path


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if not is_name(name):
            raise CaptureFailed(
                "its name has other characters than letters, digits, '_', '-' and '.'",
                where=name,
                hint="rename that parameter or the module that holds it",
            )
        names[name] = first.setdefault(id(tensor), name)
    return names


def _canonical_names(names: dict[str, str], constants: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Every constant's name -> the first name of the same tensor; and the other names of tied weights."""
    canonical = {name: names.get(name, name) for name in constants}
    used = set(canonical.values())
    return canonical, {name: to for name, to in names.items() if name != to and to in used}


def _retype_constants(program: Program) -> None:
    mode = fake_mode_of(program.graph)
    for node in program.graph.find_nodes(op="get_attr"):
        node.meta["val"] = fake_constant(mode, program.constants[node.target])


# ---------------------------------------------------------------------------------------------------------------- check


def compare(program: Program, call: Call) -> None:
    """Run program and model at `call.other_sizes`; raise `CaptureFailed` where they differ by more than rounding."""
    module = program.module()
    for inputs in call.other_sizes:
        sizes = ", ".join(str(list(t.shape)) for t in inputs[:3])
        try:
            expected = call.module(*inputs)
        except Exception:
            continue
        try:
            found = module(*inputs)
        except Exception as error:
            raise CaptureFailed(
                f"the captured program fails at the sizes {sizes}, which the model takes: {_first_line(error)}",
                where=program.metadata["class"],
                hint="give example_inputs of other sizes, so that no size is taken for a constant",
            ) from error
        for name, a, b in zip(program.signature.outputs, found, expected, strict=True):
            worst = relative_difference(a, b)
            if worst > tolerance(b.dtype):
                raise CaptureFailed(
                    f"the captured program differs from the model by {worst:.1e} in {name} at the sizes {sizes}",
                    where=program.metadata["class"],
                    why=f"the tolerance for {b.dtype} is {tolerance(b.dtype):.0e}",
                    hint="the model's control flow may depend on sizes or values",
                )


def tolerance(dtype: torch.dtype) -> float:
    """How far two correct evaluations of one model may differ, relative to the largest value: some roundings of `dtype`."""
    return 64 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite when shapes differ or only one of the two is finite."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).amax().item()
    return float("inf") if difference != difference else difference / max(scale, 1e-30)
